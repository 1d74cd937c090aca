"""How a rank's steps run, and why: as CUDA graphs, as recorded calls on a CPU, or eagerly."""

from __future__ import annotations

import torch

from thalweg.config.engine import EngineConfig
from thalweg.ops.registry import Resolver, Rows, Where
from thalweg.ops.toolchain import cpu_build


def why_eager(config: EngineConfig, device: torch.device, resolver: Resolver, rows: Rows, most: int) -> str | None:
    """Why steps of up to `most` such rows cannot run as CUDA graphs; None if they can."""
    if config.enforce_eager:
        return "--enforce-eager"
    if device.type != "cuda":
        return f"{device.type} has no CUDA graphs"
    if config.data_parallel_size > 1 and rows == "prefills":
        return "the host has to know how many tokens go to each data-parallel rank"
    reasons = (choice.why_not_captured(rows, most) for choice in resolver.explain())
    return next((reason for reason in reasons if reason is not None), None)


def why_not_recorded(config: EngineConfig, device: torch.device, eager: str | None) -> str | None:
    """Why steps that decode, which are no CUDA graphs for the reason `eager`, are not recorded and replayed as calls of
    ops in C++; None if that can be tried."""
    if device.type != "cpu":
        return eager or "CUDA graphs"
    if config.enforce_eager:
        return "--enforce-eager"
    if config.tensor_parallel_size * config.data_parallel_size > 1:
        return "ranks exchange something between ops"
    lacks_cpp = cpu_build.why_not(Where("cpu", "float32"))
    return f"ops run in torch: {lacks_cpp}" if lacks_cpp else None


def decode_steps_as(eager: str | None, graph_sizes: list[int], not_recorded: str | None, recorded_rows: int) -> str:
    """How steps of decode rows alone run."""
    if not eager:
        return f"CUDA graphs of {', '.join(map(str, graph_sizes))} rows"
    if not_recorded is None:
        return f"recorded calls of up to {recorded_rows} rows, eager beyond"
    return f"eager: {not_recorded}"


def prefill_steps_as(config: EngineConfig, eager: str | None, tokens: int) -> str:
    """How steps with prompts run, of which those of up to `tokens` tokens are graphs, unless `eager` says why not."""
    if eager:
        return f"eager: {eager}"
    if tokens:
        return f"CUDA graphs of up to {tokens} tokens, eager beyond"
    if config.prefill_graph_tokens:
        return "eager: --max-model-len is too small for graphs"
    return "eager: --prefill-graph-tokens is 0"
