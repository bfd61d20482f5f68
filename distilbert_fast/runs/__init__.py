"""Long work that may be killed at any moment: its directory, its checkpoints, its processes."""
