"""Putting adapters into backbones; the only place that knows module paths of Hugging Face models."""
