"""One training step of a model of any family, over fixed buffers, so that it can be captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from decoder import Decoder
from documents import ANSWER_WEIGHT, ROW_TOKENS
from torch import Tensor

FURTHER_WEIGHT = 0.3  # of the loss on the token after the next, against the next one's; and so on
UNEVEN_WEIGHT = 0.01  # of each layer's balance loss
BALANCE_RATE = 1e-3  # of a router bias per step, falling with the learning rate


class Trainer:
    def __init__(self, model: Decoder, rows: int, peak_rate: float, device: str, compiled: bool = False) -> None:
        self.model, self.peak_rate, self.device = model, peak_rate, device
        self.batch = torch.zeros(3, rows, ROW_TOKENS, dtype=torch.int64, device=device)
        self.rate = torch.zeros((), device=device)
        self.loss = torch.zeros((), device=device)
        # On answer tokens alone: the next, the one after, ...
        self.answer_losses = torch.zeros(model.predicted, device=device)
        self.imbalance = torch.zeros((), device=device)
        matrices = [p for p in model.parameters() if p.ndim >= 2 and p.shape[-1] > 4 and p.shape[0] > 1]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=device == "cuda"
        )
        self.token_losses = torch.compile(token_losses) if compiled else token_losses
        self._run: Callable[[], None] = self._step

    def step(self, batch: Tensor, rate: float) -> None:
        """`batch` int64 [3, rows, tokens]: ids, weights of the tokens as targets, document numbers."""
        self.batch.copy_(batch)
        self.rate.fill_(rate)
        self._run()

    def capture(self) -> None:
        """From here on a step is one graph launch."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._run = graph.replay

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        ids, weights, documents = self.batch
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            hiddens, uneven = self.model.hiddens(ids, documents)
        loss = UNEVEN_WEIGHT * uneven
        on_answers = []
        for further, hidden in enumerate(hiddens):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                losses = self.token_losses(hidden, self.model.lm_head.weight, ids.roll(-1 - further, 1))
            target_weights = weights_ahead(weights, documents, 1 + further)
            loss = loss + FURTHER_WEIGHT**further * (losses * target_weights).sum() / target_weights.sum()
            answers = (target_weights == ANSWER_WEIGHT).float()
            on_answers.append((losses.detach() * answers).sum() / answers.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for mixture in self.model.mixtures():
                mixture.balance(BALANCE_RATE * self.rate / self.peak_rate)
            self.loss.copy_(loss.detach())
            self.answer_losses.copy_(torch.stack(on_answers))
            loads = torch.stack([mixture.gate.load for mixture in self.model.mixtures()])
            self.imbalance.copy_((loads.amax(-1) / loads.mean(-1)).max())


def token_losses(hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross entropy of each target under its place's hidden state, float32 [B, T]."""
    logits = F.linear(hidden_BTD, head_VD).float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view(targets_BT.shape)


def weights_ahead(weights_BT: Tensor, documents_BT: Tensor, ahead: int) -> Tensor:
    """What each place's target, `ahead` tokens on, counts: nothing in another document or past the end."""
    same = documents_BT == documents_BT.roll(-ahead, 1)
    inside = torch.arange(weights_BT.shape[1], device=weights_BT.device) < weights_BT.shape[1] - ahead
    return (weights_BT.roll(-ahead, 1) * (same & inside)).float()
