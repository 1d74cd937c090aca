"""Steps with short prompts as CUDA graphs: launching their kernels one by one takes longer than running them.

A graph is for a shape: decode rows, prefills, tokens of prefills, and tokens of their contexts. A step runs in the
smallest shape that holds it. Decode rows beyond its own are on the sinks; so is the last prefill, which has the tokens
that the step lacks, and prefills between them and its own have none. Shapes are captured as they are met.

The experts of data-parallel ranks have as many rows of each, so a shape has that number too. In a step in which another
rank has prompts, a rank with decode rows alone runs as with a prompt of none but padding, and one without rows runs the
experts in a graph of their own.

What is new in the plan of a step with one prompt comes with its inputs, in one copy, and a graph's first kernels take
it in: a host that told the device before would make it wait.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from thalweg.core import Prefill, StepPlan
from thalweg.models.decoder import Decoder
from thalweg.ops.host_tables import Limits, Tables, UnknownWhileCapturing
from thalweg.parallel.data_ranks import DataRanks
from thalweg.runner.batch import BatchBuilder, places_of, prefill_sizes
from thalweg.runner.capture import captured
from thalweg.runner.graphs import Model, Share
from thalweg.runner.slots import News
from thalweg.sampling.sampler import Sampler

_log = logging.getLogger(__name__)

# Beyond, a step is longer than launching it.
TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840, 4096)
AT_ONCE = 2048  # most tokens of shapes that are captured at the start
CONTEXTS = (4096, 8192, 16384)  # beyond those without cached tokens; more would be computed for nothing
TURN = 512  # most tokens of a prompt after a cached prefix whose shapes are captured at the start
PREFILLS = (1, 15)  # and the one that pads the step: logits of few enough rows for kernels that stream the head once
ROWS = (0, 8, 32, 64, 128, 256)  # beyond, a step is long, and logits of so many rows are much memory
NEWS_BLOCK = 32  # tokens of a block at least, if all of a step's can come with it
# Rows of a data-parallel rank, for its experts. One for nothing takes little time, and each size wants its own graphs.
EXCHANGED = (256, 512, 1024, 2048, 3072, 4352)
MAX_SHAPES = 128  # that are captured; others run eagerly from then on


class Shape(NamedTuple):
    rows: int  # decode rows
    prefills: int  # without the one that pads the step
    tokens: int  # of prefills
    context: int  # of prefills, their new tokens included
    exchanged: int = 0  # rows of each data-parallel rank; 0 if there is one rank


def exchanged_rows(rows: int) -> int:
    """Rows that data-parallel ranks pad so many to: few numbers, for which there are kernels and, up to EXCHANGED's
    last, graphs."""
    most = EXCHANGED[-1]
    return _least(EXCHANGED, rows) if rows <= most else -(-rows // 1024) * 1024


def token_sizes(most: int, max_model_len: int) -> list[int]:
    """Numbers of prompt tokens to capture, for steps of up to `most`, which the last of them may exceed. What pads a
    step is one sequence, so it fits into a sequence."""
    found = []
    for size, before in zip(TOKENS, (0, *TOKENS), strict=False):
        if size - before > max_model_len or before >= most:
            break
        found.append(size)
    return found


class Static:
    """A step of one shape: where its inputs lie on the device, and how they are written."""

    def __init__(self, shape: Shape, batches: BatchBuilder, data: DataRanks) -> None:
        self.shape, self._batches, self._data = shape, batches, data
        self.limits, places = _layout(shape)
        *self._places, self._chosen, self._positions, self._tables, self._live = places[:-5]
        self._news = places[-5:]
        self.size = places[-1].stop
        self.memory = torch.zeros(self.size, dtype=torch.int64, device=batches.slots.device)
        self.tables = Tables(self.limits, self.memory[self._tables].view(torch.int32))

    def write(self, plan: StepPlan, stage: np.ndarray, news: News | None = None) -> None:
        """The plan's step into an image of `memory`, stage int64 [size], with what is new in it if the shape `carries`
        that."""
        shape, prefills = self.shape, plan.prefills
        rest = shape.tokens - sum(p.length for p in prefills)
        empty = [Prefill(0, 0, 0, False)] * (shape.prefills - len(prefills))
        sinks = [0] * (shape.rows - len(plan.decode_slots))
        padded = replace(
            plan,
            decode_slots=plan.decode_slots + sinks,
            decode_starts=plan.decode_starts + sinks,
            prefills=[*prefills, *empty, Prefill(0, 0, rest, False)],
        )
        self._batches.write_prefills(padded, [stage[place] for place in self._places])
        d, sampling = len(plan.decode_slots), [p for p in prefills if p.sample]
        chosen, positions = stage[self._chosen], stage[self._positions]
        chosen[:], positions[:] = 0, 1
        chosen[:d], positions[:d] = plan.decode_slots, np.array(plan.decode_starts, dtype=np.int64) + 1
        of_prefills = slice(shape.rows, shape.rows + len(sampling))
        chosen[of_prefills] = [p.slot for p in sampling]
        positions[of_prefills] = [p.start + p.length for p in sampling]
        live = stage[self._live]
        live[:] = 0
        live[:d] = live[shape.rows : shape.rows + shape.tokens - rest] = 1
        self.tables.fill(self._batches.sequences(padded), stage[self._tables].view(np.int32))
        parts = self._parts_of_news([stage[place] for place in self._news], np.float32, np.int32)
        for part in parts:
            part[...] = 1 if part.dtype == np.float32 else 0  # of the sinks
        for part, new in zip(parts, news or (), strict=False):
            part[..., : new.shape[-1]] = new

    def _parts_of_news(self, parts: Sequence[Any], reals: Any, blocks: Any) -> list[Any]:
        """As class News has them, of int64 arrays or tensors."""
        n = self.shape.prefills if self._news[0].stop > self._news[0].start else 0
        slots, numbers, integers, places, numbered = parts
        return [
            slots,
            numbers.view(reals)[: 3 * n].reshape(3, n),
            integers.reshape(2, n),
            places,
            numbered.view(blocks)[: len(places)],
        ]

    def run(self, model: Model, sampler: Sampler, share: Share) -> tuple[Tensor, Tensor]:
        """Logits [rows + prefills + 1, V] and the ids sampled from them, which are each slot's last token then."""
        slots, tables = self._batches.slots, self.tables
        news = [self.memory[place] for place in self._news]
        slots.write(*self._parts_of_news(news, torch.float32, torch.int32))
        parts = [self.memory[place] for place in self._places]
        of_prefills = min(self._batches.blocks_for(self.shape.context), slots.max_blocks)
        num_blocks = slots.max_blocks if self.shape.rows else of_prefills
        batch = self._batches.of_prefills(
            parts, self.shape.rows, tables.offsets, tables.starts, tables.boundaries, num_blocks
        )
        with self._data.padded(self.memory[self._live]) if self.shape.exchanged else nullcontext():
            logits = model(batch, slots.cache)
        chosen = self.memory[self._chosen]
        ids = share(sampler.sample_rows(logits, chosen, self.memory[self._positions]))
        slots.last_tokens[chosen] = ids.clamp(min=0)
        return logits, ids


