"""The gated delta rule over packed rows in chunks, differentiable: decays per key channel (KDA) or per head (GDN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The log decay added at a document's first token: exp(-60) wipes the state, and -60 still adds well in float32.
RESET = -60.0


def wipe_between_documents(g_BTHK: Tensor, documents_BT: Tensor) -> Tensor:
    """The log decays with RESET added where another document begins."""
    first = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))
    return g_BTHK + RESET * first[..., None, None]


def unit(x: Tensor) -> Tensor:
    """Scaled to length 1 along the last dimension, in float32 at least."""
    x = x.float() if x.dtype == torch.bfloat16 else x
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def softplus_inverse_of_rates(count: int) -> Tensor:
    """dt_bias to begin with: softplus of it spreads from 0.001 to 0.1, memories from ten tokens to thousands."""
    rate = torch.exp(torch.empty(count).uniform_(-6.9, -2.3))
    return rate + torch.log(-torch.expm1(-rate))


def chunk_delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTHK: Tensor, beta_BTH: Tensor, chunk: int
) -> Tensor:
    """Gated delta rule over whole rows, T a multiple of `chunk`; q and k are normalised and q scaled already.

    The log decays g have a value per key channel, or one per head: [B, T, H, 1].

    Decays enter only as exp(G_i - G_j), i >= j, so an unbounded gate cannot overflow. With L the strictly lower
    part of beta_i k_i.k_j and U the rows written to the state, (I + L) U = beta (V - K S); eliminating U makes the
    state affine in the state before it, S' = M S + N, which leaves one product per chunk to do in sequence.
    """
    B, T, H, _ = q_BTHK.shape

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, N, C, ...]
        return x.transpose(1, 2).reshape(B, H, T // chunk, chunk, *x.shape[3:])

    q, k, v, g, beta = (chunks(x) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH[..., None]))
    G = g.cumsum(-2)
    kk, qk = (_head_products if G.shape[-1] == 1 else _channel_products)(q, k, G)
    identity = torch.eye(chunk, dtype=q.dtype, device=q.device)
    keys = k * G.exp()
    solved = torch.linalg.solve_triangular(
        identity + beta * kk.tril(-1), beta * torch.cat([v, keys], -1), upper=False, unitriangular=True
    )
    U0, W = solved.split([v.shape[-1], k.shape[-1]], -1)
    last = G[..., -1:, :]
    tail = (k * (last - G).exp()).transpose(-1, -2)  # what each token's key is worth at the end of its chunk
    M = torch.diag_embed(last.squeeze(-2).exp().expand(*k.shape[:-2], k.shape[-1])) - tail @ W
    N = tail @ U0
    state = torch.zeros_like(N[:, :, 0])
    states = []
    for forward, added in zip(M.unbind(2), N.unbind(2), strict=True):
        states.append(state)
        state = forward @ state + added
    before = torch.stack(states, 2)
    out = (q * G.exp() - qk @ W) @ before + qk @ U0
    return out.reshape(B, H, T, -1).transpose(1, 2)


def _channel_products(q: Tensor, k: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """(k_i.k_j, q_i.k_j), each decayed by exp(G_i - G_j), zero above the diagonal; inputs [..., C, K]."""
    lower = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()[..., None]
    difference = G[..., :, None, :] - G[..., None, :, :]
    decayed = difference.masked_fill(~lower, -torch.inf).exp() * k[..., None, :, :]
    return (decayed * k[..., :, None, :]).sum(-1), (decayed * q[..., :, None, :]).sum(-1)


def _head_products(q: Tensor, k: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one decay for all channels, G [..., C, 1]: a masked matrix product."""
    lower = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    decay = (G - G.transpose(-1, -2)).masked_fill(~lower, -torch.inf).exp()
    return k @ k.transpose(-1, -2) * decay, q @ k.transpose(-1, -2) * decay
