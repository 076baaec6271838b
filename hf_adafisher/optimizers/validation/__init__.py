"""Errors before any work is lost: options, models, environments, checkpoints."""
