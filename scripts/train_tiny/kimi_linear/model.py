"""Kimi-Linear in plain torch, in the form that trains: Kimi Delta Attention and latent attention over packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from blocks import MLP, Body, Experts, Layer, Mixture, RMSNorm, Router, ShortConv, linear, masked_attention
from decoder import Decoder, ExpertParts
from delta import chunk_delta_rule, softplus_inverse_of_rates, unit, wipe_between_documents
from torch import Tensor, nn

CHUNK = 16  # small: decays per channel make the products inside a chunk elementwise


@dataclass(frozen=True)
class Shape:
    """The keys of config.json that the model is built from."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    first_k_dense_replace: int
    rms_norm_eps: float
    linear_attn_config: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


class DeltaAttention(nn.Module):
    """KDA."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        kda = shape.linear_attn_config
        heads, width = kda["num_heads"], kda["head_dim"]
        D, total = shape.hidden_size, heads * width
        self.heads, self.width = heads, width
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", linear(D, total))
            setattr(self, f"{name}_conv1d", ShortConv(total, kda["short_conv_kernel_size"]))
        self.f_a_proj, self.f_b_proj = linear(D, width), linear(width, total)
        self.g_a_proj, self.g_b_proj = linear(D, width), linear(width, total)
        self.b_proj, self.o_proj = linear(D, heads), linear(total, D)
        self.o_norm = RMSNorm(width, shape.rms_norm_eps)
        self.A_log = nn.Parameter(torch.empty(1, 1, heads, 1).uniform_(1, 8).log())
        self.dt_bias = nn.Parameter(softplus_inverse_of_rates(total))

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        heads = (B, T, self.heads, self.width)
        q = self.q_conv1d(self.q_proj(x_BTD), documents_BT).reshape(heads)
        k = self.k_conv1d(self.k_proj(x_BTD), documents_BT).reshape(heads)
        v = self.v_conv1d(self.v_proj(x_BTD), documents_BT).reshape(heads)
        gate_input = self.f_b_proj(self.f_a_proj(x_BTD)) + self.dt_bias
        g = wipe_between_documents(-self.A_log.exp() * F.softplus(gate_input).reshape(heads), documents_BT)
        beta = torch.sigmoid(self.b_proj(x_BTD)).to(g.dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            q, k = unit(q) * self.width**-0.5, unit(k)
            o = self.o_norm(chunk_delta_rule(q, k, v.to(q.dtype), g, beta, CHUNK))
        o = o * torch.sigmoid(self.g_b_proj(self.g_a_proj(x_BTD))).reshape(heads)
        return self.o_proj(o.reshape(B, T, -1))


class LatentAttention(nn.Module):
    """MLA without rotation: the "rope" part of a key is shared by the heads and used as it is."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.rank = shape.num_attention_heads, shape.kv_lora_rank
        self.nope, self.rope, self.value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
        D = shape.hidden_size
        self.q_proj = linear(D, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(D, self.rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.rank, shape.rms_norm_eps)
        self.kv_b_proj = linear(self.rank, self.heads * (self.nope + self.value))
        self.o_proj = linear(self.heads * self.value, D)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q_proj(x_BTD).reshape(B, T, self.heads, -1)
        latent, shared = self.kv_a_proj_with_mqa(x_BTD).split([self.rank, self.rope], -1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).reshape(B, T, self.heads, -1)
        k_nope, v = expanded.split([self.nope, self.value], -1)
        k = torch.cat([k_nope, shared[:, :, None].expand(-1, -1, self.heads, -1)], -1)
        return self.o_proj(masked_attention(q, k, v, documents_BT))


class BiasedRouter(Router):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))


class MoE(Mixture):
    """Sigmoid scores; a bias moved against the load takes part in the choice alone."""

    def __init__(self, shape: Shape) -> None:
        E, I, D = shape.num_experts, shape.moe_intermediate_size, shape.hidden_size
        super().__init__(BiasedRouter(D, E), Experts(E, D, I), shape.num_experts_per_token)
        self.scale = shape.routed_scaling_factor
        self.shared_experts = MLP(D, I * shape.num_shared_experts)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores = torch.sigmoid(x_BTD @ self.gate.weight.T)
            weights, _ = self.choose(scores, scores + self.gate.e_score_correction_bias, documents_BT)
        return self.experts(x_BTD, weights * self.scale) + self.shared_experts(x_BTD), x_BTD.new_zeros(())

    @torch.no_grad()
    def balance(self, rate: Tensor) -> None:
        """Moves the choice towards experts with less than their share: bias only, no auxiliary loss."""
        self.gate.e_score_correction_bias += rate * torch.sign(self.gate.load.mean() - self.gate.load)


class Model(Decoder):
    EXACT = ("A_log", "dt_bias", "e_score_correction_bias")

    def __init__(self, config: dict[str, Any]) -> None:
        shape = Shape.from_config(config)
        super().__init__(shape.hidden_size, shape.vocab_size)
        D, eps = shape.hidden_size, shape.rms_norm_eps
        layers = []
        for index in range(shape.num_hidden_layers):
            is_kda = index + 1 in shape.linear_attn_config["kda_layers"]  # counted from 1, as published
            dense = ("mlp", MLP(D, shape.intermediate_size))
            layers.append(
                Layer(
                    (RMSNorm(D, eps), RMSNorm(D, eps)),
                    ("self_attn", DeltaAttention(shape) if is_kda else LatentAttention(shape)),
                    dense if index < shape.first_k_dense_replace else ("block_sparse_moe", MoE(shape)),
                )
            )
        self.model = Body(shape.vocab_size, layers, RMSNorm(D, eps))
        self.initialise()

    def hiddens(self, ids_BT: Tensor, documents_BT: Tensor) -> tuple[list[Tensor], Tensor]:
        hidden, uneven = self.model(ids_BT, documents_BT)
        return [hidden], uneven

    def split_experts(self, prefix: str, experts: ExpertParts) -> dict[str, Tensor]:
        return {
            f"{prefix}.{number}.{part}.weight": weight
            for part, stacked in experts.items()
            for number, weight in enumerate(stacked)
        }

    def join_experts(self, prefix: str, tensors: dict[str, Tensor], count: int) -> ExpertParts:
        return {
            part: torch.stack([tensors[f"{prefix}.{number}.{part}.weight"] for number in range(count)])
            for part in ("w1", "w2", "w3")
        }
