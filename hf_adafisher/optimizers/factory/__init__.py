"""Optimizers by name: records, parameter groups and the factory."""
