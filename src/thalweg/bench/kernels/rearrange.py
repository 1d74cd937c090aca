"""einops `rearrange` against the native form, at the call sites of KDA and of Gated DeltaNet: the processor's time.

The only importer of einops, which nothing else needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thalweg.bench.kernels.case import Arguments, Candidate, Case, Draw, Setting

try:
    from einops import rearrange

    MISSING = None
except ImportError:
    MISSING = "einops is not installed; pip install einops"

HEAD = 128
PUBLISHED = "KDA path 198.7 -> 113.7 ms over 12,600 calls, one GDN call 12.67 -> 4.74 us, under a profiler"


@dataclass(frozen=True, slots=True)
class Site:
    """A reshape of a model's code: where it is, the pattern it was written with, and the same without einops."""

    where: str
    pattern: str
    sizes: dict[str, int]
    native: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]  # without the tokens, which come first where `tokens` says so
    tokens: bool = True


SITES = (
    Site(
        "KDA q, k, v",
        "t (h d) -> 1 t h d",
        {"d": HEAD},
        lambda x: x.unflatten(-1, (-1, HEAD)).unsqueeze(0),  # t (h d) -> 1 t h d
        (32 * HEAD,),
    ),
    Site(
        "KDA gate",
        "... (h d) -> ... h d",
        {"d": HEAD},
        lambda x: x.unflatten(-1, (-1, HEAD)),  # ... (h d) -> ... h d
        (32 * HEAD,),
    ),
    Site(
        "KDA output",
        "... h d -> ... (h d)",
        {},
        lambda x: x.flatten(-2),  # ... h d -> ... (h d)
        (32, HEAD),
    ),
    Site(
        "KDA conv weight",
        "c 1 w -> c w",
        {},
        lambda x: x.squeeze(1),  # c 1 w -> c w
        (3 * 32 * HEAD, 1, 4),
        tokens=False,
    ),
    Site(
        "GDN q, k",
        "t (h d) -> 1 t h d",
        {"d": HEAD},
        lambda x: x.view(1, -1, x.shape[-1] // HEAD, HEAD),  # t (h d) -> 1 t h d
        (16 * HEAD,),
    ),
    Site(
        "GDN output",
        "... h d -> ... (h d)",
        {},
        lambda x: x.flatten(-2),  # ... h d -> ... (h d)
        (32, HEAD),
    ),
)


def rearranges(setting: Setting) -> Iterator[Case]:
    """The largest batch alone: a view's time does not depend on it."""
    T = max(setting.batch_sizes)
    for site in SITES:

        def make(copy: int, site: Site = site) -> Arguments:
            return Arguments(Draw(setting, copy)(*([T] if site.tokens else []), *site.shape))

        def einops(x: Tensor, site: Site = site) -> Any:
            return rearrange(x, site.pattern, **site.sizes)

        candidates = (Candidate("einops", einops, MISSING), Candidate("native", site.native))
        yield Case("rearrange", f"{site.where}: {site.pattern}", candidates, make, timed="host", published=PUBLISHED)
