"""The Qwen families written down once more, as plainly as it can be: float64, one token after another, no cache,
nothing fused, no import from the package. What the engine is compared with on shapes that no outside oracle covers.

Weights have the names and layout of Qwen3.5 below "model.", each expert by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def logits(config: dict[str, Any], weights: Weights, ids: list[int]) -> Tensor:
    """float64 [T, V] logits of every position; `config` is that of the text model."""
    w = {name: t.double() for name, t in weights.items()}
    eps = config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        h = norm(x, 1 + w[p + "input_layernorm.weight"], eps)
        full = p + "self_attn.q_proj.weight" in w
        x = x + (attention(config, w, p + "self_attn.", h) if full else gdn(config, w, p + "linear_attn.", h))
        h = norm(x, 1 + w[p + "post_attention_layernorm.weight"], eps)
        dense = p + "mlp.gate_proj.weight" in w
        x = x + (swiglu(w, p + "mlp.", h) if dense else moe(config, w, p + "mlp.", h))
    head = "lm_head.weight" if "lm_head.weight" in w else "model.embed_tokens.weight"
    return norm(x, 1 + w["model.norm.weight"], eps) @ w[head].T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def swiglu(w: Weights, p: str, x: Tensor) -> Tensor:
    gate = x @ w[p + "gate_proj.weight"].T
    return (gate * sigmoid(gate) * (x @ w[p + "up_proj.weight"].T)) @ w[p + "down_proj.weight"].T


def moe(config: dict[str, Any], w: Weights, p: str, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(len(x)):
        scores = torch.softmax(w[p + "gate.weight"] @ x[t], 0)
        chosen = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[: config["num_experts_per_tok"]]
        total = sum(float(scores[e]) for e in chosen) if config.get("norm_topk_prob", True) else 1.0
        for e in chosen:
            out[t] += float(scores[e]) / total * swiglu(w, f"{p}experts.{e}.", x[t])
    return out + sigmoid(x @ w[p + "shared_expert_gate.weight"].T) * swiglu(w, p + "shared_expert.", x)


def gdn(config: dict[str, Any], w: Weights, p: str, x: Tensor) -> Tensor:
    G, H = config["linear_num_key_heads"], config["linear_num_value_heads"]
    K, V = config["linear_key_head_dim"], config["linear_value_head_dim"]
    T = len(x)
    raw, taps = x @ w[p + "in_proj_qkv.weight"].T, w[p + "conv1d.weight"][:, 0]
    rows = []
    for t in range(T):
        row = torch.zeros(raw.shape[1], dtype=torch.float64)
        for i in range(taps.shape[1]):
            source = t - (taps.shape[1] - 1) + i
            if source >= 0:
                row += taps[:, i] * raw[source]
        rows.append(row * sigmoid(row))
    qkv = torch.stack(rows)
    q, k = (qkv[:, i * G * K : (i + 1) * G * K].view(T, G, K) for i in (0, 1))
    v = qkv[:, 2 * G * K :].view(T, H, V)
    q = q / (q.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() * K**-0.5
    k = k / (k.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    f = x @ w[p + "in_proj_a.weight"].T + w[p + "dt_bias"]
    g = -torch.exp(w[p + "A_log"]) * (torch.log1p(torch.exp(-f.abs())) + f.clamp(min=0))
    beta = sigmoid(x @ w[p + "in_proj_b.weight"].T)
    z = (x @ w[p + "in_proj_z.weight"].T).view(T, H, V)
    outputs, S = [], torch.zeros(H, K, V, dtype=torch.float64)
    for t in range(T):
        for h in range(H):
            kh = h // (H // G)
            S[h] = torch.exp(g[t, h]) * S[h]
            S[h] = S[h] + beta[t, h] * torch.outer(k[t, kh], v[t, h] - k[t, kh] @ S[h])
        outputs.append(torch.stack([q[t, h // (H // G)] @ S[h] for h in range(H)]))
    o = norm(torch.stack(outputs), w[p + "norm.weight"], config["rms_norm_eps"]) * z * sigmoid(z)
    return o.reshape(T, H * V) @ w[p + "out_proj.weight"].T


def frequencies(config: dict[str, Any]) -> tuple[list[float], float]:
    """Angles per position, and what cosines and sines are multiplied with."""
    rope = config.get("rope_parameters") or config
    dims = int(config["head_dim"] * rope["partial_rotary_factor"])
    plain = [rope["rope_theta"] ** (-2 * i / dims) for i in range(dims // 2)]
    if rope.get("rope_type", "default") == "default":
        return plain, 1.0
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    bounds = [dims * math.log(context / (n * 2 * math.pi)) / (2 * math.log(rope["rope_theta"])) for n in (32, 1)]
    low, high = max(0, math.floor(bounds[0])), min(dims - 1, math.ceil(bounds[1]))
    ramp = [min(1.0, max(0.0, (i - low) / (high - low))) for i in range(dims // 2)]
    return [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)], 0.1 * math.log(factor) + 1


def rotated(x: Tensor, config: dict[str, Any]) -> Tensor:
    """x [T, heads, dims] with its first dims turned by their positions."""
    angles, scale = frequencies(config)
    out, half = x.clone(), len(angles)
    for i, angle in enumerate(angles):
        turn = torch.arange(len(x)).double()[:, None] * angle
        a, b = x[..., i], x[..., i + half]
        out[..., i] = (a * torch.cos(turn) - b * torch.sin(turn)) * scale
        out[..., i + half] = (b * torch.cos(turn) + a * torch.sin(turn)) * scale
    return out


def attention(config: dict[str, Any], w: Weights, p: str, x: Tensor) -> Tensor:
    H, G, K = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    T, eps = len(x), config["rms_norm_eps"]
    q, gate = (x @ w[p + "q_proj.weight"].T).view(T, H, 2, K).unbind(2)
    k, v = ((x @ w[f"{p}{n}_proj.weight"].T).view(T, G, K) for n in "kv")
    q = rotated(norm(q, 1 + w[p + "q_norm.weight"], eps), config)
    k = rotated(norm(k, 1 + w[p + "k_norm.weight"], eps), config)
    out = torch.zeros(T, H, K, dtype=torch.float64)
    for h in range(H):
        scores = q[:, h] @ k[:, h // (H // G)].T * K**-0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        out[:, h] = torch.softmax(scores, -1) @ v[:, h // (H // G)]
    return (out * sigmoid(gate)).reshape(T, H * K) @ w[p + "o_proj.weight"].T
