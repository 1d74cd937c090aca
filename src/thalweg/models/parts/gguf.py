"""How llama.cpp's GGUF files hold the tensors of each part: names, splits and orders of rows as data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from thalweg.models.parts.gdn import GdnDims
from thalweg.models.parts.gqa import GqaDims
from thalweg.models.parts.kda import KdaDims
from thalweg.models.parts.mla import MlaDims
from thalweg.models.parts.mlp import MlpDims
from thalweg.models.parts.moe import MoeDims
from thalweg.models.parts.part import Names
from thalweg.quant.scheme import Range
from thalweg.weights.gguf_names import Change, GgufNames

Mixer = KdaDims | MlaDims | GdnDims | GqaDims


@dataclass(frozen=True, slots=True)
class GgufParts:
    """Adds parts to `names`. `have` are the tensors of the file that is read; empty for one that is written."""

    names: GgufNames
    width: int
    have: Collection[str] = ()
    norms: Change = "none"  # of every RMSNorm but those of gated outputs
    tiled_heads: bool = False  # value head j of a GDN layer has key head j % key_heads, and not j // (their ratio)
    mlp_norm: str = "ffn_norm"

    def vocab(self, theirs: Names, size: int, *, tied: bool) -> None:
        self._matrix(theirs["embed"], "token_embd", size, self.width)
        self._norm(theirs["norm"], "output_norm", self.width)
        if not tied:
            self._matrix(theirs["head"], "output", size, self.width)

    def mixer(self, theirs: Names, at: str, dims: Mixer) -> None:
        self._norm(theirs["norm"], f"{at}attn_norm", self.width)
        if isinstance(dims, KdaDims):
            self._kda(theirs, at, dims)
        elif isinstance(dims, MlaDims):
            self._mla(theirs, at, dims)
        elif isinstance(dims, GdnDims):
            self._gdn(theirs, at, dims)
        else:
            self._gqa(theirs, at, dims)

    def feed_forward(self, theirs: Names, at: str, dims: MlpDims | MoeDims) -> None:
        self._norm(theirs["norm"], f"{at}{self.mlp_norm}", self.width)
        if isinstance(dims, MlpDims):
            self._swiglu(theirs, at, "", dims.inner)
        else:
            self._moe(theirs, at, dims)

    def drafting(self, theirs: Names, at: str) -> None:
        """What a layer that drafts tokens has besides; if it has no norm of its own before the head, the model's."""
        norm = f"{at}nextn.shared_head_norm"
        own = not self.have or f"{norm}.weight" in self.have
        self._matrix(theirs["fc"], f"{at}nextn.eh_proj", self.width, 2 * self.width)
        self._norm(theirs["embedding_norm"], f"{at}nextn.enorm", self.width)
        self._norm(theirs["hidden_norm"], f"{at}nextn.hnorm", self.width)
        self._norm(theirs["norm"], norm if own else "output_norm", self.width)

    def _kda(self, theirs: Names, at: str, dims: KdaDims) -> None:
        H, HK, D, R = dims.heads, dims.heads * dims.head_dim, self.width, dims.rank
        fused = f"{at}attn_qkv.weight"
        for i, x in enumerate("qkv"):
            if fused in self.have:
                self.names.cut(theirs[x], [(fused, (i * HK, (i + 1) * HK))], (HK, D))
            else:
                self._matrix(theirs[x], f"{at}attn_{x}", HK, D)
            conv = f"{at}ssm_conv1d_{x}.weight"
            self.names.whole(theirs[f"{x}_conv"], conv, (HK, 1, dims.taps), stored=(1, HK, 1, dims.taps))
        for x in "fg":
            self._matrix(theirs[f"{x}_a"], f"{at}ssm_{x}_a", R, D)
            self._matrix(theirs[f"{x}_b"], f"{at}ssm_{x}_b", HK, R)
        self._matrix(theirs["beta"], f"{at}ssm_beta", H, D)
        self.names.whole(theirs["A_log"], f"{at}ssm_a", (1, 1, H, 1), change="decay")
        self.names.whole(theirs["dt_bias"], f"{at}ssm_dt.bias", (HK,))
        self.names.whole(theirs["out_norm"], f"{at}ssm_norm.weight", (dims.head_dim,))
        self._matrix(theirs["out"], f"{at}attn_output", D, HK)

    def _mla(self, theirs: Names, at: str, dims: MlaDims) -> None:
        H, D, queries, low = dims.heads, self.width, dims.heads * dims.head_dim, dims.q_rank
        if low is None:
            self._matrix(theirs["q"], f"{at}attn_q", queries, D)
        else:
            self._matrix(theirs["q_a"], f"{at}attn_q_a", low, D)
            self._norm(theirs["q_norm"], f"{at}attn_q_a_norm", low)
            self._matrix(theirs["q_b"], f"{at}attn_q_b", queries, low)
        self._matrix(theirs["kv_a"], f"{at}attn_kv_a_mqa", dims.latent, D)
        self._norm(theirs["kv_norm"], f"{at}attn_kv_a_norm", dims.rank)
        k, v, shape = f"{at}attn_k_b.weight", f"{at}attn_v_b.weight", (H * (dims.nope + dims.value), dims.rank)
        if f"{at}attn_kv_b.weight" in self.have:
            self.names.whole(theirs["kv_b"], f"{at}attn_kv_b.weight", shape)
        else:
            all_k, all_v = (0, H * dims.rank), (0, H * dims.value)
            self.names.cut(theirs["kv_b"], [(k, all_k), (v, all_v)], shape, change="latent_up")
            self.names.shapes |= {k: (H, dims.rank, dims.nope), v: (H, dims.value, dims.rank)}
        self._matrix(theirs["out"], f"{at}attn_output", D, H * dims.value)

    def _gqa(self, theirs: Names, at: str, dims: GqaDims) -> None:
        K, D = dims.head_dim, self.width
        self._matrix(theirs["q"], f"{at}attn_q", dims.heads * 2 * K, D)
        for x in "kv":
            self._matrix(theirs[x], f"{at}attn_{x}", dims.kv_heads * K, D)
        for x in "qk":
            self._norm(theirs[f"{x}_norm"], f"{at}attn_{x}_norm", K)
        self._matrix(theirs["out"], f"{at}attn_output", D, dims.heads * K)

    def _gdn(self, theirs: Names, at: str, dims: GdnDims) -> None:
        """Rows of qkv are those of q, k and v; a checkpoint may pack them, and z, b and a, key head by key head."""
        G, H, K, V, D = dims.key_heads, dims.value_heads, dims.key_dim, dims.value_dim, self.width
        ratio, keys, channels = H // G, G * K, sum(dims.channels)
        qkv, z, conv, out = (f"{at}{x}.weight" for x in ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_out"))
        self.names.shapes |= {qkv: (channels, D), z: (H * V, D), conv: (channels, dims.taps), out: (D, H * V)}
        q_rows, k_rows = (
            [(g * K, (g + 1) * K) for g in range(G)],
            [(keys + g * K, keys + (g + 1) * K) for g in range(G)],
        )
        v_rows, z_rows = self._heads(dims, V, 2 * keys), self._heads(dims, V)
        old = f"{at}ssm_in.weight"  # as a checkpoint packs it
        if "qkvz" in theirs and old in self.have:
            self.names.whole(theirs["qkvz"], old, (channels + H * V, D))
        elif "qkvz" in theirs:
            packed: list[tuple[str, Range]] = []
            for g in range(G):
                mine = range(g * ratio, (g + 1) * ratio)
                packed += [(qkv, q_rows[g]), (qkv, k_rows[g])]
                packed += [*((qkv, v_rows[h]) for h in mine), *((z, z_rows[h]) for h in mine)]
            self.names.cut(theirs["qkvz"], packed, (channels + H * V, D))
        elif old in self.have:
            both, first = 2 * (K + ratio * V), 2 * K
            q = [(g * both, g * both + K) for g in range(G)]
            k = [(start + K, stop + K) for start, stop in q]
            v = [(g * both + first, g * both + first + ratio * V) for g in range(G)]
            gates = [(start + ratio * V, stop + ratio * V) for start, stop in v]
            self.names.cut(theirs["qkv"], [(old, part) for part in q + k + v], (channels, D))
            self.names.cut(theirs["z"], [(old, part) for part in gates], (H * V, D))
        else:
            self.names.cut(theirs["qkv"], [(qkv, (0, 2 * keys)), *((qkv, part) for part in v_rows)], (channels, D))
            self.names.cut(theirs["z"], [(z, part) for part in z_rows], (H * V, D))
        conv_rows = [(conv, (0, 2 * keys)), *((conv, part) for part in v_rows)]
        self.names.cut(theirs["conv"], conv_rows, (channels, 1, dims.taps))
        self._betas_and_alphas(theirs, at, dims)
        self._per_head(theirs["A_log"], f"{at}ssm_a", dims, change="decay")
        self._per_head(theirs["dt_bias"], f"{at}ssm_dt.bias", dims)
        self.names.whole(theirs["out_norm"], f"{at}ssm_norm.weight", (V,))
        self.names.columns(theirs["out"], out, self._heads(dims, V), (D, H * V), (ratio, G, V))

    def _betas_and_alphas(self, theirs: Names, at: str, dims: GdnDims) -> None:
        G, H, D, ratio = dims.key_heads, dims.value_heads, self.width, dims.value_heads // dims.key_heads
        both = f"{at}ssm_ba.weight"
        if "ba" in theirs:
            self.names.whole(theirs["ba"], both, (2 * H, D))
        elif both in self.have:
            b = [(2 * g * ratio, (2 * g + 1) * ratio) for g in range(G)]
            self.names.cut(theirs["b"], [(both, part) for part in b], (H, D))
            self.names.cut(theirs["a"], [(both, (start + ratio, stop + ratio)) for start, stop in b], (H, D))
        else:
            for x, name in (("b", f"{at}ssm_beta.weight"), ("a", f"{at}ssm_alpha.weight")):
                self.names.cut(theirs[x], [(name, part) for part in self._heads(dims, 1)], (H, D))
                self.names.shapes[name] = (H, D)

    def _heads(self, dims: GdnDims, size: int, first: int = 0) -> list[Range]:
        """Where a file has the `size` rows of each value head of a checkpoint."""
        G, ratio = dims.key_heads, dims.value_heads // dims.key_heads
        order = [h % ratio * G + h // ratio if self.tiled_heads else h for h in range(dims.value_heads)]
        return [(first + j * size, first + (j + 1) * size) for j in order]

    def _per_head(self, theirs: str, gguf: str, dims: GdnDims, change: Change = "none") -> None:
        self.names.cut(theirs, [(gguf, part) for part in self._heads(dims, 1)], (dims.value_heads,), change=change)
        self.names.shapes[gguf] = (dims.value_heads,)

    def _moe(self, theirs: Names, at: str, dims: MoeDims) -> None:
        E, I, D = dims.experts, dims.inner, self.width
        self._matrix(theirs["router"], f"{at}ffn_gate_inp", E, D)
        if dims.scoring == "sigmoid":
            self.names.whole(theirs["bias"], f"{at}exp_probs_b.bias", (E,))
        gate, up, down, fused = (f"{at}ffn_{x}_exps.weight" for x in ("gate", "up", "down", "gate_up"))
        self.names.shapes |= {gate: (E, I, D), up: (E, I, D), down: (E, D, I)}
        if fused in self.have:
            rows = [
                ((fused, (2 * e * I, (2 * e + 1) * I)), (fused, ((2 * e + 1) * I, 2 * (e + 1) * I))) for e in range(E)
            ]
        else:
            rows = [((gate, (e * I, (e + 1) * I)), (up, (e * I, (e + 1) * I))) for e in range(E)]
        downs = [(down, (e * D, (e + 1) * D)) for e in range(E)]
        if "stacked_down" in theirs:
            self.names.cut(theirs["stacked_gate_up"], [part for pair in rows for part in pair], (E, 2 * I, D))
            self.names.cut(theirs["stacked_down"], downs, (E, D, I))
        else:
            for e in range(E):
                for x, part in zip(("gate", "up"), rows[e], strict=True):
                    self.names.cut(theirs[x].format(e=e), [part], (I, D))
                self.names.cut(theirs["down"].format(e=e), [downs[e]], (D, I))
        shared = dims.gated_shared or dims.shared * I
        if shared:
            self._swiglu({x: theirs[f"shared_{x}"] for x in ("gate", "up", "down")}, at, "_shexp", shared)
        if dims.gated_shared:
            self.names.whole(theirs["shared_scale"], f"{at}ffn_gate_inp_shexp.weight", (1, D))

    def _swiglu(self, theirs: Names, at: str, suffix: str, inner: int) -> None:
        for x, rows, columns in (("gate", inner, self.width), ("up", inner, self.width), ("down", self.width, inner)):
            self._matrix(theirs[x], f"{at}ffn_{x}{suffix}", rows, columns)

    def _matrix(self, theirs: str, gguf: str, rows: int, columns: int) -> None:
        self.names.whole(theirs, f"{gguf}.weight", (rows, columns))

    def _norm(self, theirs: str, gguf: str, size: int) -> None:
        self.names.whole(theirs, f"{gguf}.weight", (size,), change=self.norms)
