"""Steps run before the engine says ready, so that nothing is compiled or set up while somebody waits.

Kernels compile for the shapes they meet, and libraries set themselves up at their first call. The plans here are those
of a request or two: prompts short and long, a prompt in two chunks, and prompts beside rows that decode.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from thalweg.cache.memory import MemorySplit
from thalweg.core import Admission, Prefill, SamplingParams, StepPlan, pack_ids
from thalweg.ops.toolchain.triton_compile import compiled_together
from thalweg.runner.graphs import Model
from thalweg.runner.step import ModelRunner

# Prompt lengths around the powers of two, by which kernels choose their tiles; beyond, all take the largest.
LENGTHS = sorted({n + more for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) for more in (0, 1)})

LONGEST = 16384


def make_kernels(runner: ModelRunner, one_of_each: Model, split: MemorySplit, max_num_batched_tokens: int) -> None:
    """Compile what graphs and plans need, many kernels at a time. `one_of_each` is the model with a layer of each kind
    alone, which is enough to meet every kernel."""
    with compiled_together():
        runner.rehearse(one_of_each, plans(split, max_num_batched_tokens))


def warm_up(runner: ModelRunner, split: MemorySplit, max_num_batched_tokens: int) -> None:
    """Run the plans. What they leave in slots and blocks is gone once a request is admitted to them. Every rank calls
    this, since plans run on all of them."""
    finish = [runner.launch(plan, eagerly=True) for plan in plans(split, max_num_batched_tokens)]
    for wait in finish:
        wait()


def plans(split: MemorySplit, budget: int) -> Iterator[StepPlan]:
    """Steps of one and two sequences within the memory that `split` gives; none where it holds no two of them."""
    longest = min(budget, LONGEST, split.max_model_len - 2)
    if split.num_blocks:
        longest = min(longest, split.num_blocks // 2 * split.block_size - 2)  # two sequences at once
    if longest < 1:
        return
    blocks_each = -(-(longest + 2) // split.block_size) if split.num_blocks else 0
    step = 0

    def plan(prompts: dict[int, tuple[int, int]], decodes: dict[int, int], temperature: float = 1.0) -> StepPlan:
        """`prompts` are start and end of the chunk by slot, `decodes` cached tokens by slot."""
        nonlocal step
        step += 1
        params = SamplingParams(temperature=temperature, max_tokens=None)
        new = [slot for slot, (start, _) in prompts.items() if start == 0]
        return StepPlan(
            step=step,
            admissions=[Admission(s, f"warm-up-{s}", pack_ids([0] * longest), longest, params, 0, False) for s in new],
            new_blocks=[(s, i, 1 + (s - 1) * blocks_each + i) for s in new for i in range(blocks_each)],
            decode_slots=list(decodes),
            decode_starts=list(decodes.values()),
            prefills=[Prefill(s, start, end - start, True) for s, (start, end) in prompts.items()],
        )

    for length in (n for n in LENGTHS if n < longest):
        yield plan({1: (0, length)}, {})
    yield plan({1: (0, longest)}, {}, temperature=0.0)
    short = min(17, longest)
    yield plan({1: (0, short)}, {})
    if longest > short:
        yield plan({1: (short, longest)}, {})
    yield plan({}, {1: longest})
    if split.num_slots > 1:
        yield plan({2: (0, short)}, {1: longest})
        yield plan({1: (0, short), 2: (0, min(short + 1, longest))}, {})
    if split.num_snapshots:  # what copies states is loaded when it is first used
        yield replace(plan({1: (0, short)}, {}), snapshots=[(1, 1)], restores=[(1, 1)])
