"""Where a model's files are: a folder, a GGUF file, a name on a hub, or the model that comes with the package."""

from __future__ import annotations

from pathlib import Path

from thalweg.config.gguf.model import SUFFIX, gguf_in
from thalweg.config.hub import hub_folder, is_hub_name
from thalweg.errors import ConfigError

BUNDLED = "thalweg-tiny"
_BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "bundled" / BUNDLED


def model_folder(model: str | None, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder or the GGUF file of `model`: None or "thalweg-tiny" is the bundled one, a folder without config.json
    stands for the only GGUF model in it, and OWNER/NAME for a model on a hub (hub.hub_folder): its `revision`, and
    without `weights` only its small files. OWNER/NAME is not a name if OWNER is a folder here or it ends in .gguf.

    Raises ConfigError, naming MODEL, the command line's argument, when there is neither.
    """
    if model is None or (model == BUNDLED and not Path(model).exists()):
        return _without_revision(_BUNDLED_FOLDER, revision)
    folder = Path(model).expanduser()
    if folder.is_dir():
        folder = folder if (folder / "config.json").exists() else gguf_in(folder) or folder
        return _without_revision(folder, revision)
    if folder.suffix == SUFFIX and folder.exists():
        return _without_revision(folder, revision)
    if folder.exists():
        raise ConfigError(
            f"MODEL is {model!r}, a file; expected a folder with config.json and safetensors files, or a {SUFFIX} file"
        )
    # What reads as a path of here and is misspelt does not leave the machine as a name.
    if is_hub_name(model) and folder.suffix != SUFFIX and not folder.parent.is_dir():
        return hub_folder(model, revision, weights)
    raise ConfigError(f"MODEL is {model!r}, and there is no such folder")


def _without_revision(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise ConfigError(f"--revision is {revision!r} and MODEL is {str(folder)!r}; expected a MODEL named OWNER/NAME")
    return folder
