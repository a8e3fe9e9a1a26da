"""Tasks as data: reading rows, checking them, drawing batches, making tensors."""
