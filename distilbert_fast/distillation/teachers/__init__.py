"""Teachers: a model, or a cache of its answers."""
