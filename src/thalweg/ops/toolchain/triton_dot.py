"""A matrix product that means the same on the device and under Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit  # type: ignore[untyped-decorator]
def dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a @ b in fp32. The interpreter's bf16 product is wrong, so it gets fp32 operands."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def done(acc: tl.tensor) -> tl.tensor:
    """A product's sums, but a use of them: so Triton 3.6 waits for the product. It would otherwise let the next step of
    a loop overwrite registers with weights that the product under way still reads."""
    if INTERPRETED:
        return acc
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, is_pure=True, pack=1)
