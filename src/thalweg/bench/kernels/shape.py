"""The sizes that cases are made of: Kimi-Linear-48B-A3B on one device, or a fraction of it."""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.errors import ConfigError

SCALES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and counts of one model; head sizes are those of the published config."""

    width: int = 2304
    heads: int = 32  # of KDA and of MLA
    head_dim: int = 128  # KDA's keys and values, MLA's values and its keys without a position
    rope: int = 64
    latent: int = 512
    experts: int = 256
    top_k: int = 8
    inner: int = 1024  # of an expert
    dense: int = 9216  # of the layer without experts
    vocab: int = 163840
    taps: int = 4

    @property
    def conv_channels(self) -> int:
        return 3 * self.heads * self.head_dim

    @property
    def kda_parts(self) -> tuple[int, ...]:
        """q, k, v, beta and both low-rank parts, whose rank is the head size."""
        return (*[self.heads * self.head_dim] * 3, self.heads, self.head_dim, self.head_dim)

    @property
    def kda_projection(self) -> int:
        return sum(self.kda_parts)

    @property
    def mla_parts(self) -> tuple[int, ...]:
        return self.heads * (self.head_dim + self.rope), self.latent + self.rope

    @property
    def mla_projection(self) -> int:
        return sum(self.mla_parts)

    def divided(self, by: int) -> Shape:
        """Widths and counts divided, head sizes and top-k kept. Raises ConfigError on other divisors than SCALES."""
        if by not in SCALES:
            raise ConfigError(f"--scale is {by}; expected one of {', '.join(map(str, SCALES))}")
        return Shape(
            width=self.width // by,
            heads=self.heads // by,
            latent=self.latent // by,
            experts=self.experts // by,
            inner=self.inner // by,
            dense=self.dense // by,
            vocab=self.vocab // by,
        )


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """How many of `experts` the tokens choose between them, on average, where each chooses top_k at random."""
    return experts * (1 - (1 - top_k / experts) ** tokens)
