"""Kernels in Triton and in Gluon, its lower level."""
