"""Programmatic dependent launch for Triton kernels: a kernel starts while the one ahead drains, then waits for it.

The rules of a kernel with the constexpr PDL: it executes gdc_wait, always; before that it reads only weights and
writes nothing. It may read an input earlier where the kernel ahead, of the same op, lets its dependents start after
its own wait, and then not from L1; and where the op's contract says that an ordinary launch, which starts when all
before it has ended, lies between the call and whatever wrote that input.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def pdl_options(tensor: Tensor) -> dict[str, Any]:
    """Launch options for a kernel with the constexpr PDL; off on the CPU, where only the interpreter runs kernels."""
    return {"PDL": True, "launch_pdl": True} if tensor.is_cuda else {"PDL": False}
