"""Models by name that are in the local cache, or are not; nothing is downloaded here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from thalweg.assembly.source import open_source
from thalweg.config.engine import EngineConfig
from thalweg.config.hub import hub_name, is_hub_name
from thalweg.config.model_source import model_folder
from thalweg.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no huggingface_hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("huggingface_hub", "huggingface_hub.constants", "huggingface_hub.errors"):
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path / "cache"


def keep(
    cache: Path, name: str, files: dict[str, str], commit: str = COMMIT, refs: tuple[str, ...] = ("main",)
) -> Path:
    """A model in the cache as huggingface_hub lays it out, with a tokenizer: files are links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for i, (path, text) in enumerate(({"tokenizer.json": "{}"} | files).items()):
        blob = repository / "blobs" / f"{commit[:4]}{i}"
        blob.write_text(text)
        (folder / path).symlink_to(Path("../../blobs") / blob.name)
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return folder


@pytest.mark.parametrize("name", ["moonshotai/Kimi-Linear-48B-A3B-Instruct", "a/b", "Qwen/Qwen3.5-9B", "_x/y_z.1"])
def test_names(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "/a", "a/", "./b", "../b", "~/b", "a/..", "a/b..c", "a b/c", "a/b\n", "-a/b"]
)
def test_what_is_no_name(name: str) -> None:
    assert not is_hub_name(name)


def test_a_model_in_the_cache_is_found_by_name_and_revision(cache: Path) -> None:
    old = keep(cache, "me/tiny", {"config.json": "{}", "model.safetensors": ""}, "a" * 40, refs=("v1", "refs/pr/1"))
    new = keep(cache, "me/tiny", {"config.json": "{}", "model.safetensors": ""})
    assert model_folder("me/tiny") == model_folder("me/tiny", "main") == model_folder("me/tiny", COMMIT) == new
    assert (
        model_folder("me/tiny", "v1")
        == model_folder("me/tiny", "refs/pr/1")
        == model_folder("me/tiny", "a" * 40)
        == old
    )
    assert hub_name(new) == "me/tiny"
    assert hub_name(cache) is None


def test_a_folder_of_that_name_comes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(cache, "me/tiny", {"config.json": "{}", "model.safetensors": ""})
    monkeypatch.chdir(cache.parent)
    (cache.parent / "me/tiny").mkdir(parents=True)
    assert model_folder("me/tiny") == Path("me/tiny")


@pytest.mark.parametrize("name", ["here/typo", "here/kimi.gguf", "elsewhere/kimi.gguf"])
def test_a_path_that_is_misspelt_is_no_name(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    keep(cache, name, {"config.json": "{}", "model.safetensors": ""})
    monkeypatch.chdir(cache.parent)
    (cache.parent / "here").mkdir()
    with pytest.raises(ConfigError, match=f"MODEL is '{name}', and there is no such folder$"):
        model_folder(name)


def test_weights_alone_are_not_all_that_is_needed(cache: Path) -> None:
    folder = keep(cache, "me/tiny", {"config.json": "{}", "model.safetensors": ""})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json or tiktoken\.model; pip install"):
        model_folder("me/tiny")
    assert model_folder("me/tiny", weights=False) == folder
    (folder / "tiktoken.model").write_text("")
    assert model_folder("me/tiny") == folder


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"HF_HUB_CACHE": "hub"}, "hub"),
        ({"HF_HOME": "home"}, "home/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({"HOME": "user"}, "user/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], where: str
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    folder = keep(tmp_path / where, "me/tiny", {"config.json": "{}", "model.safetensors": ""})
    assert model_folder("me/tiny") == folder


def test_shards_are_those_of_the_index(cache: Path) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    files = {"config.json": "{}", "model.safetensors.index.json": index, "model-00001-of-00002.safetensors": ""}
    folder = keep(cache, "me/large", files)
    with pytest.raises(ConfigError, match=r"has no model-00002-of-00002\.safetensors; pip install"):
        model_folder("me/large")
    assert model_folder("me/large", weights=False) == folder
    (folder / "model-00002-of-00002.safetensors").write_text("")
    assert model_folder("me/large") == folder


def test_shards_without_an_index_have_to_be_all_there(cache: Path) -> None:
    folder = keep(cache, "me/large", {"config.json": "{}", "model-00002-of-00002.safetensors": ""})
    with pytest.raises(ConfigError, match=r"has no model-00001-of-00002\.safetensors"):
        model_folder("me/large")
    (folder / "model-00001-of-00002.safetensors").write_text("")
    assert model_folder("me/large") == folder


@pytest.mark.parametrize("index", ["{", '{"weight_map": []}', '{"weight_map": {"a": "../../x.safetensors", "b": 3}}'])
def test_an_index_that_is_damaged_or_leads_elsewhere_is_nothing_to_fetch(cache: Path, index: str) -> None:
    keep(cache, "me/bad", {"config.json": "{}", "model.safetensors.index.json": index})
    try:
        assert model_folder("me/bad").name == COMMIT  # which loading refuses
    except ConfigError as error:
        assert "is not valid JSON" in str(error)  # noqa: PT017


def test_an_unknown_name_says_what_was_looked_for_where_and_what_to_install(cache: Path) -> None:
    with pytest.raises(ConfigError) as error:
        model_folder("me/nothing", "v2")
    assert str(error.value) == (
        "MODEL is 'me/nothing', and there is no such folder;"
        f" the Hugging Face cache has no {cache}/models--me--nothing;"
        " pip install 'thalweg[hub]' to have it downloaded at revision v2, or name a folder that has it"
    )


def test_offline_nothing_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    keep(cache, "me/tiny", {"config.json": "{}"})
    with pytest.raises(ConfigError, match=r"has no model\.safetensors, or .* HF_HUB_OFFLINE keeps it from being"):
        model_folder("me/tiny")


@pytest.mark.parametrize("revision", ["", "../x", "a/../../b", "/etc", "a b", "-x"])
def test_revisions_cannot_leave_the_cache(cache: Path, revision: str) -> None:
    keep(cache, "me/tiny", {"config.json": "{}", "model.safetensors": ""})
    with pytest.raises(ConfigError, match="--revision is "):
        model_folder("me/tiny", revision)


def test_a_reference_cannot_leave_the_cache(cache: Path) -> None:
    folder = keep(cache, "me/tiny", {"config.json": "{}", "model.safetensors": ""})
    (folder.parent.parent / "refs" / "main").write_text("../../..")
    with pytest.raises(ConfigError, match="has no revision main"):
        model_folder("me/tiny")


def test_a_revision_is_for_names_alone(tmp_path: Path) -> None:
    for model in (None, str(tmp_path)):
        with pytest.raises(ConfigError, match=r"--revision is 'v1' and MODEL is .*; expected a MODEL named OWNER/NAME"):
            model_folder(model, "v1")


def test_a_model_from_the_cache_is_called_by_its_name(cache: Path) -> None:
    files = {path.name: path.read_text() for path in model_folder(None).glob("*.json")}
    keep(cache, "me/tiny", files)
    source = open_source(EngineConfig(model="me/tiny", load_format="dummy"))
    assert source.name == "me/tiny"
