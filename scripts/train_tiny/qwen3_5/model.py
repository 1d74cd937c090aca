"""Qwen3.5 MoE in plain torch, in the form that trains: Gated DeltaNet, gated attention, one MTP layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from blocks import MLP, Body, Experts, Layer, Mixture, RMSNorm, Router, ShortConv, linear, masked_attention
from decoder import Decoder, ExpertParts
from delta import chunk_delta_rule, softplus_inverse_of_rates, unit, wipe_between_documents
from torch import Tensor, nn

CHUNK = 32
CHAIN = 2  # times the MTP layer runs in training, from the second on its own output, as drafting uses it


@dataclass(frozen=True)
class Shape:
    """The keys of config.json's text_config that the model is built from."""

    vocab_size: int
    hidden_size: int
    layer_types: list[str]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_parameters: dict[str, Any]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    rms_norm_eps: float
    mtp_num_hidden_layers: int = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        text = config["text_config"]
        return cls(**{name: text[name] for name in cls.__dataclass_fields__ if name in text})

    def norm(self, width: int | None = None) -> RMSNorm:
        """A norm of the kind whose weights are stored as w - 1; as wide as the model without a width."""
        return RMSNorm(width or self.hidden_size, self.rms_norm_eps, shift=1.0)


class GatedDeltaNet(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.key_heads, self.value_heads = shape.linear_num_key_heads, shape.linear_num_value_heads
        self.key_dim, self.value_dim = shape.linear_key_head_dim, shape.linear_value_head_dim
        D = shape.hidden_size
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.parts = [keys, keys, values]
        self.in_proj_qkv, self.in_proj_z = linear(D, sum(self.parts)), linear(D, values)
        self.in_proj_b, self.in_proj_a = linear(D, self.value_heads), linear(D, self.value_heads)
        self.conv1d = ShortConv(sum(self.parts), shape.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(1, 8).log())
        self.dt_bias = nn.Parameter(softplus_inverse_of_rates(self.value_heads))
        self.norm = RMSNorm(self.value_dim, shape.rms_norm_eps)
        self.out_proj = linear(values, D)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        qkv = self.conv1d(self.in_proj_qkv(x_BTD), documents_BT)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part, heads in zip(
            qkv.split(self.parts, -1), (self.key_heads, self.key_heads, self.value_heads), strict=True
        ))  # fmt: skip
        g_BTH = -self.A_log.exp() * F.softplus(self.in_proj_a(x_BTD).to(x_BTD.dtype) + self.dt_bias)
        g_BTH1 = wipe_between_documents(g_BTH[..., None], documents_BT)
        beta_BTH = torch.sigmoid(self.in_proj_b(x_BTD).to(x_BTD.dtype))
        with torch.autocast(x_BTD.device.type, enabled=False):
            q, k = unit(q) * self.key_dim**-0.5, unit(k)
            q, k = (part.repeat_interleave(self.value_heads // self.key_heads, 2) for part in (q, k))
            o = self.norm(chunk_delta_rule(q, k, v.to(q.dtype), g_BTH1, beta_BTH, CHUNK))
        return self.out_proj(o.flatten(2) * F.silu(self.in_proj_z(x_BTD)))


class GatedAttention(nn.Module):
    """Grouped-query attention, rotated in part; q_proj's rows are, head by head, the query and an output gate."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        D = shape.hidden_size
        self.q_proj = linear(D, 2 * self.heads * self.width)
        self.k_proj, self.v_proj = (linear(D, self.kv_heads * self.width) for _ in range(2))
        self.q_norm, self.k_norm = shape.norm(self.width), shape.norm(self.width)
        self.o_proj = linear(self.heads * self.width, D)
        rotated = int(self.width * shape.rope_parameters["partial_rotary_factor"])
        exponents = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
        self.register_buffer("frequencies", shape.rope_parameters["rope_theta"] ** -exponents, persistent=False)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        q, gate = self.q_proj(x_BTD).unflatten(-1, (self.heads, 2, self.width)).unbind(-2)
        k, v = (proj(x_BTD).unflatten(-1, (self.kv_heads, self.width)) for proj in (self.k_proj, self.v_proj))
        q, k = self._rotate(self.q_norm(q)), self._rotate(self.k_norm(k))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 2) for part in (k, v))
        return self.o_proj(masked_attention(q, k, v, documents_BT) * torch.sigmoid(gate.flatten(2)))

    def _rotate(self, x_BTHK: Tensor) -> Tensor:
        """By the place in the row: only differences of places count, and documents do not see each other."""
        half = len(self.frequencies)
        places = torch.arange(x_BTHK.shape[1], device=x_BTHK.device, dtype=torch.float64)
        angles = (places[:, None] * self.frequencies.double())[:, None]  # [T, 1, pairs]
        cos, sin = angles.cos().to(x_BTHK.dtype), angles.sin().to(x_BTHK.dtype)
        first, second, rest = x_BTHK.split([half, half, x_BTHK.shape[-1] - 2 * half], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class MoE(Mixture):
    """Softmax scores. Nothing but a loss on them keeps the loads even, for the published router has no bias."""

    def __init__(self, shape: Shape) -> None:
        E, D = shape.num_experts, shape.hidden_size
        super().__init__(Router(D, E), Experts(E, D, shape.moe_intermediate_size), shape.num_experts_per_tok)
        self.shared_expert, self.shared_expert_gate = MLP(D, shape.shared_expert_intermediate_size), linear(D, 1)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores = torch.softmax(x_BTD @ self.gate.weight.T, -1)
            weights, mask = self.choose(scores, scores, documents_BT)
            real = (documents_BT > 0).to(scores.dtype)[..., None]
            share, score = ((x * real).sum((0, 1)) / real.sum() for x in (mask / self.top_k, scores))
            uneven = len(share) * (share * score).sum()  # 1 when even
        shared = torch.sigmoid(self.shared_expert_gate(x_BTD)) * self.shared_expert(x_BTD)
        return self.experts(x_BTD, weights) + shared, uneven


class MultiTokenPrediction(nn.Module):
    """From the hidden state of a token and the token after it, the hidden state that predicts the one after that."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc = linear(2 * shape.hidden_size, shape.hidden_size)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (shape.norm() for _ in range(3))
        self.layers = nn.ModuleList([_layer(shape, ("self_attn", GatedAttention(shape)))])

    def forward(self, next_BTD: Tensor, hidden_BTD: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the next tokens and hidden states after the last norm -> (normed hidden states, balance)."""
        joined = torch.cat([self.pre_fc_norm_embedding(next_BTD), self.pre_fc_norm_hidden(hidden_BTD)], -1)
        x_BTD, uneven = self.layers[0](self.fc(joined).to(hidden_BTD.dtype), documents_BT)
        return self.norm(x_BTD), uneven


def _layer(shape: Shape, mixer: tuple[str, nn.Module]) -> Layer:
    return Layer((shape.norm(), shape.norm()), mixer, ("mlp", MoE(shape)))


class Model(Decoder):
    EXACT = ("A_log", "dt_bias", "linear_attn.norm.weight")

    def __init__(self, config: dict[str, Any]) -> None:
        shape = Shape.from_config(config)
        super().__init__(shape.hidden_size, shape.vocab_size)
        layers = [
            _layer(
                shape,
                ("linear_attn", GatedDeltaNet(shape))
                if kind == "linear_attention"
                else ("self_attn", GatedAttention(shape)),
            )
            for kind in shape.layer_types
        ]
        self.model = nn.ModuleDict({"language_model": Body(shape.vocab_size, layers, shape.norm())})
        self.mtp = MultiTokenPrediction(shape) if shape.mtp_num_hidden_layers else None
        self.predicted = 1 if self.mtp is None else 1 + CHAIN
        self.initialise()

    def hiddens(self, ids_BT: Tensor, documents_BT: Tensor) -> tuple[list[Tensor], Tensor]:
        body = self.model["language_model"]
        hidden, uneven = body(ids_BT, documents_BT)
        hiddens = [hidden]
        for ahead in range(1, self.predicted):
            # The last places have no such token; what stands there is seen by no place that predicts anything.
            embedded = body.embed_tokens(ids_BT.roll(-ahead, 1))
            hidden, mtp_uneven = self.mtp(embedded, hidden, documents_BT)
            hiddens.append(hidden)
            uneven = uneven + mtp_uneven
        return hiddens, uneven

    def split_experts(self, prefix: str, experts: ExpertParts) -> dict[str, Tensor]:
        if not prefix.startswith("mtp."):
            gate_up = torch.cat([experts["w1"], experts["w3"]], 1)
            return {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": experts["w2"]}
        return {
            f"{prefix}.{number}.{name}.weight": weight
            for part, name in _MTP_EXPERTS.items()
            for number, weight in enumerate(experts[part])
        }

    def join_experts(self, prefix: str, tensors: dict[str, Tensor], count: int) -> ExpertParts:
        if not prefix.startswith("mtp."):
            w1, w3 = tensors[f"{prefix}.gate_up_proj"].chunk(2, 1)
            return {"w1": w1, "w3": w3, "w2": tensors[f"{prefix}.down_proj"]}
        return {
            part: torch.stack([tensors[f"{prefix}.{number}.{name}.weight"] for number in range(count)])
            for part, name in _MTP_EXPERTS.items()
        }


_MTP_EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # kept apart in the published MTP layer
