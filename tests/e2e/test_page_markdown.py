"""What the chat page makes of a model's Markdown: the right elements, and none but these, in time."""

from __future__ import annotations

# ruff: noqa: E501 -- what comes and what is made of it, a line each
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.browser import Page, browser
from tests.e2e.page_server import page_server
from tests.unit.server_double import ClientDouble

SIZE = 100_000  # characters of a long answer
SECONDS = 3.0  # for such an answer at once: some 0.1 s here, and minutes for what takes quadratic time
TAGS = (
    *(
        "A",
        "BLOCKQUOTE",
        "BUTTON",
        "CODE",
        "DEL",
        "DIV",
        "EM",
        "H2",
        "H3",
        "H4",
        "H5",
        "H6",
        "HR",
        "LI",
        "OL",
        "P",
        "PRE",
    ),
    *("SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL"),
)
ATTRIBUTES = ("class", "href", "rel", "start", "tabindex", "target", "title", "type")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page, page_server(ClientDouble()) as url:
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && $('model').value === 'double'")
        page.run(
            "window.made = (text) => { const box = document.createElement('div'), m = new Markdown(box);"
            " m.add(text); m.render(); return box; }; 0"
        )
        yield page


def html(page: Page, text: str) -> str:
    found: str = page.run(f"made({json.dumps(text)}).innerHTML")
    return found


def code(text: str, language: str = "") -> str:
    head = f'<div class="head"><span>{language}</span><button class="copy" type="button">Copy code</button></div>'
    return f'<div class="code">{head}<pre tabindex="0"><code>{text}</code></pre></div>'


