"""Kimi-Linear's config and weight plan against the published config, the oracle and made-up shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.plans import plan, read
from thalweg.config.hf import read_config
from thalweg.errors import CheckpointError, ConfigError
from thalweg.models.family import DecoderConfig
from thalweg.models.kimi_linear.family import KimiLinear
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeDims
from thalweg.quant.scheme import tensor_index
from thalweg.weights.checkpoint import Checkpoint
from thalweg.weights.load import check, load
from thalweg.weights.plan import Target, checkpoint_shapes, local_elements

LINEAR = {"kda_layers": [1, 2, 4, 5, 6], "full_attn_layers": [3, 7], "head_dim": 32, "num_heads": 4}


def raw_config(**changes: Any) -> dict[str, Any]:
    """Unlike the published shapes: 7 layers, 12 experts, 2 shared, an odd vocabulary."""
    raw: dict[str, Any] = {
        "model_type": "kimi_linear",
        "hidden_size": 48,
        "num_hidden_layers": 7,
        "vocab_size": 777,
        "model_max_length": 1000,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "intermediate_size": 40,
        "linear_attn_config": {**LINEAR, "short_conv_kernel_size": 3},
        "mla_use_nope": True,
        "num_attention_heads": 2,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "num_experts": 12,
        "num_experts_per_token": 3,
        "moe_intermediate_size": 8,
        "num_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "eos_token_id": [3, 4],
        "dtype": "bfloat16",
    }
    return {**raw, **changes}


def config(**changes: Any) -> DecoderConfig:
    return read(raw_config(**changes))


def layers_of(c: DecoderConfig, kind: type) -> set[int]:
    """The layers whose mixer or feed-forward block is of a kind."""
    return {i for i, layer in enumerate(c.layers) if kind in (type(layer.mixer), type(layer.mlp))}


def part_of(c: DecoderConfig, kind: type) -> Any:
    """The dimensions of the first such part."""
    return next(p for layer in c.layers for p in (layer.mixer, layer.mlp) if type(p) is kind)


def params_of(targets: list[Target]) -> dict[str, Tensor]:
    return {t.name: torch.full(t.shape, float("nan")) for t in targets}


def write_checkpoint(folder: Path, c: DecoderConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) for n, s in checkpoint_shapes(plan(c)).items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_the_published_config(shared_dir: Path) -> None:
    raw = json.loads((shared_dir / "configs/kimi_linear_48b_a3b.json").read_text())
    c = read(raw)
    assert (len(c.layers), c.context_len, c.vocab_size, c.dtype) == (27, 1 << 20, 163840, "bfloat16")
    assert sorted(layers_of(c, MlaDims)) == [3, 7, 11, 15, 19, 23, 26]
    assert layers_of(c, MoeDims) == set(range(1, 27))
    assert c.eos_token_ids == (163586,)
    assert part_of(c, KdaDims) == KdaDims(heads=32, head_dim=128, taps=4, rank=128)
    mla, moe = part_of(c, MlaDims), part_of(c, MoeDims)
    assert (mla.head_dim, mla.latent) == (192, 576)
    assert (moe.experts, moe.top_k, moe.scale, moe.shared, moe.inner) == (256, 8, 2.446, 1, 1024)
    targets = plan(c)
    assert round(sum(local_elements(targets).values()) / 1e9, 2) == 49.12
    shapes = {t.name: t.shape for t in targets}
    assert shapes["layers.0.attn.in_proj.weight"] == (3 * 4096 + 32 + 256, 2304)
    assert shapes["layers.3.attn.kv_b_proj.weight"] == (32, 256, 512)
    assert shapes["layers.26.mlp.experts.gate_up"] == (257, 2048, 2304)  # the shared expert is the last one
    eighth = {t.name: t.shape for t in plan(c, 7, 8)}
    assert eighth["layers.0.attn.in_proj.weight"] == (3 * 512 + 4 + 256, 2304)
    assert eighth["embed.weight"] == (20480, 2304)


def test_the_oracle_is_covered_exactly_and_lands_where_it_should(shared_dir: Path) -> None:
    folder = shared_dir / "oracles/kimi_linear"
    c = read(read_config(folder))
    targets, checkpoint = plan(c), Checkpoint(folder)
    assert set(checkpoint_shapes(targets)) == set(checkpoint.tensors)
    params = params_of(targets)
    load(targets, checkpoint, params.__getitem__, ignore=KimiLinear().layout(c).ignored)
    raw = load_file(folder / "model.safetensors")
    assert not any(p.isnan().any() for p in params.values())

    def theirs(*names: str, prefix: str) -> list[Tensor]:
        return [raw[f"{prefix}{n}.weight"] for n in names]

    a = "model.layers.1.self_attn."
    names = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")
    assert torch.equal(params["layers.1.attn.in_proj.weight"], torch.cat(theirs(*names, prefix=a)))
    assert torch.equal(params["layers.1.attn.up_proj.weight"], torch.stack(theirs("f_b_proj", "g_b_proj", prefix=a)))
    convs = torch.cat(theirs("q_conv1d", "k_conv1d", "v_conv1d", prefix=a))
    assert torch.equal(params["layers.1.attn.conv.weight"], convs.squeeze(1))
    assert torch.equal(params["layers.1.attn.A_log"], raw[a + "A_log"].flatten())
    assert torch.equal(params["layers.1.attn.dt_bias"], raw[a + "dt_bias"].view(4, 16))
    kv_b = raw["model.layers.3.self_attn.kv_b_proj.weight"]
    assert torch.equal(params["layers.3.attn.kv_b_proj.weight"], kv_b.view(4, 32, 32))
    e = "model.layers.2.block_sparse_moe."
    assert torch.equal(
        params["layers.2.mlp.experts.gate_up"][5], torch.cat(theirs("w1", "w3", prefix=e + "experts.5."))
    )
    assert torch.equal(params["layers.2.mlp.experts.down"][5], raw[e + "experts.5.w2.weight"])
    shared = theirs("gate_proj", "up_proj", prefix=e + "shared_experts.")
    assert torch.equal(params["layers.2.mlp.experts.gate_up"][8], torch.cat(shared))  # behind the 8 routed ones
    m = "model.layers.3.self_attn."
    in_proj = torch.cat(theirs("q_proj", "kv_a_proj_with_mqa", prefix=m))
    assert torch.equal(params["layers.3.attn.in_proj.weight"], in_proj)
    assert torch.equal(params["layers.2.mlp.router.bias"], raw[e + "gate.e_score_correction_bias"])
    assert torch.equal(params["layers.0.mlp.down.weight"], raw["model.layers.0.mlp.down_proj.weight"])


def test_a_resharded_copy_of_the_oracle_loads_the_same(shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "oracles/kimi_linear"
    raw = load_file(folder / "model.safetensors")
    weight_map = {}
    for i in range(3):
        part = dict(sorted(raw.items(), key=lambda kv: kv[0][::-1])[i::3])
        save_file(part, tmp_path / f"model-{i + 1:05}-of-00003.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{i + 1:05}-of-00003.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    c = read(read_config(folder))
    one, many = params_of(plan(c)), params_of(plan(c))
    load(plan(c), Checkpoint(folder), one.__getitem__)
    load(plan(c), Checkpoint(tmp_path), many.__getitem__)
    assert all(torch.equal(one[n], many[n]) for n in one)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_element_is_filled_once(tied: bool) -> None:
    c = config(tie_word_embeddings=tied)
    for rank in range(2):
        for target in plan(c, rank, 2):
            count = torch.zeros(target.shape, dtype=torch.int32)
            for source in target.sources:
                place = count[tensor_index(source.into)]
                assert place.numel() == torch.empty(source.local_shape, device="meta").numel()
                count[tensor_index(source.into)] += 1
            last = c.vocab_size - 389 if rank == 1 and target.name in ("embed.weight", "lm_head.weight") else None
            assert bool((count[:last] == 1).all())
            assert last is None or not count[last:].any()


def merged(name: str, ranks: list[dict[str, Tensor]], c: DecoderConfig) -> Tensor:
    """The whole parameter from two ranks' halves, by what each of its dimensions means."""
    a, b = (r[name] for r in ranks)
    kind = name.split(".", 2)[-1] if name.startswith("layers.") else name
    if kind in ("embed.weight", "lm_head.weight"):
        return torch.cat([a, b])[: c.vocab_size]
    if kind == "attn.in_proj.weight" and int(name.split(".")[1]) in layers_of(c, MlaDims):
        mla = part_of(c, MlaDims)
        n = mla.heads // 2 * mla.head_dim
        assert torch.equal(a[n:], b[n:])
        return torch.cat([a[:n], b])
    if kind == "attn.in_proj.weight":
        kda = part_of(c, KdaDims)
        n, h = kda.heads * kda.head_dim // 2, kda.heads // 2
        pieces = [(x.split([n, n, n, h, 2 * kda.rank])) for x in (a, b)]
        assert torch.equal(pieces[0][4], pieces[1][4])
        return torch.cat([*[torch.cat([x, y]) for x, y in zip(*pieces, strict=True)][:4], pieces[0][4]])
    if kind == "attn.conv.weight":
        return torch.cat([torch.cat(pair) for pair in zip(a.chunk(3), b.chunk(3), strict=True)])
    if kind.endswith("gate_up.weight") or kind == "mlp.experts.gate_up":
        dim = a.ndim - 2
        return torch.cat([torch.cat(p, dim) for p in zip(a.chunk(2, dim), b.chunk(2, dim), strict=True)], dim)
    if kind == "attn.up_proj.weight":
        return torch.cat([a, b], 1)
    if kind in ("attn.out_proj.weight", "mlp.down.weight", "mlp.experts.down"):
        return torch.cat([a, b], -1)
    if kind in ("attn.kv_b_proj.weight", "attn.A_log", "attn.dt_bias"):
        return torch.cat([a, b])
    assert torch.equal(a, b), f"{name} is not replicated"
    return a


