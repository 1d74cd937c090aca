"""Qwen3-Next, and Qwen3.5, 3.6 and 3.8, dense and MoE: Gated DeltaNet layers with gated full attention every fourth."""
