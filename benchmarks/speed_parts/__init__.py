"""The parts of the speed benchmark: what is measured, and how it is timed and written down."""
