"""Base classes of the optimizers with hooks: statistics, state and checkpoints."""