def link(href: str, text: str) -> str:
    return f'<a title="{href}" href="{href}" rel="noopener noreferrer nofollow" target="_blank">{text}</a>'


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("# A #\n## B *b*\n#no", "<h2>A</h2><h3>B <em>b</em></h3><p>#no</p>"),
        ("**a** __b__ *c* _d_ ~~e~~", "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em> <del>e</del></p>"),
        ("***a** b*", "<p><em><strong>a</strong> b</em></p>"),
        ("2 * 3 * 4, snake_case_name, a*, ~x~, **", "<p>2 * 3 * 4, snake_case_name, a*, ~x~, **</p>"),
        ("**a *b** c", "<p><strong>a *b</strong> c</p>"),
        (r"\*a\* \`b\`\` \\ \(x\) \[y\]", r"<p>*a* `b`` \ \(x\) \[y\]</p>"),
        ("`a*b*` ``c`d`` ` e", "<p><code>a*b*</code> <code>c`d</code> ` e</p>"),
        ("a &lt;b&gt; &amp; &copy;", "<p>a &lt;b&gt; &amp; &amp;copy;</p>"),
        ("---\n***\n- - -", "<hr><hr><hr>"),
        ("> a\nb\n\n> > c", "<blockquote><p>a\nb</p></blockquote><blockquote><blockquote><p>c</p></blockquote></blockquote>"),
        ("- a\n- b\n  - c\n\n    d\n- e", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li><li><p>e</p></li></ul>"),
        ("3. a\n   - b\n4) c", '<ol start="3"><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>'),
        ("1. a\n  - b\n    - c", '<ol start="1"><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul></li></ol>'),
        ("- [ ] a\n- [x] b", "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>"),
        ("so:\n- a\n1986. b", "<p>so:</p><ul><li><p>a</p></li></ul><ol start=\"1986\"><li><p>b</p></li></ol>"),
        ("```py x\na\n\n  <b>\n```\nz", code("a\n\n  &lt;b&gt;", "py") + "<p>z</p>"),
        ("~~~\n```\n~~~~", code("```")),
        ("1. x\n   ```\n   a\n    b\n   ```", f'<ol start="1"><li><p>x</p>{code(chr(10).join(("a", " b")))}</li></ol>'),
        ("```\nopen *a*", code("open *a*")),
        (
            "t:\n| a | b\\|c |\n|:-:|--:|\n| *1* | `2` | 3 |\n|4\n\nx",
            '<p>t:</p><div class="table" tabindex="0"><table><thead><tr><th class="center">a</th><th class="right">b|c</th></tr></thead><tbody><tr><td class="center"><em>1</em></td><td class="right"><code>2</code></td></tr><tr><td class="center">4</td></tr></tbody></table></div><p>x</p>',
        ),
        ("a | b\nc", "<p>a | b\nc</p>"),
        ("[a *b*](https://x.org/c_(d))", f"<p>{link('https://x.org/c_(d)', 'a <em>b</em>')}</p>"),
        ('[a](<https://x.org/b> "t") ![p](http://y.org/z.png)', f"<p>{link('https://x.org/b', 'a')} {link('http://y.org/z.png', 'p')}</p>"),
        ("See https://x.org/a_b. (http://y.org)", f"<p>See {link('https://x.org/a_b', 'https://x.org/a_b')}. ({link('http://y.org/', 'http://y.org')})</p>"),
        ("<mailto:a@x.org> [m](mailto:b@x.org)", f"<p>{link('mailto:a@x.org', 'mailto:a@x.org')} {link('mailto:b@x.org', 'm')}</p>"),
        (r"[a\[b](https://x.org)", f"<p>{link('https://x.org/', chr(97) + chr(92) + '[b')}</p>"),
        ("[a](b) [c] [d][e]", "<p>[a](b) [c] [d][e]</p>"),
        ("**[a](https://x.org)**", f"<p><strong>{link('https://x.org/', 'a')}</strong></p>"),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(page: Page, text: str, made: str) -> None:
    assert html(page, text) == made


@pytest.mark.parametrize(
    "text",
    [
        "<script>window.bad = 1</script>",
        "<img src=x onerror='window.bad = 1'>",
        "<svg onload=window.bad=1><a xlink:href='javascript:window.bad=1'>x</a></svg>",
        "<!-- a --><style>* { display: none }</style>",
        "<a href='javascript:window.bad=1'>x</a>",
        "```html\n<script>window.bad = 1</script>\n```",
        "`<img src=x onerror=window.bad=1>`",
        "# <iframe srcdoc='<script>parent.bad = 1</script>'>",
        "| <script>window.bad=1</script> |\n|---|\n| <img src=x onerror=window.bad=1> |",
        '```"><img/src=x/onerror=window.bad=1>\nx\n```',
    ],
)
def test_markup_stays_text(page: Page, text: str) -> None:
    found = page.run(
        f"(() => {{ const box = made({json.dumps(text)}); $('log').append(box); return ["
        " box.textContent.replace('Copy code', ''), box.querySelectorAll('*').length] })()"
    )
    page.run("new Promise((done) => setTimeout(done, 20))")
    assert page.run("window.bad") is None
    page.run("$('log').replaceChildren()")
    for word in ("script", "img", "onerror", "javascript"):
        assert text.count(word) == found[0].count(word), found


@pytest.mark.parametrize(
    "target",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "java&#115;cript:alert(1)",
        "java\tscript:alert(1)",
        "\x01javascript:alert(1)",
        "data:text/html,<script>1</script>",
        "vbscript:x",
        "file:///etc/passwd",
        "about:blank",
        "//x.org",
        "/v1/models",
        "?a",
        "https://bank.com@evil.org",
        "https://user:pw@evil.org/",
        "https:",
        "http://",
    ],
)
def test_links_lead_to_web_pages_and_mail_alone(page: Page, target: str) -> None:
    for text in (f"[x]({target})", f"[x](<{target}>)", f"![x]({target})", f"<{target}>", f'[x]({target} "t")'):
        found = page.run(f"[...made({json.dumps(text)}).querySelectorAll('a')].map((a) => a.href)")
        assert found == [], text


