"""HEAD, request ids, redirects, pages of other sites, and streams that wait."""

from __future__ import annotations

import asyncio
import io
import logging
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from tests.unit.server_double import ClientDouble, run, serving
from thalweg.cli import main
from thalweg.errors import ConfigError
from thalweg.server.manners import MAX_ID_CHARS, WithRequestId
from thalweg.server.settings import Cors, ServerSettings

SITE = "https://chat.example.com"


def served(work: Any, settings: ServerSettings) -> Any:
    async def main() -> Any:
        client = ClientDouble()
        async with serving(client, settings) as http:
            return await asyncio.wait_for(work(http, client), 10)

    return asyncio.run(main())


def test_head_is_get_without_a_body_on_every_route() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        operations = http.app.openapi()["paths"]
        paths = [path for path, methods in operations.items() if "get" in methods]
        paths = [path.replace("{name}", "double") for path in paths]
        paths += ["/", "/page/chat.js", "/openapi.json", "/tokenizer_info", "/nowhere"]
        assert "/health" in paths
        assert len(paths) > 8
        for path in paths:
            get, head = await http.get(path), await http.head(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            if path != "/metrics":  # whose length changes
                assert head.headers["content-length"] == get.headers["content-length"]
        for path in ("/health", "/", "/metrics"):
            assert (await http.head(path)).status_code == 200
        assert (await http.head("/v1/completions")).status_code == 405
        assert (await http.put("/health")).headers["allow"] == "GET, HEAD"
        assert (await http.get("/v1/models/")).json() == (await http.get("/v1/models")).json()

    run(work)


def test_an_answer_has_the_requests_id_or_a_new_one() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        async def id_for(given: bytes | None, path: str = "/health") -> str:
            headers = [] if given is None else [(b"X-Request-Id", given)]
            return str((await http.get(path, headers=headers)).headers["x-request-id"])

        assert await id_for(b"trace-7:a/b=") == "trace-7:a/b="
        assert await id_for(b"a", "/nowhere") == "a"
        new = [await id_for(None), await id_for(b""), await id_for(b" \xff\t")]
        assert len(set(new)) == 3
        assert all(len(each) == 32 for each in new)
        assert await id_for(b"a b\tc\x7fd\xe9e") == "abcde"
        assert await id_for(b"x" * 5000) == "x" * MAX_ID_CHARS
        for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": 3}):
            response = await http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
            assert response.headers.get_list("x-request-id") == ["mine"]

    run(work)


def broken_route(http: Any) -> None:
    async def broken(request: Any) -> Any:
        raise ValueError("unforeseen")

    http.app.router.routes.insert(0, Route("/broken", broken))


def test_an_unforeseen_error_has_an_id_and_the_headers_for_other_sites() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        broken_route(http)
        response = await http.get("/broken", headers={"origin": SITE, "x-request-id": "mine"})
        assert response.status_code == 500
        assert response.headers["x-request-id"] == "mine"
        assert response.headers["access-control-allow-origin"] == SITE

    served(work, ServerSettings(cors=Cors((SITE,))))


def test_lines_about_a_request_have_its_id() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(WithRequestId())
    handler.setFormatter(logging.Formatter("%(bracketed_id)s%(message)s"))
    log = logging.getLogger("thalweg.server.streaming")
    log.addHandler(handler)
    try:

        async def work(http: Any, client: ClientDouble) -> None:
            real = client.generate

            async def breaks(*args: Any) -> Any:
                async for delta in real(*args):
                    yield delta
                    if delta.token_ids:
                        raise ValueError("unforeseen")

            client.generate = breaks  # type: ignore[method-assign]
            body = {"prompt": "x", "stream": True}
            response = await http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
            assert "internal_error" in response.text

        run(work)
    finally:
        log.removeHandler(handler)
    assert stream.getvalue().startswith("[mine] a stream broke off")


def test_redirects_do_not_name_a_host() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        for path, wanted in (("/health/", "/health"), ("/version/?a=b", "/version?a=b")):
            response = await http.get(path, headers={"host": "evil.example"}, follow_redirects=False)
            assert response.status_code == 307
            assert response.headers["location"] == wanted

    run(work)


PREFLIGHT = {
    "origin": SITE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


def test_other_sites_pages_are_not_let_in_by_default() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        preflight = await http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert preflight.status_code == 405
        response = await http.get("/health", headers={"origin": SITE})
        assert not [name for name in (*preflight.headers, *response.headers) if name.startswith("access-control")]

    run(work)


@pytest.mark.parametrize("origins", [(SITE, "http://localhost:3000"), ("*",)])
def test_other_sites_pages_are_let_in_with_a_key(origins: tuple[str, ...]) -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        preflight = await http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] in (SITE, "*")
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        body = {"prompt": "x"}
        refused = await http.post("/v1/completions", json=body, headers={"origin": SITE})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] in (SITE, "*")  # or the page could not read why
        headers = {"origin": SITE, "authorization": "Bearer k"}
        answer = await http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = await http.get("/health", headers={"origin": "https://evil.example"})
        assert (other.headers.get("access-control-allow-origin") == "*") == (origins == ("*",))

    served(work, ServerSettings(api_keys=("k",), cors=Cors(origins)))


