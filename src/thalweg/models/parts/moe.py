"""Mixtures of SwiGLU experts with shared experts that every token takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from thalweg.config.hf import ConfigReader
from thalweg.errors import ConfigError, UnsupportedError
from thalweg.models.parts.part import (
    MAX_DIM,
    MAX_EXPERTS,
    Cost,
    Names,
    PlanContext,
    Step,
    all_reduce,
    exchange,
    fp8_scales,
    int4_sources,
    product,
)
from thalweg.quant import FP8_EXPERTS, INT4_EXPERTS, PLAIN
from thalweg.quant.blocks import BLOCK
from thalweg.quant.fp8 import scales_into
from thalweg.quant.ggml_types import TYPES
from thalweg.quant.scheme import Range
from thalweg.weights.plan import Source, Target, concat, placed, whole

PLAIN_TYPES = frozenset({"none"} | {name for name, kind in TYPES.items() if kind.is_plain})
WIDTH, SHARED_WIDTH = "moe_intermediate_size", "shared_expert_intermediate_size"


@dataclass(frozen=True, slots=True)
class MoeDims:
    """`experts` routed experts, each `inner` wide, of which a token takes `top_k`, and `shared` ones of that width.

    Scores are sigmoids with a correction bias for the choice only, or a softmax over all experts; they are renormalised
    over the chosen if `renormalize` and multiplied by `scale`. Experts compete in `top_groups` of `groups` groups
    (DeepSeek-V3). A shared expert of another kind is `gated_shared` wide, its output times a sigmoid per token (Qwen).
    There is at most one kind.
    """

    experts: int
    top_k: int
    inner: int
    shared: int = 0
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    gated_shared: int = 0

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """Experts stacked: gate_up [E + S, 2*I, D] (gate above up), down [E + S, D, I]. The router is replicated, and
        so are the shared experts over data-parallel ranks, which divide the E routed ones.

        Checkpoints store the S shared experts as one MLP of width S*I. A sum over its width is a sum over S slices of
        it, so each slice is one more expert behind the routed ones, and one kernel serves all. So is a gated one as
        wide as the routed ones, its gate one more row of the router. Only if a checkpoint stores them otherwise than
        the routed ones (these alone in int4, or in other types of blocks) they are an MLP of their own.
        Names: norm, router, bias (sigmoid only); gate, up, down with {e} for the expert's number, or stacked_gate_up
        and stacked_down; shared_gate, shared_up, shared_down; shared_scale for the gate of a gated shared expert.
        """
        E, D = self.experts, ctx.width
        start, stop = ctx.shards.even(self.inner, WIDTH)
        mine = ctx.experts(E)
        count = self._like_routed
        local, here = stop - start, len(mine)
        total = here + count
        gate_up, down = self._stacked(names, mine, (start, stop), ctx) if "stacked_down" in names else ([], [])
        elsewhere: tuple[list[Source], list[Source]] = ([], [])
        if not gate_up:
            others = sorted(set(range(E)) - set(mine))
            for experts, lists in ((mine, (gate_up, down)), (others, elsewhere)):
                for place, e in enumerate(experts):
                    one = {x: names[x].format(e=e) for x in ("gate", "up", "down")}
                    self._expert(one, place, (start, stop), self.inner, D, *lists)
        shared = {x: names[f"shared_{x}"] for x in ("gate", "up", "down") if count}
        routed = {"gate": gate_up[0].name, "up": gate_up[-1].name, "down": down[0].name}
        apart = any(ctx.stored_as(name) != ctx.stored_as(routed[x]) for x, name in shared.items())
        gate = [names["shared_scale"]] if self.gated_shared and count else []
        apart = apart or any(ctx.stored_as(name) not in PLAIN_TYPES for name in gate)
        total -= count if apart else 0
        for i in range(0 if apart else count):
            part = (i * self.inner + start, i * self.inner + stop)
            self._expert(shared, here + i, part, count * self.inner, D, gate_up, down)
        router = [Source(names["router"], (E, D)), *(Source(name, (1, D)) for name in gate if not apart)]
        targets = [
            ctx.norm(f"{ours}.router.norm.weight", names["norm"], D),
            concat(f"{ours}.router.weight", router),
            self._experts(f"{ours}.experts.gate_up", (total, 2 * local, D), gate_up, ctx, 2, elsewhere[0]),
            self._experts(f"{ours}.experts.down", (total, D, local), down, ctx, 1, elsewhere[1]),
        ]
        if self.scoring == "sigmoid":
            targets.append(whole(f"{ours}.router.bias", names["bias"], (E,), dtype="float32", init="zeros"))
        if self.gated_shared and (apart or not count):
            return targets + self._own_mlp(f"{ours}.shared", names, ctx, self.gated_shared, SHARED_WIDTH)
        if apart:
            return targets + self._own_mlp(f"{ours}.shared", names, ctx, self.shared * self.inner, WIDTH)
        return targets

    @property
    def _like_routed(self) -> int:
        """How many of the shared experts are as wide as the routed ones."""
        return 1 if self.gated_shared == self.inner else self.shared

    @staticmethod
    def _experts(
        ours: str,
        shape: tuple[int, ...],
        pieces: list[Source],
        ctx: PlanContext,
        parts: int,
        elsewhere: Sequence[Source] = (),
    ) -> Target:
        """Stored as ctx says, or as the checkpoint has them quantized. `elsewhere` are other ranks' experts."""
        if elsewhere:
            target = MoeDims._experts(ours, shape, pieces, ctx, parts)
            return replace(target, elsewhere=MoeDims._experts(ours, shape, [*elsewhere], ctx, parts))
        target = Target(ours, shape, tuple(pieces), scheme=ctx.scheme, parts=parts)
        target = ctx.in_blocks(target)
        stored = {ctx.stored_as(piece.name) for piece in pieces}
        if stored == {"none"} or stored <= TYPES.keys():
            return target
        if stored == {"fp8"}:
            scales = [replace(fp8_scales(p, per_row=False), into=scales_into(p.into)) for p in pieces]
            return replace(target, scheme=FP8_EXPERTS, scales=tuple(scales))
        if stored == {"int4"}:
            words, groups = zip(*(int4_sources(p) for p in pieces), strict=True)
            return replace(target, scheme=INT4_EXPERTS, sources=words, scales=groups)
        some = " and ".join(sorted(stored - {"none"}))
        raise UnsupportedError(f"{pieces[0].name} and its like: some are in {some}; expected all or none")

    @staticmethod
    def _expert(
        names: Names, e: int, part: Range, inner: int, D: int, gate_up: list[Source], down: list[Source]
    ) -> None:
        """Expert `e` of ours is the `part` of an MLP of width `inner`."""
        local = part[1] - part[0]
        gate_up.append(placed(names["gate"], (inner, D), (e, (0, local)), 0, part))
        gate_up.append(placed(names["up"], (inner, D), (e, (local, 2 * local)), 0, part))
        down.append(placed(names["down"], (D, inner), (e,), 1, part))

    def _stacked(
        self, names: Names, mine: tuple[int, ...], part: Range, ctx: PlanContext
    ) -> tuple[list[Source], list[Source]]:
        """From one tensor of all experts [E, 2*I, D], gate above up, and one [E, D, I]: the experts `mine`, or a `part`
        of the width of all."""
        E, inner, D, (start, stop) = self.experts, self.inner, ctx.width, part
        local, shape = stop - start, (E, 2 * inner, D)
        if ctx.shards.data_size > 1:  # then each is whole
            if ctx.shards.size > 1:
                raise ConfigError(
                    f"--tensor-parallel-size {ctx.shards.size} with --data-parallel-size needs one tensor per expert;"
                    f" {names['stacked_down']!r} holds all of them, so leave one of the options out"
                )
            if ctx.scheme is not PLAIN and inner % BLOCK:
                raise ConfigError(
                    f"--quantization {ctx.scheme.name} with --data-parallel-size needs {WIDTH} to be a multiple of"
                    f" {BLOCK} if one tensor holds all experts; it is {inner}"
                )
            of_all = (names["stacked_gate_up"], shape), (names["stacked_down"], (E, D, inner))
            gate_up, down = ([placed(*one, (i,), 0, (e, e + 1)) for i, e in enumerate(mine)] for one in of_all)
            return gate_up, down
        up = (inner + start, inner + stop)
        return [
            placed(names["stacked_gate_up"], shape, ((0, E), (0, local)), 1, part),
            placed(names["stacked_gate_up"], shape, ((0, E), (local, 2 * local)), 1, up),
        ], [placed(names["stacked_down"], (E, D, inner), ((0, E),), 2, part)]

    def _own_mlp(self, ours: str, names: Names, ctx: PlanContext, inner: int, what: str) -> list[Target]:
        """in_proj has rows gate, up and, on every rank, the one of the output's gate if there is one."""
        part, D = ctx.shards.even(inner, what), ctx.width
        rows = [Source(names[f"shared_{x}"], (inner, D), 0, part) for x in ("gate", "up")]
        if self.gated_shared:
            rows.append(Source(names["shared_scale"], (1, D)))
        return [
            *ctx.linear(f"{ours}.in_proj", *rows),
            *ctx.linear(f"{ours}.down", Source(names["shared_down"], (D, inner), 1, part)),
        ]

    def idle(self, width: int) -> int:
        """Elements of the experts that a token does not take."""
        return (self.experts - self.top_k) * 3 * width * self.inner

    def costs(self, width: int, step: Step) -> list[Cost]:
        """Routing is taken as even: T tokens that each take k of E experts touch E (1 - (1 - k/E)^T) of them. Of n
        data-parallel ranks, each runs one n-th of that for the tokens of all."""
        E, k, T, n = self.experts, self.top_k, step.all_tokens, step.shards.data_size
        expert = 3 * width * step.shards.count(self.inner, WIDTH)
        rows = T * k / n + step.tokens * self._like_routed
        touched = E / n * (1 - (1 - k / E) ** T) * step.scheme.bytes_per_weight(step.dtype_bytes)
        touched += self._like_routed * (step.shared or step.scheme).bytes_per_weight(step.dtype_bytes)
        gated, routes = [], E + int(self.gated_shared == self.inner)
        if self.gated_shared != self.inner and self.gated_shared:
            inner = step.shards.count(self.gated_shared, SHARED_WIDTH)
            gated = [product("shared expert", width * (3 * inner + 1), step)]
        return [
            product("router", routes * width, step, scheme=PLAIN),
            Cost("experts", touched * expert, 2.0 * rows * expert, rate=step.rate(step.scheme)),
            *gated,
            *exchange("experts' rows between ranks", width, k, step),
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