@pytest.mark.parametrize(
    ("named", "target"),
    [
        ("https://bank.com", "https://evil.org/bank.com"),
        ("**bank.com**", "https://evil.org"),
        ("**ba**nk.com", "https://evil.org"),
        ("www.bank.com/a", "https://bank.com.evil.org"),
        ("https://bank.com@evil.org", "https://x.org"),
        ("https://bank.com@evil.org", "https://evil.org"),
        ("https://bank.com#@evil.org", "https://evil.org"),
        ("https://@bank.xyz", "https://evil.org"),
        ("Go to bank.com", "https://evil.org"),
        ("bank.com login", "https://evil.org"),
        ("The bank (bank.com).", "https://evil.org"),
        ("...bank.com!", "https://evil.org"),
        ("//bank.com", "https://evil.org"),
        ("https:/bank.xyz", "https://evil.org"),
        ("bank.com.br", "https://evil.org"),
        ("bank.com and evil.org", "https://evil.org"),
        ("https://evil.org https://bank.com", "https://evil.org"),
        ("https://evil.org/https://bank.com", "https://evil.org/b"),
        ("bank.com\u200b", "https://evil.org"),
        ("ba\u00adnk\u2060.co\u200dm", "https://evil.org"),
        ("\ufeffbank\ufeff.com", "https://evil.org"),
        ("ban\u034fk\ufe0f.com", "https://evil.org"),
        ("bank.c\x02om", "https://evil.org"),
        ("\u2068bank.com", "https://evil.org"),
        ("https:/\u200b/bank.xyz", "https://evil.org"),
        ("ｂａｎｋ．com", "https://evil.org"),
        ("b\u0430nk.com", "https://evil.org"),  # a Cyrillic letter
        ("bücher.de", "https://xn--bcher-kva.de"),  # in doubt
        ("\u202emoc.knab", "https://evil.org"),
    ],
)
def test_a_link_that_names_another_host_shows_its_own(page: Page, named: str, target: str) -> None:
    shown = page.run(f"made({json.dumps(f'[{named}]({target})')}).textContent")
    assert shown == f"{named.replace('*', '')} ({target.split('/')[2]})"


@pytest.mark.parametrize(
    ("named", "target"),
    [
        ("docs.x.org and x.org", "https://docs.x.org"),
        ("x.org", "https://docs.x.org"),
        ("X.org, see www.x.org.", "https://x.org"),
        ("https://x.org/a", "http://x.org:8000/b"),
        ("https://x.org/?to=https://y.com", "https://x.org/?to=https://y.com"),
        ("https://x.org/y.com/", "https://x.org/y.com"),
        ("main.py", "https://x.org"),
        ("java.io.File", "https://x.org"),
        ("e.g. the news", "https://x.org"),
        ("mail@x.org", "mailto:mail@y.org"),
    ],
)
def test_a_link_that_names_no_other_host_is_its_text_alone(page: Page, named: str, target: str) -> None:
    assert page.run(f"made({json.dumps(f'[{named}]({target})')}).textContent") == named


@pytest.mark.parametrize("markdown", ["[\u202emoc.knab](https://evil.org)", "\u202e [bank.com](https://evil.org)"])
def test_no_mark_turns_the_host_that_is_shown_around(page: Page, markdown: str) -> None:
    left = page.run(
        f"""(() => {{
          const box = made({json.dumps(markdown)}), range = document.createRange();
          box.className = 'markdown';
          $('log').replaceChildren(box);
          const text = box.querySelector('.host').firstChild;
          const left = [...text.data].map((_, i) => {{
            range.setStart(text, i);
            range.setEnd(text, i + 1);
            return range.getBoundingClientRect().left;
          }});
          $('log').replaceChildren();
          return left;
        }})()"""
    )
    assert left == sorted(left)
    assert left[0] < left[-1]


PIECES = [
    *"*_~`[]()<>!\\|#>-+:\n\n\n  \t&.1ax",
    *("**", "```", "~~~", "](", "![", "https://x.org", "<https://", "javascript:", "- ", "1. ", "\n> ", "|---|", "\n| a |\n"),
    *("<script>", "&lt;", "\u202e", "🙂", "\ud83d", "[x](https://a.b)", "mailto:a@b", "](javascript:1)", '"', "\x00"),
]  # fmt: skip


