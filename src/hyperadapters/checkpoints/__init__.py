"""Checkpoints: their format, older formats, model cards, and the Hugging Face Hub."""
