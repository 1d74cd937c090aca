"""Hyperparameters of Kimi-Linear, read from config.json and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thalweg.config.hf import HOUSEKEEPING_KEYS, ConfigReader, checkpoint_dtype
from thalweg.errors import ConfigError

# Bounds keep a hostile config from costing memory before its checkpoint is looked at.
MAX_LAYERS = 1_000
MAX_DIM = 2**24
MAX_EXPERTS = 2**16

# Read by nobody: hidden_size / heads, and the rotary base of a model that never rotates.
_UNUSED_KEYS = frozenset({"head_dim", "rope_theta", "bos_token_id", "max_position_embeddings"})


@dataclass(frozen=True, slots=True)
class KdaConfig:
    """Kimi Delta Attention: H heads of K key dims and V = K value dims, gates of low rank."""

    num_heads: int
    head_dim: int
    conv_kernel: int
    gate_rank: int  # of f_a, f_b and g_a, g_b; the published layout makes it head_dim


@dataclass(frozen=True, slots=True)
class MlaConfig:
    """Multi-head latent attention without positions: "rope" dims exist and are cached, but never rotated."""

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token: the latent and the shared "rope" key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        return float(self.qk_head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Routed experts (sigmoid scores, a correction bias for the choice only) and shared experts."""

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared: int
    renormalize: bool
    scale: float
    num_groups: int
    top_groups: int

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are stored as one MLP; 0 without them."""
        return self.num_shared * self.intermediate_size


@dataclass(frozen=True, slots=True)
class KimiLinearConfig:
    """Kimi-Linear's hyperparameters. Layers count from 0 here and from 1 in config.json."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    context_len: int  # tokens
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint
    eos_token_ids: tuple[int, ...]
    intermediate_size: int  # of dense MLP layers; 0 without any
    kda_layers: frozenset[int]  # all others are MLA
    moe_layers: frozenset[int]  # all others are dense
    kda: KdaConfig | None
    mla: MlaConfig | None
    moe: MoeConfig | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> KimiLinearConfig:
        """Read config.json's object. `where` begins every message.

        Raises ConfigError for a missing key, a wrong type, a value that changes the maths and is not
        supported, a key nobody knows, and keys that contradict each other.
        """
        reader = ConfigReader(raw, where)
        _refuse_other_maths(reader)
        num_layers = reader.get_int("num_hidden_layers", low=1, high=MAX_LAYERS)
        vocab_size = reader.get_int("vocab_size", low=1, high=MAX_DIM)
        eos = reader.get_token_ids("eos_token_id")
        if any(i >= vocab_size for i in eos):
            raise reader.error("eos_token_id", f"ids below vocab_size {vocab_size}")
        kda_layers, kda = _read_kda(reader, num_layers)
        mla = _read_mla(reader, needed=len(kda_layers) < num_layers)
        moe_layers, moe = _read_moe(reader, num_layers)
        old_key = raw.get("model_max_length") is None and raw.get("max_position_embeddings") is not None
        context_key = "max_position_embeddings" if old_key else "model_max_length"
        config = cls(
            hidden_size=reader.get_int("hidden_size", low=1, high=MAX_DIM),
            num_layers=num_layers,
            vocab_size=vocab_size,
            context_len=reader.get_int(context_key, low=1),
            rms_norm_eps=reader.get_float("rms_norm_eps", low=0, high=1),
            tie_word_embeddings=reader.get_bool("tie_word_embeddings", False),
            dtype=checkpoint_dtype(raw, where),
            eos_token_ids=eos,
            intermediate_size=_read_dense(reader, needed=len(moe_layers) < num_layers),
            kda_layers=kda_layers,
            moe_layers=moe_layers,
            kda=kda,
            mla=mla,
            moe=moe,
        )
        reader.finish(ignored=HOUSEKEEPING_KEYS | _UNUSED_KEYS)
        return config


def _refuse_other_maths(reader: ConfigReader) -> None:
    """Keys whose other values would need another forward pass than the one written here."""
    reader.only("attention_bias", False)
    reader.only("hidden_act", "silu")
    reader.only("q_lora_rank", None)
    reader.only("mla_use_nope", True, default=False)
    reader.only("rope_scaling", None)
    reader.only("num_nextn_predict_layers", 0)
    reader.only("quantization_config", None)
    rope = reader.get_section("rope_parameters")
    if rope is not None:
        rope.only("rope_type", "default")
        rope.finish(ignored={"rope_theta"})


