"""Attention of prompts in CUDA C++: run on the host, compiled for Hopper, cut into pieces, and when it is chosen.
Results of the device: test_gpu_prefill and test_gpu_qwen."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.compile_cuda import compile_cuda
from tests.ops.gqa_case import GqaCase, GqaShape
from tests.ops.prefill_case import check_in_graphs, ratio
from tests.ops.run_on_host import HostKernel, host_tensor_map
from thalweg.ops.attention import prompt_cuda
from thalweg.ops.attention.gqa import GQA_PREFILL, GqaDims, reference
from thalweg.ops.attention.mla import MLA_PREFILL, MlaPrefillDims
from thalweg.ops.host_tables import Contexts, Limits, StepSequences, Tables, contexts
from thalweg.ops.registry import Op, Resolver, Where

HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a block may have


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cuda, "cuda_kernel", HostKernel)
    monkeypatch.setattr(prompt_cuda, "tensor_map", host_tensor_map)
    monkeypatch.setattr(prompt_cuda, "multiprocessors", lambda device: 1)  # which takes all pieces in turn


@pytest.mark.parametrize(
    ("shape", "cached", "new"),
    [
        (GqaShape(1, 1, 256, 64, 16), [50], [30]),
        pytest.param(GqaShape(2, 1, 256, 64, 64), [5, 0, 0], [160, 1, 0], marks=pytest.mark.slow),
    ],
)
def test_grouped_heads(shape: GqaShape, cached: list[int], new: list[int]) -> None:
    case = GqaCase(shape, cached, new, torch.bfloat16)
    q = case.prepare(reference.gqa_prepare)
    assert ratio(case.prefill(prompt_cuda.gqa_prefill, q), case.prefill(reference.gqa_prefill, q)) < 0.004


def test_few_queries_behind_a_long_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in parts, of which the short sequence has fewer than the long one."""
    monkeypatch.setattr(prompt_cuda, "LEAST_TILES", 1)
    monkeypatch.setattr(prompt_cuda, "multiprocessors", lambda device: 6)
    case = GqaCase(GqaShape(1, 1, 256, 64, 16), [310, 0], [20, 9], torch.bfloat16)
    q = case.prepare(reference.gqa_prepare)
    assert prompt_cuda._pieces(case.offsets, case.cached, 80, q.device, at_once=6)[1] == 5
    assert ratio(case.prefill(prompt_cuda.gqa_prefill, q), case.prefill(reference.gqa_prefill, q)) < 0.004


