"""What several families read from a GGUF file's hyperparameters, as keys of config.json."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from thalweg.config.gguf.keys import GgufKeys
from thalweg.errors import CheckpointError, UnsupportedError
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.rope import RopeDims

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_SOFTMAX, _SIGMOID = 1, 2


def common(keys: GgufKeys) -> dict[str, Any]:
    """Width, depth and vocabulary. Layers that draft tokens are left out."""
    embedding = keys.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{keys.where}: {EMBEDDING} is missing or not a matrix; expected one of [vocabulary, width]"
        )
    vocab_size, width = embedding.shape
    keys.agree("vocab_size", vocab_size)
    keys.agree("embedding_length", width)
    layers = keys.get_int("block_count") - keys.get_int("nextn_predict_layers", 0)
    if not 0 < layers <= len(keys.tensors):
        raise keys.error("block_count", "the number of layers that there are tensors of")
    plain = all(tensor.type.name == "F32" for tensor in keys.tensors.values())
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "rms_norm_eps": keys.get_float("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": HEAD not in keys.tensors,
        "dtype": "float32" if plain else "bfloat16",
        **({"intermediate_size": inner} if (inner := keys.get_int("feed_forward_length", 0)) else {}),
    }


def latent_attention(keys: GgufKeys) -> dict[str, Any]:
    """Multi-head latent attention by DeepSeek's keys. Files from before llama.cpp cached the latent have the sizes of a
    head where later ones have those of the latent."""
    heads, rank = keys.get_int("attention.head_count"), keys.get_int("attention.kv_lora_rank")
    rope, head_dim = keys.get_int("rope.dimension_count"), keys.get_int("attention.key_length_mla", None)
    if head_dim is None:
        head_dim, value = keys.get_int("attention.key_length"), keys.get_int("attention.value_length")
    else:
        value = keys.get_int("attention.value_length_mla")
        keys.agree("attention.key_length", rank + rope)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": rank,
        "q_lora_rank": keys.get_int("attention.q_lora_rank", None) or None,
        "qk_nope_head_dim": head_dim - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
    }


def has_mtp(tensors: Collection[str], layers: int) -> bool:
    """Whether a file has a layer behind the last one that drafts tokens, with the model's own vocabulary."""
    at = f"blk.{layers}.nextn."
    dedicated = any(f"{at}{x}.weight" in tensors for x in ("embed_tokens", "shared_head_head"))
    return f"{at}eh_proj.weight" in tensors and not dedicated


def expert_count(keys: GgufKeys) -> int:
    """As many as the tensors hold, which no number in the metadata may exceed."""
    experts: int = keys.get_int("expert_count", 0)
    held = {t.shape[0] for name, t in keys.tensors.items() if name.endswith("ffn_down_exps.weight")}
    if held != ({experts} if experts else set()):
        raise keys.error("expert_count", f"{', '.join(map(str, sorted(held))) or 0}, the experts that there are")
    return experts


def sigmoid_experts(keys: GgufKeys) -> dict[str, Any]:
    """Numbers of a mixture with sigmoid scores by our names; nothing without experts."""
    experts = expert_count(keys)
    if not experts:
        return {}
    if keys.get_int("expert_gating_func", _SIGMOID) != _SIGMOID:
        raise keys.error("expert_gating_func", f"{_SIGMOID}, which is sigmoid")
    return {
        "experts": experts,
        "top_k": keys.get_int("expert_used_count"),
        "shared": keys.get_int("expert_shared_count", 0),
        "groups": keys.get_int("expert_group_count", 1) or 1,
        "top_groups": keys.get_int("expert_group_used_count", 1) or 1,
        "renormalize": keys.get_bool("expert_weights_norm", False),
        "inner": keys.get_int("expert_feed_forward_length"),
        "scale": keys.get_float("expert_weights_scale", 1.0) or 1.0,
        "dense": keys.get_int("leading_dense_block_count", 0),
    }


