"""Experts divided over data-parallel ranks give what they give on one rank, whoever has tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.threads import on_ranks
from tests.models import random_checkpoint as kimi
from tests.models import random_kimi_k2 as k2
from tests.models import random_qwen as qwen
from tests.models.plans import read
from thalweg import ops as _ops  # noqa: F401 -- registers every op's implementations
from thalweg.assembly.model import open_model
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.layers import expert_exchange
from thalweg.layers.context import BuildContext
from thalweg.layers.experts import OwnExpert
from thalweg.layers.moe import MoE
from thalweg.models import family_of
from thalweg.models.decoder import Decoder
from thalweg.models.family import weight_plan
from thalweg.models.parts.moe import MoeDims
from thalweg.ops.registry import Resolver
from thalweg.parallel.data_ranks import DataRanks, join_data_ranks
from thalweg.parallel.mesh import Mesh, join_mesh
from thalweg.parallel.placement import Placement
from thalweg.parallel.shards import Shards
from thalweg.weights.dummy import fill

MODELS: dict[str, dict[str, Any]] = {
    "shared experts like the routed ones": kimi.config(experts=12, top_k=3, shared=2, layers=2, full=(2,)),
    "no shared expert": kimi.config(experts=6, top_k=6, shared=0, layers=2, full=(2,)),
    "a gated shared expert of its own width": qwen.nested(qwen.config(experts=6, shared=40, layers=2)),
    "a gated shared expert like the routed ones": qwen.nested(qwen.config(experts=6, shared=24, layers=2)),
    "Kimi-K2 in fp8": k2.config(experts=12, inner=128, shared=2, quantization_config=k2.FP8),
    "Kimi-K2 in int4": k2.config(experts=12, quantization_config=k2.INT4),
}
Slots = tuple[tuple[int, ...], ...]
LEAVES_OUT = "reference"  # the form of "experts" for a CPU that knows pairs that are left out
TOKENS = [(5, 3, 1), (0, 4, 2), (7, 0, 0), (1, 1, 1)]  # of each rank


def moe(
    raw: dict[str, Any], ranks: DataRanks, whole: MoE | None = None, slots: Slots | None = None, op: str | None = None
) -> MoE:
    """The last layer's experts on one rank, with its share of the weights of `whole`, or with weights at random."""
    family, config = family_of(raw), read(raw)
    placements = {len(config.layers) - 1: Placement(slots)} if slots is not None else {}
    plan = weight_plan(family, config, Shards(0, 1, ranks.rank, ranks.size), placements=placements)
    context = BuildContext(
        torch.device("cpu"),
        torch.float32,
        Mesh(data=ranks),
        Resolver({} if op is None else {"experts": op}),
        "float32",
        {target.name: target for target in plan},
        block_size=64,
        placements=placements,
    )
    decoder = Decoder(context, config)
    layer = decoder._stack[-1].mlp
    assert isinstance(layer, MoE)
    if whole is None:
        fill(plan, dict(decoder.named_parameters()).__getitem__, 7)
        return layer
    theirs = dict(whole.named_parameters())
    dims = config.layers[-1].mlp
    assert isinstance(dims, MoeDims)
    total = dims.experts
    mine = list((Placement(slots) if slots is not None else Placement.even(total, ranks.size)).slots[ranks.rank])
    for name, param in layer.named_parameters():
        value = theirs[name].detach()
        if name.startswith("experts."):
            value = torch.cat([value[mine], value[total:]])
        param.detach().copy_(value)
    return layer


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_same_outputs_as_one_rank(model: str, size: int, tmp_path: Path) -> None:
    raw = MODELS[model]
    alone = moe(raw, DataRanks())
    assert isinstance(alone.shared, OwnExpert) == (model == "Kimi-K2 in int4")
    width = alone.router.weight.shape[1]
    inputs = [[torch.randn(n, width) * 3 for n in counts[:size]] for counts in TOKENS]

    def body(ranks: DataRanks) -> list[Tensor]:
        layer, outputs = moe(raw, ranks, alone), []
        for step in inputs:
            x_TD = step[ranks.rank]
            if len(x_TD):
                outputs.append(layer(x_TD.clone()))  # which may be overwritten
            else:
                layer.serve_others()
                outputs.append(x_TD)
        return outputs

    outputs = on_ranks(size, tmp_path, body)
    for i, step in enumerate(inputs):
        for rank, x_TD in enumerate(step):
            if len(x_TD):
                torch.testing.assert_close(outputs[rank][i], alone(x_TD), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "slots",
    [
        ((5, 3, 1), (0, 2, 4)),  # in another order
        ((0, 1, 2, 3), (0, 1, 4, 5)),
        ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0)),
        ((0, 1, 2), (2, 3, 4), (5, 0, 2)),
    ],
)
def test_same_outputs_wherever_experts_and_their_copies_are(slots: Slots, tmp_path: Path) -> None:
    raw = MODELS["a gated shared expert of its own width"]
    alone = moe(raw, DataRanks())
    inputs = [torch.randn(n, alone.router.weight.shape[1]) * 3 for n in (9, 4, 6)]

    def body(ranks: DataRanks) -> tuple[Tensor, list[int]]:
        layer = moe(raw, ranks, alone, slots)
        layer.expert_counts()
        return layer(inputs[ranks.rank]), layer.expert_counts()

    for (y_TD, counts), x_TD in zip(on_ranks(len(slots), tmp_path, body), inputs, strict=False):
        torch.testing.assert_close(y_TD, alone(x_TD), atol=2e-5, rtol=1e-5)
        _, _, ids_Tk = alone.router(x_TD)
        assert counts == ids_Tk[:, :2].flatten().bincount(minlength=6).tolist()  # of experts, not of copies


