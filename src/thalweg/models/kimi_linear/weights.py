"""Kimi-Linear's checkpoint names and how they become parameters on one rank.

Projections that read the same input are one matrix here, so that a layer runs one large product instead of
many small ones: six in KDA (q, k, v, beta, f_a, g_a), gate and up in every MLP.
"""

from __future__ import annotations

from thalweg.config.quantization import need_experts
from thalweg.models.kimi_linear.config import KdaConfig, KimiLinearConfig, MlaConfig, MoeConfig
from thalweg.weights.plan import Dtype, Shards, Source, Target, concat, placed, split, whole

# Tensors that checkpoints may carry and nobody needs (shell-style patterns).
IGNORED = ("*.rotary_emb.inv_freq",)


def ignored(config: KimiLinearConfig) -> tuple[str, ...]:
    """Patterns of tensors that may be in the checkpoint without being read."""
    return (*IGNORED, "lm_head.weight") if config.tie_word_embeddings else IGNORED


def plan(config: KimiLinearConfig, tp_rank: int = 0, tp_size: int = 1, quantization: str | None = None) -> list[Target]:
    """Every parameter of this rank. Raises ConfigError naming --tensor-parallel-size where it does not
    divide, or --quantization where there are no experts.

    Heads and expert widths are split evenly; vocabulary rows in blocks of ceil(V / tp_size), zero past the
    end.
    """
    need_experts(quantization, bool(config.moe_layers), "KimiLinearForCausalLM")
    expert_dtype: Dtype = "model" if quantization is None else "fp8"
    shards = Shards(tp_rank, tp_size)
    targets = [
        _vocab_rows("embed.weight", "model.embed_tokens.weight", config, shards),
        _vocab_rows(
            "lm_head.weight",
            "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight",
            config,
            shards,
        ),
        whole("lm_head.norm.weight", "model.norm.weight", (config.hidden_size,), init="ones"),
    ]
    for n in range(config.num_layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        norm, first = (config.hidden_size,), "router" if n in config.moe_layers else "gate_up"
        targets += [
            whole(f"{ours}.attn.in_proj.norm.weight", f"{theirs}.input_layernorm.weight", norm, init="ones"),
            whole(f"{ours}.mlp.{first}.norm.weight", f"{theirs}.post_attention_layernorm.weight", norm, init="ones"),
        ]
        if n in config.kda_layers:
            assert config.kda is not None
            targets += _kda(f"{ours}.attn", f"{theirs}.self_attn", config.hidden_size, config.kda, shards)
        else:
            assert config.mla is not None
            targets += _mla(f"{ours}.attn", f"{theirs}.self_attn", config.hidden_size, config.mla, shards)
        if n in config.moe_layers:
            assert config.moe is not None
            moe = f"{theirs}.block_sparse_moe"
            targets += _moe(f"{ours}.mlp", moe, config.hidden_size, config.moe, shards, expert_dtype)
        else:
            width = config.intermediate_size
            targets += _mlp(f"{ours}.mlp", f"{theirs}.mlp", config.hidden_size, width, "intermediate_size", shards)
    return targets


def _vocab_rows(name: str, source: str, config: KimiLinearConfig, shards: Shards) -> Target:
    """[ceil(V / tp), D]: this rank's rows of the vocabulary."""
    rows, (start, stop) = shards.padded(config.vocab_size)
    shape = (config.vocab_size, config.hidden_size)
    piece = placed(source, shape, ((0, stop - start),), 0, (start, stop))
    return Target(name, (rows, config.hidden_size), (piece,))


def _kda(ours: str, theirs: str, D: int, kda: KdaConfig, shards: Shards) -> list[Target]:
    """in_proj [3*H*K + H + 2*rank, D] has rows q, k, v, beta, f_a, g_a; up_proj [2, H*K, rank] f_b, g_b."""
    what = "linear_attn_config.num_heads"
    H, K, rank, kernel = kda.num_heads, kda.head_dim, kda.gate_rank, kda.conv_kernel
    heads, channels = shards.even(H, what), shards.even(H, what, K)
    local_H = shards.count(H, what)
    qkv = [Source(f"{theirs}.{x}_proj.weight", (H * K, D), 0, channels) for x in "qkv"]
    beta = Source(f"{theirs}.b_proj.weight", (H, D), 0, heads)
    low_rank = [Source(f"{theirs}.{x}_a_proj.weight", (rank, D)) for x in "fg"]
    convs = [Source(f"{theirs}.{x}_conv1d.weight", (H * K, 1, kernel), 0, channels) for x in "qkv"]
    ups = tuple(placed(f"{theirs}.{x}_b_proj.weight", (H * K, rank), (i,), 0, channels) for i, x in enumerate("fg"))
    return [
        concat(f"{ours}.in_proj.weight", [*qkv, beta, *low_rank]),
        Target(f"{ours}.up_proj.weight", (2, local_H * K, rank), ups),
        concat(f"{ours}.conv.weight", convs, (3 * local_H * K, kernel)),
        split(
            f"{ours}.A_log",
            f"{theirs}.A_log",
            (1, 1, H, 1),
            2,
            heads,
            local=(local_H,),
            dtype="float32",
            init="a_log",
        ),
        split(
            f"{ours}.dt_bias",
            f"{theirs}.dt_bias",
            (H * K,),
            0,
            channels,
            local=(local_H, K),
            dtype="float32",
            init="dt_bias",
        ),
        whole(f"{ours}.out_norm.weight", f"{theirs}.o_norm.weight", (K,), init="ones"),
        split(f"{ours}.out_proj.weight", f"{theirs}.o_proj.weight", (D, H * K), 1, channels),
    ]


def _mla(ours: str, theirs: str, D: int, mla: MlaConfig, shards: Shards) -> list[Target]:
    """kv_b_proj is [H, nope + v, R], a matrix a head: its halves go into queries and outputs apart."""
    what = "num_attention_heads"
    H, R, nope_v = mla.num_heads, mla.kv_lora_rank, mla.qk_nope_head_dim + mla.v_head_dim
    local_H = shards.count(H, what)

    def heads(dims: int) -> tuple[int, int]:
        return shards.even(H, what, dims)

    kv_b = split(
        f"{ours}.kv_b_proj.weight",
        f"{theirs}.kv_b_proj.weight",
        (H * nope_v, R),
        0,
        heads(nope_v),
        local=(local_H, nope_v, R),
    )
    return [
        concat(
            f"{ours}.in_proj.weight",
            [
                Source(f"{theirs}.q_proj.weight", (H * mla.qk_head_dim, D), 0, heads(mla.qk_head_dim)),
                Source(f"{theirs}.kv_a_proj_with_mqa.weight", (mla.latent_dim, D)),
            ],
        ),
        whole(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight", (R,), init="ones"),
        kv_b,
        split(
            f"{ours}.out_proj.weight",
            f"{theirs}.o_proj.weight",
            (D, H * mla.v_head_dim),
            1,
            heads(mla.v_head_dim),
        ),
    ]


def _mlp(ours: str, theirs: str, D: int, width: int, what: str, shards: Shards) -> list[Target]:
    """gate_up [2*I, D], gate rows first; down [D, I]."""
    part = shards.even(width, what)
    gate_up = [Source(f"{theirs}.{x}_proj.weight", (width, D), 0, part) for x in ("gate", "up")]
    return [
        concat(f"{ours}.gate_up.weight", gate_up),
        split(f"{ours}.down.weight", f"{theirs}.down_proj.weight", (D, width), 1, part),
    ]


def _moe(ours: str, theirs: str, D: int, moe: MoeConfig, shards: Shards, dtype: Dtype) -> list[Target]:
    """Experts stacked: gate_up [E + S, 2*I, D] (w1 above w3), down [E + S, D, I] (w2). The router is replicated.

    The checkpoint stores the S shared experts as one MLP of width S*I. A sum over its width is a sum over S slices
    of it, so each slice is one more expert behind the routed ones, and one kernel serves all.
    """
    E, width = moe.num_experts, moe.intermediate_size
    part = shards.even(width, "moe_intermediate_size")
    local = part[1] - part[0]
    gate_up, down = [], []
    for e in range(E):
        expert = f"{theirs}.experts.{e}"
        gate_up.append(placed(f"{expert}.w1.weight", (width, D), (e, (0, local)), 0, part))
        gate_up.append(placed(f"{expert}.w3.weight", (width, D), (e, (local, 2 * local)), 0, part))
        down.append(placed(f"{expert}.w2.weight", (D, width), (e,), 1, part))
    for i in range(moe.num_shared):
        shared, whole_width, e = f"{theirs}.shared_experts", moe.shared_intermediate_size, E + i
        rows = (i * width + part[0], i * width + part[1])
        gate_up.append(placed(f"{shared}.gate_proj.weight", (whole_width, D), (e, (0, local)), 0, rows))
        gate_up.append(placed(f"{shared}.up_proj.weight", (whole_width, D), (e, (local, 2 * local)), 0, rows))
        down.append(placed(f"{shared}.down_proj.weight", (D, whole_width), (e,), 1, rows))
    total = E + moe.num_shared
    return [
        whole(f"{ours}.router.weight", f"{theirs}.gate.weight", (E, D)),
        whole(f"{ours}.router.bias", f"{theirs}.gate.e_score_correction_bias", (E,), dtype="float32", init="zeros"),
        Target(f"{ours}.experts.gate_up", (total, 2 * local, D), tuple(gate_up), dtype),
        Target(f"{ours}.experts.down", (total, D, local), tuple(down), dtype),
    ]
