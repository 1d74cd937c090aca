"""Projections in Triton, and norms ahead of those by the library."""
