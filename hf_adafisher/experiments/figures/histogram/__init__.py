"""Histograms of a layer's Fisher diagonal and of Adam's second moment over training (AdaFisher, Figure 4)."""