def test_two_ranks_reassemble_to_the_whole(tmp_path: Path) -> None:
    c = config()
    write_checkpoint(tmp_path, c)
    checkpoint = Checkpoint(tmp_path)
    full = params_of(plan(c))
    load(plan(c), checkpoint, full.__getitem__)
    ranks = []
    for rank in range(2):
        params = params_of(plan(c, rank, 2))
        load(plan(c, rank, 2), checkpoint, params.__getitem__)
        ranks.append(params)
    for name, value in full.items():
        assert torch.equal(merged(name, ranks, c), value), name


def test_tied_embeddings_are_one_parameter_and_an_extra_head_is_allowed(tmp_path: Path) -> None:
    c = config(tie_word_embeddings=True)
    ignored = KimiLinear().layout(c).ignored
    assert "lm_head.weight" not in checkpoint_shapes(plan(c))
    assert "lm_head.weight" not in {target.name for target in plan(c)}
    tensors = write_checkpoint(tmp_path, c)
    save_file({**tensors, "lm_head.weight": torch.ones(777, 48)}, tmp_path / "model.safetensors")
    check(plan(c), Checkpoint(tmp_path), ignored)
    with pytest.raises(CheckpointError, match=r"1 unexpected: lm_head\.weight"):
        check(plan(c), Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"linear_attn_config": {**LINEAR, "num_heads": 3, "short_conv_kernel_size": 4}},
            "the number of KDA heads, which is 3",
        ),
        ({"num_attention_heads": 3}, "num_attention_heads, which is 3"),
        ({"intermediate_size": 41}, "intermediate_size, which is 41"),
        ({"moe_intermediate_size": 7}, "moe_intermediate_size, which is 7"),
    ],
)
def test_what_two_ranks_cannot_share_is_named(changes: dict[str, Any], message: str) -> None:
    c = config(**changes)
    plan(c)
    with pytest.raises(ConfigError, match="--tensor-parallel-size is 2; it must divide") as caught:
        plan(c, 0, 2)
    assert message in str(caught.value)


