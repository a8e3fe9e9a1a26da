"""Prediction and routing with trained models."""
