"""Random checkpoints of DeepSeek-V3's architecture in any shape and in every published format, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.random_checkpoint import write as write
from thalweg.quant.blocks import BLOCK, blocks

YARN = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": 1.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    },
}


def config(
    *,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    q_rank: int | None = 24,
    rank: int = 32,
    nope: int = 16,
    rope: int = 8,
    value: int = 16,
    experts: int = 8,
    top_k: int = 2,
    shared: int = 1,
    inner: int = 32,
    groups: int = 1,
    top_groups: int = 1,
    dense: int = 1,
    dense_inner: int = 96,
    vocab: int = 131,
    **more: Any,
) -> dict[str, Any]:
    """config.json with the published key set."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "torch_dtype": "float32",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": dense,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": dense_inner,
        "kv_lora_rank": rank,
        "max_position_embeddings": 512,
        "moe_intermediate_size": inner,
        "moe_layer_freq": 1,
        "n_group": groups,
        "n_routed_experts": experts,
        "n_shared_experts": shared,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": q_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "rms_norm_eps": 1e-5,
        "rope_scaling": YARN,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": top_groups,
        "topk_method": "noaux_tc",
        "v_head_dim": value,
        "vocab_size": vocab,
        **more,
    }


def nested(c: dict[str, Any]) -> dict[str, Any]:
    """As Kimi-K2.5 has it: the text model beside a vision model."""
    outer = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "torch_dtype": "float32"}
    return {**outer, "text_config": c, "vision_config": {"hidden_size": 8}, "media_placeholder_token_id": 5}


def weights(c: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the published names; large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if scale is None else scale)

    def norm(size: int) -> Tensor:
        return 1 + normal(size, scale=0.1)

    D, H, R = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, V, low = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["q_lora_rank"]
    w = {"model.embed_tokens.weight": normal(c["vocab_size"], D, scale=1.0), "model.norm.weight": norm(D)}
    if not c["tie_word_embeddings"]:
        w["lm_head.weight"] = normal(c["vocab_size"], D)

    def mlp(at: str, inner: int) -> None:
        w[f"{at}gate_proj.weight"], w[f"{at}up_proj.weight"] = normal(inner, D), normal(inner, D)
        w[f"{at}down_proj.weight"] = normal(D, inner)

    for n in range(c["num_hidden_layers"]):
        p, a = f"model.layers.{n}.", f"model.layers.{n}.self_attn."
        w[f"{p}input_layernorm.weight"], w[f"{p}post_attention_layernorm.weight"] = norm(D), norm(D)
        if low is None:
            w[f"{a}q_proj.weight"] = normal(H * (nope + rope), D)
        else:
            w[f"{a}q_a_proj.weight"], w[f"{a}q_a_layernorm.weight"] = normal(low, D), norm(low)
            w[f"{a}q_b_proj.weight"] = normal(H * (nope + rope), low)
        w[f"{a}kv_a_proj_with_mqa.weight"], w[f"{a}kv_a_layernorm.weight"] = normal(R + rope, D), norm(R)
        w[f"{a}kv_b_proj.weight"], w[f"{a}o_proj.weight"] = normal(H * (nope + V), R), normal(D, H * V)
        if n < c["first_k_dense_replace"]:
            mlp(f"{p}mlp.", c["intermediate_size"])
            continue
        w[f"{p}mlp.gate.weight"] = normal(c["n_routed_experts"], D)
        w[f"{p}mlp.gate.e_score_correction_bias"] = normal(c["n_routed_experts"], scale=0.1)
        for e in range(c["n_routed_experts"]):
            mlp(f"{p}mlp.experts.{e}.", c["moe_intermediate_size"])
        if c["n_shared_experts"]:
            mlp(f"{p}mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])
    return w


def in_fp8(w: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of a checkpoint whose linears are in float8, what they stand for)."""
    stored, held = dict(w), dict(w)
    for name, weight in w.items():
        if not name.endswith("_proj.weight") and not name.endswith("with_mqa.weight"):
            continue
        (N, K), scales = weight.shape, torch.empty(*(blocks(n) for n in weight.shape))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                scales[i, j] = block.abs().max() / 448
        full = scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
        q = (weight / full).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"], held[name] = q, scales, q.float() * full
    return stored, held


def in_int4(
    w: dict[str, Tensor], of: tuple[str, ...] = (".mlp.experts.",)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of a checkpoint whose routed experts are packed in int4, what they stand for)."""
    stored, held = dict(w), dict(w)
    for name, weight in w.items():
        if not any(part in name for part in of):
            continue
        N, K = weight.shape
        scales, words = torch.empty(N, -(-K // 32)), torch.zeros(N, K // 8, dtype=torch.int64)
        for g in range(scales.shape[1]):
            scales[:, g] = (weight[:, g * 32 : (g + 1) * 32].abs().amax(-1) / 7.5).bfloat16()
        full = scales.repeat_interleave(32, 1)[:, :K]
        values = (weight / full).round().clamp(-8, 7).long()
        for k in range(K):
            words[:, k // 8] |= (values[:, k] + 8) << (4 * (k % 8))
        words = torch.where(words >= 2**31, words - 2**32, words).int()
        del stored[name]
        stored[f"{name}_packed"], stored[f"{name}_scale"] = words, scales.bfloat16()
        stored[f"{name}_shape"], held[name] = torch.tensor([N, K]), values * full
    return stored, held
