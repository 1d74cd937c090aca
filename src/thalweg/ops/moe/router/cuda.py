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
MAX_SHARED_BYTES = 220 * 1024  # the rest of a multiprocessor's 227 KB is for what is not counted in shared_bytes


def tokens_per_cluster(T: int) -> int:
    """Few, for a short wait; but no more clusters than an H200 has places for."""
    return 8 if T <= 32 else 16


def shared_bytes(E: int, D: int, tokens: int) -> int:
    """What a launch asks for: the blocks' parts of a token's logits, and a block's columns of tokens and weights."""
    columns = D // BLOCKS
    row = 2 * (columns + (0 if columns // 16 % 2 else 16))
    return 4 * BLOCKS * E + row * (tokens + E)


def refusal(E: int, D: int, slots: int) -> str | None:
    """Why E experts of width D, `slots` a token, are not served."""
    if D % 256 or not 0 < D <= MAX_WIDTH or E % 32 or not 0 < E <= MAX_EXPERTS or slots > MAX_SLOTS:
        return (
            f"needs rows of a multiple of 256 up to {MAX_WIDTH}, a multiple of 32 experts up to {MAX_EXPERTS} and at "
            f"most {MAX_SLOTS} of them a token, not {D}, {E} and {slots}"
        )
    if shared_bytes(E, D, 16) > MAX_SHARED_BYTES:
        return f"needs a sixteenth of the weights in shared memory, not {E} x {D}"
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
    (T, D), E, k, device = x_TD.shape, w_ED.shape[0], top_k + num_shared, x_TD.device
    normed_TD = torch.empty(T, D, dtype=x_TD.dtype, device=device)
    weights_Tk = torch.empty(T, k, dtype=torch.float32, device=device)
    ids_Tk = torch.empty(T, k, dtype=torch.int64, device=device)
    choice = {"K": top_k, "SHARED": num_shared, "SOFTMAX": is_softmax(scoring), "RENORMALIZE": renormalize}
    if T == 0:
        return normed_TD, weights_Tk, ids_Tk
    x_TD, tokens = aligned_rows(x_TD), tokens_per_cluster(T)
    macros = {name: int(value) for name, value in choice.items()}
    kernel = cuda_kernel(SOURCE, "norm_router", E, device, E=E, D=D, TOKENS=tokens, **macros)
    kernel.launch(
        (BLOCKS * -(-T // tokens), 1, 1),
        shared_bytes(E, D, tokens),
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
