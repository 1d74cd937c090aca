"""Budgets of reasoning: the closing mark comes when they are spent, whatever stands beside them in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.unit.server_double import EOS, ByteTokenizer
from thalweg.core import Admission, Grammar, SamplingParams, ThinkingLimit, pack_ids
from thalweg.errors import InvalidRequest
from thalweg.ops.sample.reference import sample
from thalweg.sampling.grammars import Grammars
from thalweg.sampling.sampler import Sampler
from thalweg.sampling.table import SamplingTable

TOKENIZER = ByteTokenizer(("<think>", "</think>"))
BEGIN, END = TOKENIZER.added_tokens["<think>"], TOKENIZER.added_tokens["</think>"]
V = TOKENIZER.vocab_size + 29  # not a multiple of 32
BEFORE = rf"/(.|\n)*/ <[{END}]>"


def limit(most: int, begun: bool = True) -> ThinkingLimit:
    return ThinkingLimit(BEGIN, END, most, begun)


class Rows:
    """Sequences in slots 1, 2, ..., which a model continues by `wish`: (slot, tokens so far) to the token it wants."""

    def __init__(self, *params: SamplingParams, output: list[int] | None = None, counts: bool = True) -> None:
        grammars = Grammars(lambda: (TOKENIZER, V, frozenset({EOS})))
        table = SamplingTable(
            len(params),
            V,
            device=torch.device("cpu"),
            eos_token_ids=frozenset({EOS}),
            grammars=grammars if counts else None,
        )
        self.slots = [*range(1, len(params) + 1)]
        self.sampler = Sampler(table, sample)
        self.outputs = {slot: list(output or []) for slot in self.slots}
        self.reads = 0
        for slot, own in zip(self.slots, params, strict=True):
            numbers = table.admit([Admission(slot, f"r{slot}", pack_ids([5, *self.outputs[slot]]), 1, own, 0, False)])
            table.write(torch.tensor([slot]), *map(torch.from_numpy, numbers))

    def run(self, steps: int, wish: Callable[[int, list[int]], int]) -> dict[int, list[int]]:
        for _ in range(steps):
            logits = torch.zeros(len(self.slots), V)
            for r, slot in enumerate(self.slots):
                logits[r, wish(slot, self.outputs[slot])] = 9
            ids, _, errors = self.sampler(logits, self.slots, [len(self.outputs[s]) + 1 for s in self.slots])
            assert not errors
            chosen = ids.tolist()
            self.sampler.sampled(self.slots, lambda chosen=chosen: self._read(chosen))
            for slot, token in zip(self.slots, chosen, strict=True):
                self.outputs[slot].append(token)
        return self.outputs

    def _read(self, chosen: list[int]) -> list[int]:
        self.reads += 1
        return chosen


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=None, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [0, 1, 2, 7])
def test_the_closing_mark_comes_when_the_budget_is_spent(most: int) -> None:
    out = Rows(greedy(thinking=limit(most))).run(12, lambda slot, so_far: ord("a"))
    assert out[1] == [ord("a")] * most + [END] + [ord("a")] * (11 - most)


def test_neighbours_keep_their_tokens_and_each_has_a_budget_of_its_own() -> None:
    params = (greedy(), greedy(thinking=limit(3)), greedy(thinking=limit(5)), greedy(thinking=limit(3, begun=False)))
    out = Rows(*params).run(8, lambda slot, so_far: ord("a") + slot)
    assert out[1] == [ord("b")] * 8
    assert out[2] == [ord("c")] * 3 + [END] + [ord("c")] * 4
    assert out[3] == [ord("d")] * 5 + [END] + [ord("d")] * 2
    assert out[4] == [ord("e")] * 8


def test_a_budget_is_of_all_reasoning_and_no_more_begins_once_it_is_spent() -> None:
    wanted = [BEGIN, 97, 97, END, 98, BEGIN, 97, 97, 97, BEGIN, BEGIN, 98]
    out = Rows(greedy(thinking=limit(3, begun=False))).run(12, lambda slot, so_far: wanted[len(so_far)])
    assert out[1][:8] == [BEGIN, 97, 97, END, 98, BEGIN, 97, END]
    assert BEGIN not in out[1][8:]


def test_without_any_budget_reasoning_is_not_begun() -> None:
    out = Rows(greedy(thinking=limit(0, begun=False))).run(3, lambda slot, so_far: BEGIN)
    assert BEGIN not in out[1]


def test_what_was_generated_before_a_preemption_counts() -> None:
    out = Rows(greedy(thinking=limit(4)), output=[97, 97, 97]).run(3, lambda slot, so_far: 97)
    assert out[1] == [97, 97, 97, 97, END, 97]


def test_a_rank_whose_tokens_do_not_count_asks_for_nothing() -> None:
    rows = Rows(greedy(thinking=limit(1)), counts=False)
    assert rows.run(4, lambda slot, so_far: 97)[1] == [97] * 4
    assert rows.reads == 0


def test_a_token_is_waited_for_only_if_it_decides_something() -> None:
    rows = Rows(greedy(thinking=limit(100)))
    rows.run(50, lambda slot, so_far: 97)
    assert rows.reads == 48  # all but the last of those that a next step has seen


@pytest.mark.parametrize("seed", range(3))
def test_under_a_schema_the_answer_keeps_to_it(seed: int) -> None:
    grammar = Grammar("regex", "(yes|no)", BEFORE)
    rows = Rows(greedy(grammar=grammar, thinking=limit(5)), greedy(grammar=Grammar("regex", "[0-9]{4}")))
    out = rows.run(9, lambda slot, so_far: ord("a") + seed)
    assert out[1][:6] == [ord("a") + seed] * 5 + [END]
    assert out[1][6:] == [*b"no", EOS]
    assert bytes(out[2][:4]).isdigit()


def test_under_a_schema_a_character_is_finished_first() -> None:
    wanted = "aé".encode()
    rows = Rows(greedy(grammar=Grammar("regex", "no", BEFORE), thinking=limit(2)))
    out = rows.run(6, lambda slot, so_far: wanted[len(so_far)] if len(so_far) < 3 else 0xA9)
    assert bytes(out[1][:3]) == wanted
    assert out[1][3:] == [END, *b"no"]


@pytest.mark.parametrize("values", [(1, 1, 2), (-1, 2, 2), (1, 2, -1), (1, 2, True), (1, "2", 2)])
def test_limits_are_checked(values: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidRequest, match="thinking"):
        ThinkingLimit(*values)
