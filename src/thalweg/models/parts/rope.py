"""Rotary positions (arXiv:2104.09864), by themselves or stretched by YaRN (arXiv:2309.00071): plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from thalweg.config.hf import ConfigReader


@dataclass(frozen=True, slots=True)
class Yarn:
    """A context stretched `factor` times beyond the `original` one; frequencies between the two betas are blended."""

    factor: float
    original: int  # tokens
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # of cosines and sines; None: 0.1 ln(factor) + 1
    score_factor: float = 1.0  # of attention scores besides (DeepSeek)


@dataclass(frozen=True, slots=True)
class RopeDims:
    """`dims` of a head are rotated, in dims / 2 pairs, pair i by position * theta^(-2 i / dims). Which dims make a pair
    is the mixer's own: (i, i + dims / 2), or (2 i, 2 i + 1) in multi-head latent attention."""

    dims: int
    theta: float
    yarn: Yarn | None = None

    @property
    def frequencies(self) -> list[float]:
        """Angle per position of each of the dims / 2 pairs."""
        exponents = [2 * i / self.dims for i in range(self.dims // 2)]
        plain = [self.theta**-e for e in exponents]
        if self.yarn is None:
            return plain
        low, high = (self._pair_of(beta, self.yarn.original) for beta in (self.yarn.beta_fast, self.yarn.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.dims - 1)
        blended = []
        for i, frequency in enumerate(plain):
            ramp = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
            blended.append(frequency * (1 - ramp) + frequency / self.yarn.factor * ramp)
        return blended

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.yarn is None:
            return 1.0
        given = self.yarn.attention_factor
        return _mscale(self.yarn.factor, 1.0) if given is None else given

    def _pair_of(self, turns: float, context: int) -> float:
        """The pair, as a real number, that turns so often within `context` tokens."""
        return self.dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1


def read_rope(reader: ConfigReader, head_dim: int) -> RopeDims:
    """From `rope_parameters`, or from the older flat keys and `rope_scaling`. Sections for several axes are accepted:
    text has equal positions on each, which is plain rotation. Raises ConfigError."""
    section, yarn = reader.get_section("rope_parameters"), None
    older = reader.get_section("rope_scaling")
    section = older if section is None else section
    share = _number(reader, section, "partial_rotary_factor", low=0, high=1)
    theta = _number(reader, section, "rope_theta", low=1, high=math.inf)
    if section is not None:
        section.get_int_list("mrope_section", None)
        section.get_bool("mrope_interleaved", True)
        yarn = _read_yarn(section)
        section.finish()
    dims = int(head_dim * share)
    if dims < 2 or dims % 2:
        raise reader.error("partial_rotary_factor", f"a share that rotates an even number of the {head_dim} dims")
    return RopeDims(dims, theta, yarn)


def _number(reader: ConfigReader, section: ConfigReader | None, key: str, *, low: float, high: float) -> float:
    """Of the section, or else of the config that it stands in; what a class would fill in is not guessed."""
    own = None if section is None else section.get_float(key, None, low=low, high=high)
    if own is None:
        return reader.get_float(key, low=low, high=high)
    reader.skip(key)
    return own


def _read_yarn(section: ConfigReader) -> Yarn | None:
    key = "type" if section.get_str("rope_type", None) is None else "rope_type"
    kind = section.get_str(key, "default")
    section.skip("type")
    if kind == "default":
        return None
    if kind != "yarn":
        raise section.error(key, "'default' or 'yarn'")
    return Yarn(
        factor=section.get_float("factor", low=1),
        original=section.get_int("original_max_position_embeddings", low=1),
        beta_fast=section.get_float("beta_fast", 32.0, low=0),
        beta_slow=section.get_float("beta_slow", 1.0, low=0),
        attention_factor=section.get_float("attention_factor", None, low=0),
    )


def read_mla_rope(reader: ConfigReader, dims: int) -> RopeDims:
    """As DeepSeek's layout has it: with YaRN, `mscale` over `mscale_all_dim` scales cosines and sines, and the square
    of the latter all scores. Raises ConfigError."""
    section = reader.get_section("rope_parameters")
    older = reader.get_section("rope_scaling")
    section = older if section is None else section
    reader.only("rope_interleave", True)
    theta, yarn = _number(reader, section, "rope_theta", low=1, high=math.inf), None
    if section is not None:
        mscale = section.get_float("mscale", 1.0, low=0)
        of_scores = section.get_float("mscale_all_dim", 0.0, low=0)
        yarn = _read_yarn(section)
        if yarn is not None:
            of_both, of_scores = _mscale(yarn.factor, mscale), _mscale(yarn.factor, of_scores)
            given = yarn.attention_factor
            yarn = replace(
                yarn, attention_factor=of_both / of_scores if given is None else given, score_factor=of_scores**2
            )
        section.finish()
    if dims % 2:
        raise reader.error("qk_rope_head_dim", "an even number of dims, which are rotated in pairs")
    return RopeDims(dims, theta, yarn)
