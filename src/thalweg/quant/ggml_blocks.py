"""GGML's blocks to numbers, in plain torch: uint8 [N, bytes of a block] to float32 [N, elements of a block]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.quant.ggml_types import GgmlType

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = [1 << i for i in range(8)]
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def dequantize(rows_NB: Tensor, kind: GgmlType, dtype: torch.dtype) -> Tensor:
    """The elements [..., D] in `dtype` of rows of blocks, uint8 [..., bytes of a row]; rounded once from float32."""
    if kind.is_plain:
        stored = PLAIN_DTYPES[kind.name]
        elements: Tensor = _aligned(rows_NB, stored.itemsize).view(stored)
    else:
        elements = _DECODERS[kind.name](rows_NB.reshape(-1, kind.bytes)).view(*rows_NB.shape[:-1], -1)
    return elements.to(dtype)


def _aligned(bytes_NB: Tensor, size: int) -> Tensor:
    """Contiguous, and where a view of items of `size` bytes can begin."""
    x = bytes_NB.contiguous()
    return x.clone() if x.storage_offset() % size else x


def _half(b: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, [N, 1]."""
    return b[:, at : at + 2].clone().view(torch.float16).float()


def _nibbles(b: Tensor) -> Tensor:
    """[N, n] bytes to [N, 2, n]: low nibbles, then high ones."""
    return torch.stack([b & 15, b >> 4], dim=1)


def _bits(b: Tensor, width: int) -> Tensor:
    """[N, n] bytes to [N, 8 / width, n] numbers of `width` bits, the lowest first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=b.device)
    shifted: Tensor = b[:, None] >> shifts[:, None]
    shifted &= 2**width - 1
    return shifted


def _fifth_bits(b: Tensor) -> Tensor:
    """Four bytes, bit e of which belongs to element e of 32, as [N, 32] numbers 0 and 16."""
    bits = b.repeat_interleave(8, dim=1).bitwise_and_(torch.tensor(_BITS * 4, dtype=torch.uint8, device=b.device))
    return bits.ne_(0).mul_(16)


def _q4_0(b: Tensor) -> Tensor:
    return _nibbles(b[:, 2:]).flatten(1).float().sub_(8).mul_(_half(b, 0))


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).flatten(1).float() + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return (_nibbles(b[:, 6:]).flatten(1) | _fifth_bits(b[:, 2:6])).float().sub_(16).mul_(_half(b, 0))


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]).flatten(1) | _fifth_bits(b[:, 4:8])).float() + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float().mul_(_half(b, 0))


def _scales_and_mins(s: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes to eight scales and eight minima of six bits each, float32 [N, 8, 1]."""
    a, b, c = s.view(-1, 3, 4).unbind(1)
    scales = torch.cat([a & 63, (c & 15) | (a >> 6) << 4], dim=1)
    mins = torch.cat([b & 63, (c >> 4) | (b >> 6) << 4], dim=1)
    return scales.float().unsqueeze(-1), mins.float().unsqueeze(-1)


def _affine(b: Tensor, q_N8E: Tensor) -> Tensor:
    """d * scale * q - dmin * min of eight sub-blocks of 32."""
    scales, mins = _scales_and_mins(b[:, 4:16])
    d, dmin = _half(b, 0)[:, None], _half(b, 2)[:, None]
    return q_N8E.float().mul_(d * scales).sub_(dmin * mins).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _affine(b, _nibbles(b[:, 16:].reshape(-1, 32)).view(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, 48:].reshape(-1, 32)).view(-1, 8, 32)
    return _affine(b, low | _bits(b[:, 16:48], 1) << 4)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].reshape(-1, 64)).view(-1, 2, 4, 32)
    high = _bits(b[:, 128:192].reshape(-1, 32), 2).view(-1, 2, 4, 32)
    q = (low | high << 4).view(-1, 16, 16).float().sub_(32)
    scales = b[:, 192:208].contiguous().view(torch.int8).float().unsqueeze(-1)
    return q.mul_(_half(b, 208)[:, None] * scales).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    low = _bits(b[:, 32:96].reshape(-1, 32), 2).view(-1, 8, 32)
    q = low.float() - 4 * (1 - _bits(b[:, :32], 1).float())
    s = b[:, 96:108]
    low_four = _nibbles(s[:, :8]).flatten(1)
    high_two = _bits(s[:, 8:], 2).flatten(1)
    scales = (low_four | high_two << 4).float() - 32
    return (_half(b, 108)[:, None] * scales.unsqueeze(-1) * q.view(-1, 16, 16)).flatten(1)


def _q2_k(b: Tensor) -> Tensor:
    q = _bits(b[:, 16:80].reshape(-1, 32), 2).view(-1, 16, 16).float()
    scales, mins = (x.float().unsqueeze(-1) for x in _nibbles(b[:, :16]).unbind(1))
    return (_half(b, 80)[:, None] * scales * q - _half(b, 82)[:, None] * mins).flatten(1)


def _table(values: tuple[int, ...], q: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=q.device)[q.int()]


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _table(_IQ4, _nibbles(b[:, 2:]).flatten(1))


def _iq4_xs(b: Tensor) -> Tensor:
    low = _nibbles(b[:, 4:8]).transpose(1, 2).flatten(1)  # the scale of sub-block i is nibble i
    high = _bits(b[:, 2:4], 2).transpose(1, 2).flatten(1)
    scales = (low | high << 4).float() - 32
    q = _table(_IQ4, _nibbles(b[:, 8:].reshape(-1, 16)).view(-1, 8, 32))
    return (_half(b, 0)[:, None] * scales.unsqueeze(-1) * q).flatten(1)


def _mxfp4(b: Tensor) -> Tensor:
    exponent = b[:, :1].int() - 128
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return scale * _table(_MXFP4, _nibbles(b[:, 1:]).flatten(1))


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
