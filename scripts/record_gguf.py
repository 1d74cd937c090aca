"""Print what a GGUF file holds as JSON, long values and tensors as digests, for tests/fixtures/llama_cpp_files.json.

The files recorded there are those of llama.cpp's convert_hf_to_gguf.py with --outtype f32 (of the release that
llama-cpp-python 0.3.36 has), of src/thalweg/bundled/thalweg-tiny and models/thalweg-tiny-gdn; since it knows no
tokenizer of theirs, its get_vocab_base_pre was made to answer kimi-k2 and qwen35.

    python scripts/record_gguf.py thalweg-tiny.gguf thalweg-tiny-gdn.gguf > tests/fixtures/llama_cpp_files.json
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from thalweg.config.gguf.file import GgufFile

SHORT = 200  # characters


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]


def held(path: Path) -> dict[str, Any]:
    """{"metadata": {key: value or digest}, "tensors": {name: [type, shape, digest]}}"""
    file = GgufFile(path)
    spelt = {key: json.dumps(value) for key, value in file.metadata.items()}
    return {
        "metadata": {k: file.metadata[k] if len(v) <= SHORT else digest(v.encode()) for k, v in spelt.items()},
        "tensors": {
            name: [str(t.type), list(t.shape), digest(file.mapped[t.start : t.stop])]
            for name, t in sorted(file.tensors.items())
        },
    }


if __name__ == "__main__":
    files = [Path(argument) for argument in sys.argv[1:]]
    entries = (f'"{path.stem}": {json.dumps(held(path))}' for path in files)
    print("{\n" + ",\n".join(entries) + "\n}")
