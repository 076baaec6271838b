"""Training runs, comparisons of optimizers with their reports, figures and benchmarks."""
