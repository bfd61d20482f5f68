"""How good, how fast and how large a model is: data sets, metrics, timings and the report."""
