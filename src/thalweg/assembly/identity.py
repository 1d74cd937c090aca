"""What cached bytes depend on, as one text: two engines with the same one may read each other's cache."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from thalweg.assembly.source import ModelSource
from thalweg.config.engine import EngineConfig

SAMPLES, SAMPLE_BYTES = 64, 4096
_OPTIONS = (
    "dtype",
    "quantization",
    "dequantize",
    "quantize_activations",
    "state_dtype",
    "snapshot_dtype",
    "block_size",
    "tensor_parallel_size",
    "num_layers",
    "ignore_config_key",
)


def cache_identity(config: EngineConfig, source: ModelSource, device: str, layout: list[str]) -> str:
    """A digest of the model, this version, the options that change what is cached, and its layout. `config` has no
    "auto" left. Of weights it takes names, sizes, beginnings and samples, which tells one training from another."""
    parts = {
        "version": _version(),
        "device": device,
        "layout": layout,
        "dummy": config.seed if config.load_format == "dummy" else None,
        "ops": dict(sorted(config.op_preference.items())),
        **{name: getattr(config, name) for name in _OPTIONS},
    }
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=list).encode(), digest_size=20)
    digest.update(json.dumps(source.raw, sort_keys=True, default=str).encode())
    if config.load_format != "dummy":
        for path in _files(source.folder):
            _add(digest, path)
    return digest.hexdigest()


def _version() -> str:
    try:
        return version("thalweg")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def _add(digest: hashlib.blake2b, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(16 * SAMPLE_BYTES))
        for i in range(SAMPLES):
            file.seek(size * i // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
