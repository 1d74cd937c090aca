"""Kimi-Linear a token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from decode import Cache, RecurrentModel, remember
from torch import Tensor


class Recurrent(RecurrentModel):
    def mix(self, x: Tensor, name: str, index: int, cache: Cache) -> Tensor:
        linear = index + 1 in self.config["linear_attn_config"]["kda_layers"]
        return (self._kda if linear else self._mla)(x, name + "self_attn.", cache)

    def feed_forward(self, x: Tensor, name: str, index: int) -> Tensor:
        dense = index < self.config["first_k_dense_replace"]
        return self.mlp(x, name + "mlp.") if dense else self._moe(x, name + "block_sparse_moe.")

    def _kda(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        kda = self.config["linear_attn_config"]
        heads, width = kda["num_heads"], kda["head_dim"]
        q, k, v = (
            self.conv(self.project(x, f"{name}{part}_proj"), f"{name}{part}_conv1d", cache).view(-1, heads, width)
            for part in "qkv"
        )
        gate = self.project(self.project(x, name + "f_a_proj"), name + "f_b_proj") + self.tensors[name + "dt_bias"]
        A_H1 = self.tensors[name + "A_log"].exp().view(heads, 1)
        decay = torch.exp(-A_H1 * F.softplus(gate.view(-1, heads, width)))
        beta = torch.sigmoid(self.project(x, name + "b_proj"))[..., None]
        o = self.norm(self.delta_rule(q, k, v, decay, beta, cache), name + "o_norm")
        gate = self.project(self.project(x, name + "g_a_proj"), name + "g_b_proj").view_as(o)
        return self.project((o * torch.sigmoid(gate)).flatten(1), name + "o_proj")

    def _mla(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        heads, rank = self.config["num_attention_heads"], self.config["kv_lora_rank"]
        nope, rope = self.config["qk_nope_head_dim"], self.config["qk_rope_head_dim"]
        q = self.project(x, name + "q_proj").view(-1, heads, nope + rope)
        latent, shared = self.project(x, name + "kv_a_proj_with_mqa").split([rank, rope], -1)
        latents, shared = remember(cache, latent=self.norm(latent, name + "kv_a_layernorm"), shared=shared)
        k_up, v_up = (
            self.tensors[name + "kv_b_proj.weight"].view(heads, -1, rank).split([nope, self.config["v_head_dim"]], 1)
        )
        scores = torch.einsum("bhn,hnr,btr->bht", q[..., :nope], k_up, latents)
        scores = (scores + torch.einsum("bhp,btp->bht", q[..., nope:], shared)) * (nope + rope) ** -0.5
        mixed = torch.einsum("bht,btr->bhr", scores.softmax(-1), latents)
        return self.project(torch.einsum("bhr,hvr->bhv", mixed, v_up).flatten(1), name + "o_proj")

    def _moe(self, x: Tensor, name: str) -> Tensor:
        scores = torch.sigmoid(self.project(x, name + "gate"))
        biased = scores + self.tensors[name + "gate.e_score_correction_bias"]
        chosen = biased.topk(self.config["num_experts_per_token"], -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config["routed_scaling_factor"]
        out = self.mlp(x, name + "shared_experts.")
        for expert in range(self.config["num_experts"]):
            row, place = (chosen == expert).nonzero(as_tuple=True)
            done = self.mlp(x[row], f"{name}experts.{expert}.", ("w1", "w3", "w2"))
            out.index_add_(0, row, done * weights[row, place, None])
        return out
