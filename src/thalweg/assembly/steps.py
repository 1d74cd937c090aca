"""How a rank's steps run, and why: as CUDA graphs, as recorded calls on a CPU, or eagerly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thalweg.cache.memory import MemorySplit
from thalweg.config.engine import EngineConfig
from thalweg.ops.moe.exchange import EXPERT_DISPATCH
from thalweg.ops.moe.experts import EXPERTS
from thalweg.ops.registry import Resolver, Rows, Where
from thalweg.ops.toolchain import cpu_build
from thalweg.runner.graphs import buckets
from thalweg.runner.prefill_graphs import ROWS, exchanged_rows, token_sizes
from thalweg.runner.recorded import MAX_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What a rank's steps run as."""

    graph_sizes: list[int]  # rows of steps of decode rows alone, as CUDA graphs
    recorded_rows: int  # of such a step on a CPU, if it is recorded, at most
    recorded_bytes: int  # that results of recorded steps take, at most
    not_recorded: str | None  # why there are neither graphs nor recordings
    prefill_tokens: int  # of a step with prompts, as a CUDA graph, at most
    prefills: str  # how those run, and why

    @property
    def decodes(self) -> str:
        """How steps of decode rows alone run, and why."""
        if self.graph_sizes:
            return f"CUDA graphs of {', '.join(map(str, self.graph_sizes))} rows"
        if self.not_recorded is None:
            memory = f"results take up to {self.recorded_bytes / 2**20:.0f} MiB"
            return f"recorded calls of up to {self.recorded_rows} rows, eager beyond; {memory}"
        return f"eager: {self.not_recorded}"


def choose_steps(
    config: EngineConfig, device: torch.device, resolver: Resolver, split: MemorySplit, recorded: int
) -> Steps:
    """Of a model whose ops `resolver` has resolved. What is to be recorded, in so many bytes, may still turn out not to
    be."""
    assert config.max_num_batched_tokens is not None
    assert config.prefill_graph_tokens is not None
    sizes = buckets(split.num_slots)
    eager = why_eager(config, device, resolver, "decodes", sizes[-1])
    rows = min(MAX_ROWS, split.num_slots)
    not_recorded = why_not_recorded(config, device, resolver, eager, rows)
    tokens = min(config.prefill_graph_tokens, config.max_num_batched_tokens)
    token_counts = token_sizes(tokens, split.max_model_len)
    prefills_eager = eager or why_eager(config, device, resolver, "prefills", max(token_counts, default=0))
    tokens = 0 if prefills_eager or not token_counts else min(tokens, token_counts[-1])
    return Steps(
        graph_sizes=[] if eager else sizes,
        recorded_rows=0 if not_recorded else rows,
        recorded_bytes=recorded,
        not_recorded=not_recorded,
        prefill_tokens=tokens,
        prefills=prefill_steps_as(config, prefills_eager, tokens),
    )


def why_eager(config: EngineConfig, device: torch.device, resolver: Resolver, rows: Rows, most: int) -> str | None:
    """Why steps of up to `most` such rows cannot run as CUDA graphs; None if they can."""
    if config.enforce_eager:
        return "--enforce-eager"
    if device.type != "cuda":
        return f"{device.type} has no CUDA graphs"
    if config.expert_metrics:
        return "--expert-metrics"
    of_all = most * config.data_parallel_size  # ranks, whose rows experts are given
    if config.data_parallel_size > 1 and rows == "prefills":
        if any(c.op == EXPERT_DISPATCH.name and c.table[0].name == "reference" for c in resolver.explain()):
            return "collectives of data-parallel ranks would have to be captured by all of them at once"
        of_all = exchanged_rows(most + ROWS[-1]) * config.data_parallel_size
    reasons = (c.why_not_captured(rows, of_all if c.op == EXPERTS.name else most) for c in resolver.explain())
    return next((reason for reason in reasons if reason is not None), None)


def why_not_recorded(
    config: EngineConfig, device: torch.device, resolver: Resolver, eager: str | None, most: int
) -> str | None:
    """Why steps of up to `most` decode rows, which are no CUDA graphs for the reason `eager`, are not recorded and
    replayed as calls of ops in C++; None if that can be tried."""
    if device.type != "cpu":
        return eager or "CUDA graphs"
    if config.enforce_eager:
        return "--enforce-eager"
    if config.tensor_parallel_size * config.data_parallel_size > 1:
        return "ranks exchange something between ops"
    if lacks_cpp := cpu_build.why_not(Where("cpu", "float32")):
        return f"ops run in torch: {lacks_cpp}"
    reasons = (choice.why_not_recorded(most) for choice in resolver.explain())
    return next((reason for reason in reasons if reason is not None), None)


def prefill_steps_as(config: EngineConfig, eager: str | None, tokens: int) -> str:
    """How steps with prompts run, of which those of up to `tokens` tokens are graphs, unless `eager` says why not."""
    if eager:
        return f"eager: {eager}"
    if tokens:
        return f"CUDA graphs of up to {tokens} tokens, eager beyond"
    if config.prefill_graph_tokens:
        return "eager: --max-model-len is too small for graphs"
    return "eager: --prefill-graph-tokens is 0"
