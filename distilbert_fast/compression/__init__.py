"""Make a model smaller, after or during training."""
