"""Data of tasks: reading and checking rows, sampling batches, and making tensors."""
