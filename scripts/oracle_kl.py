"""How far --dtype moves next-token distributions: mean KL divergence from the float32 logits beside a checkpoint.

Each folder holds a checkpoint, ids.npy (int32 [B, T]) and logits.npy (float32 [B, T, V]), which another implementation
computed in float32. With --sequences so many random sequences are compared instead with our own float32 logits:

    python scripts/oracle_kl.py FOLDER... --dtype bfloat16 --device cpu
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thalweg import LLM

LENGTH = 70  # tokens of a random sequence


def divergences(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) in nats of each position's distribution, float64, from logits [..., V]."""
    p, q = (x.double().log_softmax(-1) for x in (expected, found))
    return (p.exp() * (p - q)).sum(-1)


def logits(folder: Path, ids_BT: np.ndarray, dtype: str, device: str) -> Tensor:
    """float32 [B, T, V] on the CPU, computed in `dtype`."""
    with LLM(str(folder), dtype=dtype, device=device, max_num_seqs=2, cache_memory=1 << 30) as llm:
        return torch.stack([llm.prompt_logits(row.tolist()).float().cpu() for row in ids_BT])


def compare(folder: Path, dtype: str, device: str, sequences: int | None = None) -> tuple[Tensor, float]:
    """(KL [B, T], share of positions whose likeliest token is the same)."""
    ids, expected = np.load(folder / "ids.npy"), torch.from_numpy(np.load(folder / "logits.npy"))
    if sequences is not None:
        ids = np.random.default_rng(0).integers(3, expected.shape[-1], (sequences, LENGTH))
        expected = logits(folder, ids, "float32", device)
    found = logits(folder, ids, dtype, device)
    same = (found.argmax(-1) == expected.argmax(-1)).double().mean()
    return divergences(expected, found), float(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int)
    options = parser.parse_args()
    print("| checkpoint | mean KL | standard error over sequences | largest KL | same likeliest token (%) |")
    print("|---|---|---|---|---|")
    for folder in options.folders:
        kl, same = compare(folder, options.dtype, options.device, options.sequences)
        error = kl.mean(1).std() / len(kl) ** 0.5
        print(f"| {folder.name} | {kl.mean():.2e} | {error:.1e} | {kl.max():.2e} | {100 * same:.1f} |")


if __name__ == "__main__":
    main()
