"""Kimi Delta Attention in plain torch: the recurrence that defines it, and the chunked form for prefill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.host_tables import Boundaries

CHUNK_SIZE = 16


def kda_gate(f_THK: Tensor, A_log_H: Tensor, dt_bias_HK: Tensor) -> Tensor:
    return -A_log_H.float().exp().unsqueeze(-1) * F.softplus(f_THK.float() + dt_bias_HK.float())


def kda_decode(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BHK: Tensor,
    beta_BH: Tensor,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> Tensor:
    """o_BHV for one new token of each sequence; the state of its slot is updated in place."""
    q_BHK, k_BHK = _normalise(q_BHK.float(), k_BHK.float())
    q_BH1K, k_BH1K = q_BHK.unsqueeze(-2), k_BHK.unsqueeze(-2)
    S_BHVK = state_NHVK.index_select(0, slots_B).float() * g_BHK.float().exp().unsqueeze(-2)
    # Row vector times matrix: torch's batched matmul on CPU is several times faster than the other way round.
    read_BHV = (k_BH1K @ S_BHVK.transpose(-1, -2)).squeeze(-2)
    u_BHV = (v_BHV.float() - read_BHV) * beta_BH.float().unsqueeze(-1)
    S_BHVK.addcmul_(u_BHV.unsqueeze(-1), k_BH1K)
    state_NHVK[slots_B] = S_BHVK.to(state_NHVK.dtype)
    return (q_BH1K @ S_BHVK.transpose(-1, -2)).squeeze(-2).to(v_BHV.dtype)


def kda_prefill(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_THK: Tensor,
    beta_TH: Tensor,
    *,
    state_NHVK: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    boundaries: Boundaries = (),
) -> Tensor:
    o_THV = torch.empty_like(v_THV)
    # A sequence goes up to a boundary, leaves its state there, and goes on, as one that begins from it would.
    ends = [
        sorted({*(n for b, n, _ in boundaries if b == i), end - start})
        for i, (start, end) in enumerate(pairwise(offsets))
    ]
    start_of = list(offsets)
    for stage in range(max(map(len, ends), default=0)):
        spans = {}
        for b, of_sequence in enumerate(ends):
            if stage < len(of_sequence):
                end = offsets[b] + of_sequence[stage]
                spans[b] = slice(start_of[b], end)
                start_of[b] = end
        _prefill_spans(spans, q_THK, k_THK, v_THV, g_THK, beta_TH, o_THV, state_NHVK, slots_B)
        for b, n, slot in boundaries:
            if b in spans and spans[b].stop == offsets[b] + n:
                state_NHVK[slot] = state_NHVK.index_select(0, slots_B[b : b + 1])[0]
    return o_THV


def _prefill_spans(
    spans_of: Mapping[int, slice],
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    g_THK: Tensor,
    beta_TH: Tensor,
    o_THV: Tensor,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> None:
    """A span of tokens of each sequence that has one, into o_THV."""
    # Sequences with the same number of chunks run as one batch, padded to the longest: less than a chunk of
    # padding each, whatever the mix of lengths.
    groups: dict[int, list[int]] = defaultdict(list)
    for b, span in spans_of.items():
        if span.stop > span.start:
            groups[-(-(span.stop - span.start) // CHUNK_SIZE)].append(b)
    for members in groups.values():
        spans = [spans_of[b] for b in members]
        q, k, v, g, beta = (_pad(x, spans) for x in (q_THK, k_THK, v_THV, g_THK, beta_TH))
        slots = slots_B[torch.tensor(members, device=slots_B.device)]
        o_BHTV, S_BHKV = chunk_kda(q, k, v, g, beta, state_NHVK[slots].transpose(-1, -2))
        state_NHVK[slots] = S_BHKV.transpose(-1, -2).to(state_NHVK.dtype)
        for s, o_HTV in zip(spans, o_BHTV, strict=True):
            o_THV[s] = o_HTV[:, : s.stop - s.start].transpose(0, 1)


def recurrent_kda(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    g_BHTK: Tensor,
    beta_BHT: Tensor,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o_BHTV in v's dtype, final state_BHKV), token by token: the definition.

    q and k come raw and are normalised here, as in the ops. Computed in fp32, or in fp64 from fp64 inputs;
    the state is returned so. No initial state means zeros.
    """
    q, k, v, g, beta, S_BHKV = _prepare(q_BHTK, k_BHTK, v_BHTV, g_BHTK, beta_BHT, initial_state_BHKV)
    outputs = []
    for t in range(v.shape[2]):
        S_BHKV = S_BHKV * g[:, :, t, :, None].exp()
        k_BH1K = k[:, :, t, None, :]
        u_BH1V = beta[:, :, t, None, None] * (v[:, :, t, None, :] - k_BH1K @ S_BHKV)
        S_BHKV = S_BHKV + k_BH1K.transpose(-1, -2) @ u_BH1V
        outputs.append(q[:, :, t, None, :] @ S_BHKV)
    o_BHTV = torch.cat(outputs, dim=2) if outputs else v
    return o_BHTV.to(v_BHTV.dtype), S_BHKV


