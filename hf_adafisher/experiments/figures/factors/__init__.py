"""Diagonal dominance of the Kronecker factors during training (AdaFisher, Figure 3)."""
