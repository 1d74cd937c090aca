"""Where a model's files are: a folder or GGUF file the user names, or the small model that comes with the package."""

from __future__ import annotations

from pathlib import Path

from thalweg.config.gguf.model import SUFFIX, gguf_in
from thalweg.errors import ConfigError

BUNDLED = "thalweg-tiny"
_BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "bundled" / BUNDLED


def model_folder(model: str | None) -> Path:
    """The folder or the GGUF file of `model`: None or "thalweg-tiny" is the bundled one, a folder without config.json
    stands for the only GGUF model in it. Nothing is ever downloaded.

    Raises ConfigError, naming MODEL, the command line's argument, when there is neither.
    """
    if model is None or (model == BUNDLED and not Path(model).exists()):
        return _BUNDLED_FOLDER
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder if (folder / "config.json").exists() else gguf_in(folder) or folder
    if folder.suffix == SUFFIX and folder.exists():
        return folder
    if folder.exists():
        raise ConfigError(
            f"MODEL is {model!r}, a file; expected a folder with config.json and safetensors files, or a {SUFFIX} file"
        )
    hint = f"; fetch it first: hf download {model} --local-dir FOLDER" if _looks_like_hub_name(model) else ""
    raise ConfigError(f"MODEL is {model!r}, and there is no such folder{hint}")


def _looks_like_hub_name(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(
        p and p.isprintable() and not p.startswith((".", "~")) and " " not in p for p in parts
    )
