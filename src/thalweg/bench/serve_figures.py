"""From the outcomes of a serving benchmark to its figures, under the names that serving benchmarks use."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from thalweg.bench.serve_load import Outcome
from thalweg.errors import ConfigError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_COUNTS = (  # label, key, digits
    ("Successful requests", "completed", 0),
    ("Failed requests", "failed", 0),
    ("Benchmark duration (s)", "duration", 2),
    ("Total input tokens", "total_input_tokens", 0),
    ("Total cached input tokens", "total_cached_tokens", 0),
    ("Total generated tokens", "total_output_tokens", 0),
    ("Request throughput (req/s)", "request_throughput", 2),
    ("Request goodput (req/s)", "request_goodput", 2),
    ("Output token throughput (tok/s)", "output_throughput", 2),
    ("Peak output token throughput (tok/s)", "max_output_tokens_per_s", 2),
    ("Peak concurrent requests", "max_concurrent_requests", 0),
    ("Total token throughput (tok/s)", "total_token_throughput", 2),
)


def samples_ms(outcomes: Iterable[Outcome]) -> dict[str, list[float]]:
    """Milliseconds of each metric in METRICS, over the requests that succeeded; `itl` over all their gaps."""
    done = [o for o in outcomes if o.error is None]
    return {
        "ttft": [1e3 * o.ttft for o in done],
        "tpot": [1e3 * o.tpot for o in done if o.tpot is not None],
        "itl": [1e3 * gap for o in done for gap in o.itls],
        "e2el": [1e3 * o.latency for o in done],
    }


def summarise(
    outcomes: Sequence[Outcome],
    duration_s: float,
    goodput_ms: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (99,),
) -> dict[str, Any]:
    """The figures as plain values: counts, throughputs, and mean, median, std and percentiles of every metric in ms.

    `goodput_ms` are bounds of ttft, tpot and e2el that a request must keep to count in request_goodput.
    """
    done = [o for o in outcomes if o.error is None]
    inputs, outputs = sum(o.input_tokens for o in done), sum(o.output_tokens for o in done)
    tokens = tokens_per_second(done)
    figures: dict[str, Any] = {
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "duration": duration_s,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration_s,
        "output_throughput": outputs / duration_s,
        "max_output_tokens_per_s": float(max(tokens, default=0.0)),
        "max_concurrent_requests": most_at_once(done),
        "total_token_throughput": (inputs + outputs) / duration_s,
    }
    if cached := sum(o.cached_tokens for o in done):
        figures["total_cached_tokens"] = cached
    if goodput_ms:
        figures["request_goodput"] = sum(_is_good(o, goodput_ms) for o in done) / duration_s
    for name, values in samples_ms(done).items():
        if values:
            figures[f"mean_{name}_ms"] = float(np.mean(values))
            figures[f"median_{name}_ms"] = float(np.median(values))
            figures[f"std_{name}_ms"] = float(np.std(values))
            for p in percentiles:
                figures[f"p{p:g}_{name}_ms"] = float(np.percentile(values, p))
    figures["errors"] = [f"{count} x {error}" for error, count in Counter(_errors(outcomes)).most_common(20)]
    return figures


def lines(figures: Mapping[str, Any], metrics: Iterable[str], percentiles: Sequence[float] = (99,)) -> list[str]:
    """The figures for a reader, one a line."""
    text = [_heading("Serving Benchmark Result", "=")]
    text += [_line(label, figures[key], digits) for label, key, digits in _COUNTS if key in figures]
    for name in metrics:
        if f"mean_{name}_ms" not in figures:
            continue
        text.append(_heading(METRICS[name], "-"))
        for part in ("mean", "median", *(f"p{p:g}" for p in percentiles)):
            text.append(_line(f"{part.title()} {name.upper()} (ms)", figures[f"{part}_{name}_ms"], 2))
    return [*text, "=" * 54, *(f"failed: {error}" for error in figures["errors"])]


def tokens_per_second(outcomes: Iterable[Outcome]) -> list[float]:
    """Generated tokens in each second since the first request. A piece of text counts as its share of its tokens."""
    done = [o for o in outcomes if o.error is None]
    first = min((o.start for o in done), default=0.0)
    seconds: defaultdict[int, float] = defaultdict(float)
    for o in done:
        at, share = o.start - first + o.ttft, o.output_tokens / (len(o.itls) + 1)
        seconds[int(at)] += share
        for gap in o.itls:
            at += gap
            seconds[int(at)] += share
    return [seconds[s] for s in range(max(seconds, default=-1) + 1)]


def concurrency(outcomes: Iterable[Outcome]) -> list[tuple[float, int]]:
    """(seconds since the first request, requests under way from then on), in order."""
    done = [o for o in outcomes if o.error is None]
    first = min((o.start for o in done), default=0.0)
    # At the same moment an end comes before a start.
    changes = sorted([(o.start - first, 1) for o in done] + [(o.start + o.latency - first, -1) for o in done])
    now, steps = 0, []
    for at, change in changes:
        now += change
        steps.append((at, now))
    return steps


def most_at_once(outcomes: Iterable[Outcome]) -> int:
    return max((n for _, n in concurrency(outcomes)), default=0)


def read_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """["ttft:200", "e2el:3000"] as bounds in ms. Raises ConfigError."""
    bounds = {}
    for pair in pairs:
        name, colon, value = pair.partition(":")
        try:
            bound = float(value)
        except ValueError:
            bound = -1.0
        if not colon or name not in ("ttft", "tpot", "e2el") or not 0 < bound < float("inf"):
            raise ConfigError(f"--goodput is {pair!r}; expected ttft:MS, tpot:MS or e2el:MS")
        bounds[name] = bound
    return bounds


def _is_good(o: Outcome, bounds_ms: Mapping[str, float]) -> bool:
    measured = {"ttft": o.ttft, "tpot": o.tpot or 0.0, "e2el": o.latency}
    return all(1e3 * measured[name] <= bound for name, bound in bounds_ms.items())


def _errors(outcomes: Iterable[Outcome]) -> list[str]:
    return [o.error for o in outcomes if o.error is not None]


def _line(label: str, value: float, digits: int) -> str:
    return f"{label + ':':<40} {value:<13.{digits}f}".rstrip()


def _heading(title: str, rule: str) -> str:
    return f" {title} ".center(54, rule)
