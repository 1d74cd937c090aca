"""Kimi-K2 and DeepSeek-V3: latent attention with rotated positions, dense and mixture-of-experts MLPs."""
