"""Prometheus metrics: what the engine last said of itself, and the times that requests saw."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from thalweg.cache.node import MISS_REASONS
from thalweg.engine.processes.client import EngineClient
from thalweg.errors import InvalidRequest, QueueTimeout, RequestTimeout, ThalwegError
from thalweg.text.output import Delta

PREFIX = "thalweg_"
EXPERT_SECONDS = 2.0  # that engines may take to say what their experts got
REJECTIONS = ("queue_full", "queue_timeout", "request_timeout")
# A caller's mistakes, by the code of the answer; those without one are of the last kind.
REFUSALS = (
    "context_length_exceeded",
    "invalid_grammar",
    "invalid_json",
    "model_not_found",
    "unknown_route",
    "unsupported",
    "invalid_value",
)

# Of each data-parallel rank, if there are several: name, text, field of SchedulerStats.
_GAUGES_BY_RANK = (
    ("rank_requests_running", "Sequences that hold a state slot, by data-parallel rank.", "num_running"),
    ("rank_requests_waiting", "Sequences that wait for a slot and blocks, by data-parallel rank.", "num_waiting"),
    ("rank_kv_blocks_used", "Blocks of the paged cache in use, by data-parallel rank.", "blocks_used"),
)
_COUNTERS_BY_RANK = (
    ("rank_prompt_tokens", "Prompt tokens of admitted sequences, by data-parallel rank.", "prompt_tokens"),
    ("rank_generation_tokens", "Tokens generated, by data-parallel rank.", "generation_tokens"),
    ("rank_prefix_cache_hits", "Prompt tokens found in the prefix cache, by data-parallel rank.", "prefix_hits"),
)

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 960)


class Metrics:
    """One server's metrics in a registry of their own, so that servers in one process do not mix theirs."""

    def __init__(self, client: EngineClient) -> None:
        self._registry = CollectorRegistry()
        self._client, self._engine = client, _EngineCollector(client)
        self._registry.register(self._engine)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self._registry)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT_BUCKETS
        )
        self._first_token_lag = histogram(
            "first_token_lag_seconds", "From the engine's sending a first token to its answer's writing.", _LAG_BUCKETS
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Between one token of a sequence and the next.", _TOKEN_BUCKETS
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to the end of a sequence.", _E2E_BUCKETS
        )
        self._ended = Counter(
            PREFIX + "request_success",
            "Sequences by how they ended: stop, length, abort (the client left), error.",
            ["finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(reason)

        self._rejected = Counter(
            PREFIX + "requests_rejected",
            "Requests that were not begun or not finished: the queue was full, they waited or took too long.",
            ["reason"],
            registry=self._registry,
        )
        for reason in REJECTIONS:
            self._rejected.labels(reason)

        self._refused = Counter(
            PREFIX + "request_refused",
            "Requests answered with 400 or 404, by what was wrong with them.",
            ["reason"],
            registry=self._registry,
        )
        for reason in REFUSALS:
            self._refused.labels(reason)

    def rejected(self, reason: str) -> None:
        """Count a rejection; `reason` is one of REJECTIONS."""
        self._rejected.labels(reason).inc()

    def refused(self, code: str | None) -> None:
        """Count a request that was answered with 400 or 404, by its error's code."""
        self._refused.labels(code if code in REFUSALS else REFUSALS[-1]).inc()

    async def observed(self, deltas: AsyncGenerator[Delta], arrived: float) -> AsyncGenerator[Delta]:
        """`deltas` as they are, with their times taken; `arrived` is on time.perf_counter's clock."""
        reason: str | None = "abort"  # None: it is the caller's mistake, which `refused` counts
        last = None
        async with aclosing(deltas):
            try:
                async for delta in deltas:
                    now = time.perf_counter()
                    if delta.token_ids:
                        if last is None:
                            self._first_token.observe(now - arrived)
                            if delta.sent_at is not None:
                                self._first_token_lag.observe(time.monotonic() - delta.sent_at)
                        else:
                            self._inter_token.observe(now - last)
                        last = now
                    if delta.finish_reason is not None:
                        reason = delta.finish_reason
                    yield delta
            except Exception as error:
                reason = None if isinstance(error, InvalidRequest) else "error"
                if isinstance(error, QueueTimeout | RequestTimeout):
                    self.rejected("queue_timeout" if isinstance(error, QueueTimeout) else "request_timeout")
                raise
            finally:
                if reason is not None:
                    self._ended.labels(reason).inc()
                if reason in ("stop", "length"):
                    self._e2e.observe(time.perf_counter() - arrived)

    async def count_experts(self) -> None:
        """Ask the engines how many tokens each expert got. If they do not say at once, the last figures stay."""
        with contextlib.suppress(TimeoutError, ThalwegError):
            async with asyncio.timeout(EXPERT_SECONDS):
                self._engine.experts = await self._client.expert_counts()

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's latest statistics when they are asked for."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self.experts: dict[int, list[int]] = {}  # tokens by layer and expert, if they are counted

    def describe(self) -> list[Metric]:
        return []  # else the registry would collect once to find out

    def collect(self) -> Iterator[Metric]:
        s = self._client.stats

        def gauge(name: str, text: str, value: float) -> Metric:
            return GaugeMetricFamily(PREFIX + name, text, value)

        def counter(name: str, text: str, value: float) -> Metric:
            return CounterMetricFamily(PREFIX + name, text, value)

        yield gauge("num_requests_running", "Sequences that hold a state slot.", s.num_running if s else 0)
        yield gauge("num_requests_waiting", "Sequences that wait for a slot and blocks.", s.num_waiting if s else 0)
        usage = s.blocks_used / s.blocks_total if s and s.blocks_total else 0
        yield gauge("kv_cache_usage_perc", "Share of the paged cache's blocks in use, 0 to 1.", usage)
        yield gauge("state_slots_used", "Slots of recurrent state in use.", s.slots_used if s else 0)
        if s is not None:
            yield gauge("state_slots_total", "Slots of recurrent state there are.", s.slots_total)
        yield gauge(
            "kv_blocks_kept", "Blocks of ended sequences that the prefix cache keeps.", s.blocks_kept if s else 0
        )
        yield gauge("state_snapshots_used", "Snapshots of states in the prefix cache.", s.snapshots_used if s else 0)
        if s is not None:
            yield gauge("state_snapshots_total", "Snapshots of states there is room for.", s.snapshots_total)
        queries, hits = (s.prefix_queries, s.prefix_hits) if s else (0, 0)
        yield counter("prefix_cache_queries_total", "Prompt tokens that were looked up in the prefix cache.", queries)
        yield counter("prefix_cache_hits_total", "Prompt tokens that were found in it.", hits)
        host_hits = s.prefix_host_hits if s else 0
        yield counter("prefix_cache_host_hits_total", "Tokens of them that came from host memory.", host_hits)
        if s is not None and (s.host_blocks_total or s.host_snapshots_total):
            yield gauge("host_blocks_used", "Blocks of the prefix cache in host memory.", s.host_blocks_used)
            yield gauge("host_blocks_total", "Blocks that host memory has room for.", s.host_blocks_total)
            yield gauge("host_snapshots_used", "Snapshots of states in host memory.", s.host_snapshots_used)
            yield gauge("host_snapshots_total", "Snapshots that host memory has room for.", s.host_snapshots_total)
            copies = CounterMetricFamily(
                PREFIX + "host_copies", "Blocks and snapshots copied to and from host memory.", labels=["kind"]
            )
            for kind, count in s.host_copies.items():
                copies.add_metric([kind], count)
            yield copies
        misses = CounterMetricFamily(
            PREFIX + "prefix_cache_misses",
            "Requests that found nothing in the prefix cache, by reason.",
            labels=["reason"],
        )
        for reason in MISS_REASONS:
            misses.add_metric([reason], s.prefix_misses.get(reason, 0) if s else 0)
        yield misses
        yield from self._by_rank()
        if self.experts:
            tokens = CounterMetricFamily(
                PREFIX + "expert_tokens", "Tokens that a routed expert of a layer got.", labels=["layer", "expert"]
            )
            for layer, counts in self.experts.items():
                for expert, count in enumerate(counts):
                    tokens.add_metric([str(layer), str(expert)], count)
            yield tokens
        yield gauge("server_tasks", "Tasks of the HTTP process's event loop.", len(asyncio.all_tasks()))
        yield counter(
            "num_preemptions_total", "Sequences that gave way and began again.", s.num_preemptions if s else 0
        )
        yield counter("prompt_tokens_total", "Prompt tokens of admitted sequences.", s.prompt_tokens if s else 0)
        yield counter("generation_tokens_total", "Tokens generated.", s.generation_tokens if s else 0)

    def _by_rank(self) -> Iterator[Metric]:
        """What each of several data-parallel ranks says; the other families have their sums."""
        ranks = self._client.rank_stats  # none until the engines have started, and `info` is known
        if not ranks or self._client.info.data_parallel_size == 1:
            return
        for name, text, field in _GAUGES_BY_RANK:
            gauges = GaugeMetricFamily(PREFIX + name, text, labels=["rank"])
            for rank, stats in sorted(ranks.items()):
                gauges.add_metric([str(rank)], getattr(stats, field))
            yield gauges
        for name, text, field in _COUNTERS_BY_RANK:
            counters = CounterMetricFamily(PREFIX + name, text, labels=["rank"])
            for rank, stats in sorted(ranks.items()):
                counters.add_metric([str(rank)], getattr(stats, field))
            yield counters
