"""Predictions of a model on the engine, without files: what a command or a server puts in and out is theirs."""
