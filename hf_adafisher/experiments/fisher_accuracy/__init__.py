"""The diagonal Kronecker Fisher against the exact diagonal."""
