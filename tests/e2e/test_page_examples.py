"""The Python examples of README and of the pages run, with the bundled model where they name another one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from thalweg import LLM

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/getting-started.md", "docs/python.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_first_python_example_of_a_page_prints_text(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code, *_] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    code = re.sub(r'LLM\("[^"]*"(, )?', "LLM(", code)

    def small(**options: Any) -> LLM:
        """The bundled model has a shorter context than those that pages name."""
        options.pop("max_model_len", None)
        return LLM(**options, device="cpu", cache_memory=1 << 28)

    names: dict[str, Any] = {}
    exec(
        re.sub(r"^from thalweg import LLM, ", "from thalweg import ", code, flags=re.MULTILINE), names | {"LLM": small}
    )
    assert len(capsys.readouterr().out.split()) > 10
