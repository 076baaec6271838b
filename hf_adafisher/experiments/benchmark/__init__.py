"""Benchmarks of optimizer steps, training iterations and memory."""
