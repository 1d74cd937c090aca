"""Kernels in Triton, for weights of every scheme: `products` knows how they differ."""
