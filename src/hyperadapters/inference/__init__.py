"""Answers for examples: labels, numbers or texts."""
