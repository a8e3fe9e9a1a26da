"""Reading and writing what other implementations use."""
