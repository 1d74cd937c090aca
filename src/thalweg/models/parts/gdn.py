"""Gated DeltaNet (arXiv:2412.06464): a gated delta rule with one decay per head, value heads that share key heads."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.models.parts.part import Cost, Names, PlanContext, Step, all_reduce, product
from thalweg.quant.scheme import Range
from thalweg.weights.plan import Init, Source, Target, concat, split, whole

KEY_HEADS, VALUE_HEADS = "linear_num_key_heads", "linear_num_value_heads"


@dataclass(frozen=True, slots=True)
class GdnDims:
    """`value_heads` heads of `value_dim` dims over `key_heads` heads of `key_dim`: consecutive value heads share a key
    head. One short convolution of `taps` taps goes over queries, keys and values."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> tuple[int, int, int]:
        """Channels of q, k and v, in the order of the convolution."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim

    def targets(self, ours: str, names: Names, ctx: PlanContext) -> list[Target]:
        """in_proj has rows q, k, v, z, b, a. Ranks take value heads and the key heads that those need.

        Names: norm, conv, A_log, dt_bias, out_norm, out; and qkv, z, b, a (Qwen3.5), or qkvz and ba, which are packed
        key head by key head (Qwen3-Next).
        """
        H, V, D, shards = self.value_heads, self.value_dim, ctx.width, ctx.shards
        keys = shards.shared(self.key_heads, KEY_HEADS)
        heads = shards.even(H, VALUE_HEADS)
        rows = self._packed(names, D, keys, heads) if "qkvz" in names else self._plain(names, D, keys, heads)
        q, k, v = self.channels
        conv_shape = (q + k + v, 1, self.taps)
        conv = [Source(names["conv"], conv_shape, 0, part) for part in self._channel_ranges(keys, heads)]
        channels = sum(stop - start for start, stop in self._channel_ranges(keys, heads))

        def per_head(name: str, init: Init) -> Target:
            return split(f"{ours}.{name}", names[name], (H,), 0, heads, dtype="float32", init=init)

        return [
            ctx.norm(f"{ours}.in_proj.norm.weight", names["norm"], D),
            *ctx.linear(f"{ours}.in_proj", *rows),
            concat(f"{ours}.conv.weight", conv, (channels, self.taps)),
            per_head("A_log", "a_log"),
            per_head("dt_bias", "dt_bias"),
            whole(f"{ours}.out_norm.weight", names["out_norm"], (V,), dtype="float32", init="ones"),
            *ctx.linear(f"{ours}.out_proj", Source(names["out"], (D, H * V), 1, (heads[0] * V, heads[1] * V))),
        ]

    def _channel_ranges(self, keys: Range, heads: Range) -> list[Range]:
        """Where this rank's channels of q, k and v stand among all of them."""
        q, k, _ = self.channels
        key = (keys[0] * self.key_dim, keys[1] * self.key_dim)
        value = (heads[0] * self.value_dim, heads[1] * self.value_dim)
        return [key, (q + key[0], q + key[1]), (q + k + value[0], q + k + value[1])]

    def _plain(self, names: Names, D: int, keys: Range, heads: Range) -> list[Source]:
        H, V = self.value_heads, self.value_dim
        return [
            *(Source(names["qkv"], (sum(self.channels), D), 0, part) for part in self._channel_ranges(keys, heads)),
            Source(names["z"], (H * V, D), 0, (heads[0] * V, heads[1] * V)),
            Source(names["b"], (H, D), 0, heads),
            Source(names["a"], (H, D), 0, heads),
        ]

    def _packed(self, names: Names, D: int, keys: Range, heads: Range) -> list[Source]:
        """Rows of qkvz are [q | k | v of its value heads | z of these] per key head, rows of ba [b | a] likewise."""
        ratio, K, V = self.value_heads // self.key_heads, self.key_dim, self.value_dim
        both, pair = 2 * (K + ratio * V), 2 * ratio
        # Of each key head the value heads that this rank has: [first, last) among its own.
        mine = [
            (g, max(heads[0] - g * ratio, 0), min(heads[1] - g * ratio, ratio))
            for g in range(*keys)
            if heads[0] < (g + 1) * ratio and heads[1] > g * ratio
        ]

        def pieces(name: str, period: int, total: int, ranges: list[Range]) -> list[Source]:
            return [Source(names[name], (total * period, D), 0, part) for part in ranges]

        q = [(g * both, g * both + K) for g in range(*keys)]
        k = [(g * both + K, g * both + 2 * K) for g in range(*keys)]
        v = [(g * both + 2 * K + i * V, g * both + 2 * K + j * V) for g, i, j in mine]
        z = [(start + ratio * V, stop + ratio * V) for start, stop in v]
        b = [(g * pair + i, g * pair + j) for g, i, j in mine]
        a = [(start + ratio, stop + ratio) for start, stop in b]
        return [*pieces("qkvz", both, self.key_heads, q + k + v + z), *pieces("ba", pair, self.key_heads, b + a)]

    def costs(self, width: int, step: Step) -> list[Cost]:
        """As KDA's: the recurrence is counted, which chunked forms exceed."""
        H, V, K = step.shards.count(self.value_heads, VALUE_HEADS), self.value_dim, self.key_dim
        G = step.shards.shared_count(self.key_heads, KEY_HEADS)
        channels = 2 * G * K + H * V
        conv = channels * self.taps
        state = H * K * V * step.state_bytes + channels * (self.taps - 1) * step.dtype_bytes
        moved = step.sequences * state * (2 if step.cached else 1)
        return [
            product("GDN in", width * (channels + H * V + 2 * H), step),
            Cost("GDN mixer", conv * step.dtype_bytes + moved, step.tokens * (8.0 * H * K * V + 2 * conv)),
            product("GDN out", width * H * V, step),
            *all_reduce("GDN sum over ranks", width, step),
        ]
