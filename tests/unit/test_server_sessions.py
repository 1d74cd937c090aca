"""/v1/sessions, and completions that go on from one."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.unit.server_double import ANSWER, EOS, ClientDouble, run, serving
from thalweg.engine.sessions import SessionLimits
from thalweg.errors import SessionConflict
from thalweg.server import service as service_module
from thalweg.server.service import Service
from thalweg.server.sessions import saving
from thalweg.server.settings import ServerSettings

SAID = [*ANSWER.encode(), EOS]


def test_save_go_on_fork_and_roll_back() -> None:
    async def work(http: httpx.AsyncClient, client: ClientDouble) -> None:
        made = (await http.post("/v1/sessions", json={"name": "root", "prompt": "abcd"})).json()
        assert made["object"] == "session"
        assert (made["id"], made["tokens"], made["ttl"]) == ("root", 4, 3600.0)
        assert made["points"] == [{"index": 0, "tokens": 4, "cached": 2}]
        assert client.seen[-1].params.max_tokens == 0

        forks = (await http.post("/v1/sessions/root/fork", json={"names": ["root/a", "b"]})).json()["data"]
        assert [each["id"] for each in forks] == ["root/a", "b"]
        seen = len(client.seen)
        body = {"session": "root/a", "session_save": True, "prompt": "ef", "max_tokens": 50}
        said = (await http.post("/v1/completions", json=body)).json()
        assert said["choices"][0]["text"] == ANSWER
        assert said["usage"]["prompt_tokens"] == 6
        assert client.seen[-1].prompt_token_ids == list(b"abcdef")
        assert len(client.seen) == seen + 1

        session = (await http.get("/v1/sessions/root/a")).json()
        assert [point["tokens"] for point in session["points"]] == [4, 6 + len(SAID)]
        body = {"session": "root/a", "prompt": "", "max_tokens": 2, "stream": True}
        assert "data: " in (await http.post("/v1/completions", json=body)).text
        assert client.seen[-1].prompt_token_ids == [*b"abcdef", *SAID]
        back = (await http.post("/v1/sessions/root/a/rollback", json={"point": 0})).json()
        assert back["tokens"] == 4
        more = (await http.post("/v1/sessions/b/save", json={"prompt": [1, 2]})).json()
        assert [point["tokens"] for point in more["points"]] == [4, 6]
        names = [each["id"] for each in (await http.get("/v1/sessions")).json()["data"]]
        assert names == ["root", "root/a", "b"]
        for name in names:
            answer = await http.delete(f"/v1/sessions/{name}")
            assert answer.json() == {"id": name, "object": "session.deleted", "deleted": True}
        assert client.kept == {}
        assert (await http.get("/v1/sessions/root")).status_code == 404

    run(work)


def test_a_stream_is_saved_before_it_ends() -> None:
    async def work(http: httpx.AsyncClient, client: ClientDouble) -> None:
        await http.post("/v1/sessions", json={"name": "a", "prompt": "abcd"})
        body = {"session": "a", "session_save": True, "prompt": "x", "max_tokens": 3, "stream": True}
        text = (await http.post("/v1/completions", json=body)).text
        assert text.rstrip().endswith("[DONE]")
        session = (await http.get("/v1/sessions/a")).json()
        assert [point["tokens"] for point in session["points"]] == [4, 8]
        assert client.kept[next(reversed(client.kept))] == [*b"abcdx", *SAID[:3]]

    run(work)


def test_a_request_that_fails_leaves_its_session_as_it_was() -> None:
    async def work(http: httpx.AsyncClient, client: ClientDouble) -> None:
        await http.post("/v1/sessions", json={"name": "a", "prompt": "abcd"})
        body = {"session": "a", "session_save": True, "prompt": " FAIL", "max_tokens": 9}
        assert (await http.post("/v1/completions", json=body)).status_code == 500
        assert (await http.get("/v1/sessions/a")).json()["tokens"] == 4
        assert (await http.post("/v1/sessions", json={"name": "b", "prompt": "REFUSE"})).status_code == 400
        assert (await http.get("/v1/sessions/b")).status_code == 404

    run(work)


def test_other_salts_and_keys_find_nothing() -> None:
    async def work(http: httpx.AsyncClient, client: ClientDouble) -> None:
        body = {"name": "a", "prompt": "secret", "cache_salt": "mine"}
        assert (await http.post("/v1/sessions", json=body)).status_code == 200
        assert client.seen[-1].params.cache_salt == "mine"
        ask = {"session": "a", "prompt": "x", "max_tokens": 1}
        for wrong in ({}, {"cache_salt": "other"}):
            assert (await http.post("/v1/completions", json={**ask, **wrong})).status_code == 404
        assert (await http.get("/v1/sessions/a")).status_code == 404
        assert (await http.delete("/v1/sessions/a", headers={"X-Cache-Salt": "other"})).status_code == 404
        assert (await http.get("/v1/sessions")).json()["data"] == []
        assert (await http.get("/v1/sessions/a", headers={"X-Cache-Salt": "mine"})).status_code == 200
        assert (await http.post("/v1/completions", json={**ask, "cache_salt": "mine"})).status_code == 200
        assert client.seen[-1].params.cache_salt == "mine"

    run(work)

    async def with_keys() -> None:
        settings = ServerSettings(api_keys=("one", "two"))
        async with serving(ClientDouble(), settings) as http:
            one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
            assert (await http.post("/v1/sessions", json={"name": "a", "prompt": "x"}, headers=one)).status_code == 200
            assert (await http.get("/v1/sessions/a", headers=two)).status_code == 404
            assert (await http.get("/v1/sessions", headers=two)).json()["data"] == []
            assert (await http.get("/v1/sessions/a", headers=one)).status_code == 200
            assert (await http.get("/v1/sessions/a")).status_code == 401

    asyncio.run(with_keys())


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/sessions", {"name": "a b", "prompt": "x"}, 400, "name is"),
        ("/v1/sessions", {"name": "b"}, 400, "prompt is missing"),
        ("/v1/sessions", {"name": "b", "prompt": ""}, 400, "the prompt is empty"),
        ("/v1/sessions", {"name": "b", "prompt": "x", "ttl": 1e9}, 400, "ttl is"),
        ("/v1/sessions", {"name": "a", "prompt": "x"}, 409, "in use"),
        ("/v1/sessions/a/rollback", {"point": 5}, 400, "point is 5; expected -1 to 0"),
        ("/v1/sessions/a/fork", {"names": []}, 400, "names"),
        ("/v1/sessions/a/fork", {"names": ["a"]}, 409, "in use"),
        ("/v1/sessions/none/fork", {"names": ["b"]}, 404, "there is no session"),
        ("/v1/completions", {"session": "none", "prompt": "x"}, 404, "there is no session"),
        ("/v1/completions", {"session": "a", "prompt": "x", "echo": True}, 400, "echo is given with session"),
        ("/v1/completions", {"session": "a", "prompt": ["x", "y"]}, 400, "prompt has 2 texts"),
        ("/v1/completions", {"session": "a", "session_save": True, "prompt": "x", "n": 2}, 400, "for 2 choices"),
        ("/v1/completions", {"session_save": True, "prompt": "x"}, 400, "without session"),
    ],
)
def test_what_cannot_be_done_says_so(path: str, body: dict[str, Any], status: int, says: str) -> None:
    async def work(http: httpx.AsyncClient, client: ClientDouble) -> None:
        await http.post("/v1/sessions", json={"name": "a", "prompt": "abcd"})
        answer = await http.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert says in answer.json()["error"]["message"]
        assert (await http.get("/v1/sessions/a")).json()["tokens"] == 4

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_computed_that_there_is_no_room_to_save(stream: bool) -> None:
    async def work() -> None:
        client = ClientDouble()
        async with serving(client, ServerSettings(sessions=SessionLimits(tokens=20))) as http:
            await http.post("/v1/sessions", json={"name": "a", "prompt": "abcd"})
            seen = len(client.seen)
            body = {"session": "a", "session_save": True, "prompt": "x", "stream": stream}
            answer = await http.post("/v1/completions", json={**body, "max_tokens": 16})
            assert (answer.status_code, len(client.seen)) == (400, seen)
            said = answer.json()["error"]["message"]
            assert said == "sessions: there is no room; they have at most 20 tokens in all"
            assert (await http.post("/v1/sessions/a/save", json={"prompt": "x" * 17})).status_code == 400
            assert len(client.seen) == seen
            assert (await http.post("/v1/completions", json={**body, "max_tokens": 15})).status_code == 200
            assert (await http.get("/v1/sessions/a")).json()["tokens"] > 5

    asyncio.run(work())


def test_a_session_that_changed_after_its_tokens_were_read_is_not_saved_to() -> None:
    async def work() -> None:
        service = Service(ClientDouble(), ServerSettings())  # type: ignore[arg-type]
        session = service.sessions.add("a", [1, 2])
        version = session.version
        service.sessions.extend(session, version, [3])
        begun = False

        async def news() -> Any:
            nonlocal begun
            begun = True
            yield

        with pytest.raises(SessionConflict):
            await anext(saving(service, session, version, news(), [4], 1))
        assert not begun

    asyncio.run(work())


def test_what_is_kept_of_expired_sessions_goes_although_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "TEND_SECONDS", 0.02)

    async def work() -> None:
        client = ClientDouble()
        async with serving(client, ServerSettings()) as http:
            await http.post("/v1/sessions", json={"name": "a", "prompt": "abcd", "ttl": 0.05})
            await http.post("/v1/sessions", json={"name": "b", "prompt": "abcd"})
            assert len(client.kept) == 2
            for _ in range(200):
                await asyncio.sleep(0.01)
                if len(client.kept) == 1:
                    break
            assert list(client.kept.values()) == [list(b"abcd")]
            assert (await http.get("/v1/sessions/b")).status_code == 200

    asyncio.run(work())


def test_a_salt_in_the_header_is_utf_8_as_in_bodies() -> None:
    async def work(http: httpx.AsyncClient, client: ClientDouble) -> None:
        salt = "schlüssel"
        await http.post("/v1/sessions", json={"name": "a", "prompt": "abcd", "cache_salt": salt})
        found = await http.get("/v1/sessions/a", headers={"X-Cache-Salt": salt.encode()})
        assert found.status_code == 200
        listed = await http.get("/v1/sessions", headers={"X-Cache-Salt": salt.encode()})
        assert [each["id"] for each in listed.json()["data"]] == ["a"]
        for wrong, status in ((salt.encode("latin-1"), 400), (b"schl", 404)):
            answer = await http.delete("/v1/sessions/a", headers={"X-Cache-Salt": wrong})
            assert answer.status_code == status
        assert (await http.delete("/v1/sessions/a", headers={"X-Cache-Salt": salt.encode()})).status_code == 200

    run(work)
