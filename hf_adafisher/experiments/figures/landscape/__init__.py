"""Trajectories of several optimizers over the loss of a plane in weight space (AdaFisher, Figure 1)."""
