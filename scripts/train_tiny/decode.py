"""Greedy decoding with the recurrent form, one token at a time, in float32: a second, independent reading of a
checkpoint that checks what training exported and measures its accuracy. Families say how their layers mix tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Cache = dict[str, Tensor]  # what a layer keeps of the tokens before


class RecurrentModel(ABC):
    """A checkpoint's tensors under their published names, run a token at a time for a batch of sequences."""

    PREFIX = "model."
    DRAFTS = 0  # tokens that `draft` gives

    def __init__(
        self,
        tensors: dict[str, Tensor],
        config: dict[str, Any],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        self.config = config.get("text_config", config)
        self.reset()

    def reset(self) -> None:
        self.cache: list[Cache] = [{} for _ in range(self.config["num_hidden_layers"])]

    def hidden(self, ids_B: Tensor) -> Tensor:
        """The next token of every sequence -> hidden states after the last norm [B, D]."""
        x = self.embed(ids_B)
        for index, cache in enumerate(self.cache):
            name = f"{self.PREFIX}layers.{index}."
            x = x + self.mix(self.norm(x, name + "input_layernorm"), name, index, cache)
            x = x + self.feed_forward(self.norm(x, name + "post_attention_layernorm"), name, index)
        return self.norm(x, self.PREFIX + "norm")

    def step(self, ids_B: Tensor) -> Tensor:
        """The next token of every sequence -> logits [B, vocab]."""
        return self.logits(self.hidden(ids_B))

    def draft(self, ids_B: Tensor, hidden_BD: Tensor) -> Tensor:
        """The tokens that follow `hidden` and its guesses at the DRAFTS tokens after them [B, DRAFTS]."""
        return ids_B.new_empty(len(ids_B), 0)

    @abstractmethod
    def mix(self, x: Tensor, name: str, index: int, cache: Cache) -> Tensor:
        """Attention, of whichever kind, of the layer called `name`."""

    @abstractmethod
    def feed_forward(self, x: Tensor, name: str, index: int) -> Tensor:
        """The MLP or the experts of the layer called `name`."""

    def embed(self, ids_B: Tensor) -> Tensor:
        return self.tensors[self.PREFIX + "embed_tokens.weight"][ids_B]

    def logits(self, hidden_BD: Tensor) -> Tensor:
        return self.project(hidden_BD, "lm_head")

    def project(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[name + ".weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        rms = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x / rms * self.tensors[name + ".weight"]

    def conv(self, x: Tensor, name: str, cache: Cache) -> Tensor:
        weight_CW = self.tensors[name + ".weight"][:, 0]
        seen = cache.get(name)
        if seen is None:
            seen = x.new_zeros(len(x), weight_CW.shape[1] - 1, x.shape[1])
        window = torch.cat([seen, x[:, None]], 1)
        cache[name] = window[:, 1:]
        return F.silu(torch.einsum("bwc,cw->bc", window, weight_CW))

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cache: Cache) -> Tensor:
        """One token: q, k [B, H, K], v [B, H, V], decay [B, H, K or 1], beta [B, H, 1] -> [B, H, V]."""
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        state = cache.get("state")
        if state is None:
            state = v.new_zeros(*k.shape, v.shape[-1])
        state = state * decay[..., None]
        written = beta * (v - torch.einsum("bhk,bhkv->bhv", k, state))
        state = cache["state"] = state + k[..., None] * written[..., None, :]
        return torch.einsum("bhk,bhkv->bhv", q * q.shape[-1] ** -0.5, state)

    def mlp(self, x: Tensor, name: str, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Tensor:
        gate, up, down = (name + part for part in parts)
        return self.project(F.silu(self.project(x, gate)) * self.project(x, up), down)


def remember(cache: Cache, **entries: Tensor) -> list[Tensor]:
    """Adds each entry [B, ...] to those kept under its name -> all of them [B, tokens, ...]."""
    for name, entry in entries.items():
        cache[name] = torch.cat([cache[name], entry[:, None]], 1) if name in cache else entry[:, None]
    return [cache[name] for name in entries]


@torch.no_grad()
def greedy(
    model: RecurrentModel, prompts: list[list[int]], end_ids: Collection[int], max_new: int, drafting: bool = False
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Generated ids of each prompt, up to the end id and with it; sequences keep their own pace inside the batch.

    With `drafting` also what the model drafts after each generated token but the last: lists of DRAFTS ids.
    """
    device = model.tensors["lm_head.weight"].device
    model.reset()
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest + max_new + 1, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    drafts = torch.zeros(*ids.shape, model.DRAFTS, dtype=torch.long, device=device)  # by the token they come after
    ends = torch.tensor(sorted(end_ids), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for position in range(longest + max_new):
        hidden = model.hidden(ids[:, position])
        best = model.logits(hidden).argmax(-1)
        generating = lengths <= position + 1
        ids[:, position + 1] = torch.where(generating, best, ids[:, position + 1])
        if drafting:
            drafts[:, position + 1] = model.draft(ids[:, position + 1], hidden)
        finished |= generating & (torch.isin(best, ends) | (position + 1 >= lengths + max_new))
        if bool(finished.all()):
            break
    outputs, drafted = [], []
    for row, prompt in enumerate(prompts):
        generated = ids[row, len(prompt) : len(prompt) + max_new].tolist()
        stop = next((i + 1 for i, token in enumerate(generated) if token in end_ids), len(generated))
        outputs.append(generated[:stop])
        drafted.append(drafts[row, len(prompt) : len(prompt) + stop - 1].tolist())
    return outputs, drafted
