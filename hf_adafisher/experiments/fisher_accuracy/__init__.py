"""Agreement of the diagonal Kronecker Fisher with the exact diagonal."""