def chunk_kda(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    g_BHTK: Tensor,
    beta_BHT: Tensor,
    initial_state_BHKV: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """(o_BHTV in v's dtype, final state_BHKV), as recurrent_kda gives them, chunk_size tokens at a time.

    Inside a chunk, with a_i = exp(g_i) and S0 the state before it, the rows u_i that the chunk writes solve
    (I + A) U = beta * (V - (K decayed from the chunk's start) S0), where A is strictly lower triangular with
    A_ij = beta_i * k_i . (k_j * a_{j+1} ... a_i). Decays between two tokens are products of the a's between
    them, never quotients of cumulative ones: every factor is in [0, 1], so no gate, however strong,
    overflows or cancels.
    """
    q, k, v, g, beta, S_BHKV = _prepare(q_BHTK, k_BHTK, v_BHTV, g_BHTK, beta_BHT, initial_state_BHKV)
    T, K = q.shape[2], q.shape[3]
    if T == 0:
        return v_BHTV, S_BHKV
    chunk_size = min(chunk_size, T)
    padding = -T % chunk_size
    if padding:
        q, k, v, g = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v, g))
        beta = F.pad(beta, (0, padding))
    # From here on [B, H, chunks, chunk_size, ...].
    q, k, v, g, beta = (x.unflatten(2, (-1, chunk_size)) for x in (q, k, v, g, beta))

    # decayed[..., j, :] is k_j after the decays up to token i; its products with k_i and q_i are row i of A
    # (before beta) and of P, the same matrix for outputs.
    a, kq = g.exp(), torch.stack((k, q), dim=-2)
    decayed = k[..., :1, :]
    rows = []
    for i in range(chunk_size):
        if i:
            decayed = torch.cat((decayed * a[..., i : i + 1, :], k[..., i : i + 1, :]), dim=-2)
        rows.append(F.pad(kq[..., i, :, :] @ decayed.transpose(-1, -2), (0, chunk_size - 1 - i)))
    A, P = torch.stack(rows, dim=-3).unbind(-2)

    from_start = g.cumsum(-2).exp()
    rhs = torch.cat((k * from_start, v), dim=-1) * beta.unsqueeze(-1)
    # solve_triangular reads A below its diagonal only and takes the diagonal as ones.
    solved = torch.linalg.solve_triangular(A * beta.unsqueeze(-1), rhs, upper=False, unitriangular=True)
    W, U = solved.split((K, v.shape[-1]), dim=-1)
    q, to_end, decayed = q * from_start, from_start[..., -1, :, None], decayed.transpose(-1, -2)

    outputs = []
    for n in range(q.shape[2]):
        u = U[:, :, n] - W[:, :, n] @ S_BHKV
        outputs.append(q[:, :, n] @ S_BHKV + P[:, :, n] @ u)
        S_BHKV = S_BHKV * to_end[:, :, n] + decayed[:, :, n] @ u
    return torch.cat(outputs, dim=2)[:, :, :T].to(v_BHTV.dtype), S_BHKV


def _pad(x_TH: Tensor, spans: list[slice]) -> Tensor:
    """[B, H, T, ...] of the spans' tokens. Zeros are inert: beta = 0 writes nothing, g = 0 decays nothing."""
    return torch.nn.utils.rnn.pad_sequence([x_TH[s] for s in spans], batch_first=True).transpose(1, 2)


def _normalise(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q = q * (q.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * q.shape[-1] ** -0.5
    k = k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    return q, k


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_BHKV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs in the dtype of the computation, q and k normalised, and the state to start from."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k = _normalise(q.to(dtype), k.to(dtype))
    if state_BHKV is None:
        state_BHKV = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    return q, k, v.to(dtype), g.to(dtype), beta.to(dtype), state_BHKV.to(dtype)
