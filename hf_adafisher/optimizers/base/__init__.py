"""What the optimizers with hooks share: hooks on and off, statistics, state and checkpoints."""