def yarn(keys: GgufKeys) -> dict[str, Any] | None:
    """A context stretched by YaRN, as rope_scaling has it; None without one. Raises ConfigError for another kind."""
    kind = keys.get_str("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise keys.error("rope.scaling.type", "'none' or 'yarn'")
    return {
        "rope_type": "yarn",
        "factor": keys.get_float("rope.scaling.factor"),
        "original_max_position_embeddings": keys.get_int("rope.scaling.original_context_length"),
        "beta_fast": keys.get_float("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get_float("rope.scaling.yarn_beta_slow", 1.0),
    }


def weighted_yarn(keys: GgufKeys) -> dict[str, Any] | None:
    """`yarn` with weights for scores and cosines. The file has 0.1 * mscale_all_dim. mscale is not there: it is
    taken as equal, which leaves cosines unscaled."""
    scaling = yarn(keys)
    if scaling is None:
        return None
    # The product is a float32 already: 10 times 0.1 in it is 1.0 again.
    weight = round(10 * keys.get_float("rope.scaling.yarn_log_multiplier"), 6)
    return {**scaling, "mscale": weight, "mscale_all_dim": weight}


def common_keys(
    *,
    width: int,
    vocab_size: int,
    eps: float,
    context_len: int,
    blocks: Sequence[MlpDims | MoeDims],
    drafting: int,
) -> dict[str, Any]:
    """What is written of every model, `blocks` being its feed-forward blocks in order, without those of the `drafting`
    layers behind them."""
    dense = [block.inner for block in blocks if isinstance(block, MlpDims)]
    return {
        "block_count": len(blocks) + drafting,
        **({"nextn_predict_layers": drafting} if drafting else {}),
        "context_length": context_len,
        "embedding_length": width,
        "vocab_size": vocab_size,
        "attention.layer_norm_rms_epsilon": eps,
        **({"feed_forward_length": dense[0]} if dense else {}),
        **_expert_keys(blocks),
    }


def _expert_keys(blocks: Sequence[MlpDims | MoeDims]) -> dict[str, Any]:
    moe = next((block for block in blocks if isinstance(block, MoeDims)), None)
    if moe is None:
        return {}
    first = next(i for i, block in enumerate(blocks) if isinstance(block, MoeDims))
    if any(isinstance(block, MlpDims) for block in blocks[first:]):
        raise UnsupportedError("dense blocks stand behind the first mixture of experts; GGUF files have them before it")
    keys: dict[str, Any] = {
        "expert_count": moe.experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.inner,
    }
    if moe.scoring == "softmax":
        return keys | {"expert_shared_feed_forward_length": moe.gated_shared}
    return keys | {
        "expert_shared_count": moe.shared,
        "expert_group_count": moe.groups,
        "expert_group_used_count": moe.top_groups,
        "expert_gating_func": _SIGMOID,
        "expert_weights_scale": float(moe.scale),
        "expert_weights_norm": moe.renormalize,
        "leading_dense_block_count": first,
    }


def latent_attention_keys(dims: MlaDims) -> dict[str, Any]:
    """What is written of multi-head latent attention."""
    return {
        "attention.head_count": dims.heads,
        "attention.kv_lora_rank": dims.rank,
        **({} if dims.q_rank is None else {"attention.q_lora_rank": dims.q_rank}),
        "attention.key_length": dims.latent,
        "attention.value_length": dims.rank,
        "attention.key_length_mla": dims.head_dim,
        "attention.value_length_mla": dims.value,
        "rope.dimension_count": dims.rope,
    }


def rope_keys(rope: RopeDims) -> dict[str, Any]:
    """What is written of rotated positions."""
    keys: dict[str, Any] = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dims}
    if rope.yarn is not None:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope.yarn.factor),
            "rope.scaling.original_context_length": rope.yarn.original,
            "rope.scaling.yarn_beta_fast": float(rope.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.yarn.beta_slow),
        }
    return keys


def weighted_rope_keys(rope: RopeDims) -> dict[str, Any]:
    """`rope_keys` with the weight of scores. Raises UnsupportedError for cosines that are scaled."""
    keys = rope_keys(rope)
    if rope.yarn is None:
        return keys
    if not math.isclose(rope.scale, 1):
        raise UnsupportedError(
            "YaRN scales cosines here (mscale is not mscale_all_dim), which GGUF files cannot express"
        )
    weight = (math.sqrt(rope.yarn.score_factor) - 1) / math.log(rope.yarn.factor)
    return {**keys, "rope.scaling.yarn_log_multiplier": round(weight, 6)}
