"""What a training model of any family can do: predict, and read and write checkpoints in the published layout."""

from __future__ import annotations

from abc import abstractmethod

import torch
from blocks import Layer, Mixture, linear
from torch import Tensor, nn

ExpertParts = dict[str, Tensor]  # w1 and w3 [E, I, D], w2 [E, D, I]


class Decoder(nn.Module):
    """Parameters have their published names but for those of experts, `PREFIX.experts.w1` and so on."""

    EXACT: tuple[str, ...] = ()  # ends of the names of tensors stored in float32; the others are bf16
    predicted = 1  # tokens that are predicted at each place in training

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.lm_head = linear(width, vocab_size)

    @abstractmethod
    def hiddens(self, ids_BT: Tensor, documents_BT: Tensor) -> tuple[list[Tensor], Tensor]:
        """Ids and document numbers [B, T], T a multiple of the family's chunk -> hidden states and balance loss.

        `lm_head` of the first hidden states [B, T, D] predicts the next token, of each further ones the one after.
        """

    @abstractmethod
    def split_experts(self, prefix: str, experts: ExpertParts) -> dict[str, Tensor]:
        """Published tensors of the experts whose parameters are called `prefix.w1`, ..."""

    @abstractmethod
    def join_experts(self, prefix: str, tensors: dict[str, Tensor], count: int) -> ExpertParts:
        """The inverse of `split_experts`."""

    def forward(self, ids_BT: Tensor, documents_BT: Tensor) -> Tensor:
        """-> logits of the next token [B, T, vocab]."""
        return self.lm_head(self.hiddens(ids_BT, documents_BT)[0][0])

    def mixtures(self) -> list[Mixture]:
        return [module for module in self.modules() if isinstance(module, Mixture)]

    def layers(self) -> list[Layer]:
        return [module for module in self.modules() if isinstance(module, Layer)]

    def initialise(self) -> None:
        """Random matrices, narrower where they write to the residual stream. Vectors keep what they have."""
        narrow = (2 * len(self.layers())) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2 and "conv1d" not in name and "A_log" not in name:
                out = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "w2"))
                nn.init.normal_(parameter, std=0.02 * narrow if out else 0.02)

    @torch.no_grad()
    def official_tensors(self) -> dict[str, Tensor]:
        """The checkpoint, on the CPU."""
        tensors: dict[str, Tensor] = {}
        experts: dict[str, ExpertParts] = {}
        for name, tensor in self.state_dict().items():
            stored = tensor.detach().to("cpu", torch.float32 if name.endswith(self.EXACT) else torch.bfloat16)
            prefix, _, last = name.rpartition(".")
            if prefix.endswith(".experts"):
                experts.setdefault(prefix, {})[last] = stored
            else:
                tensors[name] = stored.contiguous()
        for prefix, parts in experts.items():
            tensors |= {name: part.contiguous() for name, part in self.split_experts(prefix, parts).items()}
        return tensors

    @torch.no_grad()
    def load_official(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `official_tensors`."""
        state = {}
        for name, parameter in self.state_dict().items():
            prefix, _, last = name.rpartition(".")
            if prefix.endswith(".experts"):
                state[name] = self.join_experts(prefix, tensors, len(parameter))[last]
            else:
                state[name] = tensors[name]
        self.load_state_dict(state)
