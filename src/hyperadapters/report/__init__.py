"""Reports on finished runs and on result rows, from their files alone. No module here needs PyTorch."""
