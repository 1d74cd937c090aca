"""Who serves a Kimi-Linear-48B and Kimi-K2 on a Hopper GPU, by the number of tokens, resolved without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.models import random_checkpoint as random
from thalweg.assembly import steps
from thalweg.assembly.info import OpChoice
from thalweg.assembly.inspect import _MetaContext
from thalweg.assembly.rank import op_choices
from thalweg.config.engine import EngineConfig
from thalweg.errors import ConfigError
from thalweg.models.decoder import Decoder
from thalweg.models.family import weight_plan
from thalweg.models.kimi_k2 import config as kimi_k2
from thalweg.models.kimi_k2.family import KimiK2
from thalweg.models.kimi_linear.config import read
from thalweg.models.kimi_linear.family import KimiLinear
from thalweg.models.qwen.family import Qwen35
from thalweg.ops.linear import NORM_LINEAR, NormLinearDims
from thalweg.ops.moe.experts import ExpertsDims
from thalweg.ops.moe.routed import RoutedExpertsDims, refusal
from thalweg.ops.registry import Resolver, Rows, Where, implementations
from thalweg.ops.toolchain import cuda_build, triton_support
from thalweg.parallel.data_ranks import DataRanks
from thalweg.parallel.mesh import Mesh
from thalweg.parallel.shards import Shards
from thalweg.quant import scheme_named

PUBLISHED = dict(
    hidden=2304,
    kda_heads=32,
    kda_dim=128,
    heads=32,
    nope=128,
    rope=64,
    value=128,
    rank=512,
    experts=256,
    top_k=8,
    inner=1024,
    dense_inner=9216,
    vocab=163840,
)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_support, "_compute_capability_major", lambda: 9)
    monkeypatch.setattr(cuda_build, "why_not", lambda where: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for module in ("cuda", "matrix"):
        monkeypatch.setattr(f"thalweg.ops.linear.{module}.multiprocessors", lambda device: 132)


def resolved(
    *, ranks: int = 1, scheme: str | None = None, block_size: int = 64, prefer: dict[str, str] | None = None
) -> Resolver:
    resolver, cuda, config = Resolver(prefer), torch.device("cuda"), read(random.config(**PUBLISHED))
    meta, mesh = torch.device("meta"), Mesh(0, ranks)
    plan = {t.name: t for t in weight_plan(KimiLinear(), config, Shards(0, ranks), scheme_named(scheme))}
    ctx = _MetaContext(meta, torch.bfloat16, mesh, resolver, "float32", plan, block_size=block_size, target=cuda)
    Decoder(ctx, config)
    return resolver


def resolved_k2(
    shared_dir: Path, name: str, ranks: int, prefer: dict[str, str] | None = None, data: int = 1
) -> Resolver:
    resolver, cuda = Resolver(prefer), torch.device("cuda")
    raw = json.loads((shared_dir / f"configs/{name}.json").read_text())
    config = kimi_k2.read({**raw, "num_hidden_layers": 2})
    plan = {t.name: t for t in weight_plan(KimiK2(), config, Shards(0, ranks, 0, data))}
    mesh, meta = Mesh(0, ranks, data=DataRanks(0, data)), torch.device("meta")
    Decoder(_MetaContext(meta, torch.bfloat16, mesh, resolver, "float32", plan, block_size=64, target=cuda), config)
    return resolver


def resolved_qwen(raw: dict[str, Any], ranks: int) -> Resolver:
    resolver, family = Resolver(), Qwen35()
    config = family.read(raw)
    plan = {t.name: t for t in weight_plan(family, config, Shards(0, ranks))}
    mesh, meta, cuda = Mesh(0, ranks), torch.device("meta"), torch.device("cuda")
    ctx = _MetaContext(
        meta, torch.bfloat16, mesh, resolver, "float32", plan, block_size=64, target=cuda, norm_fp32=True
    )
    Decoder(ctx, config)
    return resolver


def tables(resolver: Resolver) -> dict[str, list[str]]:
    """By op and, where an op is there more than once, model width in the dims."""
    found: dict[str, list[str]] = {}
    sent = msgspec.msgpack.encode(op_choices(resolver))  # as an engine process tells whoever started it
    for choice in msgspec.msgpack.decode(sent, type=list[OpChoice]):
        width = f" {choice.dims['D']}" if choice.op.startswith(("linear", "norm_linear")) else ""
        if choice.op.endswith("_fp8"):
            width += f" to {choice.dims['O']}"
        found[choice.op + width] = [str(span) for span in choice.table]
    return found


def test_decode_rows_and_prompts_of_the_published_shape() -> None:
    assert tables(resolved()) == {
        "norm_linear 2304": ["1-32: cuda", "33-128: matrix", "129-: triton"],  # the head
        "linear 2304": ["1-16: cuda", "17-128: matrix", "129-: reference"],  # of a norm that experts have computed
        "linear_add 4096": ["1-16: cuda", "17-32: matrix", "33-: in_place"],  # out of the mixers
        "linear_add 9216": ["1-8: cuda", "9-32: matrix", "33-: in_place"],  # down, of the layer without experts
        "norm_router": ["1-128: cuda", "129-1024: prompts", "1025-: library"],
        "experts": ["1-2: pairs", "3-192: tiles", "193-: matrix"],
        "kda_mixer_decode": ["cuda"],
        "mla_mixer_decode": ["gluon"],
        "batched_projection": ["reference"],
        "split_norms": ["triton"],
        "kda_mixer_prefill": ["cuda"],
        "mla_prefill": ["cuda"],
        "norm_swiglu": ["1-32: cuda", "33-: separate"],
        "vocab_rows": ["reference"],  # one kernel of torch
    }


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_attention_of_kimi_k2_has_kernels_for_every_share_of_its_heads(shared_dir: Path, ranks: int) -> None:
    found = tables(resolved_k2(shared_dir, "kimi_k2_instruct", ranks))
    attention = {op: found[op] for op in ("split_norms", "mla_decode", "mla_rope", "mla_prefill")}
    assert attention == {
        "split_norms": ["triton"],
        "mla_decode": ["gluon"],
        "mla_rope": ["triton"],
        "mla_prefill": ["cuda"],
    }


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["qwen3_5_9b", "qwen3_5_35b_a3b"])
def test_attention_of_qwen_has_kernels_for_every_share_of_its_heads(shared_dir: Path, name: str, ranks: int) -> None:
    raw = json.loads((shared_dir / f"configs/{name}.json").read_text())
    raw["text_config"] |= {"num_hidden_layers": 4, "layer_types": raw["text_config"]["layer_types"][:4]}
    found = tables(resolved_qwen(raw, ranks))
    attention = {op: table for op, table in found.items() if op.startswith("gqa")}
    assert attention == {"gqa_mixer_decode": ["cuda"], "gqa_prepare": ["triton"], "gqa_prefill": ["cuda"]}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("kimi_k2_instruct", ["1-8: cuda", "9-384: tiles", "385-: w8a8"]),
        ("kimi_k2_5_text_int4", ["1-64: cuda", "65-2560: batch", "2561-: matrix"]),
    ],
)
def test_experts_of_kimi_k2(shared_dir: Path, name: str, spans: list[str], ranks: int) -> None:
    found = tables(resolved_k2(shared_dir, name, ranks))
    assert found["norm_router"] == ["1: few", "2-64: cuda", "65-512: triton", "513-: library"]
    if name == "kimi_k2_instruct" and ranks == 1:  # experts 2048 wide
        spans = ["1-8: cuda", "9-16: tiles", "17-64: joined_w8a8", "65-384: tiles", "385-: w8a8"]
    assert found["experts"] == spans
    assert found.get("routed_experts") == (["1: cuda", "2-: reference"] if ranks == 1 else None)


@pytest.mark.parametrize("prefer", [{"experts": "separate"}, {"norm_router": "cuda"}])
def test_router_and_experts_are_apart_if_one_of_them_is_asked_for(shared_dir: Path, prefer: dict[str, str]) -> None:
    found = tables(resolved_k2(shared_dir, "kimi_k2_5_text_int4", 1, prefer))
    assert "routed_experts" not in found
    assert found[next(iter(prefer))][0].endswith(next(iter(prefer.values())))


@pytest.mark.parametrize(("ranks", "data"), [(1, 2), (1, 8), (2, 4)])
def test_experts_of_kimi_k2_that_data_parallel_ranks_divide(shared_dir: Path, ranks: int, data: int) -> None:
    for name, spans in (("kimi_k2_instruct", None), ("kimi_k2_5_text_int4", ["1-64: cuda", "65-: reference"])):
        found = tables(resolved_k2(shared_dir, name, ranks, data=data))
        assert found.get("gathered_experts") == spans
        assert found["expert_dispatch"] == found["expert_combine"] == ["1-159: cuda", "160-: cuda_many"]
    prefer = {"gathered_experts": "reference"}
    found = tables(resolved_k2(shared_dir, "kimi_k2_5_text_int4", ranks, prefer, data))
    assert found["gathered_experts"] == ["reference"]


INT4 = ExpertsDims(E=384, D=7168, I=2048, scheme="int4", own=2048)
FP8_EXPERTS = ExpertsDims(E=385, D=7168, I=2048, scheme="fp8")
ROUTED = dict(K=8, G=1, S=0, scoring="sigmoid", renormalize=True)


@pytest.mark.parametrize(
    ("experts", "others", "reason"),
    [
        (INT4, {}, None),
        (FP8_EXPERTS, {"S": 1}, None),
        (INT4, {"scoring": "softmax"}, "needs sigmoids"),
        (INT4, {"G": 8}, "experts in one group"),
        (INT4, {"norm_fp32": True}, "a norm in x's dtype"),
        (INT4, {"K": 17}, "at most 16 of them a token"),
        (replace(INT4, E=768), {}, "at most 3 experts for each of 132 multiprocessors"),
        (replace(INT4, own=0), {}, "one expert that every token takes"),
        (replace(INT4, E=385, own=0), {"S": 1}, "to be an own one"),  # the shared expert in int4 too, as a routed one
        (replace(INT4, D=2304), {}, "needs 4096 columns or more"),
        (replace(INT4, own=1024), {}, "needs an own expert as wide as the others"),
        (replace(FP8_EXPERTS, I=512), {"S": 1}, "experts wide enough"),
        (replace(FP8_EXPERTS, I=7168), {"S": 1}, "no room for 9 rows of 7168 columns"),
        (replace(FP8_EXPERTS, scheme="none"), {"S": 1}, "needs weights in scheme fp8 or int4"),
    ],
)
def test_what_router_and_experts_in_one_are_refused_for(
    experts: ExpertsDims, others: dict[str, Any], reason: str | None
) -> None:
    found = refusal(Where("cuda", "bfloat16"), RoutedExpertsDims(experts=experts, **{**ROUTED, **others}))
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("processors", [132, 114, 78])  # of an H200, an H100 on PCIe, an H20
def test_what_matrix_serves_over_float8_finds_room(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    from thalweg.ops.linear import fp8
    from thalweg.ops.linear.fp8.matrix import cut

    monkeypatch.setattr(fp8, "processors_here", lambda: processors)
    (matrix,) = (i for i in implementations("linear_fp8") if i.name == "matrix")
    most = 0
    for O in (64, 2048, 8184, 8192, 12288, 14976, 16384):
        dims = fp8.Fp8LinearDims(D=1536, O=O)
        if matrix.supports(Where("cuda", "bfloat16"), dims) is None:
            most = O
            for T in range(17, (matrix.tokens(dims).last or 0) + 1):
                cut(T, dims.D, O, processors)  # which raises if it does not fit
    assert most == min(16384, 192 * processors)


def test_down_projections_of_kimi_k2_in_bf16() -> None:
    resolver = Resolver()
    resolver.resolve(NORM_LINEAR, Where("cuda", "bfloat16"), NormLinearDims(D=7168, parts=(1536, 576)))
    (choice,) = op_choices(resolver)
    assert [str(span) for span in choice.table] == ["1-8: cuda", "9-64: splits", "65-: triton"]


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", ["kimi_k2_instruct", "kimi_k2_5_text_int4"])
def test_what_kimi_k2_has_no_kernels_for(shared_dir: Path, name: str, ranks: int) -> None:
    """Rows of one rank's embedding alone, which are one kernel of torch's."""
    by_reference = {op.split()[0] for op, table in tables(resolved_k2(shared_dir, name, ranks)).items()
                    if table == ["reference"]}  # fmt: skip
    assert by_reference <= {"vocab_rows"}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KEPT_OF_QWEN = [f"model.language_model.layers.{n}.linear_attn.in_proj_{x}" for n in range(4) for x in "ab"]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["kimi_k2_instruct", "qwen3_5_9b", "qwen3_5_35b_a3b"])
def test_linears_in_float8_have_kernels_for_any_number_of_tokens(shared_dir: Path, name: str, ranks: int) -> None:
    raw = json.loads((shared_dir / f"configs/{name}.json").read_text())
    if name.startswith("qwen"):
        raw["quantization_config"] = {**FP8, "modules_to_not_convert": [*KEPT_OF_QWEN, "lm_head"]}
        raw["text_config"] |= {"num_hidden_layers": 4, "layer_types": raw["text_config"]["layer_types"][:4]}
    found = tables(resolved_k2(shared_dir, name, ranks) if name == "kimi_k2_instruct" else resolved_qwen(raw, ranks))
    in_float8 = {op: table for op, table in found.items() if "_fp8" in op}
    assert {op.split()[0] for op in in_float8} >= {"norm_linear_fp8", "linear_add_fp8" if ranks == 1 else "linear_fp8"}
    whole, many_rows = (["1-16: cuda", f"17-{n}: matrix", f"{n + 1}-: w8a8"] for n in (128, 64))
    odd = [["1-16: cuda", "17-: triton"], ["triton"]]  # a rank's share with half a block, a rest of one row
    # More rows, or columns, than a tile per multiprocessor has.
    odd += [["1-16: cuda", f"17-{n}: triton", f"{n + 1}-: w8a8"] for n in (64, 128)]
    # Of 1536, 7168 or 8192 columns.
    odd += [["1-16: cuda", "17-64: splits", *more] for more in (["65-128: matrix", "129-: w8a8"], ["65-: w8a8"])]
    assert all(table in (whole, many_rows, *odd) for table in in_float8.values())
    assert any(table in (whole, many_rows) for table in in_float8.values()) or (name, ranks) == ("kimi_k2_instruct", 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_of_qwen_in_float8_leave_out_launches_of_a_batch(shared_dir: Path, ranks: int) -> None:
    raw = json.loads((shared_dir / "configs/qwen3_5_35b_a3b.json").read_text())
    raw["quantization_config"] = {**FP8, "modules_to_not_convert": [*KEPT_OF_QWEN, "lm_head"]}
    raw["text_config"] |= {"num_hidden_layers": 4, "layer_types": raw["text_config"]["layer_types"][:4]}
    found = tables(resolved_qwen(raw, ranks))
    for op, name in (("routed_experts", "w8a8"), ("gdn_decode_add", "cuda")):
        expected = ["1-16: reference", f"17-128: {name}", "129-: reference"]
        assert found.get(op) == (expected if ranks == 1 else None)


def test_experts_in_fp8_of_a_batch_are_multiplied_in_fp8() -> None:
    assert tables(resolved(scheme="fp8"))["experts"] == ["1-16: cuda", "17-192: tiles_w8a8", "193-: w8a8"]


def test_over_ranks_in_fp8_and_with_other_blocks() -> None:
    found = tables(resolved(ranks=4, scheme="fp8", block_size=16))
    assert found["linear_reduce_add 1024"] == ["1-16: cuda", "17-128: matrix", "129-: separate"]
    assert found["experts"] == ["1-16: cuda", "17-192: tiles", "193-: w8a8"]  # 256 wide
    assert found["mla_mixer_decode"] == ["triton"]


@pytest.mark.parametrize(
    ("op", "name", "spans"),
    [
        ("norm_linear", "cuda", ["1-32: cuda", "33-128: matrix", "129-: triton"]),
        ("norm_linear", "separate", ["separate"]),
        ("norm_router", "triton", ["1-512: triton", "513-1024: prompts", "1025-: library"]),
        ("experts", "tiles", ["1-192: tiles", "193-: matrix"]),
        ("experts", "grouped", ["grouped"]),
    ],
)
def test_a_preference_holds_within_the_range(op: str, name: str, spans: list[str]) -> None:
    found = tables(resolved(prefer={op: name}))
    assert [table for key, table in found.items() if key.split()[0] == op] == [spans]


def test_a_preference_that_a_shape_cannot_have_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'experts' cannot be served by 'cuda' for .* not none"):
        resolved(prefer={"experts": "cuda"})


def why_eager(
    resolver: Resolver, most: int, rows: Rows = "decodes", data_ranks: int = 1, expert_metrics: bool = False
) -> str | None:
    config = EngineConfig(
        device="cuda",
        data_parallel_size=data_ranks,
        enable_expert_parallel=data_ranks > 1,
        expert_metrics=expert_metrics,
    )
    return steps.why_eager(config, torch.device("cuda"), resolver, rows, most)


def test_graphs_ask_only_what_decode_rows_run() -> None:
    assert why_eager(resolved(), 512) is None
    waits = "op experts is served by 'reference', which cannot be captured"
    assert why_eager(resolved(prefer={"experts": "reference"}), 1) == waits
    assert why_eager(resolved(prefer={"mla_mixer_decode": "reference"}), 1) is not None
    assert why_eager(resolved(prefer={"mla_prefill": "reference"}), 512) is None


def test_graphs_do_not_count_the_tokens_of_experts() -> None:
    assert why_eager(resolved(), 16, data_ranks=2) is None
    assert why_eager(resolved(), 16, data_ranks=2, expert_metrics=True) == "--expert-metrics"


def test_graphs_of_prompts_ask_only_what_prompts_run() -> None:
    assert why_eager(resolved(), 2048, "prefills") is None
    assert why_eager(resolved(prefer={"mla_mixer_decode": "reference"}), 2048, "prefills") is None
    for op in ("mla_prefill", "kda_mixer_prefill", "experts"):
        expected = f"op {op} is served by 'reference', which cannot be captured"
        assert why_eager(resolved(prefer={op: "reference"}), 2048, "prefills") == expected


def test_graphs_do_not_mind_what_waits_for_the_device_beyond_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.ops import registry

    few = [i for i in registry.implementations("experts") if i.name not in ("grouped", "matrix")]
    monkeypatch.setitem(registry._implementations, "experts", few)
    resolver = resolved()  # the reference serves beyond 192 tokens
    assert why_eager(resolver, 192) is None
    assert why_eager(resolver, 193) == "op experts is served by 'reference', which cannot be captured"
    assert why_eager(resolver, 48, data_ranks=4) is None  # the rows of all of them
    assert why_eager(resolver, 49, data_ranks=4) is not None


def test_the_published_config_is_that_shape(shared_dir: Path) -> None:
    raw = json.loads((shared_dir / "configs" / "kimi_linear_48b_a3b.json").read_text())
    published, ours = (read(config).layers for config in (raw, random.config(**PUBLISHED)))
    assert set(published) == set(ours)
