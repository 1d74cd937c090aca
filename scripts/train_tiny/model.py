"""Kimi-Linear in plain torch, in the form that trains: whole rows of packed documents at once.

The maths is that of `thalweg.models.kimi_linear`; the shapes are a batch of equal rows. `documents_BT` numbers the
documents of a row (0: padding): the recurrent state, the short convolution and attention never cross from one
document into the next. Parameters have the official tensor names except the experts, which `official_tensors` splits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import MLP, RMSNorm, Shape, linear
from kda import DeltaAttention
from torch import Tensor, nn


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
        causal = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril()
        visible = (documents_BT[:, :, None] == documents_BT[:, None, :]) & causal
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class Router(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)


class MoE(nn.Module):
    """Every expert computes every token and the weights choose: at this size cheaper than gathering tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        E, I, D = shape.num_experts, shape.moe_intermediate_size, shape.hidden_size
        self.top_k, self.scale = shape.num_experts_per_token, shape.routed_scaling_factor
        self.gate = Router(D, E)
        self.w1, self.w3 = nn.Parameter(torch.empty(E, I, D)), nn.Parameter(torch.empty(E, I, D))
        self.w2 = nn.Parameter(torch.empty(E, D, I))
        self.shared_experts = MLP(D, I * shape.num_shared_experts)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores = torch.sigmoid(x_BTD @ self.gate.weight.T)
            chosen = (scores.detach() + self.gate.e_score_correction_bias).topk(self.top_k, -1).indices
            mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
            weights_BTE = scores * mask
            weights_BTE = weights_BTE / (weights_BTE.sum(-1, keepdim=True) + 1e-20) * self.scale
            if self.training:
                self.gate.load.copy_((mask * (documents_BT > 0)[..., None]).sum((0, 1)))
        inner = F.silu(F.linear(x_BTD, self.w1.flatten(0, 1))) * F.linear(x_BTD, self.w3.flatten(0, 1))
        inner = inner.unflatten(-1, self.w1.shape[:2]) * weights_BTE[..., None].to(inner.dtype)
        routed = F.linear(inner.flatten(-2), self.w2.transpose(0, 1).flatten(1))
        return routed + self.shared_experts(x_BTD)

    @torch.no_grad()
    def balance(self, rate: Tensor) -> None:
        """Moves the choice towards experts with less than their share: bias only, no auxiliary loss."""
        self.gate.e_score_correction_bias += rate * torch.sign(self.gate.load.mean() - self.gate.load)


class Layer(nn.Module):
    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        D, eps = shape.hidden_size, shape.rms_norm_eps
        is_kda = index + 1 in shape.linear_attn_config["kda_layers"]  # counted from 1, as published
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.self_attn = DeltaAttention(shape) if is_kda else LatentAttention(shape)
        self.dense = index < shape.first_k_dense_replace
        if self.dense:
            self.mlp = MLP(D, shape.intermediate_size)
        else:
            self.block_sparse_moe = MoE(shape)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), documents_BT)
        h_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + (self.mlp(h_BTD) if self.dense else self.block_sparse_moe(h_BTD, documents_BT))


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class KimiLinear(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = linear(shape.hidden_size, shape.vocab_size)
        narrow = (2 * shape.num_hidden_layers) ** -0.5  # for what writes to the residual stream
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2 and "conv1d" not in name and "A_log" not in name:
                out = name.endswith(("o_proj.weight", "down_proj.weight", "w2"))
                nn.init.normal_(parameter, std=0.02 * narrow if out else 0.02)

    def forward(self, ids_BT: Tensor, documents_BT: Tensor) -> Tensor:
        """Ids and document numbers [B, T], T a multiple of CHUNK -> logits [B, T, vocab]."""
        x_BTD = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, documents_BT)
        return self.lm_head(self.model.norm(x_BTD))

    def mixtures(self) -> list[MoE]:
        return [layer.block_sparse_moe for layer in self.model.layers if not layer.dense]

    @torch.no_grad()
    def official_tensors(self) -> dict[str, Tensor]:
        """The checkpoint: bf16 but for the gate's decay parameters and the router bias, experts apart."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            exact = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
            stored = tensor.detach().to("cpu", torch.float32 if exact else torch.bfloat16)
            head, _, last = name.rpartition(".")
            if last in ("w1", "w2", "w3"):
                for expert, weight in enumerate(stored):
                    tensors[f"{head}.experts.{expert}.{last}.weight"] = weight.contiguous()
            else:
                tensors[name] = stored.contiguous()
        return tensors

    @torch.no_grad()
    def load_official(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `official_tensors`."""
        state = {}
        for name in self.state_dict():
            head, _, last = name.rpartition(".")
            if last in ("w1", "w2", "w3"):
                count = len(self.get_parameter(name))
                parts = [tensors[f"{head}.experts.{expert}.{last}.weight"] for expert in range(count)]
                state[name] = torch.stack(parts)
            else:
                state[name] = tensors[name]
        self.load_state_dict(state)
