"""The `thalweg` command."""

from __future__ import annotations

from thalweg.cli.app import main

__all__ = ["main"]
