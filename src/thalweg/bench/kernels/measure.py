"""Runs a case: every candidate is checked first, and timed only if its result is right."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.bench.ceilings import Ceilings
from thalweg.bench.kernels.case import Arguments, Candidate, Case, Setting
from thalweg.bench.kernels.timing import time_eager, time_graph, time_host
from thalweg.bench.spread import Spread

# ||result - first|| / ||first||: each of the two is within half of it of the truth, in 16 bits and in 32.
TOLERANCE_16_BITS, TOLERANCE_32_BITS = 0.01, 1e-4
MOST_UNEQUAL = 0.01  # share of integers (expert and token ids) that differ: a tie may be broken otherwise
SLICE = 1 << 26
CACHES, MOST_COPIES = 8, 64  # a graph rotates over arguments of 8 times what the L2 cache holds


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate of one case. `us` is None where `refusal` says why it cannot run here, or `wrong` what is wrong.

    error is relative to the first candidate that runs, equal_bits to the one the case names; None for itself. floor_us
    is the call's bytes or arithmetic, whichever `bound` names, at the machine's measured rates; None without either.
    """

    op: str
    case: str
    implementation: str
    timed: str
    serves: bool = False  # whether the model runs it
    error: float | None = None
    equal_bits: bool | None = None
    us: Spread | None = None
    times_faster: float | None = None  # than the first candidate
    num_bytes: float = 0.0
    flops: float = 0.0
    bound: str | None = None
    floor_us: float | None = None
    refusal: str = ""
    wrong: str = ""
    published: str = ""  # figures of the same comparison, on another machine

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def measure_case(case: Case, setting: Setting, ceilings: Ceilings) -> Iterator[Measurement]:
    """A Measurement for each candidate, in their order."""
    floor = _floor(case, ceilings) if case.num_bytes or case.flops else {}
    outputs: dict[str, list[Tensor]] = {}
    copies: list[Arguments] = []
    first_us: float | None = None
    for candidate in case.candidates:
        timed = _how(case, candidate, setting.device)
        of_case = {"published": case.published, **floor}
        result = functools.partial(Measurement, case.op, case.label, candidate.name, timed, candidate.serves, **of_case)
        if candidate.refusal is not None:
            yield result(refusal=candidate.refusal)
            continue
        try:
            found = _outputs(case, candidate)
            checked = _compare(case, candidate, found, outputs)
            wrong = _what_is_wrong(checked.pop("unequal"), checked["error"], setting.dtype, candidate.rounding)
            if wrong:
                yield result(**checked, wrong=wrong)
                continue
            copies = copies or [case.make(i) for i in range(_num_copies(case, setting.device))]
            us = _time(candidate, copies, timed, setting.device)
        except torch.OutOfMemoryError:
            yield result(refusal="out of memory; lower --batch-size or --context")
            continue
        first_us = first_us or us.median
        yield result(**checked, us=us, times_faster=first_us / us.median)


def _floor(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    bytes_s, flops_s = case.num_bytes / ceilings.bytes_per_s, case.flops / (case.rate * ceilings.flops_per_s)
    return {
        "num_bytes": case.num_bytes,
        "flops": case.flops,
        "bound": "bytes" if bytes_s >= flops_s else "flops",
        "floor_us": 1e6 * max(bytes_s, flops_s),
    }


def _how(case: Case, candidate: Candidate, device: torch.device) -> str:
    if case.timed == "graph" and not (device.type == "cuda" and candidate.capturable):
        return "eager"
    return case.timed


def _outputs(case: Case, candidate: Candidate) -> list[Tensor]:
    """What the candidate returns and changes, given arguments of its own."""
    arguments = case.make(0)
    returned = arguments.of(candidate.fn)()
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [*returned, *case.changed(arguments)]


def _compare(case: Case, candidate: Candidate, found: list[Tensor], outputs: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Fields error, equal_bits and unequal of `found`, which joins `outputs` where later ones are compared with it."""
    expected = next(iter(outputs.values()), None)
    same_bits = outputs.get(case.same_bits_as) if case.same_bits_as else expected
    if expected is None or candidate.name == case.same_bits_as:
        outputs[candidate.name] = found
    if expected is None:
        return {"error": None, "equal_bits": None, "unequal": 0.0}
    pairs = list(zip(found, expected, strict=True))
    errors = [_error(x, y) for x, y in pairs if y.is_floating_point()]
    return {
        "error": float(torch.tensor(errors or [0.0], dtype=torch.float64).max()),  # Python's max passes over NaN
        "equal_bits": None if same_bits is None else all(map(_same_bits, found, same_bits)),
        "unequal": max(_unequal(x, y) for x, y in pairs),
    }


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)


def _error(x: Tensor, expected: Tensor) -> float:
    """||x - expected|| / ||expected||. NaN, which passes no comparison, where either has one; 1 for other shapes."""
    if x.shape != expected.shape:
        return 1.0
    difference = norm = 0.0
    # In slices: fp64 copies of the largest states would not fit beside them.
    for a, b in zip(x.reshape(-1).split(SLICE), expected.reshape(-1).split(SLICE), strict=True):
        difference += float((a.double() - b.double()).square().sum())
        norm += float(b.double().square().sum())
    return float((difference / norm) ** 0.5) if norm else float(difference > 0)


def _unequal(x: Tensor, expected: Tensor) -> float:
    if expected.is_floating_point():
        return 0.0
    return float((x != expected).float().mean()) if x.shape == expected.shape else 1.0


def _what_is_wrong(unequal: float, error: float | None, dtype: torch.dtype, rounding: float) -> str:
    tolerance = (TOLERANCE_32_BITS if dtype.itemsize == 4 else TOLERANCE_16_BITS) + rounding
    if error is not None and not error <= tolerance:
        return f"error {error:.2g}, at most {tolerance:g} expected"
    if unequal > MOST_UNEQUAL:
        return f"{unequal:.1%} of the integers differ"
    return ""


def _num_copies(case: Case, device: torch.device) -> int:
    """Enough arguments that none is in the cache when its turn comes again; on a CPU one, which is warm."""
    if device.type != "cuda" or case.timed == "host":
        return 1
    cold = CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_COPIES, int(cold / max(case.num_bytes, 1)) + 1))


def _time(candidate: Candidate, copies: Sequence[Arguments], timed: str, device: torch.device) -> Spread:
    calls = [arguments.of(candidate.fn) for arguments in copies]
    if timed == "host":
        return time_host(calls[0])
    return time_graph(calls, device) if timed == "graph" else time_eager(calls, device)
