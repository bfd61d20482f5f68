"""A model packed for inference: one call a batch."""
