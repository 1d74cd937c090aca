"""What the training models are built from, whatever the family: norms, linear maps, convolution, experts, layers.

The shapes are a batch of equal rows. `documents_BT` numbers the documents of a row (0: padding): recurrent states,
short convolutions and attention never cross from one document into the next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Multiplies by `weight + shift`: families with a shift of 1 store their weights as w - 1."""

    def __init__(self, width: int, eps: float, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - shift))
        self.eps, self.shift = eps, shift

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float() if x.dtype == torch.bfloat16 else x
        return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.shift)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ShortConv(nn.Module):
    """Causal depthwise convolution and SiLU; taps that reach into another document count nothing."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-(taps**-0.5), taps**-0.5))

    def forward(self, x_BTC: Tensor, documents_BT: Tensor) -> Tensor:
        taps = self.weight.shape[-1]
        out = x_BTC * self.weight[:, 0, -1]
        for back in range(1, taps):
            same = documents_BT[:, back:] == documents_BT[:, :-back]
            shifted = x_BTC[:, :-back] * same[..., None]
            out = out + F.pad(shifted, (0, 0, back, 0)) * self.weight[:, 0, -1 - back]
        return F.silu(out)


def masked_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, documents_BT: Tensor) -> Tensor:
    """Causal softmax attention within documents -> [B, T, H * V]; scale K^-0.5."""
    T = q_BTHK.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=q_BTHK.device).tril()
    visible = (documents_BT[:, :, None] == documents_BT[:, None, :]) & causal
    q, k, v = (x.to(v_BTHV.dtype).transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None]).transpose(1, 2).flatten(2)


class Router(nn.Module):
    """`load` is how many tokens of the last batch chose each expert."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("load", torch.zeros(experts), persistent=False)


class Experts(nn.Module):
    """Every expert computes every token and the weights choose: at this size cheaper than gathering tokens."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(torch.empty(count, inner, width)) for _ in range(2))  # gate, up
        self.w2 = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x_BTD: Tensor, weights_BTE: Tensor) -> Tensor:
        inner = F.silu(F.linear(x_BTD, self.w1.flatten(0, 1))) * F.linear(x_BTD, self.w3.flatten(0, 1))
        inner = inner.unflatten(-1, self.w1.shape[:2]) * weights_BTE[..., None].to(inner.dtype)
        return F.linear(inner.flatten(-2), self.w2.transpose(0, 1).flatten(1))


class Mixture(nn.Module):
    """Routed experts beside a shared one. A family says how scores become a choice.

    `forward` gives the output and a scalar that the loss adds to keep the experts' loads even.
    """

    def __init__(self, gate: Router, experts: Experts, top_k: int) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = gate, experts, top_k

    def choose(self, scores_BTE: Tensor, preference_BTE: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The `top_k` preferred experts' scores, made to sum to 1, and 1 for each of them; both [B, T, E]."""
        chosen = preference_BTE.detach().topk(self.top_k, -1).indices
        mask_BTE = torch.zeros_like(scores_BTE).scatter(-1, chosen, 1.0)
        if self.training:
            self.gate.load.copy_((mask_BTE * (documents_BT > 0)[..., None]).sum((0, 1)))
        weights_BTE = scores_BTE * mask_BTE
        return weights_BTE / (weights_BTE.sum(-1, keepdim=True) + 1e-20), mask_BTE

    def balance(self, rate: Tensor) -> None:
        """After a step: moves what the loss cannot move. `rate` falls with the learning rate."""


class Layer(nn.Module):
    """A token mixer and a feed-forward part, each normed before and added; named as the family's checkpoints do."""

    def __init__(
        self, norms: tuple[RMSNorm, RMSNorm], mixer: tuple[str, nn.Module], feed_forward: tuple[str, nn.Module]
    ) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norms
        self.mixer, self.feed_forward = mixer[0], feed_forward[0]
        self.add_module(*mixer)
        self.add_module(*feed_forward)
        self.routed = isinstance(feed_forward[1], Mixture)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
        """-> (output [B, T, D], balance loss)."""
        x_BTD = x_BTD + getattr(self, self.mixer)(self.input_layernorm(x_BTD), documents_BT)
        h_BTD = self.post_attention_layernorm(x_BTD)
        if self.routed:
            y_BTD, uneven = getattr(self, self.feed_forward)(h_BTD, documents_BT)
        else:
            y_BTD, uneven = getattr(self, self.feed_forward)(h_BTD), x_BTD.new_zeros(())
        return x_BTD + y_BTD, uneven


class Body(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, vocab_size: int, layers: list[Layer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, len(norm.weight))
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, ids_BT: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor]:
        """-> (normed hidden states [B, T, D], sum of the balance losses)."""
        x_BTD = self.embed_tokens(ids_BT)
        total = x_BTD.new_zeros(())
        for layer in self.layers:
            x_BTD, uneven = layer(x_BTD, documents_BT)
            total = total + uneven
        return self.norm(x_BTD), total
