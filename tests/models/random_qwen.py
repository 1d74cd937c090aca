"""Random checkpoints of the Qwen families in any shape and in every published layout, small by default: 3 layers of
Gated DeltaNet to one of full attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.random_checkpoint import write as write
from thalweg.quant.fp8 import BLOCK, blocks

KEPT = ("in_proj_a", "in_proj_b", "in_proj_ba", "mlp.gate", "shared_expert_gate", "embed_tokens", "lm_head", "conv1d")


def config(
    *,
    layers: int = 4,
    hidden: int = 32,
    key_heads: int = 2,
    value_heads: int = 4,
    key_dim: int = 16,
    value_dim: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    rotary: float = 0.25,
    experts: int = 6,
    top_k: int = 2,
    inner: int = 24,
    shared: int = 40,
    dense: int = 0,
    vocab: int = 131,
    context: int = 512,
    **more: Any,
) -> dict[str, Any]:
    """config.json of Qwen3.5, flat; `dense` is the width of dense layers, 0 for experts."""
    feed_forward = {"intermediate_size": dense} if dense else {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": shared,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForCausalLM" if dense else "Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_text" if dense else "qwen3_5_moe_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": rotary},
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **feed_forward,
        **more,
    }


def nested(text: dict[str, Any]) -> dict[str, Any]:
    """The same beside a vision model's, as Qwen3.5, 3.6 and 3.8 are published."""
    kind = text["model_type"].removesuffix("_text")
    outer = {"architectures": [text["architectures"][0].replace("ForCausalLM", "ForConditionalGeneration")]}
    quantized = {k: text[k] for k in ("quantization_config",) if k in text}
    inner = {k: v for k, v in text.items() if k not in quantized}
    vision = {"vision_config": {"model_type": kind, "depth": 2}, "image_token_id": 7, "vision_start_token_id": 8}
    return {**outer, "model_type": kind, "text_config": inner, "tie_word_embeddings": False, **vision, **quantized}


def as_next(text: dict[str, Any]) -> dict[str, Any]:
    """The same in the keys of Qwen3-Next."""
    rope = text["rope_parameters"]
    flat = {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    own = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "rope_scaling": None}
    names = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "use_sliding_window": False}
    return {**{k: v for k, v in text.items() if k != "rope_parameters"}, **flat, **own, **names}


def weights(c: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a text model below "model.", each expert by itself, GDN's inputs plain; large enough that every
    part shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float | None = None) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if scale is None else scale)

    D = c["hidden_size"]
    G, H, K, V = (c[f"linear_{x}"] for x in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))
    heads, kv, dims = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    w = {"model.embed_tokens.weight": normal(c["vocab_size"], D, scale=1.0), "model.norm.weight": normal(D, scale=0.1)}
    if not c["tie_word_embeddings"]:
        w["lm_head.weight"] = normal(c["vocab_size"], D)

    def mlp(p: str, inner: int) -> None:
        w[p + "gate_proj.weight"], w[p + "up_proj.weight"] = normal(inner, D), normal(inner, D)
        w[p + "down_proj.weight"] = normal(D, inner)

    for n in range(c["num_hidden_layers"]):
        p = f"model.layers.{n}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            w[f"{p}{name}.weight"] = normal(D, scale=0.1)
        kinds = c.get("layer_types")
        if (kinds[n] == "full_attention") if kinds else (n + 1) % c.get("full_attention_interval", 4) == 0:
            a = p + "self_attn."
            w[a + "q_proj.weight"] = normal(2 * heads * dims, D)
            w[a + "k_proj.weight"], w[a + "v_proj.weight"] = normal(kv * dims, D), normal(kv * dims, D)
            w[a + "q_norm.weight"], w[a + "k_norm.weight"] = normal(dims, scale=0.1), normal(dims, scale=0.1)
            w[a + "o_proj.weight"] = normal(D, heads * dims)
        else:
            a, channels = p + "linear_attn.", 2 * G * K + H * V
            w[a + "in_proj_qkv.weight"], w[a + "in_proj_z.weight"] = normal(channels, D), normal(H * V, D)
            w[a + "in_proj_b.weight"], w[a + "in_proj_a.weight"] = normal(H, D), normal(H, D)
            w[a + "conv1d.weight"] = normal(channels, 1, c["linear_conv_kernel_dim"], scale=0.5)
            w[a + "A_log"] = torch.rand(H, generator=generator) * 2 - 1
            w[a + "dt_bias"] = normal(H, scale=1.0) - 1
            w[a + "norm.weight"] = 1 + normal(V, scale=0.1)
            w[a + "out_proj.weight"] = normal(D, H * V)
        if "num_experts" not in c:
            mlp(p + "mlp.", c["intermediate_size"])
            continue
        w[p + "mlp.gate.weight"] = normal(c["num_experts"], D)
        for e in range(c["num_experts"]):
            mlp(f"{p}mlp.experts.{e}.", c["moe_intermediate_size"])
        mlp(p + "mlp.shared_expert.", c["shared_expert_intermediate_size"])
        w[p + "mlp.shared_expert_gate.weight"] = normal(1, D)
    return w


