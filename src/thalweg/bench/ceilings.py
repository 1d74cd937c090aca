"""What the machine at hand can do: copy bandwidth and matrix rate, measured here, since data sheets promise more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from statistics import median

import torch

from thalweg.engine.offline import OfflineEngine
from thalweg.models.parts.part import Cost
from thalweg.ops.linear import LINEAR, LinearDims
from thalweg.ops.registry import Resolver, Where
from thalweg.recorder.orders import MeasureLink

REPEATS = 9


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The machine's measured rates: bytes per second of a copy within the device's memory, reads and writes counted;
    flop per second of a product; bytes per second that a rank sends while all ranks do, infinite for one rank."""

    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float = inf

    def floor_s(self, costs: Iterable[Cost]) -> float:
        """The time that neither traffic nor arithmetic of one operation after another can go below."""
        return sum(
            max(c.bytes / self.bytes_per_s, c.flops / (c.rate * self.flops_per_s), c.sent / self.link_bytes_per_s)
            for c in costs
        )

    def describe(self) -> dict[str, str | int]:
        """Plain values for a table and a results file."""
        return {
            "copy_GB_per_s": round(self.bytes_per_s / 1e9),
            "matrix_TFLOP_per_s": f"{self.flops_per_s / 1e12:.1f}",
            **({"link_GB_per_s": f"{self.link_bytes_per_s / 1e9:.1f}"} if self.link_bytes_per_s < inf else {}),
        }

    def with_link(self, engine: OfflineEngine) -> Ceilings:
        """The same with the link rate between the ranks of `engine`: all-reduces of 256 MiB (CPU: 16 MiB), or exchanges
        of as much between data-parallel ones."""
        if engine.info.tensor_parallel_size * engine.info.data_parallel_size == 1:
            return self
        size = (16 if engine.info.device == "cpu" else 256) << 20
        return replace(self, link_bytes_per_s=engine.order(MeasureLink(size)).result())


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A copy of 4 GiB (CPU: 256 MiB) and a square product of 8192 (CPU: 1024) on random data; the median of a few. The
    product is torch's or, on a CPU, that of op "linear" if it is faster."""
    on_gpu = device.type == "cuda"
    elements = (4 << 30 if on_gpu else 256 << 20) // 4
    pair = torch.ones(2, elements, device=device)
    copy_s = _seconds(lambda: pair[1].copy_(pair[0]), device)
    n = 8192 if on_gpu else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product_s = _seconds(lambda: torch.mm(a, b), device)
    if not on_gpu:
        where = Where("cpu", str(dtype).removeprefix("torch."))
        linear = Resolver().resolve(LINEAR, where, LinearDims(D=n, O=n))
        product_s = min(product_s, _seconds(lambda: linear(a, b), device))
    return Ceilings(2 * 4 * elements / copy_s, 2 * n**3 / product_s)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    samples = []
    for _ in range(2 + REPEATS):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        samples.append(time.perf_counter() - began)
    return median(samples[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
