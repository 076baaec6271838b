"""Comparisons of optimizers: cells, budgets and their execution."""
