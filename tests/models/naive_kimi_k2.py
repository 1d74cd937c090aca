"""DeepSeek-V3's architecture written down once more, as plainly as it can be: float64, no cache, nothing fused, no
import from the package. What the engine is compared with on shapes that no outside oracle covers."""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch
from torch import Tensor

from tests.models.naive_kimi_linear import norm, silu, swiglu


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """float64 [T, V] logits of every position."""
    w = {name: t.double() for name, t in weights.items()}
    eps = config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        x = x + mla(config, w, p + "self_attn.", norm(x, w[p + "input_layernorm.weight"], eps))
        h = norm(x, w[p + "post_attention_layernorm.weight"], eps)
        x = x + (swiglu(w, p + "mlp.", h) if n < config["first_k_dense_replace"] else moe(config, w, p + "mlp.", h))
    return norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def moe(config: dict[str, Any], w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    size = config["n_routed_experts"] // config["n_group"]
    for t in range(len(x)):
        scores = torch.sigmoid(w[p + "gate.weight"] @ x[t]).tolist()
        biased = [s + float(b) for s, b in zip(scores, w[p + "gate.e_score_correction_bias"], strict=True)]
        of_groups = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(config["n_group"])]
        kept = sorted(range(config["n_group"]), key=lambda g: -of_groups[g])[: config["topk_group"]]
        competing = [e for g in kept for e in range(g * size, (g + 1) * size)]
        chosen = sorted(competing, key=lambda e: -biased[e])[: config["num_experts_per_tok"]]
        total = sum(scores[e] for e in chosen) if config["norm_topk_prob"] else 1.0
        for e in chosen:
            q = f"{p}experts.{e}."
            y = silu(w[q + "gate_proj.weight"] @ x[t]) * (w[q + "up_proj.weight"] @ x[t])
            out[t] += scores[e] / total * config["routed_scaling_factor"] * (w[q + "down_proj.weight"] @ y)
    return out + swiglu(w, p + "shared_experts.", x) if config["n_shared_experts"] else out


def mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def rotations(config: dict[str, Any], positions: int) -> Tensor:
    """complex128 [T, P / 2]: what each pair of dims, as a complex number, is multiplied with at each position."""
    P, theta, yarn = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    rows = []
    for t in range(positions):
        row = []
        for i in range(P // 2):
            turn, size = theta ** (-2 * i / P), 1.0
            if yarn is not None:

                def pair(beta: float) -> float:
                    context = yarn["original_max_position_embeddings"]
                    return P * math.log(context / (beta * 2 * math.pi)) / (2 * math.log(theta))

                low = max(math.floor(pair(yarn["beta_fast"])), 0)
                high = min(math.ceil(pair(yarn["beta_slow"])), P - 1)
                stretched = min(max((i - low) / (high - low), 0.0), 1.0) if high > low else float(i > low)
                turn = turn * (1 - stretched) + turn / yarn["factor"] * stretched
                size = mscale(yarn["factor"], yarn["mscale"]) / mscale(yarn["factor"], yarn["mscale_all_dim"])
            row.append(size * cmath.exp(1j * t * turn))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.complex128)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.complex(x[:, 0::2].contiguous(), x[:, 1::2].contiguous()) * turns
    return torch.cat([pairs.real, pairs.imag], -1)  # in another order of dims, for queries and keys alike


def mla(config: dict[str, Any], w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    H, R, eps = config["num_attention_heads"], config["kv_lora_rank"], config["rms_norm_eps"]
    nope, rope, V = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    T, turns, yarn = len(x), rotations(config, len(x)), config["rope_scaling"]
    if config["q_lora_rank"] is None:
        q = x @ w[p + "q_proj.weight"].T
    else:
        q = norm(x @ w[p + "q_a_proj.weight"].T, w[p + "q_a_layernorm.weight"], eps) @ w[p + "q_b_proj.weight"].T
    q = q.view(T, H, nope + rope)
    kv = x @ w[p + "kv_a_proj_with_mqa.weight"].T
    latent = norm(kv[:, :R], w[p + "kv_a_layernorm.weight"], eps)
    up = (latent @ w[p + "kv_b_proj.weight"].T).view(T, H, nope + V)
    scale = (nope + rope) ** -0.5
    if yarn is not None and yarn["mscale_all_dim"]:
        scale *= mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    out = torch.zeros(T, H, V, dtype=torch.float64)
    for h in range(H):
        scores = q[:, h, :nope] @ up[:, h, :nope].T + rotated(q[:, h, nope:], turns) @ rotated(kv[:, R:], turns).T
        scores = (scores * scale).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        out[:, h] = torch.softmax(scores, -1) @ up[:, h, nope:]
    return out.reshape(T, H * V) @ w[p + "o_proj.weight"].T
