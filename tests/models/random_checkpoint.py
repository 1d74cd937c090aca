"""Random Kimi-Linear checkpoints of any shape, in the published layout, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def config(
    *,
    layers: int = 4,
    full: tuple[int, ...] = (4,),
    hidden: int = 48,
    kda_heads: int = 4,
    kda_dim: int = 8,
    heads: int = 4,
    nope: int = 8,
    rope: int = 4,
    value: int = 8,
    rank: int = 16,
    experts: int = 8,
    top_k: int = 2,
    shared: int = 1,
    inner: int = 16,
    dense: int = 1,
    dense_inner: int = 64,
    vocab: int = 128,
    context: int = 512,
    **more: Any,
) -> dict[str, Any]:
    """A config.json with the published key set; `full` are the 1-based full-attention layers."""
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": dense,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": dense_inner,
        "kv_lora_rank": rank,
        "linear_attn_config": {
            "full_attn_layers": list(full),
            "kda_layers": [n for n in range(1, layers + 1) if n not in full],
            "head_dim": kda_dim,
            "num_heads": kda_heads,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "model_max_length": context,
        "moe_intermediate_size": inner,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": heads,
        "num_expert_group": 1,
        "num_experts": experts,
        "num_experts_per_token": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_shared_experts": shared,
        "q_lora_rank": None,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": value,
        "vocab_size": vocab,
        **more,
    }


def weights(c: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the published names; large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if scale is None else scale)

    D, L = c["hidden_size"], c["linear_attn_config"]
    H, K = L["num_heads"], L["head_dim"]
    w = {
        "model.embed_tokens.weight": normal(c["vocab_size"], D, scale=1.0),
        "model.norm.weight": 1 + normal(D, scale=0.1),
    }
    if not c["tie_word_embeddings"]:
        w["lm_head.weight"] = normal(c["vocab_size"], D)
    for n in range(c["num_hidden_layers"]):
        p = f"model.layers.{n}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            w[f"{p}{name}.weight"] = 1 + normal(D, scale=0.1)
        a = p + "self_attn."
        if n + 1 in L["kda_layers"]:
            for name in "qkv":
                w[f"{a}{name}_proj.weight"] = normal(H * K, D)
                w[f"{a}{name}_conv1d.weight"] = normal(H * K, 1, L["short_conv_kernel_size"], scale=0.5)
            w[a + "A_log"] = torch.rand(1, 1, H, 1, generator=generator) * 2 - 1
            w[a + "dt_bias"] = normal(H * K, scale=1.0) - 2
            w[a + "b_proj.weight"] = normal(H, D)
            for name in "fg":
                w[f"{a}{name}_a_proj.weight"] = normal(K, D)
                w[f"{a}{name}_b_proj.weight"] = normal(H * K, K)
            w[a + "o_norm.weight"] = 1 + normal(K, scale=0.1)
            w[a + "o_proj.weight"] = normal(D, H * K)
        else:
            heads, R = c["num_attention_heads"], c["kv_lora_rank"]
            nope, rope, V = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
            w[a + "q_proj.weight"] = normal(heads * (nope + rope), D)
            w[a + "kv_a_proj_with_mqa.weight"] = normal(R + rope, D)
            w[a + "kv_a_layernorm.weight"] = 1 + normal(R, scale=0.1)
            w[a + "kv_b_proj.weight"] = normal(heads * (nope + V), R)
            w[a + "o_proj.weight"] = normal(D, heads * V)
        if n < c["first_k_dense_replace"]:
            _mlp(w, p + "mlp.", c["intermediate_size"], D, normal)
            continue
        m, inner = p + "block_sparse_moe.", c["moe_intermediate_size"]
        w[m + "gate.weight"] = normal(c["num_experts"], D)
        w[m + "gate.e_score_correction_bias"] = normal(c["num_experts"], scale=0.1)
        for e in range(c["num_experts"]):
            w[f"{m}experts.{e}.w1.weight"] = normal(inner, D)
            w[f"{m}experts.{e}.w3.weight"] = normal(inner, D)
            w[f"{m}experts.{e}.w2.weight"] = normal(D, inner)
        if c["num_shared_experts"]:
            _mlp(w, m + "shared_experts.", inner * c["num_shared_experts"], D, normal)
    return w


def _mlp(w: dict[str, Tensor], p: str, inner: int, D: int, normal: Any) -> None:
    w[p + "gate_proj.weight"], w[p + "up_proj.weight"] = normal(inner, D), normal(inner, D)
    w[p + "down_proj.weight"] = normal(D, inner)


def write(folder: Path, c: dict[str, Any], w: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file({name: t.contiguous() for name, t in w.items()}, folder / "model.safetensors")
    return folder
