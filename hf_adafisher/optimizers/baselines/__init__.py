"""Baseline optimizers that no library provides as needed; each module is imported when its optimizer is requested."""
