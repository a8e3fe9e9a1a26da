"""The model: a backbone, a method, the tasks and everything that belongs to one of them."""
