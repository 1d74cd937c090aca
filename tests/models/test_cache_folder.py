"""The prefix cache on disk: what an engine wrote, the next one of the same model goes on from, and nothing else."""

from __future__ import annotations

import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.models.test_prefix_cache import GREEDY, engine, ids, model_of, one_by_one, tokens
from thalweg import LLM
from thalweg.engine import cache_folder
from thalweg.errors import ConfigError
from thalweg.runner import cache_file
from thalweg.runner.cache_file import images

PROMPTS = [ids(150), ids(150)[:140] + ids(30, 1), ids(200, 5), ids(90, 6)]
OPTIONS = {"cpu_cache_memory": 16 << 20, "max_model_len": 512}


@pytest.fixture(params=["kimi_linear", "tiny_gdn", "kimi_k2"])
def model(request: pytest.FixtureRequest) -> str | None:
    shared = request.getfixturevalue("shared_dir") if request.param == "kimi_k2" else Path()
    return model_of(request.param, shared)


def opened(model: str | None, folder: Path, **options: Any) -> LLM:
    return engine(model, cache_folder=str(folder), **{**OPTIONS, **options})


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("image-*/*"))


def test_a_restart_finds_what_was_cached(model: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with engine(model, on=False) as llm:
        cold = tokens(one_by_one(llm, PROMPTS))
    with opened(model, folder) as llm:
        assert tokens(one_by_one(llm, PROMPTS)) == cold
        warm = one_by_one(llm, PROMPTS)
    (file,) = files(folder)
    assert file.name == "rank-0.safetensors"
    assert os.stat(folder).st_mode & 0o077 == os.stat(file).st_mode & 0o077 == 0
    for _ in range(2):
        with opened(model, folder) as llm:
            again = one_by_one(llm, PROMPTS)
            assert tokens(again) == cold
            assert [o.num_cached_tokens for o in again] == [o.num_cached_tokens for o in warm]
            assert llm.engine.core.stats().prefix_host_hits > 0
    assert len(files(folder)) == 1


def test_less_room_and_a_size_limit_keep_what_was_used_last(tmp_path: Path) -> None:
    with opened(None, tmp_path) as llm:
        block, states = llm.info.bytes_per_token * 64, llm.info.bytes_per_sequence
        one_by_one(llm, PROMPTS)
    limit = files(tmp_path)[0].stat().st_size // 2
    with opened(None, tmp_path, cpu_cache_memory=6 * (block + states)) as llm:
        assert llm.generate([PROMPTS[3]], GREEDY)[0].num_cached_tokens == 64
    with opened(None, tmp_path, cache_folder_size=limit) as llm:
        one_by_one(llm, PROMPTS)
    assert files(tmp_path)[0].stat().st_size < limit + 4096


@pytest.mark.parametrize("damage", ["bytes", "cut", "header", "other", "empty", "index"])
def test_a_damaged_or_foreign_file_is_refused_and_never_served(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with engine(None, on=False) as llm:
        cold = tokens(one_by_one(llm, PROMPTS))
    with opened(None, tmp_path) as llm:
        one_by_one(llm, PROMPTS)
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "bytes":
        data[-1000] ^= 1
    elif damage == "cut":
        del data[-1000:]
    elif damage == "header":
        data[:8] = b"\xff" * 8
    elif damage == "other":
        data = data.replace(b'"identity":"', b'"identity":"x')[: len(data)]
    elif damage == "empty":
        data.clear()
    elif damage == "index":
        at = data.index(b'"crc32"') + 300
        data[at] ^= 0xFF
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING), opened(None, tmp_path) as llm:
        again = one_by_one(llm, PROMPTS)
    assert tokens(again) == cold
    assert again[0].num_cached_tokens == 0
    (line,) = [message for message in caplog.messages if "begins empty" in message]
    assert "\n" not in line


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"block_size": 32}, {"state_dtype": "bfloat16"}])
def test_other_options_read_nothing(options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(None, tmp_path) as llm:
        one_by_one(llm, PROMPTS[:1])
    with caplog.at_level(logging.WARNING), opened(None, tmp_path, **options) as llm:
        assert one_by_one(llm, PROMPTS[:1])[0].num_cached_tokens == 0
    assert "is of another model, version, dtype or layout" in caplog.text


def test_another_model_reads_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(None, tmp_path) as llm:
        one_by_one(llm, PROMPTS[:1])
    with caplog.at_level(logging.WARNING), opened(model_of("tiny_gdn", Path()), tmp_path) as llm:
        assert one_by_one(llm, PROMPTS[:1])[0].num_cached_tokens == 0
    assert "is of another model" in caplog.text


def test_salts_stay_apart(tmp_path: Path) -> None:
    from msgspec.structs import replace

    with opened(None, tmp_path) as llm:
        llm.generate([PROMPTS[0]], replace(GREEDY, cache_salt="mine"))
    with opened(None, tmp_path) as llm:
        assert llm.generate([PROMPTS[0]], GREEDY)[0].num_cached_tokens == 0
        assert llm.generate([PROMPTS[0]], replace(GREEDY, cache_salt="mine"))[0].num_cached_tokens == 128


def test_requests_under_way_and_an_interrupted_plan_leave_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(None, on=False) as llm:
        cold = tokens(one_by_one(llm, PROMPTS))
    llm = opened(None, tmp_path)
    one_by_one(llm, PROMPTS[2:])
    under_way = llm.stream(PROMPTS[0], GREEDY)
    next(under_way)
    llm.close()
    del under_way
    with opened(None, tmp_path) as llm:
        outputs = one_by_one(llm, PROMPTS)
        assert tokens(outputs) == cold
        assert outputs[0].num_cached_tokens == 128
    before = files(tmp_path)
    with opened(None, tmp_path) as llm:

        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(llm.engine.core.scheduler._roster, "prefilled", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([ids(100, 77)], GREEDY)
    assert files(tmp_path) == before


def test_options_that_need_each_other() -> None:
    with pytest.raises(ConfigError, match="expected --cpu-cache-memory too"):
        LLM(cache_folder="x")
    with pytest.raises(ConfigError, match="--cache-folder-size is given without"):
        LLM(cache_folder_size=1, cpu_cache_memory=1 << 20)
    with pytest.raises(ConfigError, match="--cache-folder is '/proc/x', which cannot be made or written to"):
        LLM(cache_folder="/proc/x", cpu_cache_memory=1 << 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kimi_linear", "tiny_gdn"])
def test_ranks_write_and_read_together(name: str, tmp_path: Path) -> None:
    model = model_of(name, Path())
    with engine(model, on=False) as llm:
        cold = tokens(one_by_one(llm, PROMPTS))
    for first in (True, False):
        with opened(model, tmp_path, tensor_parallel_size=2) as llm:
            outputs = one_by_one(llm, PROMPTS)
            assert tokens(outputs) == cold
            assert bool(outputs[0].num_cached_tokens) is not first
        assert [path.name for path in files(tmp_path)] == ["rank-0.safetensors", "rank-1.safetensors"]
    files(tmp_path)[1].write_bytes(b"")
    with opened(model, tmp_path, tensor_parallel_size=2) as llm:
        outputs = one_by_one(llm, PROMPTS)
        assert tokens(outputs) == cold
        assert outputs[0].num_cached_tokens == 0


def test_nothing_but_finished_images_is_taken_and_what_was_not_finished_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is killed while it writes leaves the image before, and a folder that is no image."""
    with opened(None, tmp_path) as llm:
        one_by_one(llm, PROMPTS)
    before = files(tmp_path)
    (tmp_path / "image-of-my-cat").mkdir()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache_folder, "_wait", killed)
        llm = opened(None, tmp_path)
        one_by_one(llm, [ids(150, 40)])
        with pytest.raises(KeyboardInterrupt):
            llm.close()
        del llm
    (leftover,) = tmp_path.glob("unfinished-*")
    assert (files(tmp_path), images(tmp_path)) == (before, [before[0].parent])
    with opened(None, tmp_path) as llm:
        assert one_by_one(llm, PROMPTS)[0].num_cached_tokens > 0
        assert not leftover.exists()
    assert (tmp_path / "image-of-my-cat").is_dir()


@pytest.mark.slow
def test_a_rank_that_cannot_write_holds_nobody_up_and_the_image_before_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("tiny_gdn", Path())
    with opened(model, tmp_path, tensor_parallel_size=2) as llm:
        one_by_one(llm, PROMPTS[:1])
    before = files(tmp_path)
    llm = opened(model, tmp_path, tensor_parallel_size=2)
    one_by_one(llm, PROMPTS)
    send = llm.engine.order

    def order(order: Any) -> Any:
        (Path(order.folder) / "rank-1.unfinished").mkdir()  # which rank 1 cannot write to
        return send(order)

    llm.engine.order = order  # type: ignore[method-assign]
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < 30
    assert "rank 1: IsADirectoryError" in caplog.text
    assert files(tmp_path) == before
    assert not list(tmp_path.glob("unfinished-*"))


def test_a_file_that_cannot_be_written_whole_leaves_its_reason_and_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    left: list[str] = []
    wait = cache_folder.shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        left.extend(each.name for each in path.iterdir())
        wait(path, **options)

    monkeypatch.setattr(cache_file, "_taken", full)
    monkeypatch.setattr(cache_folder.shutil, "rmtree", rmtree)
    with opened(None, tmp_path) as llm:
        one_by_one(llm, PROMPTS[:1])
    assert left == ["rank-0.failed"]
    assert "No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_is_for_one_engine_at_a_time(tmp_path: Path) -> None:
    with opened(None, tmp_path):
        with pytest.raises(ConfigError, match="which another engine uses; expected one of its own"):
            opened(None, tmp_path)
        lock = tmp_path / "lock"
        assert os.stat(lock).st_mode & 0o077 == 0
    with opened(None, tmp_path):
        pass


def test_a_process_that_was_forked_meanwhile_neither_keeps_nor_gives_back_the_folder(tmp_path: Path) -> None:
    folder = str(tmp_path)
    give_back = cache_folder.take(folder)
    until, end = os.pipe()
    child = os.fork()
    if child == 0:
        give_back()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(ConfigError, match="which another engine uses"):
        cache_folder.take(folder)
    give_back()
    give_back()
    with opened(None, tmp_path):
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(until, 1)
            os._exit(0)
    try:
        with opened(None, tmp_path):
            pass
    finally:
        os.close(end)
        os.close(until)
        os.waitpid(child, 0)
