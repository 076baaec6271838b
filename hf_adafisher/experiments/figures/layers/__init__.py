"""Relative step size of each layer over a run, as ``CurvatureCallback`` recorded it."""
