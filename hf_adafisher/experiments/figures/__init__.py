"""The paper's figures, from any model that the training scripts train."""
