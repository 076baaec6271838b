"""Coverage of parameters by layer rules, and curvature by layer."""
