"""A serving benchmark as one SVG picture: percentiles of each latency, then tokens/s and requests over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

from thalweg.bench.serve_figures import METRICS, concurrency, samples_ms, tokens_per_second
from thalweg.bench.serve_load import Outcome

Points = Sequence[tuple[float, float]]

WIDTH, PANEL_H, GAP = 960, 220, 60
_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" '
    'font-family="sans-serif" font-size="12">\n<rect width="{w}" height="{h}" fill="#fff"/>\n'
    '<text x="{mid}" y="24" font-size="16" text-anchor="middle">{title}</text>'
)


def draw(outcomes: Sequence[Outcome], title: str) -> str:
    """The picture's text. Panels without a figure are empty."""
    half = (WIDTH - 3 * GAP) // 2
    percents = np.arange(0, 100.5, 0.5)
    parts = []
    for i, (name, values) in enumerate(samples_ms(outcomes).items()):
        points: Points = []
        if values:
            points = list(zip(percents.tolist(), np.percentile(values, percents).tolist(), strict=True))
        x, y = GAP + i % 2 * (half + GAP), 60 + i // 2 * (PANEL_H + GAP)
        parts.append(_panel(x, y, half, f"{METRICS[name]}, ms by percentile", points))
    full, y = WIDTH - 2 * GAP, 60 + 2 * (PANEL_H + GAP)
    rates = [(float(second), rate) for second, rate in enumerate(tokens_per_second(outcomes))]
    parts.append(_panel(GAP, y, full, "Output tokens/s over seconds", rates))
    under_way = [(at, float(n)) for at, n in concurrency(outcomes)]
    parts.append(_panel(GAP, y + PANEL_H + GAP, full, "Requests under way over seconds", under_way, steps=True))
    height = y + 2 * (PANEL_H + GAP)
    return "\n".join([_HEAD.format(w=WIDTH, h=height, mid=WIDTH // 2, title=escape(title)), *parts, "</svg>\n"])


def _panel(x: int, y: int, width: int, title: str, points: Points, *, steps: bool = False) -> str:
    """One line over axes that begin at zero, with a label every round number."""
    right, top = (max((p[axis] for p in points), default=1.0) or 1.0 for axis in (0, 1))

    def place(px: float, py: float) -> str:
        return f"{x + px / right * width:.1f},{y + PANEL_H - py / top * PANEL_H:.1f}"

    marks = [f'<text x="{x}" y="{y - 10}" font-size="13">{escape(title)}</text>']
    for value in _ticks(top):
        at = y + PANEL_H - value / top * PANEL_H
        marks.append(f'<path d="M{x} {at:.1f}h{width}" stroke="#ddd"/>')
        marks.append(f'<text x="{x - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(right):
        at = x + value / right * width
        marks.append(f'<text x="{at:.1f}" y="{y + PANEL_H + 16}" text-anchor="middle">{value:g}</text>')
    path: list[str] = []
    for i, (px, py) in enumerate(points):
        if steps and i:
            path.append(place(px, points[i - 1][1]))
        path.append(place(px, py))
    marks.append(f'<path d="M{x} {y}v{PANEL_H}h{width}" fill="none" stroke="#333"/>')
    if path:
        marks.append(f'<polyline points="{" ".join(path)}" fill="none" stroke="#0b6bcb" stroke-width="1.5"/>')
    return "\n".join(marks)


def _ticks(most: float) -> list[float]:
    """About five round numbers from 0 to `most`."""
    raw = most / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]
