"""Comparisons: cells, budgets, and their execution."""
