"""Linear heads of classification and regression tasks, and how they are fitted to fixed features."""
