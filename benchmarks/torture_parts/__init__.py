"""Parts of benchmarks/torture.py."""