def _read_kda(reader: ConfigReader, num_layers: int) -> tuple[frozenset[int], KdaConfig | None]:
    """The KDA layers (0-based) and their dimensions. Without linear_attn_config every layer is MLA."""
    section = reader.get_section("linear_attn_config")
    kda_1 = section.get_int_list("kda_layers") if section else []
    full_1 = section.get_int_list("full_attn_layers") if section else list(range(1, num_layers + 1))
    if sorted(kda_1 + full_1) != list(range(1, num_layers + 1)):
        raise ConfigError(
            f"{reader.where}: linear_attn_config has {len(kda_1)} kda_layers, {len(full_1)} full_attn_layers;"
            f" expected each of 1 to num_hidden_layers {num_layers} in exactly one of them"
        )
    kda_layers = frozenset(i - 1 for i in kda_1)
    kinds = ["linear_attention" if i in kda_layers else "full_attention" for i in range(num_layers)]
    reader.agree("layer_types", kinds)
    if section is None or not kda_layers:
        reader.skip("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        if section is not None:
            section.finish(ignored={"num_heads", "head_dim", "short_conv_kernel_size"})
        return kda_layers, None
    head_dim = section.get_int("head_dim", low=1, high=MAX_DIM)
    kda = KdaConfig(
        num_heads=section.get_int("num_heads", low=1, high=MAX_DIM),
        head_dim=head_dim,
        conv_kernel=section.get_int("short_conv_kernel_size", low=2, high=64),
        gate_rank=head_dim,
    )
    section.finish()
    reader.agree("linear_num_heads", kda.num_heads)
    reader.agree("linear_head_dim", kda.head_dim)
    reader.agree("linear_conv_kernel_dim", kda.conv_kernel)
    return kda_layers, kda


def _read_mla(reader: ConfigReader, *, needed: bool) -> MlaConfig | None:
    if not needed:
        reader.skip("num_attention_heads", "num_key_value_heads", "kv_lora_rank", "qk_head_dim")
        reader.skip("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return None
    mla = MlaConfig(
        num_heads=reader.get_int("num_attention_heads", low=1, high=MAX_DIM),
        kv_lora_rank=reader.get_int("kv_lora_rank", low=1, high=MAX_DIM),
        qk_nope_head_dim=reader.get_int("qk_nope_head_dim", low=1, high=MAX_DIM),
        qk_rope_head_dim=reader.get_int("qk_rope_head_dim", low=1, high=MAX_DIM),
        v_head_dim=reader.get_int("v_head_dim", low=1, high=MAX_DIM),
    )
    # The latent is expanded for every query head; a smaller number would mean grouped heads, which MLA has
    # none of.
    reader.agree("num_key_value_heads", mla.num_heads)
    reader.agree("qk_head_dim", mla.qk_head_dim)
    return mla


def _read_dense(reader: ConfigReader, *, needed: bool) -> int:
    """Width of the dense MLP layers, 0 where there are none."""
    if needed:
        return reader.get_int("intermediate_size", low=1, high=MAX_DIM)
    reader.skip("intermediate_size")
    return 0


def _read_moe(reader: ConfigReader, num_layers: int) -> tuple[frozenset[int], MoeConfig | None]:
    """The MoE layers (0-based) and their dimensions. num_experts null or 0 makes every layer dense."""
    num_experts = reader.get_int("num_experts", 0, high=MAX_EXPERTS)
    first = reader.get_int("first_k_dense_replace", 0)
    freq = reader.get_int("moe_layer_freq", 1, low=1)
    layers = frozenset(i for i in range(num_layers) if num_experts > 0 and i >= first and i % freq == 0)
    reader.agree("mlp_layer_types", ["sparse" if i in layers else "dense" for i in range(num_layers)])
    if not layers:
        reader.skip("num_experts_per_token", "moe_intermediate_size", "num_shared_experts", "moe_renormalize")
        reader.skip("routed_scaling_factor", "num_expert_group", "topk_group", "use_grouped_topk")
        reader.skip("moe_router_activation_func")
        return layers, None
    reader.only("moe_router_activation_func", "sigmoid")
    groups = reader.get_int("num_expert_group", 1, low=1)
    if num_experts % groups or (groups > 1 and num_experts // groups < 2):
        raise reader.error("num_expert_group", f"a divisor of num_experts {num_experts} with 2 experts or more a group")
    top_groups = reader.get_int("topk_group", 1, low=1)
    if top_groups > groups:
        raise reader.error("topk_group", f"at most num_expert_group {groups}")
    if groups > 1:
        reader.only("use_grouped_topk", True)
    else:
        reader.get_bool("use_grouped_topk", True)  # one group: both ways choose alike
    top_k = reader.get_int("num_experts_per_token", low=1)
    if top_k > num_experts // groups * top_groups:
        raise reader.error(
            "num_experts_per_token",
            f"at most {num_experts // groups * top_groups}, the experts to choose from",
        )
    return layers, MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=reader.get_int("moe_intermediate_size", low=1, high=MAX_DIM),
        num_shared=reader.get_int("num_shared_experts", 0, high=MAX_EXPERTS),
        renormalize=reader.get_bool("moe_renormalize", True),
        scale=reader.get_float("routed_scaling_factor", 1.0),
        num_groups=groups,
        top_groups=top_groups,
    )


def cut(raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """config.json's object with the first `num_layers` layers only. Raises ConfigError when it has fewer."""
    have = raw.get("num_hidden_layers")
    if isinstance(have, int) and num_layers > have:
        raise ConfigError(f"--num-layers is {num_layers}; expected at most {have}, the layers of config.json")
    shorter = {**raw, "num_hidden_layers": num_layers}
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(raw.get(key), list):
            shorter[key] = raw[key][:num_layers]
    kinds = raw.get("linear_attn_config")
    if isinstance(kinds, Mapping):
        shorter["linear_attn_config"] = {
            key: [n for n in value if n <= num_layers] if isinstance(value, list) else value
            for key, value in kinds.items()
        }
    return shorter