def test_layer_kinds() -> None:
    c = config(moe_layer_freq=2, first_k_dense_replace=1)
    assert layers_of(c, MoeDims) == {2, 4, 6}
    assert layers_of(c, KdaDims) == {0, 1, 3, 4, 5}
    all_dense = config(num_experts=None, num_experts_per_token=None)
    assert layers_of(all_dense, MlpDims) == set(range(7))
    assert layers_of(config(first_k_dense_replace=0, intermediate_size=None), MoeDims) == set(range(7))
    everything = list(range(1, 8))
    kda_only = config(
        linear_attn_config={
            **LINEAR,
            "kda_layers": everything,
            "full_attn_layers": [],
            "short_conv_kernel_size": 4,
        }
    )
    assert layers_of(kda_only, KdaDims) == set(range(7))
    mla_only = config(linear_attn_config={**LINEAR, "kda_layers": [], "full_attn_layers": everything})
    assert layers_of(mla_only, MlaDims) == set(range(7))
    assert config(linear_attn_config=None) == mla_only
    for c in (all_dense, kda_only, mla_only):
        assert len(plan(c)) > 0


def linear(**changes: Any) -> dict[str, Any]:
    return {"linear_attn_config": {**LINEAR, "short_conv_kernel_size": 3, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is true; only false is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"q_lora_rank": 1536}, "q_lora_rank is 1536; only null is supported"),
        ({"mla_use_nope": False}, "mla_use_nope is false; only true is supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is {'type': 'yarn'}; only null is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type is 'yarn'; only 'default'"),
        (
            {"moe_router_activation_func": "softmax"},
            "moe_router_activation_func is 'softmax'; only 'sigmoid'",
        ),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1; expected 2"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1; only 0 is supported"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is {'quant_method': 'fp8'}; only null",
        ),
        ({"sliding_window": 4096}, "unknown key sliding_window"),
        (linear(gate_lower_bound=-5), "linear_attn_config: unknown key gate_lower_bound"),
        (linear(full_attn_layers=[3]), "in exactly one of them"),
        (linear(full_attn_layers=[2, 3, 7]), "in exactly one of them"),
        (linear(full_attn_layers=[3, 8]), "in exactly one of them"),
        (linear(head_dim="32"), "linear_attn_config: head_dim is '32' (str); expected an integer"),
        ({"layer_types": ["linear_attention"] * 7}, "layer_types is ["),
        ({"mlp_layer_types": ["sparse"] * 7}, "mlp_layer_types is ["),
        ({"linear_num_heads": 5}, "linear_num_heads is 5; expected 4"),
        ({"linear_head_dim": 64}, "linear_head_dim is 64; expected 32"),
        ({"linear_conv_kernel_dim": 4}, "linear_conv_kernel_dim is 4; expected 3"),
        ({"qk_head_dim": 17}, "qk_head_dim is 17; expected 16"),
        ({"num_experts_per_token": 13}, "num_experts_per_token is 13; expected at most 12"),
        ({"num_expert_group": 5}, "num_expert_group is 5; expected a divisor of num_experts 12"),
        ({"num_expert_group": 4, "topk_group": 5}, "topk_group is 5; expected at most num_expert_group 4"),
        ({"num_expert_group": 6, "topk_group": 1}, "num_experts_per_token is 3; expected at most 2"),
        ({"num_expert_group": 2, "use_grouped_topk": False}, "use_grouped_topk is false; only true"),
        ({"eos_token_id": 777}, "eos_token_id is 777; expected ids below vocab_size 777"),
        ({"model_max_length": None}, "model_max_length is missing"),
        ({"hidden_size": None}, "hidden_size is missing; expected an integer"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected an integer from 1 to 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; expected bfloat16, float16, float32"),
    ],
)
def test_what_is_not_supported_or_contradicts_itself_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    text = str(caught.value)
    assert text.startswith("config.json: ")
    assert message in text
    assert "\n" not in text


def test_keys_that_repeat_others_may_agree_with_them() -> None:
    same = config(
        layer_types=["linear_attention" if i not in (2, 6) else "full_attention" for i in range(7)],
        mlp_layer_types=["dense"] + ["sparse"] * 6,
        linear_num_heads=4,
        linear_head_dim=32,
        linear_conv_kernel_dim=3,
        qk_head_dim=16,
        num_key_value_heads=2,
        rope_theta=10000.0,
        auto_map={"AutoConfig": "configuration_kimi.KimiLinearConfig"},
    )
    assert same == config()
