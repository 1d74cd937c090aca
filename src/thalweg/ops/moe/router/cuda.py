"""Launches norm, router and choice in CUDA C++: of few tokens, and of short prompts (router.cu and prompts.cu say how
they work)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.ops.moe.router.reference import empty_results, is_softmax
from thalweg.ops.toolchain.counters import counters
from thalweg.ops.toolchain.cuda_build import CudaKernel, aligned_rows, cuda_kernel
from thalweg.ops.toolchain.tensor_map import tensor_map
from thalweg.ops.toolchain.triton_compile import rehearsing
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("router.cu")
PROMPTS = SOURCE.with_name("prompts.cu")
BLOCKS = 16  # of a cluster, as in the source
PROMPT_WARPS, SPLIT = 16, 2  # of a block, and parts of the columns, of prompts.cu
PROMPT_TOKENS = (16, 40)  # of a cluster
MAX_PROMPT_WIDTH, MAX_PROMPT_TOKENS = 2560, 1024  # of more tokens clusters take turns
MAX_PROMPT_BYTES = 227 * 1024  # of shared memory that a block may ask for
MAX_WIDTH, MAX_EXPERTS, MAX_SLOTS = 4096, 512, 32
MAX_WIDTH_IN_PARTS, MAX_EXPERTS_IN_PARTS = 7168, 384  # of which a thread has registers for a half
MAX_SHARED_BYTES = 220 * 1024  # the rest of a multiprocessor's 227 KB is for what is not counted in shared_bytes


def parts(E: int, D: int) -> int:
    """In how many parts a block's weights come."""
    return 1 if D <= MAX_WIDTH and shared_bytes(E, D, 16, 1) <= MAX_SHARED_BYTES else 2


def tokens_per_cluster(T: int, parts: int = 1) -> int:
    """Few, for a short wait; but no more clusters than an H200 has places for, unless registers are short."""
    return 8 if T <= 32 or parts == 2 else 16