def test_random_markdown_has_no_other_elements_and_comes_out_the_same_in_pieces(page: Page) -> None:
    rng = random.Random(7)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(1, 60))) for _ in range(1000)]
    page.run(
        "window.inPieces = (text, sizes) => { const box = document.createElement('div'), m = new Markdown(box);"
        " for (let at = 0, i = 0; at < text.length; at += sizes[i++ % sizes.length])"
        " { m.add(text.slice(at, at + sizes[i % sizes.length])); m.render(); } return box; }; 0"
    )
    found = page.run(
        f"""{json.dumps(texts)}.map((text) => {{
          const whole = made(text), parts = inPieces(text, [1, 2, 5, 3]);
          const all = [...whole.querySelectorAll('*')];
          return {{
            tags: [...new Set(all.map((e) => e.tagName))],
            attributes: [...new Set(all.flatMap((e) => e.getAttributeNames()))],
            targets: all.filter((e) => e.tagName === 'A').map((e) => e.protocol),
            whole: whole.innerHTML,
            parts: parts.innerHTML,
          }};
        }})"""
    )
    for text, seen in zip(texts, found, strict=True):
        assert set(seen["tags"]) <= {*TAGS}, text
        assert set(seen["attributes"]) <= {*ATTRIBUTES}, text
        assert set(seen["targets"]) <= {"http:", "https:", "mailto:"}, text
        assert seen["whole"] == seen["parts"], text


UNITS = [
    *("*", "_", "`", "~", "[", "]", "(", "!", "<", ">", "|", "#", "-", "\\", "&", " ", "\n", "a", "- ", "> ", "1. "),
    *("*a ", "**a", "a*", "_a ", "*a* ", "`a", "`` ` ", "[a", "[a](", "[a](b", "![", "](", "[a](https://x.org) "),
    *(f"[{text}](https://x.org) " for text in (999 * "a", 499 * "a.", 249 * "com.", 124 * "https://", 199 * "www.@")),
    *("https://", "https://a@", "https://x.org/ ", "<https://", "((", "[x]((a)", "\\[", "| a ", "|-", "|\n", "| a |\n|-|\n"),
    *("\n> ", "\n - ", "\n  - a", "\n\n1. a", "```\n", "~~~a\n", "word ", "# a\n", "a\n", "\n\n", "<b>", "&lt;", "🙂"),
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_a_long_answer_takes_time_in_proportion(page: Page, unit: str) -> None:
    took = page.run(
        f"(() => {{ const text = {json.dumps(unit)}.repeat({SIZE // len(unit)}), at = performance.now();"
        " made(text); made(text + 'x'); made('x' + text + '\\n'); return (performance.now() - at) / 3000; })()"
    )
    assert took < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", ["word ", "```\nx = 1\n", "x = 1\n", "- item **b**\n", "para *a* `b`\n\n", "| a | b |\n", "**a "]
)
def test_a_long_answer_that_comes_in_pieces_does_not_hold_up_the_page(page: Page, piece: str) -> None:
    """It is shown while it comes, and the page has time for other things."""
    found: dict[str, Any] = page.run(
        f"""(async () => {{
          $('log').replaceChildren();
          const shown = new Answer(), show = shown.show, began = performance.now();
          let spent = 0, shows = 0;
          shown.show = function () {{ const at = performance.now(); show.call(shown); spent += performance.now() - at; shows++; }};
          const head = {json.dumps(piece)}.startsWith('x') ? '```\\n' : {json.dumps(piece)}.startsWith('|') ? '|a|b|\\n|-|-|\\n' : '';
          shown.write(head);
          for (let i = 0; i < {SIZE // len(piece)}; i++) {{
            shown.write({json.dumps(piece)});
            if (i % 50 === 0) await new Promise((done) => setTimeout(done));
          }}
          const coming = {{ spent, shows, took: performance.now() - began, text: shown.text.textContent.length }};
          shown.end([]);
          $('log').replaceChildren();
          return coming;
        }})()"""
    )
    assert found["shows"] >= 2
    assert found["text"] > 0
    assert found["spent"] < 0.6 * found["took"], found
    assert found["took"] < 20_000, found
