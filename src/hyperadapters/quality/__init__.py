"""Checks of the quality of data before training: duplicates, leakage, contradictory and suspected wrong labels."""