@pytest.mark.parametrize(
    ("cors", "message"),
    [
        ({"origins": ("chat.example.com",)}, "--allowed-origins"),
        ({"origins": (f"{SITE}/",)}, "--allowed-origins"),
        ({"origins": ("https://*.example.com",)}, "--allowed-origins"),
        ({"origins": ("*",), "credentials": True}, "--allow-credentials"),
        ({"credentials": True}, "--allowed-origins"),
    ],
)
def test_what_browsers_would_not_follow_is_refused(cors: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cors(**cors)


def test_the_command_line_takes_lists_as_json_and_with_commas(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("thalweg.server.run.serve", lambda config, **options: seen.append(options))
    origins = [
        "--allowed-origins",
        '["https://a.example", "https://b.example"]',
        "--allowed-origins",
        "https://c.example",
    ]
    more = [
        "--allowed-methods",
        "GET, POST",
        "--allow-credentials",
        "--keep-alive-timeout",
        "7",
        "--sse-ping-interval",
        "2.5",
    ]
    assert main(["serve", *origins, *more]) == 0
    [options] = seen
    origins = ("https://a.example", "https://b.example", "https://c.example")
    assert options["cors"] == Cors(origins, ("GET", "POST"), ("*",), credentials=True)
    assert (options["keep_alive_timeout"], options["sse_ping_interval"]) == (7, 2.5)
    assert main(["serve"]) == 0
    assert seen[1]["cors"] == Cors()
    assert main(["serve", "--allowed-origins", "[1"]) == 2
    assert capsys.readouterr().err.startswith("error: --allowed-origins is '[1'")


def test_a_stream_that_waits_has_its_head_and_comments() -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        # The transport of these tests gives a response when it is over, so the application is called itself.
        sent: list[dict[str, Any]] = []
        body = [{"type": "http.request", "body": b'{"prompt": "QUEUED", "stream": true}', "more_body": False}]

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        task = asyncio.create_task(http.app({**scope, "asgi": {"spec_version": "2.3"}, "app": http.app}, receive, send))
        await asyncio.sleep(0.05)
        assert [m["type"] for m in sent] == ["http.response.start"]
        assert sent[0]["status"] == 200
        await asyncio.sleep(0.6)
        comments = [m["body"] for m in sent[1:]]
        assert 2 <= len(comments) <= 6
        assert set(comments) == {b": keep-alive\n\n"}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(client.aborted) == 1

    served(work, ServerSettings(ping_seconds=0.1))


def test_what_is_wrong_with_a_streamed_request_has_its_status() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        for prompt in ("REFUSE", ["x", "REFUSE"], [["x"]]):
            response: httpx.Response = await http.post("/v1/completions", json={"prompt": prompt, "stream": True})
            assert response.status_code == 400

    run(work)
