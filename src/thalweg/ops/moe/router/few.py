"""Launches norm, router and choice of very few tokens in CUDA C++ (few.cu says how it works)."""

from __future__ import annotations

from ctypes import c_float, c_longlong
from pathlib import Path

from torch import Tensor

from thalweg.ops.moe.router.reference import empty_results, is_softmax
from thalweg.ops.toolchain.counters import counters
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel

SOURCE = Path(__file__).with_name("few.cu")
WARPS, MAX_VECTORS = 14, 2  # of a block; 16 bytes of a row that a thread has registers for
ROWS = 3  # experts of a block, as many as it has registers for
MAX_TOKENS, MAX_EXPERTS, MAX_SLOTS = 1, 512, 32


def refusal(E: int, D: int, slots: int) -> str | None:
    """Why E experts of width D, `slots` a token, are not served."""
    vectors, rest = divmod(D, 8 * 32 * WARPS)
    if rest or not 0 < vectors <= MAX_VECTORS or E % 32 or not 0 < E <= MAX_EXPERTS or slots > MAX_SLOTS:
        return (
            f"needs rows of {256 * WARPS} or {512 * WARPS}, a multiple of 32 experts up to {MAX_EXPERTS} and at most "
            f"{MAX_SLOTS} of them a token, not {D}, {E} and {slots}"
        )
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
    known_TD: Tensor | None = None,  # computed all the same
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), E, device = x_TD.shape, len(bias_E), x_TD.device
    normed_TD, weights_Tk, ids_Tk = empty_results(x_TD, top_k + num_shared)
    if T == 0:
        return normed_TD, weights_Tk, ids_Tk
    x_TD = aligned_rows(x_TD)
    macros = {"E": E, "D": D, "K": top_k, "SHARED": num_shared, "ROWS": ROWS, "WARPS": WARPS}
    macros |= {"SOFTMAX": int(is_softmax(scoring)), "RENORMALIZE": int(renormalize)}
    cuda_kernel(SOURCE, "norm_router", 32 * WARPS, device, **macros).launch(
        (-(-E // ROWS), T, 1),
        0,
        x_TD,
        norm_weight_D,
        w_ED,
        bias_E,
        normed_TD,
        weights_Tk,
        ids_Tk,
        counters("norm_router", device, 2 * T * E),  # logits, and whether they have come
        (c_longlong, x_TD.stride(0)),
        (c_float, eps),
        (c_float, scale),
    )
    return normed_TD, weights_Tk, ids_Tk
