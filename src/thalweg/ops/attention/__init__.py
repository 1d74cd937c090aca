"""Ops of layers that attend to all cached tokens."""
