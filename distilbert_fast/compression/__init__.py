"""Making a model smaller: what happens to the weights, after or during training."""
