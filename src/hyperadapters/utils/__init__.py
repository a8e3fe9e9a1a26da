"""Utilities for files and optional packages."""
