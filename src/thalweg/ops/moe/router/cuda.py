"""Launches norm, router and choice in CUDA C++ (router.cu says how it works)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.moe.router.reference import is_softmax
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel

SOURCE = Path(__file__).with_name("router.cu")
BLOCKS = 16  # of a cluster, as in the source
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
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), E, k, device = x_TD.shape, len(bias_E), top_k + num_shared, x_TD.device
    normed_TD = torch.empty(T, D, dtype=x_TD.dtype, device=device)
    weights_Tk = torch.empty(T, k, dtype=torch.float32, device=device)
    ids_Tk = torch.empty(T, k, dtype=torch.int64, device=device)
    choice = {"K": top_k, "SHARED": num_shared, "SOFTMAX": is_softmax(scoring), "RENORMALIZE": renormalize}
    choice |= {"GROUPS": n_group, "TOP_GROUPS": topk_group, "PARTS": parts(E, D), "GATED": len(w_ED) > E}
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
    )
    return normed_TD, weights_Tk, ids_Tk
