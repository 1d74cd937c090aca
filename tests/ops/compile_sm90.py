"""Compiles a Triton kernel for Hopper where there is no GPU, and reads what ptxas says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_sm90(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> Compiled:
    """`types` of the arguments that are not constexpr, as Triton writes them: "*bf16", "i32". All divide by 16.

    The kernel is in Triton or in Gluon, where descriptors of bulk copies have `descriptor` types.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] in "*i"}
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(kernel, signature, constexprs=constants, attrs=attrs)
    result = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    ptx = result.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", f"{folder}/k.ptx", "-o", f"{folder}/k.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", log).group(1))  # type: ignore[union-attr]
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return Compiled(ptx, registers, spilled, result.metadata.shared)


def descriptor(*block: int) -> str:
    """The type of a bf16 descriptor whose copies have these sizes and rows of 128 bytes or a multiple."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return f"tensordesc<bf16[{', '.join(map(str, block))}],{NVMMASharedLayout(128, 16, len(block))!r}>"