@pytest.mark.slow
def test_few_queries_behind_a_long_prefix_in_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in parts: as many as the shape has, of which a step with a shorter prefix leaves some out."""
    monkeypatch.setattr(prompt_cuda, "LEAST_TILES", 1)
    monkeypatch.setattr(prompt_cuda, "multiprocessors", lambda device: 6)
    case = GqaCase(GqaShape(1, 1, 256, 64, 16), [310, 0], [20, 12], torch.bfloat16)
    q = case.prepare(reference.gqa_prepare)
    made: list[int] = []
    join = prompt_cuda._pieces

    def pieces(*args: Any, **options: Any) -> tuple[Tensor, int]:
        made.append(join(*args, **options)[1])
        return join(*args, **options)

    monkeypatch.setattr(prompt_cuda, "_pieces", pieces)

    def run(offsets: Any, starts: Any, boundaries: Any) -> list[Tensor]:
        return [prompt_cuda.gqa_prefill(q, case.proj, **case.blocks, starts=starts, offsets=offsets)]

    steps = [StepSequences(case.offsets, starts, []) for starts in ([310, 0], [230, 0], [0, 0])]
    check_in_graphs(run, steps, context=512)
    assert made == [6, 6, 5, 6, 4, 6, 1]


def test_parts_have_all_tiles_once_and_those_that_are_few_or_short_none() -> None:
    every = prompt_cuda.cut([0, 128, 130], [1000, 0], 80, None, rows=False)
    found = prompt_cuda.in_parts(every, 4, 80)
    assert found[:, [0, 3, 5, 7]].tolist() == [
        [0, 0, 3, 0],
        [0, 240, 4, 1],
        [0, 560, 4, 2],
        [0, 880, 4, 3],
        [128, 0, 1, 3],
    ]
    device = torch.device("cpu")
    parts = {
        (new, cached, at_once): prompt_cuda._pieces([0, new], [cached], 80, device, at_once=at_once)[1]
        for new, cached, at_once in [
            (100, 9000, 6),
            (200, 9000, 8),
            (1000, 9000, 8),
            (100, 4000, 8),
            (9, 99_999, 66),
        ]
    }
    assert list(parts.values()) == [6, 4, 1, 1, 16]


class LatentCase:
    """Expanded keys and values of one head, of sequences with `starts` tokens before their `new` ones."""

    def __init__(self, starts: list[int], new: list[int]) -> None:
        rng = torch.Generator().manual_seed(0)
        self.starts, self.offsets = starts, list(accumulate(new, initial=0))
        self.totals = [a + b for a, b in zip(starts, new, strict=True)]
        shapes = (self.offsets[-1], 1, 192), (sum(self.totals), 1, 256), (sum(self.totals), 576)
        self.q, self.kv, self.latent = (torch.randn(s, generator=rng).bfloat16() for s in shapes)

    def truth(self) -> Tensor:
        """o [T, 1, 128] in float64."""
        outputs, row = [], 0
        for b, (start, total) in enumerate(zip(self.starts, self.totals, strict=True)):
            kv, latent = self.kv[row : row + total, 0].double(), self.latent[row : row + total].double()
            q = self.q[self.offsets[b] : self.offsets[b + 1], 0].double()
            scores = q @ torch.cat((kv[:, :128], latent[:, 512:]), dim=1).T * 192**-0.5
            future = torch.arange(total) > torch.arange(start, total).unsqueeze(1)
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ kv[:, 128:])
            row += total
        return torch.cat(outputs).unsqueeze(1)


@pytest.mark.parametrize(("starts", "new"), [([0], [40]), pytest.param([130, 10], [170, 10], marks=pytest.mark.slow)])
def test_latent_attention(starts: list[int], new: list[int]) -> None:
    case = LatentCase(starts, new)
    q, o = torch.cat((case.q, case.q), dim=2)[..., :192], torch.empty(len(case.q), 1, 128, dtype=torch.bfloat16)
    part = contexts(starts, case.offsets, 16, q.device)
    prompt_cuda.attend_latent(q, case.kv, case.latent, o, (), case.offsets, starts, part, 192**-0.5)
    assert ratio(o, case.truth()) < 0.004


def test_latent_attention_in_parts() -> None:
    """40 queries behind 30 tokens: the first ones see nothing of the second part, the last ones all of the first."""
    case = LatentCase([30], [40])
    o = torch.empty(40, 1, 128, dtype=torch.bfloat16)
    sums = (torch.zeros(40, 1, 128), torch.full((40, 1), -torch.inf), torch.zeros(40, 1))
    for lo, hi in ((0, 48), (48, 70)):
        whole = contexts([30], [0, 40], 16, o.device)
        part = Contexts(hi - lo, whole.cut, whole.totals_B3, lo)
        args = case.q, case.kv[lo:hi], case.latent[lo:hi], o, sums, case.offsets, [30], part
        prompt_cuda.attend_latent(*args, 192**-0.5)
    assert ratio(sums[0] / sums[2].unsqueeze(-1), case.truth()) < 0.004


def test_pieces_that_a_captured_step_does_not_need_are_nobodys() -> None:
    """And are passed over: those of an empty sequence, and those that only other steps of that shape have."""
    case = LatentCase([0, 0, 0], [20, 0, 12])
    limits = Limits(3, 32, 64)
    tables = Tables(limits, torch.zeros(Tables.words(limits), dtype=torch.int32))
    tables.step = StepSequences(case.offsets, case.starts, [])
    beyond = torch.full((32, 1, 256), torch.nan).bfloat16()
    o = torch.empty(32, 1, 128, dtype=torch.bfloat16)
    part = contexts(tables.starts, tables.offsets, 16, o.device)
    latent = torch.cat((case.latent, beyond.flatten(1).repeat(1, 3)[:, :576]))
    args = case.q, torch.cat((case.kv, beyond)), latent, o, (), tables.offsets, tables.starts, part
    prompt_cuda.attend_latent(*args, 192**-0.5)
    assert ratio(o, case.truth()) < 0.004


def test_pieces_cover_all_queries_and_come_with_the_longest_first() -> None:
    offsets, starts = [0, 300, 300, 301, 429], [1000, 7, 5, 0]
    found = prompt_cuda.cut(offsets, starts, 128, None, rows=True)
    covered = sorted((token, min(token + 128, end)) for token, end, *_ in found.tolist())
    assert covered == [(0, 128), (128, 256), (256, 300), (300, 301), (301, 429)]
    assert found[:, 5].tolist() == [11, 10, 9, 1, 1]  # of 128 keys: up to 1300, 1256, 1128, 6 and 128
    by_token = {row[0]: row for row in found.tolist()}
    assert by_token[256][2:7] == [1256, 0, 1300, 11, 0]
    assert by_token[301][1:7] == [429, 0, 0, 128, 1, 1306]  # its keys come behind those of the sequences ahead
    in_blocks = prompt_cuda.cut(offsets, starts, 128, None, rows=False)
    assert {row[0]: row[6] for row in in_blocks.tolist()} == {0: 0, 128: 0, 256: 0, 300: 2, 301: 3}


def test_queries_that_see_nothing_of_a_part_have_no_pieces() -> None:
    found = prompt_cuda.cut([0, 300], [0], 128, (128, 172), rows=True)
    assert found[:, [0, 5]].tolist() == [[256, 2], [128, 1]]


@pytest.mark.parametrize("part", [0, 1])
def test_latent_attention_compiles_for_hopper_without_spills(tmp_path: Path, part: int) -> None:
    compiled = compile_cuda(prompt_cuda.SOURCE, tmp_path, **prompt_cuda.latent_macros(part))
    assert compiled.spilled_bytes == 0
    assert compiled.static_shared_bytes + prompt_cuda.shared_bytes(128, 192, 128) <= HOPPER_SHARED


@pytest.mark.parametrize(("ratio", "block", "part"), [(4, 64, 0), (8, 16, 0), (8, 64, 2)])
def test_grouped_heads_compile_for_hopper_without_spills(tmp_path: Path, ratio: int, block: int, part: int) -> None:
    compiled = compile_cuda(prompt_cuda.SOURCE, tmp_path, **prompt_cuda.grouped_macros(ratio, block, part))
    assert compiled.spilled_bytes == 0
    assert compiled.static_shared_bytes + prompt_cuda.shared_bytes(80, 256, 256) <= HOPPER_SHARED


GQA = dict(H=16, G=2, K=256, R=64, S=64)
MLA = dict(H=32, K=128, V=128, R=512, P=64)


@pytest.mark.parametrize(
    ("op", "dims", "dtype", "reason"),
    [
        (GQA_PREFILL, GqaDims(**GQA | {"K": 128}), "bfloat16", "heads of 256 dims"),
        (GQA_PREFILL, GqaDims(**GQA | {"S": 8}), "bfloat16", "a multiple of 16 tokens, not 256 and 8"),
        (GQA_PREFILL, GqaDims(**GQA), "float32", "needs bfloat16"),
        (
            MLA_PREFILL,
            MlaPrefillDims(**MLA | {"P": 32}),
            "bfloat16",
            "P = 64 and a multiple of 8",
        ),
        (MLA_PREFILL, MlaPrefillDims(**MLA), "float32", "needs bfloat16"),
    ],
)
def test_what_it_does_not_serve_it_refuses_with_a_reason(op: Op, dims: object, dtype: str, reason: str) -> None:  # type: ignore[type-arg]
    resolver = Resolver()
    resolver.resolve(op, Where("cuda", dtype), dims)
    assert reason in dict(resolver.explain()[0].refused)["cuda"]
