"""The suites, and how one is run."""

from __future__ import annotations

from collections.abc import Iterator

from thalweg.bench.ceilings import Ceilings
from thalweg.bench.kernels.case import Builder, Setting
from thalweg.bench.kernels.decode import DECODE
from thalweg.bench.kernels.measure import Measurement, measure_case
from thalweg.bench.kernels.prefill import PREFILL
from thalweg.bench.kernels.seeds import SEEDS
from thalweg.errors import ConfigError

SUITES: dict[str, dict[str, Builder]] = {"seeds": SEEDS, "decode": DECODE, "prefill": PREFILL}


def choose_ops(suite: str, op: str | None) -> list[Builder]:
    """The builders of a suite's cases, or of one op's. Raises ConfigError on a name that does not exist."""
    if suite not in SUITES:
        raise ConfigError(f"--suite is {suite!r}; expected {', '.join(SUITES)}")
    builders = SUITES[suite]
    if op is not None and op not in builders:
        raise ConfigError(f"--op is {op!r}; suite {suite!r} has {', '.join(builders)}")
    return [builders[op]] if op is not None else list(builders.values())


def run_suite(builders: list[Builder], setting: Setting, ceilings: Ceilings) -> Iterator[Measurement]:
    for builder in builders:
        for case in builder(setting):
            yield from measure_case(case, setting, ceilings)
