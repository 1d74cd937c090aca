"""Record what the gguf package dequantises random blocks to, as tests/fixtures/ggml_blocks.npz.

The argument is that file. It needs numpy and the gguf package, which is no dependency.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

# Where a block's float16 numbers stand: any bits there could be NaN.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "MXFP4": [],
}
COUNT = 6

rng, recorded = np.random.default_rng(7), {}
for name, halves in HALVES.items():
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (COUNT, size), dtype=np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = rng.normal(0, 1, (COUNT, 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(100, 150, COUNT)
    if name in ("Q4_K", "Q5_K"):
        blocks[0, 4:16] = 255  # the upper bits of every scale
    recorded[f"{name}.blocks"] = blocks
    recorded[f"{name}.values"] = gguf.quants.dequantize(blocks, kind).astype(np.float32).reshape(COUNT, -1)
np.savez_compressed(sys.argv[1], **recorded)
