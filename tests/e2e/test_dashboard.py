"""Every panel of the shipped Grafana dashboard asks for metrics that a live server has, by their right type."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.tiny_model import server_process
from thalweg.config.model_source import model_folder

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "thalweg.json"


def post(url: str, body: dict[str, object]) -> None:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60).read()


def test_panels_against_a_live_scrape(tmp_path: Path) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with server_process(tmp_path / "log", {}) as server:
        post(f"{server.url}/v1/completions", {"prompt": "Tom has", "max_tokens": 8})
        text = urllib.request.urlopen(f"{server.url}/metrics", timeout=60).read().decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    samples = set(re.findall(r"^(thalweg_\w+)", text, re.MULTILINE))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [t["expr"] for panel in panels for t in panel["targets"]]
    assert len(expressions) >= len(panels) > 5
    asked = set()
    for expression in expressions:
        names = re.findall(r"thalweg_\w+", expression)
        assert names, expression
        asked.update(names)
        for name in names:
            assert name in samples, f"{name} of {expression} is not in the scrape"
            family = re.sub(r"_bucket$", "", name)
            kind = types[family]
            assert ("rate(" in expression) == (kind in ("counter", "histogram")), expression
            if label := re.search(r"by \((\w+)\)", expression):
                assert re.search(rf"^{name}{{[^}}]*{label[1]}=", text, re.MULTILINE), expression
    # Whatever the server counts is to be seen.
    plain = {re.sub(r"_(bucket|count|sum|created|total)$", "", n) for n in samples}
    assert plain <= {re.sub(r"_(bucket|total)$", "", n) for n in asked}
