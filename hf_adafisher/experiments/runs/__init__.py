"""One training run of any task."""
