"""Greedy decoding with the recurrent form, one token at a time, in float32: a second, independent reading of a
checkpoint that checks what training exported and measures its accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RecurrentModel:
    """A checkpoint's tensors under their official names, run a token at a time for a batch of sequences."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any], device: str = "cpu") -> None:
        self.tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
        self.config, self.kda = config, config["linear_attn_config"]
        self.cache: list[dict[str, Tensor]] = [{} for _ in range(config["num_hidden_layers"])]

    def step(self, ids_B: Tensor) -> Tensor:
        """The next token of every sequence -> logits [B, vocab]."""
        x = self.tensors["model.embed_tokens.weight"][ids_B]
        for index in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{index}."
            h = self._norm(x, name + "input_layernorm")
            linear = index + 1 in self.kda["kda_layers"]
            x = x + (self._kda if linear else self._mla)(h, name + "self_attn.", self.cache[index])
            h = self._norm(x, name + "post_attention_layernorm")
            dense = index < self.config["first_k_dense_replace"]
            x = x + (self._mlp(h, name + "mlp.") if dense else self._moe(h, name + "block_sparse_moe."))
        return self._project(self._norm(x, "model.norm"), "lm_head")

    def _project(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[name + ".weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        rms = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x / rms * self.tensors[name + ".weight"]

    def _conv(self, x: Tensor, name: str, cache: dict[str, Tensor]) -> Tensor:
        weight_CW = self.tensors[name + ".weight"][:, 0]
        seen = cache.get(name)
        if seen is None:
            seen = x.new_zeros(len(x), weight_CW.shape[1] - 1, x.shape[1])
        window = torch.cat([seen, x[:, None]], 1)
        cache[name] = window[:, 1:]
        return F.silu(torch.einsum("bwc,cw->bc", window, weight_CW))

    def _kda(self, x: Tensor, name: str, cache: dict[str, Tensor]) -> Tensor:
        heads, width = self.kda["num_heads"], self.kda["head_dim"]
        q, k, v = (
            self._conv(self._project(x, f"{name}{part}_proj"), f"{name}{part}_conv1d", cache).view(-1, heads, width)
            for part in "qkv"
        )
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        q = q * width**-0.5
        gate = self._project(self._project(x, name + "f_a_proj"), name + "f_b_proj") + self.tensors[name + "dt_bias"]
        A_H1 = self.tensors[name + "A_log"].exp().view(heads, 1)
        decay = torch.exp(-A_H1 * F.softplus(gate.view(-1, heads, width)))
        beta = torch.sigmoid(self._project(x, name + "b_proj"))[..., None]
        state = cache.get("state")
        if state is None:
            state = x.new_zeros(len(x), heads, width, width)
        state = state * decay[..., None]
        written = beta * (v - torch.einsum("bhk,bhkv->bhv", k, state))
        state = cache["state"] = state + k[..., None] * written[..., None, :]
        o = self._norm(torch.einsum("bhk,bhkv->bhv", q, state), name + "o_norm")
        gate = self._project(self._project(x, name + "g_a_proj"), name + "g_b_proj").view_as(o)
        return self._project((o * torch.sigmoid(gate)).flatten(1), name + "o_proj")

    def _mla(self, x: Tensor, name: str, cache: dict[str, Tensor]) -> Tensor:
        heads, rank = self.config["num_attention_heads"], self.config["kv_lora_rank"]
        nope, rope = self.config["qk_nope_head_dim"], self.config["qk_rope_head_dim"]
        q = self._project(x, name + "q_proj").view(-1, heads, nope + rope)
        latent, shared = self._project(x, name + "kv_a_proj_with_mqa").split([rank, rope], -1)
        entry = torch.cat([self._norm(latent, name + "kv_a_layernorm"), shared], -1)[:, None]
        entries = cache["latent"] = torch.cat([cache["latent"], entry], 1) if "latent" in cache else entry
        latents, shared = entries.split([rank, rope], -1)
        k_up, v_up = (
            self.tensors[name + "kv_b_proj.weight"].view(heads, -1, rank).split([nope, self.config["v_head_dim"]], 1)
        )
        scores = torch.einsum("bhn,hnr,btr->bht", q[..., :nope], k_up, latents)
        scores = (scores + torch.einsum("bhp,btp->bht", q[..., nope:], shared)) * (nope + rope) ** -0.5
        mixed = torch.einsum("bht,btr->bhr", scores.softmax(-1), latents)
        return self._project(torch.einsum("bhr,hvr->bhv", mixed, v_up).flatten(1), name + "o_proj")

    def _mlp(self, x: Tensor, name: str, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Tensor:
        gate, up, down = (name + part for part in parts)
        return self._project(F.silu(self._project(x, gate)) * self._project(x, up), down)

    def _moe(self, x: Tensor, name: str) -> Tensor:
        scores = torch.sigmoid(self._project(x, name + "gate"))
        biased = scores + self.tensors[name + "gate.e_score_correction_bias"]
        chosen = biased.topk(self.config["num_experts_per_token"], -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config["routed_scaling_factor"]
        out = self._mlp(x, name + "shared_experts.")
        for expert in range(self.config["num_experts"]):
            row, place = (chosen == expert).nonzero(as_tuple=True)
            done = self._mlp(x[row], f"{name}experts.{expert}.", ("w1", "w3", "w2"))
            out.index_add_(0, row, done * weights[row, place, None])
        return out


@torch.no_grad()
def greedy(model: RecurrentModel, prompts: list[list[int]], end_id: int, max_new: int) -> list[list[int]]:
    """Generated ids of each prompt, without `end_id`; sequences keep their own pace inside the batch."""
    device = model.tensors["lm_head.weight"].device
    model.cache = [{} for _ in model.cache]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest + max_new + 1, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for position in range(longest + max_new):
        best = model.step(ids[:, position]).argmax(-1)
        generating = lengths <= position + 1
        ids[:, position + 1] = torch.where(generating, best, ids[:, position + 1])
        finished |= generating & ((best == end_id) | (position + 1 >= lengths + max_new))
        if bool(finished.all()):
            break
    outputs = []
    for row, prompt in enumerate(prompts):
        generated = ids[row, len(prompt) : len(prompt) + max_new].tolist()
        outputs.append(generated[: generated.index(end_id)] if end_id in generated else generated)
    return outputs
