"""The kernels, of one program each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit(do_not_specialize=["N"])
def take_kernel(
    places_ptr,  # [PLACES, ROWS, width]
    turn_ptr,
    last_tokens_ptr,
    rows_ptr,  # [ROWS, width]
    token_ids_ptr,
    N,
    width,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    turn = tl.load(turn_ptr)
    n = tl.arange(0, BLOCK)
    here = n < N
    place_ptrs = places_ptr + turn * ROWS * width + n
    values = ()  # all are asked for before the first is there: each is a trip to the host
    for row in tl.static_range(ROWS):
        values = values + (tl.load(place_ptrs + row * width, mask=here, other=0, volatile=True),)
    tl.store(token_ids_ptr + n, tl.load(last_tokens_ptr + values[0], mask=here, other=0), mask=here)
    for row in tl.static_range(ROWS):
        tl.store(rows_ptr + row * width + n, values[row], mask=here)
    tl.debug_barrier()  # all have read the turn
    tl.store(turn_ptr, (turn + 1) % PLACES)


def take(places_SRN: Tensor, turn: Tensor, last_tokens: Tensor, rows_RN: Tensor, token_ids: Tensor) -> None:
    S, R, width = places_SRN.shape
    n = len(token_ids)
    block = triton.next_power_of_2(n)
    take_kernel[(1,)](
        places_SRN, turn, last_tokens, rows_RN, token_ids, n, width, PLACES=S, ROWS=R, BLOCK=block, num_warps=4
    )


@triton.jit(do_not_specialize=["N"])
def tell_kernel(
    ids_ptr,
    slots_ptr,
    turn_ptr,
    last_tokens_ptr,
    places_ptr,  # [PLACES, width]
    N,
    width,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.arange(0, BLOCK)
    here = n < N
    if PDL:
        gdc_wait()
    place = (tl.load(turn_ptr) + PLACES - 1) % PLACES
    ids = tl.load(ids_ptr + n, mask=here, other=0)
    tl.store(places_ptr + place * width + n, ids, mask=here)
    tl.store(last_tokens_ptr + tl.load(slots_ptr + n, mask=here, other=0), tl.maximum(ids, 0), mask=here)


def tell(ids: Tensor, slots: Tensor, turn: Tensor, last_tokens: Tensor, places_SN: Tensor) -> None:
    S, width = places_SN.shape
    block = triton.next_power_of_2(len(ids))
    tell_kernel[(1,)](
        ids,
        slots,
        turn,
        last_tokens,
        places_SN,
        len(ids),
        width,
        PLACES=S,
        BLOCK=block,
        num_warps=4,
        **pdl_options(ids),
    )