def test_a_token_s_output_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """The sum of a token's experts has one order, whichever ranks they are on."""
    raw = MODELS["shared experts like the routed ones"]
    x_TD, alone = torch.randn(4, raw["hidden_size"]), moe(raw, DataRanks())

    def body(ranks: DataRanks) -> list[Tensor]:
        layer = moe(raw, ranks, alone)
        first = layer(x_TD)
        if ranks.rank:
            layer.serve_others()
            return [first]
        return [first, layer(x_TD)]

    (first, again), (other,) = on_ranks(2, tmp_path, body)
    assert torch.equal(first, again)
    assert torch.equal(first, other)


def test_rows_of_any_dtype_go_where_they_should(tmp_path: Path) -> None:
    def body(ranks: DataRanks) -> dict[torch.dtype, Tensor]:
        sent = [[1, 2], [0, 3]][ranks.rank]
        received = [[1, 0], [2, 3]][ranks.rank]
        rows = torch.arange(3).unsqueeze(1).expand(3, 5) + 10 * ranks.rank
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
        return {dtype: ranks.all_to_all(rows.to(dtype), sent, received) for dtype in dtypes}

    results = on_ranks(2, tmp_path, body)
    for rank, expected in enumerate([[0], [1, 2, 10, 11, 12]]):
        for dtype, rows in results[rank].items():
            assert rows.dtype == dtype
            assert rows[:, 0].tolist() == expected
            assert rows.shape == (len(expected), 5)


def test_maxima_and_minimum_over_ranks(tmp_path: Path) -> None:
    def body(ranks: DataRanks) -> tuple[list[int], int]:
        return ranks.maxima([ranks.rank, -ranks.rank, 2**62 + ranks.rank]), ranks.minimum(5 + ranks.rank)

    assert on_ranks(3, tmp_path, body) == [([2, 0, 2**62 + 2], 5)] * 3
    assert DataRanks().maxima([3, -1]) == [3, -1]


