"""Kimi Delta Attention over packed rows: short convolutions, decay gate and the chunked delta rule, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import RMSNorm, Shape, linear
from torch import Tensor, nn

CHUNK = 16
# The log decay added at a document's first token: exp(-60) wipes the state, and -60 still adds well in float32.
RESET = -60.0


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


def chunk_kda(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHK: Tensor, beta_BTH: Tensor) -> Tensor:
    """Gated delta rule over whole rows, T a multiple of CHUNK; q and k are normalised and q scaled already.

    Decays enter only as exp(G_i - G_j), i >= j, so an unbounded gate cannot overflow. With L the strictly lower
    part of beta_i k_i.k_j and U the rows written to the state, (I + L) U = beta (V - K S); eliminating U makes the
    state affine in the state before it, S' = M S + N, which leaves one product per chunk to do in sequence.
    """
    B, T, H, _ = q_BTHK.shape

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, N, C, ...]
        return x.transpose(1, 2).reshape(B, H, T // CHUNK, CHUNK, *x.shape[3:])

    q, k, v, g, beta = (chunks(x) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH[..., None]))
    G = g.cumsum(-2)
    kk, qk = _pair_products(q, k, G)
    identity = torch.eye(CHUNK, dtype=q.dtype, device=q.device)
    keys = k * G.exp()
    solved = torch.linalg.solve_triangular(
        identity + beta * kk.tril(-1), beta * torch.cat([v, keys], -1), upper=False, unitriangular=True
    )
    U0, W = solved.split([v.shape[-1], k.shape[-1]], -1)
    last = G[..., -1:, :]
    tail = (k * (last - G).exp()).transpose(-1, -2)  # what each token's key is worth at the end of its chunk
    M = torch.diag_embed(last.squeeze(-2).exp()) - tail @ W
    N = tail @ U0
    state = torch.zeros_like(N[:, :, 0])
    states = []
    for chunk in range(T // CHUNK):
        states.append(state)
        state = M[:, :, chunk] @ state + N[:, :, chunk]
    before = torch.stack(states, 2)
    out = (q * G.exp() - qk @ W) @ before + qk @ U0
    return out.reshape(B, H, T, -1).transpose(1, 2)


def _pair_products(q: Tensor, k: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """(k_i.k_j, q_i.k_j), each decayed by exp(G_i - G_j), zero above the diagonal; inputs [..., C, K]."""
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()[..., None]
    difference = G[..., :, None, :] - G[..., None, :, :]
    decayed = difference.masked_fill(~lower, -torch.inf).exp() * k[..., None, :, :]
    return (decayed * k[..., :, None, :]).sum(-1), (decayed * q[..., :, None, :]).sum(-1)


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
        # softplus(dt_bias) spreads from 0.001 to 0.1: memories from ten tokens to thousands.
        rate = torch.exp(torch.empty(total).uniform_(-6.9, -2.3))
        self.dt_bias = nn.Parameter(rate + torch.log(-torch.expm1(-rate)))

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        heads = (B, T, self.heads, self.width)
        q = self.q_conv1d(self.q_proj(x_BTD), documents_BT).reshape(heads)
        k = self.k_conv1d(self.k_proj(x_BTD), documents_BT).reshape(heads)
        v = self.v_conv1d(self.v_proj(x_BTD), documents_BT).reshape(heads)
        with torch.autocast(x_BTD.device.type, enabled=False):
            q, k, v = (x.float() if x.dtype == torch.bfloat16 else x for x in (q, k, v))
            q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * self.width**-0.5
            k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        gate_input = self.f_b_proj(self.f_a_proj(x_BTD)) + self.dt_bias
        first = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))
        g = -self.A_log.exp() * F.softplus(gate_input).reshape(heads) + RESET * first[..., None, None]
        beta = torch.sigmoid(self.b_proj(x_BTD)).to(g.dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            o = self.o_norm(chunk_kda(q, k, v, g, beta))
        o = o * torch.sigmoid(self.g_b_proj(self.g_a_proj(x_BTD))).reshape(heads)
        return self.o_proj(o.reshape(B, T, -1))
