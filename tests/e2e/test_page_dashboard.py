"""The page of metrics: its figures are those that the server counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.browser import Page, browser
from tests.e2e.page_server import page_server
from tests.unit.server_double import ClientDouble
from thalweg.core import SchedulerStats
from thalweg.server.settings import ServerSettings

FOLDER = Path(__file__).parents[2] / "src" / "thalweg" / "server" / "page"
STATS = SchedulerStats(2, 1, 25, 100, 3, 8, 0, 1000, 400, prefix_queries=1000, prefix_hits=0, snapshots_total=4)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        page.call("Page.enable")
        yield page


def panel(page: Page, title: str) -> dict[str, str]:
    rows: list[list[str]] = page.run(
        f"[...document.querySelectorAll({json.dumps(f'[aria-label={json.dumps(title)}] tr')})]"
        ".map((row) => [row.querySelector('th').textContent, row.lastChild.textContent])"
    )
    return dict(rows)  # type: ignore[arg-type]


def test_figures_are_those_of_the_server(tab: Page) -> None:
    client = ClientDouble()
    client.stats = STATS
    with page_server(client) as url:
        tab.call("Page.navigate", url=f"{url}/dashboard")
        tab.wait("document.readyState === 'complete' && $('model').textContent === 'double' && scrapes.length > 0")
        assert panel(tab, "Sequences") == {"running": "2", "waiting": "1"}
        assert panel(tab, "Paged cache in use") == {"blocks": "25.0 %"}
        assert panel(tab, "State slots") == {"in use": "3", "all": "8"}
        assert panel(tab, "Time to first token") == {"50 %": "none yet", "90 %": "none yet", "99 %": "none yet"}
        assert panel(tab, "Prompt tokens from the prefix cache") == {"of those looked up": "none yet"}

        for model in ("double", "other"):
            httpx.post(f"{url}/v1/completions", json={"prompt": "hi", "model": model})
        client.stats = SchedulerStats(0, 0, 0, 100, 0, 8, 0, 3000, 500, prefix_queries=3000, prefix_hits=500)
        tab.run("scrapes.push({ ...scrapes.pop(), at: performance.now() / 1000 - 4 })")
        tab.run("scrape()")
        assert panel(tab, "Sequences")["running"] == "0"
        assert panel(tab, "Prompt tokens from the prefix cache") == {"of those looked up": "25.0 %"}
        assert float(panel(tab, "Tokens per second")["generated"]) == pytest.approx(25, rel=0.2)
        assert float(panel(tab, "Tokens per second")["of prompts"]) == pytest.approx(500, rel=0.2)
        assert panel(tab, "Sequences by their end")["stop"] == "1"
        assert panel(tab, "Requests that were wrong")["model not found"] == "1"
        assert panel(tab, "Time to first token")["50 %"].endswith(" ms")
        points = tab.run(
            "document.querySelector('.panel polyline.line0[points*=\".\"], .panel > svg > .line0').outerHTML"
        )
        assert points.count(",") == 2

        # A server that began anew counts from 0: no rate is negative.
        client.stats = SchedulerStats(0, 0, 0, 100, 0, 8, 0, 10, 10)
        tab.run("scrape()")
        assert all(float(value) >= 0 for value in panel(tab, "Tokens per second").values())
    tab.run("scrape()")
    assert tab.run("$('status').textContent").startswith("No figures: ")


def test_quantiles_are_prometheus_own(tab: Page) -> None:
    """Of what came since the first scrape; within a bucket evenly spread."""
    with page_server(ClientDouble()) as url:
        tab.call("Page.navigate", url=f"{url}/dashboard")
        tab.wait("document.readyState === 'complete' && scrapes.length > 0")

        texts = [
            f't_bucket{{le="0.5"}} {a}\nt_bucket{{le="2.0",x="a}},b"}} {b}\n# x\nt_bucket{{le="+Inf"}} {c}.0\n'
            for a, b, c in ((4, 4, 4), (5, 13, 14))
        ]
        scrapes = f"{json.dumps(texts)}.map((text, at) => ({{ at, values: parse(text) }}))"
        found = tab.run(f"[0.05, 0.1, 0.5, 0.99].map((q) => quantile('t', q)({scrapes}))")
        assert found == pytest.approx([0.25, 0.5, 1.25, 2])


def test_every_figure_that_the_page_shows_is_counted() -> None:
    client = ClientDouble()
    client.stats = STATS
    with page_server(client) as url:
        names = set(re.findall(r"^(thalweg_\w+)", httpx.get(f"{url}/metrics").text, re.MULTILINE))
    asked = set(re.findall(r'"(thalweg_\w+)"', (FOLDER / "dashboard.js").read_text()))
    assert len(asked) > 10
    for name in asked:
        assert name in names or f"{name}_bucket" in names, name


def test_browsers_are_asked_for_the_key_where_the_pages_are() -> None:
    with page_server(ClientDouble(), ServerSettings(api_keys=("k",))) as url:
        for path, scheme in (("/", "Basic"), ("/dashboard", "Basic"), ("/metrics", "Bearer")):
            refused = httpx.get(url + path)
            assert (refused.status_code, refused.headers["www-authenticate"].split()[0]) == (401, scheme)
            assert httpx.get(url + path, auth=("any", "k")).status_code == 200
