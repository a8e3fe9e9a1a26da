"""The parts of `benchmarks/server_load.py`."""