def shared_bytes(E: int, D: int, tokens: int, parts: int = 1) -> int:
    """What a launch asks for: the blocks' parts of a token's logits, and a block's columns of tokens and weights."""

    def row(columns: int) -> int:
        return 2 * (columns + (0 if columns // 16 % 2 else 16))

    columns = D // BLOCKS
    return 4 * BLOCKS * E + row(columns) * tokens + row(columns // parts) * E


def refusal(E: int, D: int, slots: int, groups: int = 1) -> str | None:
    """Why E experts in `groups` of width D, `slots` a token, are not served."""
    if groups not in (1, E // 32):
        return f"needs experts in one group or in groups of 32, not {E} in {groups}"
    if D % 256 or not 0 < D <= MAX_WIDTH_IN_PARTS or E % 32 or not 0 < E <= MAX_EXPERTS or slots > MAX_SLOTS:
        return (
            f"needs rows of a multiple of 256 up to {MAX_WIDTH_IN_PARTS}, a multiple of 32 experts up to {MAX_EXPERTS} "
            f"and at most {MAX_SLOTS} of them a token, not {D}, {E} and {slots}"
        )
    halves = parts(E, D) == 2
    if halves and (D % 512 or E > MAX_EXPERTS_IN_PARTS or shared_bytes(E, D, 8, 2) > MAX_SHARED_BYTES):
        return f"needs a thirty-second of the weights in shared memory, and as much in registers, not {E} x {D}"
    return None


class PromptCut(NamedTuple):
    """How a cluster divides norm, router and choice: tokens, parts of the experts, and stages of a block's ring."""

    tokens: int
    parts: int
    stages: int
    shared_bytes: int


def prompt_cut(T: int, E: int, D: int, norm_words: int, processors: int) -> PromptCut:
    """For T tokens: few for each cluster, if there is room for all clusters at a time, which fill four multiprocessors
    of five. Stages are as many as find room in shared memory beside all else that the source lays out there."""
    parts = max(1, E // 128)
    places = processors * 4 // 5 // (parts * SPLIT)
    tokens = next((n for n in PROMPT_TOKENS if places * n >= T), PROMPT_TOKENS[-1])
    columns, own, stage = D // SPLIT, tokens // (parts * SPLIT), 128 * E // parts
    fixed = 2 * columns * (tokens + norm_words) + SPLIT * own * (4 * E + 16) + 16 * tokens + 16
    stages = min(columns // 64, (MAX_PROMPT_BYTES - fixed) // (stage + 16))
    return PromptCut(tokens, parts, stages, fixed + stages * (stage + 16))


def prompt_refusal(E: int, D: int, slots: int, groups: int = 1) -> str | None:
    """Why prompts for E experts in `groups` of width D, `slots` a token, are not served."""
    if groups != 1:
        return f"needs experts in one group, not in {groups}"
    if E not in (64, 128, 256) or slots > MAX_SLOTS:
        return f"needs 64, 128 or 256 experts and at most {MAX_SLOTS} of them a token, not {E} and {slots}"
    if D % 128 or not 640 <= D <= MAX_PROMPT_WIDTH:
        return f"needs rows of a multiple of 128 from 640 up to {MAX_PROMPT_WIDTH}, not {D}"
    return None


def norm_router_of_prompts(
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
    known_TD: Tensor | None = None,  # computed all the same
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), E, device = x_TD.shape, len(bias_E), x_TD.device
    normed_TD, weights_Tk, ids_Tk = empty_results(x_TD, top_k + num_shared)
    if T == 0:
        return normed_TD, weights_Tk, ids_Tk
    x_TD = aligned_rows(x_TD)
    norm_words, processors = norm_weight_D.element_size() // 2, multiprocessors(device)
    macros = {"E": E, "D": D, "K": top_k, "SHARED": num_shared, "GATED": len(w_ED) > E, "SOFTMAX": is_softmax(scoring)}
    macros |= {"RENORMALIZE": renormalize, "NORM_FLOAT": norm_words == 2, "SPLIT": SPLIT, "WARPS": PROMPT_WARPS}
    macros = {name: int(value) for name, value in macros.items()}

    def kernel(cut: PromptCut) -> CudaKernel:
        more = {"TOKENS": cut.tokens, "PARTS": cut.parts, "STAGES": cut.stages}
        return cuda_kernel(PROMPTS, "router_of_prompts", 32 * PROMPT_WARPS, device, **macros, **more)

    if rehearsing():  # a step may have more tokens than the longest that is rehearsed
        for most in (1, MAX_PROMPT_TOKENS):
            kernel(prompt_cut(most, E, D, norm_words, processors))
    cut = prompt_cut(T, E, D, norm_words, processors)
    kernel(cut).launch(
        (cut.parts * SPLIT * -(-T // cut.tokens), 1, 1),
        cut.shared_bytes,
        (None, tensor_map(w_ED.unsqueeze(1), E // cut.parts)),
        x_TD,
        norm_weight_D,
        w_ED,
        bias_E,
        normed_TD,
        weights_Tk,
        ids_Tk,
        (c_longlong, x_TD.stride(0)),
        (c_int, T),
        (c_float, eps),
        (c_float, scale),
    )
    return normed_TD, weights_Tk, ids_Tk


class ForExperts(NamedTuple):
    """What experts in float8 need of a router: x's norm in e4m3, [T, D], with a scale for each 128 columns,
    [T, D / 128], and the pairs of each expert, the last one's first: how many, and which, [E, T]. Counts are to be 0
    again once they have been read."""

    narrow_TD: Tensor
    scales_TB: Tensor
    counts_E: Tensor
    lists_ET: Tensor


def for_experts(x_TD: Tensor, experts: int) -> ForExperts:
    """Room for what `norm_router` writes of x [T, D], bf16, besides its results. `experts` counts shared ones too."""
    (T, D), device = x_TD.shape, x_TD.device
    return ForExperts(
        torch.empty(T, D, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(T, BLOCKS, dtype=torch.float32, device=device),
        counters("expert pairs", device, experts),
        torch.empty(experts, T, dtype=torch.int32, device=device),
    )


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
    known_TD: Tensor | None = None,  # computed all the same
    more: ForExperts | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), E, device = x_TD.shape, len(bias_E), x_TD.device
    normed_TD, weights_Tk, ids_Tk = empty_results(x_TD, top_k + num_shared)
    choice = {"K": top_k, "SHARED": num_shared, "SOFTMAX": is_softmax(scoring), "RENORMALIZE": renormalize}
    choice |= {"GROUPS": n_group, "TOP_GROUPS": topk_group, "PARTS": parts(E, D), "GATED": len(w_ED) > E}
    choice["FOR_EXPERTS"] = more is not None
    choice["NORM_FLOAT"] = norm_weight_D.dtype == torch.float32
    if T == 0:
        return normed_TD, weights_Tk, ids_Tk
    x_TD, tokens = aligned_rows(x_TD), tokens_per_cluster(T, choice["PARTS"])
    macros = {name: int(value) for name, value in choice.items()}
    kernel = cuda_kernel(SOURCE, "norm_router", E, device, E=E, D=D, TOKENS=tokens, **macros)
    kernel.launch(
        (BLOCKS * -(-T // tokens), 1, 1),
        shared_bytes(E, D, tokens, choice["PARTS"]),
        x_TD,
        norm_weight_D,
        w_ED,
        bias_E,
        normed_TD,
        weights_Tk,
        ids_Tk,
        (c_longlong, x_TD.stride(0)),
        (c_int, T),
        (c_float, eps),
        (c_float, scale),
        *(more or ()),
    )
    return normed_TD, weights_Tk, ids_Tk
