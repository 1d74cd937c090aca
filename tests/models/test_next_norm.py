"""Norms that experts compute with their sum, or a sum over ranks, for what comes behind, change no model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_checkpoint, random_kimi_k2, random_qwen
from thalweg import LLM, SamplingParams
from thalweg.layers.context import BuildContext
from thalweg.layers.experts import Router
from thalweg.layers.linear import NormLinear
from thalweg.ops.all_reduce import reference as all_reduce_reference
from thalweg.ops.linear.fp8 import reference
from thalweg.ops.moe import experts
from thalweg.ops.norm import NextNorm
from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.registry import Resolver
from thalweg.parallel.mesh import Mesh


def model(family: str, folder: Path) -> Path:
    if family == "kimi_linear":
        c = random_checkpoint.config(vocab=128, context=600)
        return random_checkpoint.write(folder, c, random_checkpoint.weights(c))
    if family == "kimi_k2":
        k2 = random_kimi_k2.config()
        return random_kimi_k2.write(folder, k2, random_kimi_k2.weights(k2))
    qwen = random_qwen.config()
    return random_qwen.write(folder, random_qwen.nested(qwen), random_qwen.published(qwen, random_qwen.weights(qwen)))


@pytest.mark.parametrize("family", ["kimi_linear", "kimi_k2", "qwen"])
def test_the_next_layer_takes_the_norm_it_is_told(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(family, tmp_path)

    def logits() -> Tensor:
        with LLM(str(folder), device="cpu", dtype="float32", max_num_seqs=2) as llm:
            params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5)
            [output] = llm.generate([[(7 * j * j) % 100 for j in range(40)]], params)
        assert output.error is None
        assert output.prompt_logprobs is not None
        found = [entry.top_logprobs for entry in output.prompt_logprobs if entry is not None]
        return torch.tensor(found)

    expected = logits()
    told, used = [], []

    def telling(form: Any) -> Any:
        def run(*inputs: Any, next_norm: NextNorm | None = None, **others: Any) -> Tensor:
            y_TD: Tensor = form(*inputs, **others)
            if next_norm is not None:
                next_norm.normed_TD = rms_norm(y_TD, next_norm.weight_D, next_norm.eps)
                told.append(next_norm.normed_TD)
            return y_TD

        return run

    forward = NormLinear.forward

    def spied(self: NormLinear, x_TD: Tensor, normed_TD: Tensor | None = None, /) -> Tensor:
        used.extend([] if normed_TD is None else [normed_TD])
        return forward(self, x_TD, normed_TD)

    monkeypatch.setattr(experts, "_without_norm", telling)
    monkeypatch.setattr(NormLinear, "forward", spied)
    torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)
    assert told
    assert [t.data_ptr() for t in told] == [t.data_ptr() for t in used]


@pytest.mark.parametrize("family", ["kimi_linear", "qwen"])
def test_blocks_take_the_norm_that_a_sum_over_ranks_tells(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(family, tmp_path)

    def answer() -> list[int]:
        with LLM(str(folder), device="cpu", dtype="float32", max_num_seqs=2, tensor_parallel_size=2) as llm:
            prompt = [(7 * j * j) % 100 for j in range(40)]
            [output] = llm.generate([prompt], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        assert output.error is None
        return list(output.outputs[0].token_ids)

    expected, told, used = answer(), list[Tensor](), list[Tensor]()
    plain, linear_forward, router_forward = all_reduce_reference.all_reduce_add, NormLinear.forward, Router.forward

    def telling(*inputs: Any, next_norm: NextNorm | None = None, **others: Any) -> Tensor:
        y_TD = plain(*inputs, **others)
        if next_norm is not None:
            next_norm.normed_TD = rms_norm(y_TD, next_norm.weight_D, next_norm.eps)
            told.append(next_norm.normed_TD)
        return y_TD

    def spied_linear(self: NormLinear, x_TD: Tensor, normed_TD: Tensor | None = None, /) -> Tensor:
        used.extend([] if normed_TD is None else [normed_TD])
        return linear_forward(self, x_TD, normed_TD)

    def spied_router(self: Router, x_TD: Tensor, known_TD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        used.extend([] if known_TD is None else [known_TD])
        return router_forward(self, x_TD, known_TD)

    monkeypatch.setattr(all_reduce_reference, "all_reduce_add", telling)
    monkeypatch.setattr(NormLinear, "forward", spied_linear)
    monkeypatch.setattr(Router, "forward", spied_router)
    assert answer() == expected
    assert len(told) > 4
    assert [t.data_ptr() for t in told] == [t.data_ptr() for t in used]


def test_a_norm_in_float8_reaches_the_projection_over_float8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = random_qwen.config()
    tensors, quantization = random_qwen.in_fp8(random_qwen.published(c, random_qwen.weights(c)))
    folder = random_qwen.write(tmp_path, random_qwen.nested({**c, "quantization_config": quantization}), tensors)

    def answer() -> list[int]:
        with LLM(str(folder), device="cpu", dtype="float32", max_num_seqs=2) as llm:
            [output] = llm.generate([[5, 4, 3]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        return list(output.outputs[0].token_ids)

    expected, told, used = answer(), [], []

    def telling(form: Any) -> Any:
        def run(*inputs: Any, next_norm: NextNorm | None = None, **others: Any) -> Tensor:
            y_TD: Tensor = form(*inputs, **others)
            if next_norm is not None:
                assert next_norm.wants_float8
                next_norm.in_float8 = y_TD.to(torch.float8_e4m3fn), y_TD[:, 0]
                told.append(next_norm.in_float8[0].data_ptr())
            return y_TD

        return run

    plain = reference.norm_linear_fp8

    def spied(*inputs: Any, in_float8: tuple[Tensor, Tensor] | None = None) -> Tensor:
        used.extend([] if in_float8 is None else [in_float8[0].data_ptr()])
        return plain(*inputs)

    monkeypatch.setattr(experts, "_without_norm", telling)
    monkeypatch.setattr(reference, "norm_linear_fp8", spied)
    assert answer() == expected
    assert told
    assert told == used


@pytest.mark.parametrize(
    ("prefer", "is_told"),
    [({}, True), ({"linear": "reference"}, True), ({"norm_linear": "separate"}, False), ({"*": "reference"}, False)],
)
def test_a_layer_whose_form_of_norm_linear_was_asked_for_norms_by_that(prefer: dict[str, str], is_told: bool) -> None:
    ctx = BuildContext(torch.device("cpu"), torch.float32, Mesh(0, 1), Resolver(prefer), "float32", {}, block_size=16)
    layer = NormLinear(ctx, 32, (16, 8), 1e-5)
    assert (layer.next_norm() is not None) == is_told
    layer.norm.weight.fill_(2)
    layer.weight.copy_(torch.eye(24, 32))
    x_TD = torch.randn(3, 32)
    expected = rms_norm(x_TD, layer.norm.weight, 1e-5)
    torch.testing.assert_close(layer(x_TD), expected[:, :24])
    torch.testing.assert_close(layer(x_TD, expected), expected[:, :24])