class PrefillGraphs:
    """Steps with prefills that fit a shape. The first step of a shape runs uncaptured, since that sets up what it
    needs; the second is captured. Before `start` none is."""

    def __init__(
        self,
        model: Model,
        batches: BatchBuilder,
        sampler: Sampler,
        share: Share,
        max_num_seqs: int,
        tokens: int,
        keeps_prefixes: bool = False,
        data: DataRanks | None = None,
    ) -> None:
        """For steps of up to `tokens` prompt tokens, for which there is a size at least (`token_sizes`).
        `keeps_prefixes`: prompts may begin after cached tokens."""
        self._keeps_prefixes, self._data = keeps_prefixes, data or DataRanks()
        self.model, self._batches, self._sampler, self._share = model, batches, sampler, share
        self._sizes = sizes = token_sizes(tokens, batches.slots.max_model_len)  # of tokens, ascending
        self._most_tokens = min(tokens, sizes[-1])
        most = min(max_num_seqs, ROWS[-1])
        self._rows = [n for n in ROWS if n < most] + [most]
        self._statics: dict[Shape, Static] = {}
        self._replays: dict[Shape, Callable[[], None]] = {}
        self._refused: set[Shape] = set()  # of which a capture failed: steps of these run uncaptured
        exchanged = EXCHANGED[-1] if self._data.size > 1 else 0
        device = batches.slots.device
        self._started = False
        self._pool: Any = None
        self._logits: Tensor | None = None
        self._ids = torch.zeros(self._rows[-1] + PREFILLS[-1] + 1, dtype=torch.int64, device=device)
        self._no_rows = torch.zeros(exchanged, dtype=torch.int64, device=device)
        self._met: set[Shape] = set()  # of idle steps
        self.steps: Counter[str] = Counter()  # how many ran "captured", "uncaptured", or "eager", in no shape

    def rehearse(self) -> None:
        """A step on the sinks of every kind of shape, so that its kernels are met."""
        beside = [Shape(d, n, size, size) for d in self._rows[1:] for n in PREFILLS for size in self._whole()[::-1][:1]]
        for shape in self._usual() + [self._alone(shape) for shape in beside]:
            self._at_rest(shape)

    def start(self) -> None:
        """From now on shapes are captured: the usual ones of few tokens at once. The largest comes first, so that the
        others fit into its memory. Graphs of an earlier start go with the memory that they read."""
        self._started = True
        self._replays.clear()
        self._refused.clear()
        self._statics.clear()  # in a rehearsal nothing ran
        for shape in self._usual():
            if shape.tokens <= AT_ONCE:
                static = self._at_rest(shape)
                self._capture(shape, partial(self._step, static), static.tables)
        for rows in self._exchanged():
            self._idle_step(rows)
            self._capture(_idle(rows), partial(self._idle_step, rows))

    def close(self) -> None:
        self._replays.clear()

    def _whole(self) -> list[int]:
        """Numbers of tokens that one prompt can have, so that one can pad a step of them."""
        return [n for n in self._sizes if n <= self._batches.slots.max_model_len]

    def _usual(self) -> list[Shape]:
        """Of many prompts, of one alone, and of a short one after a cached prefix, as a conversation's next turn is,
        alone or beside few rows that decode."""
        sizes, longest = self._whole()[::-1], self._batches.slots.max_model_len
        many = [Shape(0, n, size, size) for n in PREFILLS[1:] for size in sizes[:1]]
        one = [Shape(0, PREFILLS[0], size, size) for size in sizes]
        return [self._alone(shape) for shape in many + self._turns(longest) + one] + self._beside_others()

    def _turns(self, longest: int) -> list[Shape]:
        if not self._keeps_prefixes:
            return []
        contexts = [n for n, less in zip(CONTEXTS, (0, *CONTEXTS), strict=False) if less < longest]
        short = [size for size in self._whole()[::-1] if size <= TURN]
        return [Shape(d, PREFILLS[0], size, n) for d in self._rows[1::-1] for n in contexts[::-1] for size in short]

    def _alone(self, shape: Shape) -> Shape:
        """If no other data-parallel rank has more rows."""
        return shape._replace(exchanged=exchanged_rows(shape.rows + shape.tokens)) if self._data.size > 1 else shape

    def _beside_others(self) -> list[Shape]:
        """Few rows that decode while other data-parallel ranks have prompts."""
        few = Shape(self._rows[1], PREFILLS[0], self._sizes[0], self._sizes[0])
        return [few._replace(exchanged=n) for n in self._exchanged() if n >= few.rows + few.tokens]

    def _exchanged(self) -> list[int]:
        """Rows of other data-parallel ranks, if they have prompts of at most AT_ONCE tokens, the most first."""
        most = exchanged_rows(min(AT_ONCE, self._whole()[-1]))
        return [n for n in EXCHANGED[::-1] if n <= most] if self._data.size > 1 else []

    def _at_rest(self, shape: Shape) -> Static:
        """A step of the shape on the sinks."""
        static = self._static(shape)
        image = np.zeros(static.size, dtype=np.int64)
        static.write(StepPlan(0, [], [], [], [], []), image)
        static.memory.copy_(torch.from_numpy(image))
        self._step(static)
        return static

    def rows_of(self, plan: StepPlan) -> int | None:
        """Rows of the shape that the step of a data-parallel rank runs in, if the others' rows allow it one."""
        shape = self._fitting(plan)
        return None if shape is None else shape.rows + shape.tokens

    def shape_of(self, plan: StepPlan) -> Shape | None:
        """The shape that a step runs in; None: in none. Data-parallel ranks have agreed on their rows."""
        shape, rows = self._fitting(plan), self._data.rows
        if shape is None or rows > EXCHANGED[-1]:
            return None
        shape = shape._replace(exchanged=rows)
        # One that was refused, perhaps for memory, stays a shape: other ranks, which have to run as many tokens, may
        # have had room for its graph.
        full = self._started and len(self._replays) + len(self._refused) >= MAX_SHAPES
        return None if full and shape not in self._replays and shape not in self._refused else shape

    def _fitting(self, plan: StepPlan) -> Shape | None:
        prefills, d = plan.prefills, len(plan.decode_slots)
        tokens = sum(p.length for p in prefills)
        if tokens > self._most_tokens or len(prefills) > PREFILLS[-1] or d > self._rows[-1]:
            return None
        size = _least(self._sizes, tokens)
        context = size + sum(p.start for p in prefills if p.length)
        if context > size:
            if context > CONTEXTS[-1]:
                return None
            context = _least(CONTEXTS, context)
        return Shape(_least(self._rows, d), _least(PREFILLS, len(prefills)), size, context)

    def run(self, plan: StepPlan, shape: Shape, news: News | None = None) -> tuple[Tensor, Tensor]:
        """Launch the step in the shape that `shape_of` gave, with what the device was not told before.

        Returns logits [R, V] and ids [R] (-1 if a logit was not finite) of the rows that sample, in the plan's order,
        in buffers that the next step overwrites.
        """
        new, static = shape not in self._statics, self._static(shape)
        stage = self._batches.stages.next(static.size)
        static.write(plan, stage.numpy(), news)
        static.memory.copy_(stage, non_blocking=True)
        self._launch(shape, partial(self._step, static), new, static.tables)
        d, sampling = len(plan.decode_slots), sum(p.sample for p in plan.prefills)
        assert self._logits is not None
        return _rows(self._logits, d, shape.rows, sampling), _rows(self._ids, d, shape.rows, sampling)

    def idle(self) -> None:
        """Launch the step of a data-parallel rank that has no rows, while others have prompts and as many rows as there
        are graphs for."""
        shape = _idle(self._data.rows)
        new = shape not in self._met
        self._met.add(shape)
        self._launch(shape, partial(self._idle_step, shape.exchanged), new)

    def _launch(self, shape: Shape, step: Callable[[], None], new: bool, tables: Tables | None = None) -> None:
        if self._started and not new and shape not in self._replays and shape not in self._refused:
            self._try_to_capture(shape, step, tables)
        replay = self._replays.get(shape)
        self.steps["uncaptured" if replay is None else "captured"] += 1
        (replay or step)()

    def _static(self, shape: Shape) -> Static:
        if shape not in self._statics:
            self._statics[shape] = Static(shape, self._batches, self._data)
        return self._statics[shape]

    def _step(self, static: Static) -> None:
        logits, ids = static.run(self.model, self._sampler, self._share)
        if self._logits is None:
            self._logits = logits.new_empty(len(self._ids), logits.shape[1])
        self._logits[: len(logits)] = logits  # a copy: what a graph has of its own would be kept for each of them
        self._ids[: len(ids)] = ids

    def _idle_step(self, rows: int) -> None:
        assert isinstance(self.model, Decoder)
        with self._data.padded(self._no_rows[:rows]):
            self.model.serve_others()

    def _try_to_capture(self, shape: Shape, step: Callable[[], None], tables: Tables | None) -> None:
        """A shape that requests brought ends none of them by being too large for the memory that is left."""
        try:
            self._capture(shape, step, tables)
        except (torch.OutOfMemoryError, UnknownWhileCapturing) as error:
            _log.warning("steps with prompts of shape %s run without a graph, which failed: %s", shape, error)
            self._refused.add(shape)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _capture(self, shape: Shape, step: Callable[[], None], tables: Tables | None = None) -> None:
        if tables is not None:
            tables.frozen = True
        try:
            self._replays[shape], self._pool = captured(step, self._pool, cuts=_cuts(self.model))
        finally:
            if tables is not None:
                tables.frozen = False


