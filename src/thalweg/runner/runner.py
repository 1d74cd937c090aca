"""Executes step plans: the model, its cache and the sampler, on one rank. It decides nothing."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from thalweg import tracing
from thalweg.cache.storage import CacheStorage
from thalweg.core import StepPlan, StepResult, TokenLogprobs
from thalweg.layers.batch import Batch
from thalweg.parallel.mesh import Mesh
from thalweg.runner.inputs import InputBuilder
from thalweg.sampling.logprobs import token_logprobs
from thalweg.sampling.sampler import Sampler


class Model(Protocol):
    def __call__(self, batch: Batch, cache: CacheStorage) -> Tensor: ...


class ModelRunner:
    """execute(plan) -> StepResult, in the order of the plans. Every rank runs the same plans; rank 0's tokens count."""

    def __init__(self, model: Model, cache: CacheStorage, inputs: InputBuilder, sampler: Sampler, mesh: Mesh) -> None:
        self.model, self._cache, self._inputs, self._sampler, self._mesh = model, cache, inputs, sampler, mesh
        self._prompt_logits: set[int] = set()
        self._prompt_logprobs: dict[int, int] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        if plan.admissions:
            self._admit(plan)
        prefills = plan.prefills
        inspected = [p for p in prefills if p.slot in self._prompt_logits or p.slot in self._prompt_logprobs]
        with tracing.span("build"):
            batch = self._inputs.build(plan, every_row=bool(inspected))
        with tracing.span("model"):
            logits = self.model(batch, self._cache)

        prompt_logits: dict[int, Tensor] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        d = batch.num_decodes
        sampling = [
            (p.slot, d + batch.prefill_offsets[i + 1] - 1, p.start + p.length)
            for i, p in enumerate(prefills)
            if p.sample
        ]
        if inspected:
            for i, p in enumerate(prefills):
                first = d + batch.prefill_offsets[i]
                rows = logits[first : first + p.length]
                if p.slot in self._prompt_logits:
                    prompt_logits[p.slot] = rows.clone()
                if p.slot in self._prompt_logprobs:
                    prompt_logprobs[p.slot] = self._logprobs_of_prompt(rows, p.slot, p.start)
            logits = logits[[*range(d), *(row for _, row, _ in sampling)]]

        slots = plan.decode_slots + [slot for slot, _, _ in sampling]
        if not slots:
            return StepResult(plan.step, [], {}, prompt_logprobs, {}, prompt_logits)
        positions = [s + 1 for s in plan.decode_starts] + [end for _, _, end in sampling]
        with tracing.span("sample"):
            ids, logprobs, errors = self._sampler(logits, slots, positions)
        ids = self._mesh.broadcast(ids)
        index = batch.slots_B[:d] if not sampling else torch.tensor(slots, device=ids.device)
        self._inputs.last_tokens[index] = ids
        return StepResult(plan.step, ids.tolist(), logprobs, prompt_logprobs, errors, prompt_logits)

    def close(self) -> None:
        self._mesh.close()

    def _admit(self, plan: StepPlan) -> None:
        for a in plan.admissions:
            self._inputs.admit(a)
            self._sampler.admit(a)
            self._prompt_logits.discard(a.slot)
            self._prompt_logprobs.pop(a.slot, None)
            if a.prompt_logits:
                self._prompt_logits.add(a.slot)
            if a.params.prompt_logprobs is not None:
                self._prompt_logprobs[a.slot] = a.params.prompt_logprobs
        slots = torch.tensor([a.slot for a in plan.admissions], device=self._inputs.device)
        self._cache.reset_slots(slots)

    def _logprobs_of_prompt(self, rows_LV: Tensor, slot: int, start: int) -> list[TokenLogprobs]:
        """Of the tokens that follow each of the rows, as far as they are known."""
        following = self._inputs.admitted(slot)[start + 1 : start + 1 + len(rows_LV)]
        ids = torch.from_numpy(following).to(rows_LV.device)
        return token_logprobs(rows_LV[: len(ids)], ids, self._prompt_logprobs[slot])
