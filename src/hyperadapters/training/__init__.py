"""Training on several tasks, and evaluation of the trained models."""
