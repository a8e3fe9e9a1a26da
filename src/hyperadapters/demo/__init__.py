"""The demo that comes with the package."""
