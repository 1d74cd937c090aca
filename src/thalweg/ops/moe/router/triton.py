"""Norm and router where cuda.py does not serve: norm, products split over programs, or whole ones of the library
for many tokens, then one small program per token sums and chooses.

One launch, in which the last program to finish chooses, was slower at every size: its wait is longer than a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.router.reference import is_softmax
from thalweg.ops.norm.triton.rms import rms_norm
from thalweg.ops.toolchain.triton_launch import pdl_options

COLUMNS = 16  # of logits: a multiple of so many


@triton.jit
def logits_kernel(
    x_ptr,
    w_ptr,
    partial_ptr,  # [splits, T, E] fp32
    T,
    x_stride,
    w_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    if PDL:
        gdc_launch_dependents()
    experts = block * BLOCK_E + tl.arange(0, BLOCK_E)
    cols = split * BLOCK_D + tl.arange(0, BLOCK_D)
    w_ptrs = w_ptr + tl.minimum(experts, E - 1)[None, :] * w_stride + cols[:, None]
    w = tl.load(w_ptrs, mask=(cols < D)[:, None], other=0.0)
    if PDL:
        gdc_wait()
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    x_ptrs = x_ptr + tl.minimum(tokens, T - 1)[:, None] * x_stride + cols[None, :]
    x = tl.load(x_ptrs, mask=(cols < D)[None, :], other=0.0)
    logits = tl.dot(x, w, input_precision="ieee")
    here = (tokens < T)[:, None] & (experts < E)[None, :]
    tl.store(partial_ptr + (split * T + tokens)[:, None] * E + experts[None, :], logits, mask=here)


@triton.jit
def _competes(choice, G2: tl.constexpr, S2: tl.constexpr, TOP_G: tl.constexpr):
    """Whether an expert is in one of the TOP_G groups whose two best have the largest sum; of equals, the first."""
    of_group = tl.reshape(choice, [G2, S2])
    most = tl.max(of_group, 1)
    place = tl.arange(0, S2)[None, :]
    first = tl.min(tl.where(of_group == most[:, None], place, S2), 1)
    score = most + tl.max(tl.where(place == first[:, None], float("-inf"), of_group), 1)
    # The same once more along the other axis.
    group = tl.arange(0, G2)
    same = group[:, None] == group[None, :]
    along = tl.max(tl.where(same, score[:, None], float("-inf")), 0)
    equal = (along[None, :] == score[:, None]) & (group[None, :] < group[:, None])
    before = (along[None, :] > score[:, None]) | equal
    kept = tl.sum(before.to(tl.int32), 1) < TOP_G
    return tl.reshape(tl.broadcast_to(kept[:, None], [G2, S2]), [G2 * S2])


@triton.jit(do_not_specialize=["split_stride"])
def choose_kernel(
    partial_ptr,  # [SPLITS, T, E or more] fp32; column E of a gate
    bias_ptr,
    weights_ptr,
    ids_ptr,
    scale,
    split_stride,
    row_stride,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    G: tl.constexpr,
    TOP_G: tl.constexpr,
    G2: tl.constexpr,  # G as a power of two
    S2: tl.constexpr,  # experts of a group as a power of two
    K2: tl.constexpr,  # K + SHARED as a power of two
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    E2: tl.constexpr = G2 * S2
    S: tl.constexpr = E // G
    place = tl.arange(0, E2)
    columns = place // S2 * S + place % S2
    inside = (place % S2 < S) & (columns < E)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    logits = tl.zeros([E2], tl.float32)
    gate = 0.0
    for s in tl.static_range(SPLITS):
        row_ptr = partial_ptr + s * split_stride + token * row_stride
        logits += tl.load(row_ptr + columns, mask=inside, other=0.0)
        if GATED:
            gate += tl.load(row_ptr + E)
    if SOFTMAX:
        logits = tl.where(inside, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores + bias
    # NaN ranks last and equals rank by index, so that every id is in range and different from the others.
    choice = tl.where(choice == choice, choice, float("-inf"))
    if G > 1:
        choice = tl.where(_competes(tl.where(inside, choice, float("-inf")), G2, S2, TOP_G), choice, float("-inf"))
    bits = choice.to(tl.int32, bitcast=True)
    # As integers, in the same order: a warp finds the largest of those in one instruction.
    order = tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -(2**31))
    slots = tl.arange(0, K2)
    ids = E - K + slots
    for j in tl.static_range(K):
        best = tl.min(tl.where(order == tl.max(order, 0), columns, E), 0)
        order = tl.where(columns == best, -(2**31), order)
        ids = tl.where(slots == j, best, ids)
    routed = tl.gather(scores, tl.where(slots < K, ids // S * S2 + ids % S, 0), 0)
    if RENORMALIZE:
        routed = routed / (tl.sum(tl.where(slots < K, routed, 0.0), 0) + 1e-20)
    shared = 1.0
    if GATED:
        shared = 1.0 / (1.0 + tl.exp(-gate))
    out = token * (K + SHARED) + slots
    tl.store(weights_ptr + out, tl.where(slots < K, routed * scale, shared), mask=slots < K + SHARED)
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=slots < K + SHARED)


def norm_router(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    w_ED: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    scale: float,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    num_shared: int = 0,
    known_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    normed_TD = rms_norm(x_TD, norm_weight_D, eps) if known_TD is None else known_TD
    logits_STE, groups = run_logits(normed_TD, w_ED), (n_group, topk_group)
    return normed_TD, *run_choose(logits_STE, bias_E, top_k, renormalize, scale, scoring, num_shared, groups)


def norm_router_by_library(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    w_ED: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    scale: float,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    num_shared: int = 0,
    known_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As norm_router, of a product that the library has whole."""
    normed_TD = rms_norm(x_TD, norm_weight_D, eps) if known_TD is None else known_TD
    as_fp32 = {} if x_TD.dtype == torch.float32 else {"out_dtype": torch.float32}
    # Of an odd number of columns, as a gate makes it, the library's product takes many times as long, and the choice
    # would read value by value. What the rows behind the weight's own hold is of no matter.
    rows, columns = len(w_ED), -(-len(w_ED) // COLUMNS) * COLUMNS
    if columns > rows:
        padded_ED = w_ED.new_empty(columns, w_ED.shape[1])
        padded_ED[:rows] = w_ED
        w_ED = padded_ED
    logits_TE = torch.mm(normed_TD, w_ED.t(), **as_fp32)[:, :rows]
    groups = (n_group, topk_group)
    return normed_TD, *run_choose(logits_TE[None], bias_E, top_k, renormalize, scale, scoring, num_shared, groups)


def run_choose(
    logits_STE: Tensor,
    bias_E: Tensor,
    top_k: int,
    renormalize: bool,
    scale: float,
    scoring: str,
    num_shared: int,
    groups: tuple[int, int] = (1, 1),
) -> tuple[Tensor, Tensor]:
    """(weights fp32, ids int64), both [T, top_k + num_shared], of parts of the logits, and of a gate's behind those of
    all experts; groups are how many there are, and how many compete."""
    (S, T, rows), E, k, device = logits_STE.shape, len(bias_E), top_k + num_shared, logits_STE.device
    weights_Tk = torch.empty(T, k, dtype=torch.float32, device=device)
    ids_Tk = torch.empty(T, k, dtype=torch.int64, device=device)
    softmax = is_softmax(scoring)
    if T:
        choose_kernel[(T,)](
            logits_STE,
            bias_E,
            weights_Tk,
            ids_Tk,
            float(scale),
            logits_STE.stride(0),
            logits_STE.stride(1),
            SPLITS=S,
            E=E,
            K=top_k,
            SHARED=num_shared,
            GATED=rows > E,
            SOFTMAX=softmax,
            RENORMALIZE=renormalize,
            G=groups[0],
            TOP_G=groups[1],
            G2=triton.next_power_of_2(groups[0]),
            S2=triton.next_power_of_2(E // groups[0]),
            K2=triton.next_power_of_2(k),
            num_warps=1 if E <= 256 else 4,
            **pdl_options(logits_STE),
        )
    return weights_Tk, ids_Tk


def run_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Parts of the logits, fp32 [splits, T, E]."""
    (T, D), E = x_TD.shape, w_ED.shape[0]
    block_t, block_e, block_d = 16, 32, 256
    splits = triton.cdiv(D, block_d)
    partial_STE = torch.empty(splits, T, E, dtype=torch.float32, device=x_TD.device)
    if T:
        logits_kernel[(triton.cdiv(E, block_e) * splits, triton.cdiv(T, block_t))](
            x_TD,
            w_ED,
            partial_STE,
            T,
            x_TD.stride(0),
            w_ED.stride(0),
            D=D,
            E=E,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_D=block_d,
            num_warps=4,
            **pdl_options(x_TD),
        )
    return partial_STE
