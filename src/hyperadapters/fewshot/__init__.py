"""Adding a task to a trained model from a few examples."""
