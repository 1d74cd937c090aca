"""The chat page in front of scripted answers: reasoning, calls, models, copies, retries, stops, keys, colours."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.browser import Page, browser
from tests.e2e.page_server import page_server
from tests.unit.server_double import ANSWER, ClientDouble
from thalweg.server.settings import ServerSettings

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}{{ m.reasoning_content }}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{% endfor %}]{% endfor %}{# <think> </think> <tool_call> #}"
)
CALLS = (
    "<think>Where <b>is</b> it?</think>I *look*.\n"
    '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
    '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        page.call("Page.enable")
        yield page


@contextmanager
def chat(tab: Page, client: ClientDouble, settings: ServerSettings | None = None) -> Iterator[Page]:
    with page_server(client, settings) as url:
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && $('model').value !== ''")
        yield tab


def send(page: Page, text: str) -> None:
    page.run(f"$('prompt').value = {json.dumps(text)}; $('form').requestSubmit()")


def answered(page: Page, count: int = 1) -> None:
    page.wait(f"document.querySelectorAll('.facts').length === {count} && running === null", 10)


def prompt(client: ClientDouble) -> str:
    return bytes(i for i in client.seen[-1].prompt_token_ids if i < 256).decode()


def key(page: Page, name: str, code: int, text: str = "", modifiers: int = 0) -> None:
    common: dict[str, Any] = {"key": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
    page.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
    page.call("Input.dispatchKeyEvent", type="keyUp", **common)


def test_reasoning_is_folded_and_calls_are_shown_and_answered(tab: Page) -> None:
    client = ClientDouble(answer=CALLS, template=TEMPLATE)
    with chat(tab, client) as page:
        page.run(f"$('tools').value = {json.dumps(json.dumps(TOOLS))}")
        send(page, "Weather?")
        answered(page)
        thoughts = page.run("(() => { const d = $('log').querySelector('details'); return [d.open, d.textContent] })()")
        assert thoughts[0] is False
        assert re.fullmatch(r"Thought for [\d.]+ sWhere <b>is</b> it\?", thoughts[1])
        assert page.run("document.querySelector('.assistant .text').innerHTML") == "<p>I <em>look</em>.</p>"
        calls = page.run("[...document.querySelectorAll('.call')].map((c) => c.textContent)")
        assert calls == ['Calls weather{"city": "Ulm"}', "Calls time{}"]

        client.answer = client.codec.tokenizer.encode("Sunny.")
        page.run("document.querySelectorAll('.results textarea').forEach((f, i) => { f.value = `<i>r${i}` })")
        page.run("document.querySelector('.results').requestSubmit()")
        answered(page, 2)
        turns = "[user:Weather?][assistant:I *look*.Where <b>is</b> it?weathertime]"
        assert prompt(client) == f"{turns}[tool:<i>r0][tool:<i>r1]"
        assert page.run("document.querySelectorAll('.results, .tool i').length") == 0
        assert page.run("messages.map((m) => m.role).join()") == "user,assistant,tool,tool,assistant"

        # Answering again takes back what follows the answer.
        page.run("document.querySelector('.retry').click()")
        answered(page)
        assert page.run("messages.map((m) => m.role).join()") == "user,assistant"


def test_tools_that_are_no_json_say_so_and_ask_nothing(tab: Page) -> None:
    client = ClientDouble()
    with chat(tab, client) as page:
        page.run("$('tools').value = '[{'")
        send(page, "hi")
        answered(page)
        assert page.run("document.querySelector('[role=alert]').textContent").startswith("Tools are no JSON: ")
        assert client.seen == []
        page.run("$('tools').value = ''; document.querySelector('.retry').click()")
        answered(page)
        assert page.run("document.querySelector('.assistant .text').textContent") == ANSWER
        assert page.run("document.querySelectorAll('[role=alert]').length") == 0


def test_the_model_can_be_picked(tab: Page) -> None:
    client = ClientDouble()
    with chat(tab, client, ServerSettings(served_model_names=("one", "<b>two"))) as page:
        assert page.run("[...$('model').options].map((o) => o.value)") == ["one", "<b>two"]
        page.run(
            "window.asked = []; real = fetch;"
            " window.fetch = (url, o) => { if (o?.body) asked.push(JSON.parse(o.body).model); return real(url, o) }; 0"
        )
        page.run("$('model').value = '<b>two'")
        send(page, "hi")
        answered(page)
        assert page.run("asked") == ["<b>two"]
    with chat(tab, ClientDouble()) as page:
        assert page.run("$('model').disabled") is True


def test_copies_are_the_markdown_or_the_code(tab: Page) -> None:
    answer = "# A\n\n```py\nx = 1\n  y\n```\n"
    with chat(tab, ClientDouble(answer=answer)) as page:
        page.run("window.copied = []; copyText = async (text) => { copied.push(text) }; 0")
        send(page, "  *hi* ")
        answered(page)
        page.run("for (const b of document.querySelectorAll('.copy')) b.click()")
        page.wait("copied.length === 3 && $('status').textContent === 'Copied'", 5)
        assert page.run("copied") == ["*hi*", "x = 1\n  y", answer]


@pytest.mark.parametrize("secure", [True, False])
def test_a_copy_reaches_the_clipboard(tab: Page, secure: bool) -> None:
    """Pages that are not encrypted have no navigator.clipboard."""
    with chat(tab, ClientDouble()) as page:
        origin = page.run("location.origin")
        grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": origin}
        session, page._session = page._session, None
        page.call("Browser.grantPermissions", **grant)
        page._session = session
        page.call("Page.bringToFront")
        page.run("window.board = navigator.clipboard; 0")
        if not secure:
            page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        send(page, "hi")
        answered(page)
        place = page.run("document.querySelector('.assistant .copy').getBoundingClientRect().toJSON()")
        at = {"x": place["x"] + 5, "y": place["y"] + 5, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            page.call("Input.dispatchMouseEvent", type=kind, **at)
        page.wait("$('status').textContent === 'Copied'", 5)
        assert page.run("board.readText()") == ANSWER
        assert page.run("document.querySelectorAll('textarea').length") == 3


def test_an_answer_can_be_retried_and_a_message_edited(tab: Page) -> None:
    client = ClientDouble()
    with chat(tab, client) as page:
        for i in range(2):
            send(page, f"q{i}")
            answered(page, i + 1)
        page.run("[...document.querySelectorAll('.retry')].at(-1).click()")
        answered(page, 2)
        assert prompt(client) == f"user:q0\nassistant:{ANSWER}\nuser:q1\nassistant:"
        page.run("document.querySelector('.edit').click()")
        assert page.run("[$('prompt').value, messages.length, $('log').children.length]") == ["q0", 0, 0]
        assert page.run("document.activeElement.id") == "prompt"
        send(page, "q2")
        answered(page)
        assert prompt(client) == "user:q2\nassistant:"


def test_an_answer_that_fails_says_why_and_can_be_retried(tab: Page) -> None:
    client = ClientDouble()
    with chat(tab, client) as page:
        send(page, "FAIL")
        answered(page)
        assert "logits are not finite" in page.run("document.querySelector('[role=alert]').textContent")
        assert page.run("$('status').textContent") == "The answer failed"
        page.run("document.querySelector('.edit').click()")
        send(page, "hi")
        answered(page)
        assert page.run("document.querySelector('.assistant .text').textContent") == ANSWER


def test_keys_send_and_stop_and_the_focus_is_never_lost(tab: Page) -> None:
    client = ClientDouble()
    with chat(tab, client) as page:
        assert page.run("document.activeElement.id") == "prompt"
        page.call("Input.insertText", text="HANG")
        key(page, "Enter", 13, "\r", modifiers=8)
        assert page.run("$('prompt').value") == "HANG\n"
        key(page, "Enter", 13, "\r")
        page.wait("document.querySelector('.assistant .text')?.textContent === 'He'", 5)
        assert page.run("$('stop').hidden") is False
        assert page.run("document.querySelector('.assistant').getAttribute('aria-busy')") == "true"
        assert page.run("$('status').textContent") == "Answering…"
        key(page, "Escape", 27)
        answered(page)
        assert page.run("[$('status').textContent, document.activeElement.id]") == ["Stopped", "prompt"]
        assert page.run("document.querySelector('.assistant').hasAttribute('aria-busy')") is False
        until = time.monotonic() + 5
        while not client.aborted:
            assert time.monotonic() < until

        page.run("$('prompt').value = 'HANG'; $('send').focus(); $('send').click()")
        page.wait("document.querySelectorAll('.assistant').length === 2 && running !== null", 5)
        assert page.run("document.activeElement.id") == "stop"
        page.run("$('stop').click()")
        answered(page, 2)
        assert page.run("document.activeElement.id") == "prompt"


def test_a_new_chat_leaves_no_status_of_the_old_one(tab: Page) -> None:
    with chat(tab, ClientDouble()) as page:
        send(page, "hi")
        answered(page)
        assert page.run("$('status').textContent") == "The answer is complete"
        page.run("$('new').click()")
        assert page.run("$('status').textContent") == ""

        send(page, "HANG")
        page.wait("document.querySelector('.assistant .text')?.textContent === 'He'", 5)
        assert page.run("$('status').textContent") == "Answering…"
        page.run("$('new').click()")
        page.wait("running === null", 5)
        assert page.run("[$('status').textContent, $('send').hidden, $('log').children.length]") == ["", False, 0]

        send(page, "hi")
        answered(page)
        assert page.run("$('status').textContent") == "The answer is complete"


def test_screen_readers_meet_names_and_roles(tab: Page) -> None:
    with chat(tab, ClientDouble()) as page:
        send(page, "hi")
        answered(page)
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        seen = {(n["role"]["value"], n["name"]["value"]) for n in nodes if "name" in n and not n["ignored"]}
        assert {
            ("log", "Conversation"),
            ("article", "You"),
            ("article", "Assistant"),
            ("textbox", "Message"),
            ("combobox", "Model"),
            ("button", "Send"),
            ("button", "Dark theme"),
            ("button", "Answer again"),
            ("button", "Copy this answer as Markdown"),
        } <= seen
        assert all(name for role, name in seen if role in ("button", "textbox", "combobox", "link"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(tab: Page, scheme: str) -> None:
    """The contrast that WCAG's level AA asks of text, 4.5."""
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    answer = "# A\n[x](https://x.org) `y`\n\n> z\n\n```py\nx\n```\n"
    with chat(tab, ClientDouble(answer=answer)) as page:
        assert page.run("document.documentElement.dataset.theme") == scheme
        send(page, "FAIL")
        answered(page)
        send(page, "hi")
        answered(page, 2)
        low = page.run(
            """(() => {
              const light = (color) => {
                const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
                  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const back = (e) => {
                const color = getComputedStyle(e).backgroundColor;
                return color === 'rgba(0, 0, 0, 0)' && e.parentElement ? back(e.parentElement) : color;
              };
              const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = [];
              while (walker.nextNode()) {
                const e = walker.currentNode.parentElement;
                if (!walker.currentNode.data.trim() || !e.checkVisibility()) continue;
                const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((a, b) => b - a);
                if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${walker.currentNode.data} ${(a + 0.05) / (b + 0.05)}`);
              }
              return low;
            })()"""
        )
        assert low == []
    tab.call("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_the_theme_is_the_systems_until_the_button_is_pressed(tab: Page, path: str) -> None:
    def system(scheme: str) -> None:
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def load(url: str) -> list[str]:
        tab.call("Page.navigate", url="about:blank")
        tab.call("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && typeof theme === 'function'")
        return shown()

    def shown() -> list[str]:
        found: list[str] = tab.run("[document.documentElement.dataset.theme, $('theme').getAttribute('aria-pressed')]")
        return found

    with page_server(ClientDouble()) as server:
        url = server + path
        system("light")
        assert load(url) == ["light", "false"]
        system("dark")
        tab.wait("document.documentElement.dataset.theme === 'dark'", 5)
        assert load(url) == ["dark", "true"]
        tab.run("$('theme').click()")
        assert shown() == ["light", "false"]
        assert load(url) == ["light", "false"]
        tab.run("$('theme').click()")
        system("light")
        assert load(url) == ["dark", "true"]
    tab.call("Emulation.setEmulatedMedia", features=[])


def test_a_browser_asks_for_the_key_once(tab: Page) -> None:
    asked: list[str] = []

    def paused(event: dict[str, Any]) -> None:
        tab.send("Fetch.continueRequest", requestId=event["requestId"])

    def prompted(event: dict[str, Any]) -> None:
        asked.append(event["request"]["url"])
        answer = {"response": "ProvideCredentials", "username": "whoever", "password": "k"}
        tab.send("Fetch.continueWithAuth", requestId=event["requestId"], authChallengeResponse=answer)

    tab.on = {"Fetch.requestPaused": paused, "Fetch.authRequired": prompted}
    tab.call("Fetch.enable", handleAuthRequests=True)
    with chat(tab, ClientDouble(), ServerSettings(api_keys=("k",))) as page:
        send(page, "hi")
        answered(page)
        assert page.run("document.querySelector('.assistant .text').textContent") == ANSWER
        assert asked == [page.run("location.href")]
    tab.call("Fetch.disable")
    tab.on = {}


def test_strings_cannot_become_markup_or_script_and_nothing_comes_from_elsewhere(tab: Page) -> None:
    with chat(tab, ClientDouble()) as page:
        names = page.run("performance.getEntriesByType('resource').map((e) => e.name)")
        assert {name.rpartition("/")[2] for name in names} >= {"chat.css", "chat.js", "inline.js", "models"}
        assert all(name.startswith(page.run("location.href")) for name in names)
        for sink in ("document.body.innerHTML = '<b>'", "document.createElement('script').text = '1'"):
            assert page.run(f"(() => {{ try {{ {sink} }} catch (e) {{ return e instanceof TypeError }} }})()")
        violated = page.run(
            "new Promise((done) => {"
            " document.addEventListener('securitypolicyviolation', (e) => done(e.violatedDirective));"
            " new Image().src = 'http://127.0.0.1:9/x.png'; })"
        )
        assert violated == "img-src"
        assert page.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
        policy = httpx.get(page.run("location.href")).headers["content-security-policy"]
        for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "trusted-types 'none'"):
            assert part in policy
        assert "unsafe" not in policy


def test_files_of_the_page_have_no_address_but_its_own() -> None:
    folder = Path(__file__).parents[2] / "src" / "thalweg" / "server" / "page"
    for file in folder.iterdir():
        if file.suffix in (".html", ".css", ".js"):
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"(?:src|href|url|import|fetch)\W{1,3}(?:https?:)?//", text), file
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), file