def test_rows_for_one_rank_are_bounded_whatever_the_tokens_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = MODELS["shared experts like the routed ones"]
    alone, tokens = moe(raw, DataRanks()), [torch.randn(n, raw["hidden_size"]) for n in (23, 0, 9)]
    dict(alone.named_parameters())["router.bias"].detach()[4:] -= 1e3  # all take experts of the first rank
    monkeypatch.setattr(
        expert_exchange, "MOST_BYTES", 3 * 4 * 3 * raw["hidden_size"] * 4
    )  # 4 tokens of each of 3 ranks

    def body(ranks: DataRanks) -> tuple[Tensor, list[int]]:
        layer, rows = moe(raw, ranks, alone), []
        run = layer._run_routed
        layer._run_routed = lambda x, ids: (rows.append(len(x)), run(x, ids))[1]  # type: ignore[method-assign]
        if len(tokens[ranks.rank]) == 0:
            layer.serve_others()
            return tokens[ranks.rank], rows
        return layer(tokens[ranks.rank]), rows

    results = on_ranks(3, tmp_path, body)
    for (y_TD, _), x_TD in zip(results, tokens, strict=True):
        torch.testing.assert_close(y_TD, alone(x_TD) if len(x_TD) else x_TD, atol=2e-5, rtol=1e-5)
    assert [rows for _, rows in results] == [[24, 24, 15, 12, 12, 9], [], []]


def test_counts_of_experts_are_of_what_this_rank_s_tokens_took(tmp_path: Path) -> None:
    raw = MODELS["shared experts like the routed ones"]
    alone = moe(raw, DataRanks())
    tokens = [torch.randn(n, raw["hidden_size"]) for n in (5, 9)]

    def body(ranks: DataRanks) -> list[list[int]]:
        layer, x_TD = moe(raw, ranks, alone), tokens[ranks.rank]
        layer(x_TD)
        counts = [layer.expert_counts()]  # from here on
        layer(x_TD)
        counts.append(layer.expert_counts())
        layer.serve_others() if ranks.rank else layer(x_TD)
        return [*counts, layer.expert_counts()]

    for rank, (before, once, twice) in enumerate(on_ranks(2, tmp_path, body)):
        _, _, ids_Tk = alone.router(tokens[rank])
        expected = ids_Tk[:, :3].flatten().bincount(minlength=12).tolist()
        assert before == [0] * 12
        assert once == expected
        assert twice == (expected if rank else [2 * n for n in expected])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_same_outputs_if_all_ranks_have_as_many_tokens(model: str, size: int, tmp_path: Path) -> None:
    """The form for graphs: no count of what goes where."""
    raw = MODELS[model]
    alone = moe(raw, DataRanks())
    inputs = [torch.randn(4, alone.router.weight.shape[1]) * 3 for _ in range(size)]

    def body(ranks: DataRanks) -> Tensor:
        layer = moe(raw, ranks, alone, op=LEAVES_OUT)
        with ranks.padded(torch.ones(4, dtype=torch.int64)):
            return layer(inputs[ranks.rank].clone())

    for y_TD, x_TD in zip(on_ranks(size, tmp_path, body), inputs, strict=True):
        torch.testing.assert_close(y_TD, alone(x_TD), atol=2e-5, rtol=1e-5)


def test_copies_of_experts_serve_if_all_ranks_have_as_many_tokens(tmp_path: Path) -> None:
    raw, slots = MODELS["a gated shared expert of its own width"], ((0, 1, 2), (2, 3, 4), (5, 0, 2))
    alone = moe(raw, DataRanks())
    inputs = [torch.randn(5, alone.router.weight.shape[1]) * 3 for _ in range(3)]

    def body(ranks: DataRanks) -> Tensor:
        with ranks.padded(torch.ones(5, dtype=torch.int64)):
            return moe(raw, ranks, alone, slots, LEAVES_OUT)(inputs[ranks.rank])

    for y_TD, x_TD in zip(on_ranks(3, tmp_path, body), inputs, strict=True):
        torch.testing.assert_close(y_TD, alone(x_TD), atol=2e-5, rtol=1e-5)


