"""Two real processes over gloo."""
