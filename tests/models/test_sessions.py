"""Sessions of models: whatever is saved, forked or rolled back, tokens are a cold run's."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from tests.models.test_prefix_cache import engine, ids, model_of, small_with_host_memory, tokens
from thalweg import LLM, SamplingParams
from thalweg.engine.llm_sessions import Session
from thalweg.engine.sessions import SessionLimits
from thalweg.errors import InvalidRequest, SessionConflict, SessionNotFound

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture(params=["kimi_linear", "tiny_gdn", "kimi_k2"])
def model(request: pytest.FixtureRequest) -> str | None:
    shared = request.getfixturevalue("shared_dir") if request.param == "kimi_k2" else Path()
    return model_of(request.param, shared)


def check(llm: LLM, cold: LLM) -> None:
    """A tree of thoughts over one long prompt, beside an engine that keeps nothing."""

    def same(token_ids: list[int], answer: list[int]) -> None:
        assert [answer] == tokens(cold.generate([token_ids], GREEDY))

    root = llm.session("root", ids(200))
    before = llm.engine.core.stats().prefix_hits
    forks = llm.fork(root, 3)
    assert [fork.name for fork in forks] == ["root/1", "root/2", "root/3"]
    for i, fork in enumerate(forks):
        said = fork.generate(ids(30, i), GREEDY)
        assert said.num_cached_tokens == 192  # one prefill for all of them
        same(ids(200) + ids(30, i), said.outputs[0].token_ids)
        assert fork.points == [200, 250]
    assert llm.engine.core.stats().prefix_hits - before == 3 * 192
    first = forks[0]
    second = first.generate(ids(40, 9), GREEDY)
    assert second.num_cached_tokens >= 192
    same(first.token_ids[:290], second.outputs[0].token_ids)
    first.roll_back(1)
    assert len(first.token_ids) == 250
    other = first.generate(ids(5, 11), GREEDY, save=False)
    assert first.points == [200, 250]
    same(first.token_ids + ids(5, 11), other.outputs[0].token_ids)
    nested = llm.fork("root/1", ["a", "b"])
    first.delete()
    same(nested[1].token_ids, nested[1].generate((), GREEDY).outputs[0].token_ids)


def test_forks_and_points_are_cold(model: str | None) -> None:
    with engine(model, on=False) as cold, engine(model) as llm:
        check(llm, cold)


def test_sessions_outlive_what_displaces_them(model: str | None) -> None:
    with engine(model, on=False) as cold, small_with_host_memory(cold) as llm:
        root = llm.session("root", ids(200))
        for i in range(5):
            llm.generate([ids(200 + i, 20 + i)], GREEDY)
        said = root.generate(ids(9, 3), GREEDY)
        assert said.num_cached_tokens == 192
        assert tokens([said]) == tokens(cold.generate([ids(200) + ids(9, 3)], GREEDY))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kimi_linear", "tiny_gdn"])
def test_ranks_fork_alike(name: str) -> None:
    model = model_of(name, Path())
    with engine(model, on=False) as cold, engine(model, tensor_parallel_size=2) as llm:
        check(llm, cold)


def test_names_salts_and_errors() -> None:
    with engine(None) as llm:
        mine = llm.session("a", ids(70), cache_salt="mine")
        with pytest.raises(SessionNotFound):
            llm.session("a")
        with pytest.raises(SessionConflict, match="in use"):
            llm.session("a", ids(3))
        assert llm.session("a", cache_salt="mine").token_ids == ids(70)
        assert mine.generate(ids(3), GREEDY).num_cached_tokens == 64
        assert llm.generate([ids(70)], GREEDY)[0].num_cached_tokens == 0
        with pytest.raises(InvalidRequest, match="point is 7"):
            mine.roll_back(7)
        mine.delete()
        with pytest.raises(SessionNotFound):
            mine.generate(ids(3), GREEDY)


def test_without_a_prefix_cache_sessions_are_computed_again() -> None:
    with engine(None, on=False) as llm:
        said = llm.session("a", ids(100)).generate(ids(3), GREEDY)
        assert said.num_cached_tokens == 0
        assert tokens([said]) == tokens(llm.generate([ids(100) + ids(3)], GREEDY))


def test_the_example_computes_its_prompt_once(capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "examples" / "fork.py"
    names = runpy.run_path(str(script))["main"]()
    assert names == ["problem/1", "problem/2", "problem/3"]
    lines = capsys.readouterr().out.splitlines()
    cached, total = zip(*((int(line.split()[1]), int(line.split()[3])) for line in lines), strict=True)
    assert len(set(cached)) == 1
    assert min(cached) > max(total) - 100


def test_a_session_comes_back_from_its_file_and_the_cache_folder(model: str | None, tmp_path: Path) -> None:
    options = {"cpu_cache_memory": 16 << 20, "max_model_len": 512, "cache_folder": str(tmp_path / "cache")}
    with engine(model, **options) as llm:
        one = llm.session("one", ids(150))
        one.generate(ids(9, 1), GREEDY)
        one.write(tmp_path / "one.json")
        said = one.generate(ids(9, 2), GREEDY, save=False)
    with engine(model, **options) as llm:
        again = llm.load_session(tmp_path / "one.json", "again")
        assert again.points == [150, 179]
        assert llm.engine.core.stats().prefix_host_hits >= 128
        assert tokens([again.generate(ids(9, 2), GREEDY)]) == tokens([said])


def test_a_session_of_another_model_or_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    with engine(None) as llm:
        llm.session("one", ids(70)).write(path)
    text = path.read_text()
    with engine(model_of("tiny_gdn", Path())) as llm, pytest.raises(InvalidRequest, match="is of another model"):
        llm.load_session(path, "one")
    with engine(None) as llm:
        for wrong, says in (
            (text.replace('"format":1', '"format":2'), "is of another model"),
            (text[:-5], "cannot be read"),
            (text.replace('"points":[70]', '"points":[71]'), "contradicts itself"),
            (text.replace('"token_ids":[', '"token_ids":[-'), "contradicts itself"),
        ):
            path.write_text(wrong)
            with pytest.raises(InvalidRequest, match=says):
                llm.load_session(path, "one")
        with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
            llm.load_session(tmp_path / "none", "one")


def test_a_session_that_fails_to_load_keeps_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(None) as llm:
        one = llm.session("one", ids(70))
        one.generate(ids(9, 1), GREEDY)
        one.write(tmp_path / "one.json")
        with monkeypatch.context() as patch:

            def extend(*_: object) -> None:
                raise InvalidRequest("no room: a test")

            patch.setattr(llm._sessions.registry, "extend", extend)
            with pytest.raises(InvalidRequest, match="no room"):
                llm.load_session(tmp_path / "one.json", "again")
        assert llm.load_session(tmp_path / "one.json", "again").points == one.points


def test_a_session_replaces_its_file_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    with engine(None) as llm:
        one = llm.session("one", ids(70))
        one.write(path)
        assert path.stat().st_mode & 0o777 == 0o600
        before = path.read_bytes()
        one.generate(ids(9, 1), GREEDY)

        def replace(*_: object) -> None:
            raise OSError("the disk is full: a test")

        monkeypatch.setattr("os.replace", replace)
        with pytest.raises(OSError, match="full"):
            one.write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_answer_is_computed_that_there_is_no_room_to_save() -> None:
    with engine(None, max_model_len=512) as llm:
        session = llm.session("a", ids(100))
        queries = llm.engine.core.stats().prefix_queries
        llm._sessions.registry.limits = SessionLimits(tokens=120)
        with pytest.raises(InvalidRequest, match="no room; they have at most 120 tokens"):
            session.generate(ids(10, 1), SamplingParams(max_tokens=11, temperature=0))
        assert llm.engine.core.stats().prefix_queries == queries
        session.generate(ids(10, 1), SamplingParams(max_tokens=11, temperature=0), save=False)
        session.generate(ids(10, 1), SamplingParams(max_tokens=10, temperature=0))
        assert session.points[0] == 100
        assert 110 < session.points[1] <= 120


def test_what_is_deleted_or_rolled_back_while_it_is_saved_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(None) as llm:
        pump, kept = llm.engine.pump, llm.engine.core.scheduler._prefixes._kept
        keep = pump.keep
        meanwhile: list[Callable[[], object]] = []

        def late(name: str, salt: str, token_ids: list[int]) -> int:
            while meanwhile:
                meanwhile.pop()()  # as another thread could
            return keep(name, salt, token_ids)

        monkeypatch.setattr(pump, "keep", late)
        meanwhile.append(lambda: llm.session("one").delete())
        llm.session("one", ids(100))
        assert not kept
        one = llm.session("one", ids(100))
        meanwhile.append(lambda: one.roll_back(0))
        one.generate(ids(100, 1), GREEDY)
        assert list(kept) == [one._saved.points[0].key]
        meanwhile.append(one.delete)
        one.generate(ids(100, 1), GREEDY)
        assert not kept


def test_a_fork_and_a_file_are_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(None) as llm, ThreadPoolExecutor(1) as thread:
        one = llm.session("one", ids(70))
        one.generate(ids(9, 1), GREEDY)
        registry = llm._sessions.registry
        others: list[Callable[[], object]] = []
        begun: list[Future[Any]] = []

        def interrupted(read: Callable[..., Any]) -> Callable[..., Any]:
            def reading(*args: Any, **kwargs: Any) -> Any:
                found = read(*args, **kwargs)
                if others:
                    begun.append(thread.submit(others.pop()))
                    wait(begun, timeout=0.2)
                return found

            return reading

        monkeypatch.setattr(registry, "all", interrupted(registry.all))
        others.append(lambda: llm.fork(one, 2))
        assert [each.name for each in llm.fork(one, 2)] == ["one/1", "one/2"]
        assert [each.name for each in begun.pop().result()] == ["one/3", "one/4"]
        monkeypatch.setattr(Session, "points", property(interrupted(Session.points.fget)))
        others.append(lambda: one.roll_back(0))
        one.write(tmp_path / "one.json")
        begun.pop().result()
        assert one.points == [70]
        assert llm.load_session(tmp_path / "one.json", "two").points == [70, 99]