def _layout(shape: Shape) -> tuple[Limits, list[slice]]:
    """Where a step's inputs lie in one array of int64: what write_prefills writes, slots and positions of the rows that
    are chosen for, tables, which rows are no padding, if other ranks are to know, and what is new."""
    d, B = shape.rows, shape.prefills + 1
    limits = Limits(B, shape.tokens, shape.context)
    sizes = prefill_sizes(d, B, shape.tokens, d + B)
    n, m = _most_news(shape)
    return limits, places_of(
        (*sizes, d + B, d + B, -(-Tables.words(limits) // 2), shape.exchanged, n, -(-3 * n // 2), 2 * n, m, -(-m // 2))
    )


def _idle(rows: int) -> Shape:
    """The shape of a data-parallel rank without rows."""
    return Shape(0, 0, 0, 0, rows)


def _most_news(shape: Shape) -> tuple[int, int]:
    """Admissions and blocks that steps of the shape can carry. States of all that it can are zeroed, so that it is one
    prompt; blocks are those of a whole context."""
    return (1, shape.context // NEWS_BLOCK + shape.rows + 8) if shape.prefills == 1 else (0, 0)


def carries(shape: Shape, news: News) -> bool:
    """Whether a step of the shape can take in what is new itself."""
    n, m = _most_news(shape)
    return len(news.slots) <= n and len(news.places) <= m


def _cuts(model: Model) -> list[nn.Module]:
    """Layers behind which a step's next graph begins: the first one's takes little to launch, and the device longer
    than launching the second, which likewise covers the third."""
    layers = list(getattr(model, "layers", ()))
    return [layers[i] for i in sorted({0, len(layers) // 4}) if i < len(layers) - 1]


def _least(sizes: Sequence[int], n: int) -> int:
    return sizes[bisect_left(sizes, n)]


def _rows(values: Tensor, d: int, rows: int, sampling: int) -> Tensor:
    """The first d, and `sampling` more from `rows` on."""
    if d == rows or not d:
        return values[rows - d : rows + sampling]
    return torch.cat([values[:d], values[rows : rows + sampling]]) if sampling else values[:d]
