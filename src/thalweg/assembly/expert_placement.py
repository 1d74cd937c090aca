"""Files that say which data-parallel rank has which expert, as --expert-placement reads and place-experts writes them.

A JSON object with `physical_to_logical_map`: a list for each layer of experts, in order, of the expert in each slot,
those of rank 0 first; as many slots on each rank. Lists for layers without experts may be there too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.config.bounded_json import read_object
from thalweg.errors import ConfigError
from thalweg.models.family import DecoderConfig
from thalweg.models.parts.moe import MoeDims
from thalweg.parallel.placement import Placement, place

if TYPE_CHECKING:
    from thalweg.parallel.data_ranks import DataRanks

KEY = "physical_to_logical_map"
MAX_BYTES = 64 << 20
_COUNT = re.compile(r"thalweg_expert_tokens_total\{([^}]*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="(\d{1,7})"')


def read_placements(file: str, config: DecoderConfig, ranks: int) -> dict[int, Placement]:
    """By layer. Raises ConfigError, or CheckpointError for a file that is no JSON object."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"--expert-placement is {file!r}, and there is no such file")
    rows = read_object(path.parent, path.name, max_bytes=MAX_BYTES).get(KEY)
    experts = {n: layer.mlp.experts for n, layer in enumerate(config.layers) if isinstance(layer.mlp, MoeDims)}
    lists: list[Any] = rows if isinstance(rows, list) else []
    if not lists or len(lists) not in (len(experts), len(config.layers)):
        expected = f"{len(experts)} lists, one for each layer of experts, or {len(config.layers)} for all layers"
        raise ConfigError(f"{path}: {KEY} has {len(lists)} lists; expected {expected}")
    by_layer = dict(zip(experts, lists, strict=True)) if len(lists) == len(experts) else dict(enumerate(lists))
    placements = {}
    for n, count in experts.items():
        row, where = by_layer[n], f"{path}: the list of layer {n}"
        if not isinstance(row, list) or not all(type(e) is int for e in row):
            raise ConfigError(f"{where} is not a list of experts' numbers")
        placements[n] = Placement.of_row(row, count, ranks, where)
    return placements


def check_same(ranks: DataRanks, placements: Mapping[int, Placement], file: str) -> None:
    """Raises ConfigError unless all ranks have read the same from their `file`, of which each host has one. All call
    this together."""
    rows = json.dumps([placements[n].row for n in sorted(placements)])
    read = ranks.gather_bytes(hashlib.sha256(rows.encode()).digest())
    for rank, theirs in enumerate(read):
        if theirs != read[0]:
            differs = f"places experts otherwise on the host of data-parallel rank {rank} than on that of rank 0"
            raise ConfigError(f"--expert-placement is {file!r}, which {differs}; expected the same file on every host")


def describe_experts(config: DecoderConfig, placements: Mapping[int, Placement], ranks: int) -> str | None:
    """How data-parallel ranks divide the routed experts of a layer; None for one rank."""
    if ranks == 1:
        return None
    layers = enumerate(config.layers)
    n, experts = next((n, layer.mlp.experts) for n, layer in layers if isinstance(layer.mlp, MoeDims))
    placement = placements.get(n) or Placement.even(experts, ranks)
    copies = f" with {len(placement.row) - experts} copies in all" if placements else ""
    return f"{placement.here} of {experts} on each of {ranks} data-parallel ranks{copies}"


def counted(metrics: str, where: str) -> dict[int, list[int]]:
    """Tokens by layer and expert, of a server's /metrics with --expert-metrics. Raises ConfigError."""
    found: dict[int, dict[int, int]] = {}
    for labels, value in _COUNT.findall(metrics):
        names = {name: int(number) for name, number in _LABEL.findall(labels)}
        try:
            found.setdefault(names["layer"], {})[names["expert"]] = int(float(value))
        except (KeyError, ValueError, OverflowError):
            raise ConfigError(f"{where}: {labels[:80]} {value[:40]} is no count of an expert's tokens") from None
    for layer, counts in found.items():
        if sorted(counts) != list(range(len(counts))):
            raise ConfigError(f"{where}: the counts of layer {layer} leave experts out; expected a whole /metrics")
    if not found:
        expected = "what /metrics of a server with --expert-metrics says"
        raise ConfigError(f"{where} has no thalweg_expert_tokens_total; expected {expected}")
    if not any(tokens for counts in found.values() for tokens in counts.values()):
        raise ConfigError(f"{where} has counted no tokens; expected /metrics after a while of the usual load")
    return {layer: [tokens for _, tokens in sorted(counts.items())] for layer, counts in sorted(found.items())}


def placed_by(counts: Mapping[int, list[int]], redundant: int, ranks: int) -> tuple[str, list[tuple[float, float]]]:
    """The text of a file with `redundant` copies in each layer, and for each layer the share of the busiest rank, in
    times the mean, without it and with it. Raises ConfigError."""
    rows, shares = [], []
    for tokens in counts.values():
        placement = place(tokens, redundant, ranks)
        rows.append(placement.row)
        even = None if len(tokens) % ranks else Placement.even(len(tokens), ranks)
        shares.append((busiest(even, tokens) if even else float("nan"), busiest(placement, tokens)))
    return json.dumps({KEY: rows}) + "\n", shares


def busiest(placement: Placement, tokens: list[int]) -> float:
    """Tokens of the busiest rank, in times the mean, if those of an expert are spread evenly over its copies."""
    copies = [0] * len(tokens)
    for expert in placement.row:
        copies[expert] += 1
    loads = [sum(tokens[e] / copies[e] for e in own) for own in placement.slots]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0
