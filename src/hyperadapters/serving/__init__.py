"""HTTP server for a trained model, with tasks that can be added, fitted again and removed while it serves."""