def published(
    c: dict[str, Any], w: dict[str, Tensor], *, prefix: str = "model.language_model.", packed: bool = False,
    stacked: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors as a checkpoint has them: `packed` as Qwen3-Next, experts `stacked` as Qwen3.5 in bfloat16."""
    out = {n.replace("model.", prefix, 1) if n.startswith("model.") else n: t for n, t in w.items()}
    for n in range(c["num_hidden_layers"]):
        a, m = f"{prefix}layers.{n}.linear_attn.", f"{prefix}layers.{n}.mlp."
        if packed and a + "in_proj_qkv.weight" in out:
            for name, rows in pack(c, *(out.pop(f"{a}in_proj_{x}.weight") for x in ("qkv", "z", "b", "a"))).items():
                out[f"{a}in_proj_{name}.weight"] = rows
        if stacked and m + "experts.0.up_proj.weight" in out:
            gate, up, down = (
                torch.stack([out.pop(f"{m}experts.{e}.{x}_proj.weight") for e in range(c["num_experts"])])
                for x in ("gate", "up", "down")
            )
            out[m + "experts.gate_up_proj"], out[m + "experts.down_proj"] = torch.cat((gate, up), 1), down
    return out


def pack(c: dict[str, Any], qkv: Tensor, z: Tensor, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """Rows key head by key head, each with those of its value heads."""
    G, K = c["linear_num_key_heads"], c["linear_key_head_dim"]
    q, k, v = qkv.split([G * K, G * K, len(z)])
    by_head = [[x.chunk(G)[g] for x in (q, k, v, z)] for g in range(G)]
    pairs = [[x.chunk(G)[g] for x in (b, a)] for g in range(G)]
    return {"qkvz": torch.cat([torch.cat(rows) for rows in by_head]), "ba": torch.cat([torch.cat(x) for x in pairs])}


def unpublished(
    c: dict[str, Any], tensors: dict[str, Tensor], *, prefix: str = "model.language_model.", packed: bool = False
) -> dict[str, Tensor]:
    """What `published` was given, of experts that are not stacked."""
    w = {n.replace(prefix, "model.", 1) if n.startswith(prefix) else n: t for n, t in tensors.items()}
    G, K = c["linear_num_key_heads"], c["linear_key_head_dim"]
    ratio = c["linear_num_value_heads"] // G
    for name in [n for n in w if packed and n.endswith("in_proj_qkvz.weight")]:
        a, V = name.removesuffix("in_proj_qkvz.weight"), ratio * c["linear_value_head_dim"]
        q, k, v, z = (torch.cat(x) for x in zip(*(h.split([K, K, V, V]) for h in w.pop(name).chunk(G)), strict=True))
        ba = w.pop(f"{a}in_proj_ba.weight").chunk(G)
        w[f"{a}in_proj_qkv.weight"], w[f"{a}in_proj_z.weight"] = torch.cat((q, k, v)), z
        w[f"{a}in_proj_b.weight"], w[f"{a}in_proj_a.weight"] = (torch.cat([x.chunk(2)[i] for x in ba]) for i in (0, 1))
    return w


def in_fp8(tensors: dict[str, Tensor], kept: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, quantization_config) in the published layout: matrices in float8 with bfloat16 scales of blocks, other
    tensors in bfloat16, all but those of modules whose names end so: `KEPT` and `kept`."""
    out, modules = {}, []
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        if t.ndim != 2 or module.endswith(KEPT + kept):
            out[name] = t if name.endswith("A_log") else t.bfloat16()
            modules += [module] if t.ndim == 2 else []
            continue
        O, D = t.shape
        q = torch.empty(O, D, dtype=torch.float8_e4m3fn)
        scales = torch.empty(blocks(O), blocks(D), dtype=torch.bfloat16)
        for i in range(blocks(O)):
            for j in range(blocks(D)):
                at = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
                scales[i, j] = t[at].abs().max() / 400
                q[at] = (t[at] / scales[i, j].float()).to(torch.float8_e4m3fn)
        out[name], out[f"{name}_scale_inv"] = q, scales
    return out, {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": modules,
    }


def out_of_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32 tensors, as they are held."""
    out = {}
    for name, t in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        out[name] = t.float()
        if t.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{name}_scale_inv"].float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            out[name] *= scales[: t.shape[0], : t.shape[1]]
    return out


def beside_the_text(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a vision model and of an MTP layer, which text without drafts does not need."""
    extra = ("model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight")
    return {**w, **{name: torch.full((3, 5), torch.nan) for name in extra}}