def test_rows_that_pad_a_step_take_no_expert(tmp_path: Path) -> None:
    """Their experts, and those of other ranks, may give anything."""
    raw = MODELS["shared experts like the routed ones"]
    alone = moe(raw, DataRanks())
    x_TD = torch.randn(4, raw["hidden_size"])
    live = [torch.tensor([5, 0, 1, 0]), torch.tensor([0, 0, 0, 0])]

    def body(ranks: DataRanks) -> tuple[Tensor, list[Tensor]]:
        layer, ids = moe(raw, ranks, alone, op=LEAVES_OUT), []
        run = layer.experts.forward
        layer.experts.forward = lambda x, w, i, *rest: (ids.append(i), run(x, w, i, *rest))[1]  # type: ignore[method-assign]
        with ranks.padded(live[ranks.rank]):
            return layer(x_TD), ids

    (y_TD, (ids,)), (other_TD, (others,)) = on_ranks(2, tmp_path, body)
    expected = alone(x_TD)
    torch.testing.assert_close(y_TD[[0, 2]], expected[[0, 2]], atol=2e-5, rtol=1e-5)
    assert torch.equal(y_TD[[1, 3]], x_TD[[1, 3]])
    assert torch.equal(other_TD, x_TD)
    _, _, chosen = alone.router(x_TD)
    for ids_Ak, first in ((ids, 0), (others, 6)):
        for t in range(8):
            wanted = {int(e) - first for e in chosen[t, :3] if first <= e < first + 6} if t in (0, 2) else set()
            own = {6, 7} if t in (0, 2) and first == 0 else set()
            assert {int(e) for e in ids_Ak[t] if e >= 0} == wanted | own


def test_experts_of_one_tensor_are_not_cut_twice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["a gated shared expert of its own width"]))
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True}
    config = EngineConfig(config_file=str(tmp_path / "config.json"), load_format="dummy", device="cpu", **sizes)
    with pytest.raises(ConfigError, match="needs one tensor per expert"):
        open_model(config, 0)


@pytest.mark.parametrize("model", ["shared experts like the routed ones", "no shared expert"])
def test_same_outputs_if_each_is_two_tensor_parallel_ranks(model: str, tmp_path: Path) -> None:
    """Steps that are padded and others, with tokens on all ranks or on one, of experts whose width is divided too."""
    raw = MODELS[model]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))

    def layer(tp_rank: int, data: DataRanks, mesh: Mesh, **options: int) -> MoE:
        config = EngineConfig(
            config_file=str(folder / "config.json"), load_format="dummy", dtype="float32", device="cpu",
            enable_expert_parallel=data.size > 1, **options,
        )  # fmt: skip
        opened = open_model(config, tp_rank, data.rank)
        decoder = Decoder(opened.context(mesh, Resolver({"experts": LEAVES_OUT})), opened.source.config)
        opened.fill(dict(decoder.named_parameters()))
        found = decoder._stack[-1].mlp
        assert isinstance(found, MoE)
        return found

    alone = layer(0, DataRanks(), Mesh())
    inputs = [torch.randn(4, alone.router.weight.shape[1]) * 3 for _ in range(2)]

    def body(ranks: DataRanks) -> list[Tensor]:
        data, tp_rank = divmod(ranks.rank, 2)
        mesh = join_mesh(tp_rank, 2, str(tmp_path / f"share-{data}"), torch.device("cpu"), timeout_s=20)
        mesh.data = join_data_ranks(data, 2, str(tmp_path / f"data-{tp_rank}"), torch.device("cpu"), timeout_s=20)
        own = layer(tp_rank, mesh.data, mesh, tensor_parallel_size=2, data_parallel_size=2)
        outputs = [own(inputs[data].clone())]
        with mesh.data.padded(torch.ones(4, dtype=torch.int64)):
            outputs.append(own(inputs[data].clone()))
        outputs.append(own.serve_others() or inputs[1] if data else own(inputs[0].clone()))
        mesh.close()
        return outputs

    for rank, (eager, padded, one) in enumerate(on_ranks(4, tmp_path, body)):
        expected = alone(inputs[rank // 2].clone())
        torch.testing.assert_close(eager, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(padded, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(one, inputs[1] if rank > 1 else expected, atol=2e-5, rtol=1e-5)
