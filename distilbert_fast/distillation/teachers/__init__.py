"""Who tells the student what is likely: a model, or a cache of its answers."""
