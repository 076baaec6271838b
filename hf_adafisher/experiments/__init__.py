"""Runs that train a model and report on it: language modelling, comparisons and sweeps."""
