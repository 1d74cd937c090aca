"""The types of GGML's tensors: elements and bytes of a block. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """Blocks run along a row, whose elements are a multiple of `elements`; a block has `bytes` bytes."""

    name: str
    id: int
    elements: int
    bytes: int

    @property
    def is_plain(self) -> bool:
        """Whether elements are numbers of their own."""
        return self.elements == 1

    def is_kept(self, halves: bool) -> bool:
        """Whether matrices stay in this type: in blocks, and with `halves` in 16 bits too."""
        return not self.is_plain or (halves and self.bytes == 2)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row. `columns` is a multiple of `elements`."""
        return columns // self.elements * self.bytes

    def __str__(self) -> str:
        return self.name


def _table(*rows: tuple[str, int, int, int]) -> dict[str, GgmlType]:
    return {name: GgmlType(name, number, elements, size) for name, number, elements, size in rows}


TYPES = _table(
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("IQ4_NL", 20, 32, 18),
    ("IQ4_XS", 23, 256, 136),
    ("BF16", 30, 1, 2),
    ("MXFP4", 39, 32, 17),
)
"""Those that can be read, by name."""

BY_ID = {t.id: t for t in TYPES.values()}

UNREAD = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}
"""Names of the others, for messages."""
