"""What a model's MTP layer drafts along its own greedy answers, and what speculation would accept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.layers.batch import Batch

if TYPE_CHECKING:
    from thalweg.assembly.drafter import Drafter
    from thalweg.cache.storage import CacheStorage


@dataclass(frozen=True, slots=True)
class Drafted:
    """A greedy answer; `drafts[i]` are the tokens that were drafted to come after `token_ids[i]`."""

    token_ids: list[int]
    drafts: list[list[int]]


def draft(
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    end_ids: frozenset[int],
    *,
    max_new_tokens: int,
    depth: int,
    parallel: int,
    advance: Callable[[], object] = lambda: None,
) -> list[Drafted]:
    """Answer every prompt greedily up to an id of `end_ids`, which is kept, drafting `depth` tokens after each token;
    `parallel` prompts at once. `advance` is called as each answer ends."""
    answers: list[Drafted] = []
    for i in range(0, len(prompts), parallel):
        run = _Run(drafter, prompts[i : i + parallel], max_new_tokens, depth)
        answers += run.answers(end_ids, advance)
    return answers


class _Run:
    """Prompts that are answered together, each in blocks and a slot of its own: sequence i has slot i + 1."""

    def __init__(self, drafter: Drafter, prompts: Sequence[Sequence[int]], max_new_tokens: int, depth: int) -> None:
        self._model, self._prompts, self._new, self._depth = drafter, prompts, max_new_tokens, depth
        self._size = drafter.opened.config.block_size
        self._blocks = -(-(max(map(len, prompts)) + max_new_tokens + depth) // self._size)
        self._cache: CacheStorage = drafter.cache(self._blocks * len(prompts), len(prompts))

    @torch.inference_mode()
    def answers(self, end_ids: frozenset[int], advance: Callable[[], object]) -> list[Drafted]:
        answers = [Drafted([], []) for _ in self._prompts]
        running = list(range(len(self._prompts)))
        batch = self._prefill()
        while True:
            ids, drafts = self._step(batch, running)
            for i, token, drafted in zip(running, ids, drafts, strict=True):
                answers[i].token_ids.append(token)
                answers[i].drafts.append(drafted)
            ended = {i for i in running if answers[i].token_ids[-1] in end_ids or len(answers[i].drafts) == self._new}
            for _ in ended:
                advance()
            running = [i for i in running if i not in ended]
            if not running:
                return answers
            at = [len(self._prompts[i]) + len(answers[i].token_ids) - 1 for i in running]
            batch = self._decodes(running, self._tensor([answers[i].token_ids[-1] for i in running]), at)

    def _step(self, batch: Batch, running: list[int]) -> tuple[list[int], list[list[int]]]:
        """The next token of each sequence, and those drafted to come after it."""
        decoder, head = self._model.decoder, self._model.head
        hidden_TD = head.hidden(decoder.stream(batch, self._cache))
        ends_B = self._tensor([*range(batch.num_decodes), *(end - 1 for end in batch.prefill_offsets[1:])])
        next_B = head.logits(hidden_TD[ends_B]).argmax(-1)
        following_T = batch.token_ids_T.roll(-1)
        following_T[ends_B] = next_B
        at = (batch.positions_T[ends_B] + 1).tolist()
        hidden_BD = self._draft(hidden_TD, following_T, batch)[ends_B]
        drafts = [head.logits(hidden_BD).argmax(-1)]
        for more in range(self._depth - 1):
            batch = self._decodes(running, drafts[-1], [position + more for position in at])
            hidden_BD = self._draft(hidden_BD, drafts[-1], batch)
            drafts.append(head.logits(hidden_BD).argmax(-1))
        return next_B.tolist(), torch.stack(drafts, 1).tolist()

    def _draft(self, hidden_TD: Tensor, following_T: Tensor, batch: Batch) -> Tensor:
        embedded_TD = self._model.decoder.embed(following_T)
        out_TD: Tensor = self._model.mtp(hidden_TD, embedded_TD, batch, self._cache.layers[-1])
        return out_TD

    def _prefill(self) -> Batch:
        lens = [len(prompt) for prompt in self._prompts]
        batch = self._batch(list(range(len(lens))), [0] * len(lens), lens)
        return replace(batch, token_ids_T=self._tensor([t for prompt in self._prompts for t in prompt]))

    def _decodes(self, sequences: list[int], ids_B: Tensor, positions: list[int]) -> Batch:
        batch = self._batch(sequences, positions, [1] * len(sequences))
        return replace(
            batch, token_ids_T=ids_B, num_decodes=len(sequences), starts=[], prefill_offsets=[0],
            context_lens_B=(batch.positions_T + 1).to(torch.int32),
        )  # fmt: skip

    def _batch(self, sequences: list[int], starts: list[int], lens: list[int]) -> Batch:
        """`lens` new tokens, unknown yet, of each sequence from position `starts`, as prefills."""
        sequences_B, starts_B, lens_B = self._tensor(sequences), self._tensor(starts), self._tensor(lens)
        firsts_B = lens_B.cumsum(0) - lens_B
        positions_T = torch.arange(sum(lens), device=lens_B.device) + (starts_B - firsts_B).repeat_interleave(lens_B)
        first_blocks_B = 1 + sequences_B * self._blocks
        return Batch(
            token_ids_T=positions_T,
            positions_T=positions_T,
            num_decodes=0,
            prefill_offsets=[*accumulate(lens, initial=0)],
            starts=starts,
            slots_B=sequences_B + 1,
            block_tables_BN=(first_blocks_B[:, None] + torch.arange(self._blocks, device=lens_B.device)).int(),
            block_rows_T=(first_blocks_B * self._size).repeat_interleave(lens_B) + positions_T,
            context_lens_B=lens_B[:0].int(),
            logit_rows_R=None,
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


def acceptance(answers: Sequence[Drafted], depth: int) -> list[dict[str, Any]]:
    """What speculation with 1 to `depth` drafts per step would do: `accepted` of all drafts, `by_place` of the first,
    second, ... of a step, and `tokens_per_step`, the model's own included.

    A step drafts after the last known token; drafts up to the first wrong one are accepted, then comes the model's
    token. Drafts beyond the end of an answer do not count, nor does its first token, which the prompt's step gives.
    """
    rows = []
    for count in range(1, depth + 1):
        tried, taken, steps = [0] * count, [0] * count, 0
        for answer in answers:
            place = 0
            while place < len(answer.token_ids) - 1:
                told = answer.token_ids[place + 1 :][:count]
                pairs = zip(told, answer.drafts[place], strict=False)
                right = next((i for i, (a, b) in enumerate(pairs) if a != b), len(told))
                for i in range(len(told)):
                    tried[i] += 1
                    taken[i] += i < right
                place += right + 1
                steps += 1
        tokens = sum(max(len(answer.token_ids) - 1, 0) for answer in answers)
        rows.append(
            {
                "draft_tokens": count,
                "accepted": sum(taken) / max(sum(tried), 1),
                "by_place": [a / max(b, 1) for a, b in zip(taken, tried, strict=True)],
                "tokens_per_step": tokens / max(steps, 1),
            }
        )
    return rows
