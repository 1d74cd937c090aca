"""Tensor maps: what the copy unit of a Hopper GPU is told of a tensor whose tiles it moves to shared memory."""

from __future__ import annotations

from ctypes import Structure, addressof, byref, c_char, c_int, c_uint32, c_uint64, c_void_p
from functools import lru_cache

from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.toolchain.launch import driver

BFLOAT16, NO_INTERLEAVE, SWIZZLE_128_BYTES, L2_256_BYTES, ZEROS = 9, 0, 3, 3, 0  # of the driver's enumerations


class TensorMap(Structure):
    _fields_ = [("words", c_uint64 * 16)]


def tensor_map(x_RHX: Tensor, rows: int, heads: int = 1) -> TensorMap:
    """For copies of [rows, heads, 64] bf16 values, whose 128 bytes are swizzled. Rows past the tensor's end are zeros.

    Strides but the last are multiples of 16 bytes, as is the address. An argument of CudaKernel.launch, with type None.
    """
    return _tensor_map(x_RHX.data_ptr(), tuple(x_RHX.shape), x_RHX.stride(), rows, heads)


@lru_cache(maxsize=4096)  # weights and caches of all layers, and what a step's layers have alike
def _tensor_map(address: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, heads: int) -> TensorMap:
    memory = (c_char * 192)()
    result = TensorMap.from_buffer(memory, -addressof(memory) % 64)  # where the driver wants it
    code = driver().cuTensorMapEncodeTiled(
        byref(result),
        c_int(BFLOAT16),
        c_uint32(3),
        c_void_p(address),
        (c_uint64 * 3)(*reversed(shape)),
        (c_uint64 * 2)(2 * strides[1], 2 * strides[0]),
        (c_uint32 * 3)(64, heads, rows),
        (c_uint32 * 3)(1, 1, 1),
        c_int(NO_INTERLEAVE),
        c_int(SWIZZLE_128_BYTES),
        c_int(L2_256_BYTES),
        c_int(ZEROS),
    )
    if code:
        raise KernelError(f"no tensor map of {shape} values with strides {strides}, {rows} rows at a time: code {code}")
    return result
