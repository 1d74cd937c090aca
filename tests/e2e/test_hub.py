"""Models by name, downloaded from a hub on the loopback address, through the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_server_structured import QUESTION
from tests.e2e.tiny_model import server_process
from tests.fixtures.small_hub import COMMIT, TAGGED, SmallHub, small_hub
from thalweg.config.model_source import model_folder

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

NAME = "me/tiny"
CUT = 10_700_000  # of the weights' 10,979,328 bytes, and beyond the 10 MiB that the library writes at a time
READ = {
    *("config.json", "generation_config.json", "tokenizer_config.json", "tiktoken.model", "chat_template.jinja"),
    "model.safetensors",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallHub]:
    bundled = model_folder(None)
    if not (bundled / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    folder = tmp_path_factory.mktemp("hub") / "main"
    shutil.copytree(bundled, folder)
    for name in ("modeling_kimi.py", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import os; os._exit(77)")
    tagged = shutil.copytree(folder, folder.parent / "tagged")
    template = tagged / "chat_template.jinja"
    template.write_text(template.read_text() + "{# v1 #}")
    pickled = shutil.copytree(bundled, folder.parent / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_text("x")
    with small_hub(
        {NAME: {COMMIT: folder, TAGGED: tagged}, "me/pickled": {COMMIT: pickled}}, {"v1": TAGGED}
    ) as running:
        yield running


def variables(hub: SmallHub, home: Path, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def thalweg(*arguments: str, env: dict[str, str]) -> Any:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "thalweg", *arguments]
    return subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=120, check=False)


def test_a_model_is_downloaded_once_and_only_what_is_read_of_it(hub: SmallHub, tmp_path: Path) -> None:
    hub.asked.clear()
    question = ("generate", NAME, "--chat", "--prompt", QUESTION)
    first = thalweg(*question, env=variables(hub, tmp_path))
    assert first.returncode == 0, first.stderr
    assert "#### 7" in first.stdout
    assert f"downloading {NAME} from {hub.url} to {tmp_path / 'hub'}" in first.stderr
    assert hub.files_fetched() == READ
    hub.asked.clear()
    again = thalweg(*question, env=variables(hub, tmp_path, HF_HUB_OFFLINE="1"))
    assert (again.returncode, again.stdout, hub.asked) == (0, first.stdout, [])


@pytest.mark.slow
def test_a_download_that_broke_off_is_gone_on_with(hub: SmallHub, tmp_path: Path) -> None:
    hub.cut, hub.ranges = {"model.safetensors": CUT}, []
    env = variables(hub, tmp_path)
    question = ("generate", NAME, "--prompt", "1", "--max-tokens", "1")
    first = thalweg(*question, env=env)
    if first.returncode != 0:  # versions that do not try again by themselves
        assert "failed: " in first.stderr
        assert "Traceback" not in first.stderr
    second = thalweg(*question, env=env)
    assert second.returncode == 0, second.stderr
    assert hub.ranges
    assert all(0 < int(asked.removeprefix("bytes=").split("-")[0]) <= CUT for asked in hub.ranges)
    [snapshot] = (tmp_path / "hub/models--me--tiny/snapshots").iterdir()
    assert (snapshot / "model.safetensors").read_bytes() == (model_folder(None) / "model.safetensors").read_bytes()


def test_a_revision_and_no_weights_where_none_are_needed(hub: SmallHub, tmp_path: Path) -> None:
    hub.asked.clear()
    env = variables(hub, tmp_path)
    done = thalweg("inspect", NAME, "--revision", "v1", env=env)
    assert done.returncode == 0, done.stderr
    assert hub.files_fetched() == READ - {"model.safetensors"}
    [snapshot] = (tmp_path / "hub/models--me--tiny/snapshots").iterdir()
    assert snapshot.name == TAGGED
    assert (snapshot / "chat_template.jinja").read_text().endswith("{# v1 #}")


@pytest.mark.slow
def test_what_is_not_there_is_one_line(hub: SmallHub, tmp_path: Path) -> None:
    for arguments, said in (
        (["me/nothing"], f"{hub.url} has no such model, or only for those who may see it (HF_TOKEN)"),
        ([NAME, "--revision", "v9"], f"{hub.url} has no revision 'v9' of it (--revision)"),
        (["me/pickled"], "the hub lacks files that it needs: "),
    ):
        done = thalweg("generate", *arguments, "--prompt", "1", env=variables(hub, tmp_path))
        assert done.returncode == 2
        *_, last = done.stderr.strip().splitlines()
        assert last.startswith(f"error: MODEL is '{arguments[0]}'")
        assert said in last
        assert "Traceback" not in done.stderr
    gone = thalweg("inspect", NAME, env={**variables(hub, tmp_path / "other"), "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert gone.returncode == 2
    assert "downloading it from http://127.0.0.1:9 failed: " in gone.stderr


def test_a_server_has_the_models_name(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(hub, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    with server_process(tmp_path / "log", {"model": NAME}) as server:
        models = httpx.get(f"{server.url}/v1/models").json()
        assert [model["id"] for model in models["data"]] == [NAME]
        body = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "#### 7" in answer["choices"][0]["message"]["content"]
        assert httpx.get(f"{server.url}/v1/models/{NAME}").status_code == 200
