"""The MTP layer of the Qwen families written down once more, as plainly as it can be: float64, loops over tokens and
heads, nothing cached, no import from the package. Tensors have the published names, experts either layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def mtp(c: dict[str, Any], weights: Weights, hidden_TD: Tensor, embedded_TD: Tensor) -> Tensor:
    """float64 [T, D] behind mtp.norm, for hidden states behind the model's norm and embeddings of the next tokens."""
    w = {name: tensor.double() for name, tensor in weights.items() if name.startswith("mtp.")}
    embedded = rms(c, embedded_TD.double(), w["mtp.pre_fc_norm_embedding.weight"])
    hidden = rms(c, hidden_TD.double(), w["mtp.pre_fc_norm_hidden.weight"])
    x = torch.cat([embedded, hidden], 1) @ w["mtp.fc.weight"].T
    at = "mtp.layers.0."
    x = x + attention(c, w, f"{at}self_attn.", rms(c, x, w[f"{at}input_layernorm.weight"]))
    normed = rms(c, x, w[f"{at}post_attention_layernorm.weight"])
    if "num_experts" in c:
        x = x + torch.stack([moe(c, w, f"{at}mlp.", row) for row in normed])
    else:
        x = x + swiglu(normed, *(w[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")))
    return rms(c, x, w["mtp.norm.weight"])


def rms(c: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * (1 + weight)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = x @ gate.T
    return (g * torch.sigmoid(g) * (x @ up.T)) @ down.T


def attention(c: dict[str, Any], w: Weights, p: str, x: Tensor) -> Tensor:
    H, G, K = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q_gate = (x @ w[p + "q_proj.weight"].T).view(len(x), H, 2, K)
    k = (x @ w[p + "k_proj.weight"].T).view(len(x), G, K)
    v = (x @ w[p + "v_proj.weight"].T).view(len(x), G, K)
    q = rotated(c, rms(c, q_gate[:, :, 0], w[p + "q_norm.weight"]))
    k = rotated(c, rms(c, k, w[p + "k_norm.weight"]))
    out = torch.zeros(len(x), H, K, dtype=torch.float64)
    for t in range(len(x)):
        for h in range(H):
            g = h // (H // G)
            share = torch.softmax(k[: t + 1, g] @ q[t, h] * K**-0.5, 0)
            out[t, h] = share @ v[: t + 1, g] * torch.sigmoid(q_gate[t, h, 1])
    return out.flatten(1) @ w[p + "o_proj.weight"].T


def rotated(c: dict[str, Any], x: Tensor) -> Tensor:
    rope, x = c["rope_parameters"], x.clone()
    dims = int(x.shape[-1] * rope["partial_rotary_factor"])
    for t in range(len(x)):
        for i in range(dims // 2):
            angle = torch.tensor(t * rope["rope_theta"] ** (-2 * i / dims), dtype=torch.float64)
            a, b = x[t, :, i].clone(), x[t, :, i + dims // 2].clone()
            x[t, :, i] = a * angle.cos() - b * angle.sin()
            x[t, :, i + dims // 2] = a * angle.sin() + b * angle.cos()
    return x


def moe(c: dict[str, Any], w: Weights, p: str, x: Tensor) -> Tensor:
    scores = torch.softmax(w[p + "gate.weight"] @ x, 0)
    chosen = scores.argsort(descending=True)[: c["num_experts_per_tok"]]
    shared = swiglu(x, *(w[f"{p}shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")))
    out = torch.sigmoid(w[p + "shared_expert_gate.weight"] @ x) * shared
    for e in chosen.tolist():
        if p + "experts.gate_up_proj" in w:
            gate, up = w[p + "experts.gate_up_proj"][e].chunk(2)
            expert = [gate, up, w[p + "experts.down_proj"][e]]
        else:
            expert = [w[f"{p}experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        out = out + scores[e] / scores[chosen].sum() * swiglu(x, *expert)
    return out
