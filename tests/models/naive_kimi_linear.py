"""Kimi-Linear written down once more, as plainly as it can be: float64, one token after another, no cache, nothing
fused, no import from the package. What the engine is compared with on shapes that no outside oracle covers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """float64 [T, V] logits of every position."""
    w = {name: t.double() for name, t in weights.items()}
    eps = config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        attention = kda if n + 1 in config["linear_attn_config"]["kda_layers"] else mla
        x = x + attention(config, w, p + "self_attn.", norm(x, w[p + "input_layernorm.weight"], eps))
        h = norm(x, w[p + "post_attention_layernorm.weight"], eps)
        dense = n < config["first_k_dense_replace"]
        x = x + (swiglu(w, p + "mlp.", h) if dense else moe(config, w, p + "block_sparse_moe.", h))
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return norm(x, w["model.norm.weight"], eps) @ w[head].T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def swiglu(w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    return (silu(x @ w[p + "gate_proj.weight"].T) * (x @ w[p + "up_proj.weight"].T)) @ w[p + "down_proj.weight"].T


def moe(config: dict[str, Any], w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(len(x)):
        scores = torch.sigmoid(w[p + "gate.weight"] @ x[t])
        biased = scores + w[p + "gate.e_score_correction_bias"]
        chosen = sorted(range(len(scores)), key=lambda e: -float(biased[e]))[: config["num_experts_per_token"]]
        total = sum(float(scores[e]) for e in chosen) if config["moe_renormalize"] else 1.0
        for e in chosen:
            q = f"{p}experts.{e}."
            y = w[q + "w2.weight"] @ (silu(w[q + "w1.weight"] @ x[t]) * (w[q + "w3.weight"] @ x[t]))
            out[t] += float(scores[e]) / total * config["routed_scaling_factor"] * y
    return out + swiglu(w, p + "shared_experts.", x) if config["num_shared_experts"] else out


def kda(config: dict[str, Any], w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    H, K = config["linear_attn_config"]["num_heads"], config["linear_attn_config"]["head_dim"]
    T = len(x)

    def conv(name: str) -> Tensor:
        taps = w[f"{p}{name}_conv1d.weight"][:, 0]
        y = x @ w[f"{p}{name}_proj.weight"].T
        rows = []
        for t in range(T):
            row = torch.zeros(H * K, dtype=torch.float64)
            for i in range(taps.shape[1]):
                source = t - (taps.shape[1] - 1) + i
                if source >= 0:
                    row += taps[:, i] * y[source]
            rows.append(silu(row))
        return torch.stack(rows).view(T, H, K)

    q, k, v = conv("q"), conv("k"), conv("v")
    q = q / (q.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() * K**-0.5
    k = k / (k.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    f = (x @ w[p + "f_a_proj.weight"].T @ w[p + "f_b_proj.weight"].T).view(T, H, K)
    f = f + w[p + "dt_bias"].view(H, K)
    g = -torch.exp(w[p + "A_log"].view(H, 1)) * (torch.log1p(torch.exp(-f.abs())) + f.clamp(min=0))
    beta = torch.sigmoid(x @ w[p + "b_proj.weight"].T)
    gate = torch.sigmoid(x @ w[p + "g_a_proj.weight"].T @ w[p + "g_b_proj.weight"].T).view(T, H, K)
    rows = []
    S = torch.zeros(H, K, K, dtype=torch.float64)
    for t in range(T):
        for h in range(H):
            S[h] = torch.exp(g[t, h])[:, None] * S[h]
            S[h] = S[h] + beta[t, h] * torch.outer(k[t, h], v[t, h] - k[t, h] @ S[h])
        rows.append(torch.stack([q[t, h] @ S[h] for h in range(H)]))
    o = norm(torch.stack(rows), w[p + "o_norm.weight"], config["rms_norm_eps"]) * gate
    return o.reshape(T, H * K) @ w[p + "o_proj.weight"].T


def mla(config: dict[str, Any], w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    H, R = config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, V = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    T = len(x)
    q = (x @ w[p + "q_proj.weight"].T).view(T, H, nope + rope)
    kv = x @ w[p + "kv_a_proj_with_mqa.weight"].T
    latent = norm(kv[:, :R], w[p + "kv_a_layernorm.weight"], config["rms_norm_eps"])
    up = (latent @ w[p + "kv_b_proj.weight"].T).view(T, H, nope + V)
    out = torch.zeros(T, H, V, dtype=torch.float64)
    for h in range(H):
        k = torch.cat([up[:, h, :nope], kv[:, R:]], -1)
        scores = q[:, h] @ k.T * (nope + rope) ** -0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        out[:, h] = torch.softmax(scores, -1) @ up[:, h, nope:]
    return out.reshape(T, H * V) @ w[p + "o_proj.weight"].T
