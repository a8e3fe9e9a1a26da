"""Training on many tasks, and measuring the result."""
