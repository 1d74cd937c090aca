"""Mixtures of SwiGLU experts with shared experts that every token takes."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.config.hf import ConfigReader
from thalweg.models.parts.part import MAX_DIM, MAX_EXPERTS, Cost, Names, Step, all_reduce, product
from thalweg.parallel.shards import Shards
from thalweg.quant import Scheme
from thalweg.weights.plan import Source, Target, placed, whole

WIDTH = "moe_intermediate_size"


@dataclass(frozen=True, slots=True)
class MoeDims:
    """`experts` routed experts, each `inner` wide, of which a token takes `top_k`, and `shared` ones of that width.

    Scores are sigmoids with a correction bias for the choice only; they are renormalised over the chosen if
    `renormalize` and multiplied by `scale`. Experts compete in `top_groups` of `groups` groups (DeepSeek-V3).
    """

    experts: int
    top_k: int
    inner: int
    shared: int
    renormalize: bool
    scale: float
    groups: int = 1
    top_groups: int = 1

    def targets(self, ours: str, names: Names, width: int, shards: Shards, scheme: Scheme) -> list[Target]:
        """Experts stacked: gate_up [E + S, 2*I, D] (gate above up), down [E + S, D, I]. The router is replicated.

        Checkpoints store the S shared experts as one MLP of width S*I. A sum over its width is a sum over S slices of
        it, so each slice is one more expert behind the routed ones, and one kernel serves all.
        Names: norm, router, bias; gate, up, down with {e} for the expert's number; shared_gate, shared_up, shared_down.
        """
        E, D, inner = self.experts, width, self.inner
        start, stop = part = shards.even(inner, WIDTH)
        local, total, both = stop - start, E + self.shared, self.shared * inner
        gate_up: list[Source] = []
        down: list[Source] = []
        for e in range(E):
            for half, x in enumerate(("gate", "up")):
                rows = (half * local, (half + 1) * local)
                gate_up.append(placed(names[x].format(e=e), (inner, D), (e, rows), 0, part))
            down.append(placed(names["down"].format(e=e), (D, inner), (e,), 1, part))
        for i in range(self.shared):
            piece = (i * inner + start, i * inner + stop)
            for half, x in enumerate(("shared_gate", "shared_up")):
                rows = (half * local, (half + 1) * local)
                gate_up.append(placed(names[x], (both, D), (E + i, rows), 0, piece))
            down.append(placed(names["shared_down"], (D, both), (E + i,), 1, piece))
        return [
            whole(f"{ours}.router.norm.weight", names["norm"], (D,), init="ones"),
            whole(f"{ours}.router.weight", names["router"], (E, D)),
            whole(f"{ours}.router.bias", names["bias"], (E,), dtype="float32", init="zeros"),
            Target(f"{ours}.experts.gate_up", (total, 2 * local, D), tuple(gate_up), scheme=scheme),
            Target(f"{ours}.experts.down", (total, D, local), tuple(down), scheme=scheme),
        ]

    def costs(self, width: int, step: Step) -> list[Cost]:
        """Routing is taken as even: T tokens that each take k of E experts touch E (1 - (1 - k/E)^T) of them."""
        E, k, T = self.experts, self.top_k, step.tokens
        expert = 3 * width * step.shards.count(self.inner, WIDTH)
        touched = self.shared + E * (1 - (1 - k / E) ** T)
        weight_bytes = step.scheme.bytes_per_weight(step.dtype_bytes)
        return [
            product("router", E * width, step),
            Cost("experts", touched * expert * weight_bytes, 2.0 * T * (k + self.shared) * expert),
            *all_reduce("experts' sum over ranks", width, step),
        ]


@dataclass(frozen=True, slots=True)
class MoeKeys:
    """What a family's config.json calls the numbers of its mixture of experts."""

    experts: str
    top_k: str
    shared: str
    groups: str
    top_groups: str
    renormalize: str
    scoring: str
    also: tuple[str, ...] = ()  # further keys of the layout, passed over without experts

    def all(self) -> tuple[str, ...]:
        return (self.top_k, self.shared, self.groups, self.top_groups, self.renormalize, self.scoring, *self.also)


def read_moe(reader: ConfigReader, keys: MoeKeys) -> MoeDims:
    """The dimensions, checked against each other. Raises ConfigError."""
    experts = reader.get_int(keys.experts, low=1, high=MAX_EXPERTS)
    reader.only(keys.scoring, "sigmoid")
    groups = reader.get_int(keys.groups, 1, low=1)
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise reader.error(keys.groups, f"a divisor of {keys.experts} {experts} with 2 experts or more a group")
    top_groups = reader.get_int(keys.top_groups, 1, low=1)
    if top_groups > groups:
        raise reader.error(keys.top_groups, f"at most {keys.groups} {groups}")
    competing = experts // groups * top_groups
    top_k = reader.get_int(keys.top_k, low=1)
    if top_k > competing:
        raise reader.error(keys.top_k, f"at most {competing}, the experts to choose from")
    return MoeDims(
        experts=experts,
        top_k=top_k,
        inner=reader.get_int(WIDTH, low=1, high=MAX_DIM),
        shared=reader.get_int(keys.shared, 0, high=MAX_EXPERTS),
        renormalize=reader.get_bool(keys.renormalize, True),
        scale=reader.get_float("routed_scaling_factor", 1.0),
        groups=groups,
        top_groups=top_groups,
    )
