"""The MTP layer of the Qwen families written down once more, out of the parts of their float64 twin. Tensors have the
published names, experts either layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.naive_qwen import Weights, attention, moe, norm, swiglu


def mtp(c: dict[str, Any], weights: Weights, hidden_TD: Tensor, embedded_TD: Tensor) -> Tensor:
    """float64 [T, D] behind mtp.norm, for hidden states behind the model's norm and embeddings of the next tokens."""
    w = unstacked({name: tensor.double() for name, tensor in weights.items() if name.startswith("mtp.")})
    embedded = normed(c, w, "mtp.pre_fc_norm_embedding.weight", embedded_TD.double())
    hidden = normed(c, w, "mtp.pre_fc_norm_hidden.weight", hidden_TD.double())
    x = torch.cat([embedded, hidden], 1) @ w["mtp.fc.weight"].T
    at = "mtp.layers.0."
    x = x + attention(c, w, f"{at}self_attn.", normed(c, w, f"{at}input_layernorm.weight", x))
    h = normed(c, w, f"{at}post_attention_layernorm.weight", x)
    x = x + (moe(c, w, f"{at}mlp.", h) if "num_experts" in c else swiglu(w, f"{at}mlp.", h))
    return normed(c, w, "mtp.norm.weight", x)


def normed(c: dict[str, Any], w: Weights, name: str, x: Tensor) -> Tensor:
    return norm(x, 1 + w[name], c["rms_norm_eps"])


def unstacked(w: Weights) -> Weights:
    """Each expert by itself."""
    p = "mtp.layers.0.mlp.experts."
    for e, (gate_up, down) in enumerate(zip(w.pop(f"{p}gate_up_proj", ()), w.pop(f"{p}down_proj", ()), strict=True)):
        w[f"{p}{e}.gate_proj.weight"], w[f"{p}{e}.up_proj.weight"] = gate_up.chunk(2)
        w[f"{p}{e}.down_proj.weight"] = down
    return w
