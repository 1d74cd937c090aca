"""Kimi-Linear (arXiv:2510.26692): KDA layers with NoPE MLA between them, dense and mixture-of-experts MLPs."""
