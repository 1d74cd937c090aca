"""What weights and caches may be stored in."""

from __future__ import annotations

DTYPE_BYTES = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}
