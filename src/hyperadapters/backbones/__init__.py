"""Frozen backbones: their architectures, loading, adapters in their layers, and passes through them."""
