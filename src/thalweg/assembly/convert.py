"""From a model folder to a GGUF file, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.assembly.source import ModelSource, open_source
from thalweg.config.engine import EngineConfig
from thalweg.config.gguf.keys import sampling_metadata
from thalweg.config.gguf.model import SUFFIX, open_gguf
from thalweg.config.gguf.write import NewTensor, write_gguf
from thalweg.errors import ConfigError
from thalweg.models.gguf import architecture_for
from thalweg.models.parts.quantized import stored_as
from thalweg.quant import FP8_LINEARS, INT4_EXPERTS
from thalweg.quant.blocks import BLOCK
from thalweg.tokenizer.gguf_write import tokenizer_metadata, write_tokenizer_files
from thalweg.tokenizer.load import has_tokenizer
from thalweg.weights.checkpoint import WeightFiles
from thalweg.weights.gguf import GgufCheckpoint
from thalweg.weights.gguf_write import OUTTYPES, new_tensors
from thalweg.weights.load import check
from thalweg.weights.progress import progress_bar
from thalweg.weights.safetensors_write import NewWeight, write_checkpoint

SAFETENSORS_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_FLOAT32 = ("A_log", "dt_bias", "e_score_correction_bias")  # whatever the rest is in


def to_gguf(config: EngineConfig, output: Path, outtype: str) -> None:
    """Write the model that `config` names as one GGUF file.

    Raises ConfigError for an unknown outtype or an output that is there, UnsupportedError for a model that llama.cpp's
    files cannot say, and what opening a model raises.
    """
    if outtype not in OUTTYPES:
        raise ConfigError(f"--outtype is {outtype!r}; expected {', '.join(OUTTYPES)}")
    if output.suffix != SUFFIX:
        raise ConfigError(f"--output is {str(output)!r}; expected a file that ends in {SUFFIX}")
    _refuse_present(output)
    source = open_source(config)
    checkpoint = source.open_weights()
    source = source.fitted(checkpoint, dequantize=True)
    c = source.config
    check(source.plan(), checkpoint, source.ignored)
    architecture = source.gguf or architecture_for(source.family, c)
    layout = source.family.layout(c, source.tensors)
    if layout.mtp is None or layout.mtp.own["fc"] not in source.tensors:
        c = replace(c, mtp=None)
    names = architecture.names(c, layout)
    read = partial(_numbers, checkpoint, stored_as(c.quantized, source.tensors))
    tensors = list(new_tensors(names, read, outtype, layers=len(c.layers), tied=c.vocab.tied))
    metadata = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": source.name,
        "general.file_type": OUTTYPES[outtype],
        "general.quantization_version": 2,
        **architecture.keys(c),
        **sampling_metadata(source.generation.sampling),
        **tokenizer_metadata(source.folder, c.vocab_size, source.eos_token_ids),
    }
    with progress_bar(f"writing {output.name}", sum(tensor.nbytes for tensor in tensors)) as advance:
        _into_place(output, lambda path: write_gguf(path, metadata, [_telling(t, advance) for t in tensors]))


def to_safetensors(config: EngineConfig, output: Path, outtype: str) -> None:
    """Write the GGUF model that `config` names as a folder in Hugging Face layout. Raises as `to_gguf` does."""
    if outtype not in SAFETENSORS_DTYPES:
        raise ConfigError(f"--outtype is {outtype!r}; expected {', '.join(SAFETENSORS_DTYPES)} for safetensors")
    source = open_source(config)
    if source.gguf is None:
        raise ConfigError(f"MODEL is {str(source.folder)!r}, which is in safetensors already; expected a {SUFFIX} file")
    _refuse_present(output)
    c = source.config
    layout = source.gguf.layout(c, published=True)
    model = open_gguf(source.folder)
    checkpoint = GgufCheckpoint(model, source.gguf.names(c, layout, model.tensors), source.gguf.ignored(c))
    dtype = SAFETENSORS_DTYPES[outtype]
    with progress_bar(f"writing {output.name}", sum(1 for _ in checkpoint.tensors)) as advance:

        def content(name: str) -> Tensor:
            advance(1)
            return checkpoint.read(name)

        weights = [
            NewWeight(name, "F32" if name.endswith(_FLOAT32) else dtype, info.shape, partial(content, name))
            for name, info in checkpoint.tensors.items()
        ]
        _into_place(output, lambda folder: _write_folder(folder, source, weights, dtype))


def _write_folder(folder: Path, source: ModelSource, weights: list[NewWeight], dtype: str) -> None:
    folder.mkdir()
    write_checkpoint(folder, weights)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    ends: dict[str, Any] = {"eos_token_id": list(source.eos_token_ids)}
    config = {**source.raw, **ends, "dtype": names[dtype]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ends | source.generation.sampling, indent=2))
    if has_tokenizer(source.folder):
        write_tokenizer_files(source.folder, folder)


def _numbers(checkpoint: WeightFiles, stored: Callable[[str], str], name: str) -> Tensor:
    """A tensor of a checkpoint as plain numbers, whatever it is stored in."""
    kind = stored(name)
    if kind == "fp8":
        weight, scales = checkpoint.read(name), checkpoint.read(f"{name}_scale_inv")
        rows = scales.float().repeat_interleave(BLOCK, 0)[: len(weight)]

        return FP8_LINEARS.widened([weight, rows], 1, torch.float32)
    if kind == "int4":
        words, scales = checkpoint.read(f"{name}_packed"), checkpoint.read(f"{name}_scale")
        return INT4_EXPERTS.widened([words, scales], 1, torch.float32)
    return checkpoint.read(name)


def _telling(tensor: NewTensor, advance: Callable[[int], None]) -> NewTensor:
    """The tensor, whose progress is told as it is made."""

    def content() -> bytes | memoryview:
        made = tensor.content()
        advance(tensor.nbytes)
        return made

    return NewTensor(tensor.name, tensor.type, tensor.shape, content)


def _refuse_present(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"--output is {str(output)!r}, which exists already; expected a new name")
    if not output.parent.is_dir():
        raise ConfigError(f"--output is {str(output)!r}, and there is no folder {str(output.parent)!r}")


def _into_place(output: Path, write: Callable[[Path], None]) -> None:
    """Written under another name first: what bears the name is whole."""
    unfinished = output.with_name(f".{output.name}.unfinished")
    write(unfinished)
    unfinished.rename(output)
