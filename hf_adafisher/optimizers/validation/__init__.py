"""Errors before any work is lost: models, environments, checkpoints, and one table of training modes."""
