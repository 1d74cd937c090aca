"""Qwen3.5 MoE a token at a time, and what its MTP layer drafts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from decode import Cache, RecurrentModel, remember
from torch import Tensor


class Recurrent(RecurrentModel):
    PREFIX = "model.language_model."
    DRAFTS = 3

    def reset(self) -> None:
        super().reset()
        self.mtp_cache: Cache = {}

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Every norm but that of Gated DeltaNet is stored as w - 1."""
        rms = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        weight = self.tensors[name + ".weight"]
        return x / rms * (weight if name.endswith("linear_attn.norm") else 1 + weight)

    def draft(self, ids_B: Tensor, hidden_BD: Tensor) -> Tensor:
        """Each guess goes on from the one before; of what the layer caches, the first token's entry stays."""
        drafts, cache = [], self.mtp_cache
        for _ in range(self.DRAFTS):
            hidden_BD = self.predict(ids_B, hidden_BD, cache)
            ids_B = self.logits(hidden_BD).argmax(-1)
            drafts.append(ids_B)
            if cache is self.mtp_cache:
                cache = dict(cache)
        return torch.stack(drafts, -1)

    def predict(self, ids_B: Tensor, hidden_BD: Tensor, cache: Cache) -> Tensor:
        """Tokens and the hidden states before them -> the MTP layer's hidden states, after its norm."""
        embedded = self.norm(self.embed(ids_B), "mtp.pre_fc_norm_embedding")
        x = self.project(torch.cat([embedded, self.norm(hidden_BD, "mtp.pre_fc_norm_hidden")], -1), "mtp.fc")
        name = "mtp.layers.0."
        x = x + self._attention(self.norm(x, name + "input_layernorm"), name + "self_attn.", cache)
        x = x + self._moe(self.norm(x, name + "post_attention_layernorm"), name + "mlp.")
        return self.norm(x, "mtp.norm")

    def mix(self, x: Tensor, name: str, index: int, cache: Cache) -> Tensor:
        if self.config["layer_types"][index] == "linear_attention":
            return self._gdn(x, name + "linear_attn.", cache)
        return self._attention(x, name + "self_attn.", cache)

    def feed_forward(self, x: Tensor, name: str, index: int) -> Tensor:
        return self._moe(x, name + "mlp.")

    def _gdn(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        key_heads, value_heads = self.config["linear_num_key_heads"], self.config["linear_num_value_heads"]
        keys = key_heads * self.config["linear_key_head_dim"]
        qkv = self.conv(self.project(x, name + "in_proj_qkv"), name + "conv1d", cache)
        key_head_of = torch.arange(value_heads, device=x.device) // (value_heads // key_heads)
        q, k = (part.reshape(len(x), key_heads, -1)[:, key_head_of] for part in qkv[:, : 2 * keys].chunk(2, -1))
        v = qkv[:, 2 * keys :].reshape(len(x), value_heads, -1)
        rate = F.softplus(self.project(x, name + "in_proj_a") + self.tensors[name + "dt_bias"])
        decay = torch.exp(-self.tensors[name + "A_log"].exp() * rate)[..., None]
        beta = torch.sigmoid(self.project(x, name + "in_proj_b"))[..., None]
        o = self.norm(self.delta_rule(q, k, v, decay, beta, cache), name + "norm")
        return self.project((o * F.silu(self.project(x, name + "in_proj_z")).view_as(o)).flatten(1), name + "out_proj")

    def _attention(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = self.config["head_dim"]
        place = cache["k"].shape[1] if "k" in cache else 0
        query_and_gate = self.project(x, name + "q_proj").view(-1, heads, 2 * width)
        q, gate = query_and_gate[..., :width], query_and_gate[..., width:]
        k, v = (self.project(x, f"{name}{part}_proj").view(-1, kv_heads, width) for part in "kv")
        q, k = (self._rotate(self.norm(t, f"{name}{part}_norm"), place) for part, t in (("q", q), ("k", k)))
        ks, vs = remember(cache, k=k, v=v)
        grouped = q.view(len(x), kv_heads, heads // kv_heads, width)
        scores = torch.einsum("bgqw,btgw->bgqt", grouped, ks) * width**-0.5
        mixed = torch.einsum("bgqt,btgw->bgqw", scores.softmax(-1), vs).reshape(len(x), heads, width)
        return self.project((mixed * torch.sigmoid(gate)).flatten(1), name + "o_proj")

    def _rotate(self, x: Tensor, place: int) -> Tensor:
        """Dims i and i + half of the first 2 * half, as one complex number, turn by place * theta^(-i / half)."""
        rope = self.config["rope_parameters"]
        half = int(x.shape[-1] * rope["partial_rotary_factor"]) // 2
        places = torch.arange(half, dtype=torch.float64, device=x.device) / half
        angle = place * rope["rope_theta"] ** -places
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real.to(x.dtype), turned.imag.to(x.dtype), x[..., 2 * half :]], -1)

    def _moe(self, x: Tensor, name: str) -> Tensor:
        top = torch.softmax(self.project(x, name + "gate"), -1).topk(self.config["num_experts_per_tok"], -1)
        weights = top.values / top.values.sum(-1, keepdim=True)
        out = torch.sigmoid(self.project(x, name + "shared_expert_gate")) * self.mlp(x, name + "shared_expert.")
        for expert in range(self.config["num_experts"]):
            row, place = (top.indices == expert).nonzero(as_tuple=True)
            out.index_add_(0, row, self._expert(x[row], name + "experts.", expert) * weights[row, place, None])
        return out

    def _expert(self, x: Tensor, name: str, expert: int) -> Tensor:
        if name + "gate_up_proj" not in self.tensors:
            return self.mlp(x, f"{name}{expert}.")
        gate, up = (x @ self.tensors[name + "gate_up_proj"][expert].T).chunk(2, -1)
        return (F.silu(gate) * up) @ self.tensors[name + "down_proj"][expert].T
