"""The chat page as somebody in front of it meets it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.browser import Page, browser
from tests.e2e.tiny_model import server_process
from thalweg.config.model_source import model_folder

pytestmark = pytest.mark.slow
QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now?"


def send(page: Page, text: str) -> None:
    page.run(f"$('prompt').value = {text!r}; $('form').requestSubmit()")


def last(page: Page, part: str) -> str:
    found: str = page.run(f"[...document.querySelectorAll('.{part}')].at(-1)?.textContent ?? ''")
    return found


def test_chat_page(tmp_path: Path) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with browser(tmp_path / "profile") as page, server_process(tmp_path / "log", {}) as server:
        page.call("Page.enable")
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        page.call("Page.navigate", url=server.url)
        page.wait("document.readyState === 'complete' && $('model').value === 'thalweg-tiny'")

        send(page, QUESTION)  # by the model's own sampling defaults: greedy
        page.wait("document.querySelectorAll('.facts').length === 1")
        assert last(page, "text h5") == "7"
        assert "tokens/s" in last(page, "facts")
        if keep := os.environ.get("THALWEG_SCREENSHOTS"):
            page.screenshot(Path(keep) / "chat-page.png")

        # A second message is sent with the first and its answer.
        send(page, "Ana has 5 pens. She loses 2 pens. How many pens does Ana have left?")
        page.wait("document.querySelectorAll('.facts').length === 2")
        assert page.run("messages.map((m) => m.role).join()") == "user,assistant,user,assistant"

        page.run("$('theme').click()")
        assert page.run("document.documentElement.dataset.theme") == "dark"
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 27)"

        # What the server refuses is shown in its own words, and the page goes on.
        page.run("$('temperature').value = -1")
        send(page, "x")
        page.wait("document.querySelectorAll('.error').length === 1")
        assert "temperature" in last(page, "error")

        page.run("$('new').click(); $('temperature').value = 1; $('max_tokens').value = 3")
        send(page, "<img src=x onerror='window.bad = 1'>")
        page.wait("document.querySelectorAll('.facts').length === 1")
        assert page.run("document.querySelectorAll('main img').length") == 0
        assert "cut at the token limit" in last(page, "facts")


def test_stop_ends_the_answer(tmp_path: Path) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with browser(tmp_path / "profile") as page, server_process(tmp_path / "log", {}) as server:
        page.call("Page.navigate", url=server.url)
        page.wait("document.readyState === 'complete' && $('model').value !== ''")
        # An answer that would not end by itself soon.
        more = "JSON.stringify({...JSON.parse(o.body), ignore_eos: true})"
        page.run(f"real = fetch; window.fetch = (url, o) => real(url, o?.body ? {{...o, body: {more}}} : o)")
        send(page, QUESTION)
        page.wait("document.querySelector('.assistant .text')?.textContent.length > 0")
        assert page.run("$('stop').hidden") is False
        page.run("$('stop').click()")
        page.wait("document.querySelectorAll('.facts').length === 1", 5)
        assert "stopped" in last(page, "facts")
        page.wait(
            "fetch('metrics').then((r) => r.text()).then((t) => t.includes('thalweg_num_requests_running 0.0'))", 5
        )
