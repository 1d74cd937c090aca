"""Models by their name on a hub, OWNER/NAME: found in the local Hugging Face cache, or downloaded into it.

Only what is read here is fetched: config.json and its like, tokenizer files, chat templates and safetensors files of
the repository's root. Code is never fetched, and none that lies there is run.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from thalweg.config import env
from thalweg.config.bounded_json import read_object
from thalweg.config.streams import say
from thalweg.errors import CheckpointError, ConfigError

INDEX, SINGLE, SHARDS = "model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors"
TOKENIZERS = ("tokenizer.json", "tiktoken.model")
SMALL_FILES = (
    *("config.json", "generation_config.json", INDEX),
    *(*TOKENIZERS, "tokenizer_config.json", "chat_template.jinja"),
)
MAX_INDEX_BYTES = 64 << 20

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*")
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")


def is_hub_name(model: str) -> bool:
    """Whether `model` has the form OWNER/NAME."""
    parts = model.split("/")
    return len(parts) == 2 and all(_PART.fullmatch(part) and ".." not in part for part in parts)


def hub_name(folder: Path) -> str | None:
    """OWNER/NAME of a folder in the cache; None for any other folder."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def hub_folder(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model's files in the cache, with all that is needed: downloaded, unless it is there already.

    `revision` is a branch, tag or commit, None the main branch as it was last fetched. Without `weights` only the small
    files matter. Raises ConfigError that says what was looked for, where, and what to do.
    """
    if revision is not None and not (_REVISION.fullmatch(revision) and ".." not in revision):
        raise ConfigError(f"--revision is {revision!r}; expected a branch, a tag or a commit")
    try:
        return _found(cache_folder(), name, revision, weights)
    except LookupError as error:
        said = f"MODEL is {name!r}, and there is no such folder; {error}"
    at = f" at revision {revision}" if revision is not None else ""
    if (env.read("HF_HUB_OFFLINE") or "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(f"{said}, and HF_HUB_OFFLINE keeps it from being downloaded{at}")
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        install = f"pip install 'thalweg[hub]' to have it downloaded{at}"
        raise ConfigError(f"{said}; {install}, or name a folder that has it") from None
    _download(huggingface_hub, name, revision, weights, said)
    try:
        return _found(cache_folder(), name, revision, weights, tokenizer=False)  # the hub's own may have none
    except LookupError as error:
        raise ConfigError(f"MODEL is {name!r}, and the hub lacks files that it needs{at}: {error}") from None


def cache_folder() -> Path:
    """Where models are kept, as huggingface_hub has it."""
    if (folder := env.read("HF_HUB_CACHE")) is not None:
        return Path(folder).expanduser()
    if (home := env.read("HF_HOME")) is not None:
        return Path(home).expanduser() / "hub"
    base = env.read("XDG_CACHE_HOME")
    return (Path("~/.cache") if base is None else Path(base)).expanduser() / "huggingface" / "hub"


@lru_cache(maxsize=8)
def _found(cache: Path, name: str, revision: str | None, weights: bool, tokenizer: bool = True) -> Path:
    """The folder. Raises LookupError that says why there is none that would do; with `weights` and `tokenizer` it has
    a tokenizer's file too, which others who fetched the weights may have left out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    if not repository.is_dir():
        raise LookupError(f"the Hugging Face cache has no {repository}")
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    folder = repository / "snapshots" / commit
    if not _PART.fullmatch(commit) or not folder.is_dir():
        raise LookupError(f"{repository} has no revision {revision or 'main'}")
    if (lacking := _lacking(folder, weights)) is not None:
        raise LookupError(f"{folder} has no {lacking}")
    if weights and tokenizer and not any((folder / file).is_file() for file in TOKENIZERS):
        raise LookupError(f"{folder} has no {' or '.join(TOKENIZERS)}")
    return folder


def _lacking(folder: Path, weights: bool) -> str | None:
    """A file without which the model cannot be used."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not weights or (folder / SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        counts = [match[1] for path in folder.glob(SHARDS) if (match := _SHARD.fullmatch(path.name))]
        if not counts:
            return f"{SINGLE}, or {INDEX} and what it names"
        names = [f"model-{i:05d}-of-{counts[0]}.safetensors" for i in range(1, int(counts[0]) + 1)]
    else:
        names = _shards(folder)
    return next((shard for shard in names if not (folder / shard).is_file()), None)


def _shards(folder: Path) -> list[str]:
    """The files that the index names, as far as they may be here; loading refuses an index with other names."""
    try:
        index = read_object(folder, INDEX, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    except CheckpointError as error:
        raise ConfigError(f"MODEL: {error}") from None
    names = {name for name in index.values() if isinstance(name, str)} if isinstance(index, dict) else set()
    return sorted(name for name in names if "/" not in name and name.endswith(".safetensors"))


def _download(hub: Any, name: str, revision: str | None, weights: bool, said: str) -> None:
    """Fetch what is missing, with the library's own progress bars; what broke off is gone on with."""
    endpoint = hub.constants.ENDPOINT
    say(f"downloading {name} from {endpoint} to {cache_folder()}", error=True)
    options = {"cache_dir": cache_folder(), "ignore_patterns": ["*/*"]}
    try:
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(SMALL_FILES), **options))
        if weights:
            files = _shards(folder) if (folder / INDEX).is_file() else [SINGLE, SHARDS]
            hub.snapshot_download(name, revision=folder.name, allow_patterns=files, **options)
    except hub.errors.GatedRepoError:
        reason = f"{endpoint} asks for its conditions to be accepted and for a token (HF_TOKEN)"
    except hub.errors.RepositoryNotFoundError:
        reason = f"{endpoint} has no such model, or only for those who may see it (HF_TOKEN)"
    except hub.errors.RevisionNotFoundError:
        reason = f"{endpoint} has no revision {revision!r} of it (--revision)"
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever it was, it is the network, the hub or the disk
        text = str(error).strip().splitlines()
        reason = f"downloading it from {endpoint} failed: {type(error).__name__}: {text[0] if text else ''}"
    else:
        return
    raise ConfigError(f"{said}; {reason}")
