"""Puts an engine together: ranks, executor, scheduler."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.assembly.info import EngineInfo
from thalweg.assembly.source import open_source
from thalweg.cache.manager import CacheManager
from thalweg.cache.tiers import TieredTree
from thalweg.config.engine import EngineConfig
from thalweg.core import StepPlan, StepResult
from thalweg.engine.core import EngineCore
from thalweg.engine.processes.ranks import OtherRanks
from thalweg.engine.pump import Pump
from thalweg.errors import ConfigError, EngineDeadError
from thalweg.parallel.shards import Shards
from thalweg.recorder.orders import Order
from thalweg.runner.executor import Executor, Runner
from thalweg.runner.lock_step import LockStep
from thalweg.sampling.grammars import Grammars, Vocabulary
from thalweg.scheduler.scheduler import Scheduler
from thalweg.text.codec import load_codec

if TYPE_CHECKING:
    from thalweg.parallel.mesh import Mesh
    from thalweg.runner.cache_file import CacheIndex

STATE_CHUNK = 64  # tokens: prefills that end at a multiple cut no chunk that a kernel of a recurrent layer works in
LAST_SECONDS = 2.0  # for NCCL to give up, and for a collective with ranks that are gone to end then
COARSEST_GRID = 256  # tokens: with a coarser one, few prompts would have a snapshot


class Engine:
    """An EngineCore with what it stands on; `info` is known once this returns. Raises what building raised.

    `folder` is for the sockets of its ranks (see OtherRanks). With --data-parallel-size it is that of all engines of
    this host, of which this one is `data_rank`; they meet in a file there, or, if they are on several hosts, at
    `data_meeting`, for which one of them has a `listener` (see join_data_ranks).
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path | None = None,
        data_rank: int | None = None,
        data_meeting: str = "",
        listener: socket.socket | None = None,
    ) -> None:
        if config.data_parallel_size > 1 and (data_rank is None or folder is None):
            only = "this drives the steps of one rank; `thalweg bench latency` measures several"
            raise ConfigError(f"--data-parallel-size is {config.data_parallel_size}; expected 1: {only}")
        self._pid = os.getpid()
        if config.tensor_parallel_size > 1:
            source = open_source(config)
            source.plan(Shards(0, config.tensor_parallel_size))  # refuses what ranks do not divide
        self._give_folder_back = None
        if config.cache_folder is not None:
            from thalweg.engine import cache_folder  # brings torch in, which the rank's thread does otherwise

            self._give_folder_back = cache_folder.take(config.cache_folder)
        data_meeting = data_meeting or ("" if folder is None else str(folder / "data-rendezvous"))
        several = config.tensor_parallel_size > 1
        self.ranks = OtherRanks(config, folder, data_rank or 0, data_meeting) if several else None

        self._config = config = self.ranks.config if self.ranks else config
        self.lock_step = LockStep() if config.data_parallel_size > 1 else None
        meeting = self.ranks.meeting if self.ranks else ""
        tell = self.ranks.send if self.ranks else None
        listener = listener or (self.ranks.listener if self.ranks else None)
        self.grammars = Grammars(lambda: _vocabulary(config))
        self.expert_counts: Callable[[], dict[int, list[int]]]  # of a data-parallel rank: Decoder.expert_counts
        self._joined: list[Mesh] = []  # once this rank is in one
        cached: list[CacheIndex | None] = []

        def build() -> tuple[Runner, EngineInfo]:
            from thalweg.assembly.rank import build_rank  # torch comes in on the rank's own thread
            from thalweg.recorder.window import RecordedRunner

            where = data_rank or 0, data_meeting, listener
            runner, info = build_rank(config, 0, meeting, self.grammars, *where, self._joined.append)
            cached.append(runner.cache_index)
            recorded = RecordedRunner(runner, (data_rank or 0) * config.tensor_parallel_size)
            if self.lock_step is not None:
                self.lock_step.begin(runner.mesh.data, recorded.serve_others, runner.rows_of, tell)
                self.expert_counts = runner.expert_counts
            return recorded, info

        self._executor: Executor[EngineInfo] = Executor(build, tell, self.lock_step)
        if self.ranks is not None:
            self.ranks.watch(self._executor.fail)
        try:
            self.info = info = self._executor.info()
        except BaseException:
            self.close()
            raise
        atexit.register(self.close, save=False)
        # Requests without a seed of their own differ from rank to rank.
        scheduler = new_scheduler(info, config.seed + ((data_rank or 0) << 32))
        tree = scheduler.cache.tree
        if isinstance(tree, TieredTree) and cached[0] is not None:
            cache_folder.restore(tree, cached[0], info)
        self.core = EngineCore(scheduler, self._executor, config.step_timeout)
        self.pump = Pump(self.core, self.grammars)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Run a step that no scheduler planned, for benchmarks; only while no request is here."""
        return self._executor.submit(plan)

    def wake(self, number: int) -> None:
        """Have this rank take part in the others' steps; `number` counts the wake-ups of all ranks."""
        self._executor.wake(number)

    def order(self, order: Order, wake: int | None = None) -> Future[Any]:
        """Have every rank do something after the steps that were handed over; rank 0's outcome. With several
        data-parallel ranks, all of them get the order, each with the number of the same `wake`-up."""
        return self._executor.order(order, wake)

    @property
    def forked(self) -> bool:
        """Whether this is a process that was forked from the one with the engine, which has its threads and ranks."""
        return os.getpid() != self._pid

    def close(self, *, save: bool = True) -> None:
        """Without `save` the prefix cache is not written down: after an error its books may be wrong. Does nothing if
        `forked`."""
        if self.forked:
            return
        atexit.unregister(self.close)
        try:
            if save:
                self._save_cache()
        finally:  # also if somebody has no patience for it
            self._end()

    def _end(self) -> None:
        reason = self._executor.failure()
        self.grammars.close()
        self._executor.close()
        if self.ranks is not None:
            self.ranks.close(reason)
            for mesh in self._joined if reason else ():
                mesh.abandon(LAST_SECONDS)
        self._executor.join(LAST_SECONDS)
        if self._give_folder_back is not None:
            self._give_folder_back()

    def _save_cache(self) -> None:
        """Write the prefix cache down, if that is wanted and the ranks live."""
        core = getattr(self, "core", None)
        if self._config.cache_folder is None or core is None or core.scheduler.interrupted:
            return
        tree = core.scheduler.cache.tree
        from thalweg.engine import cache_folder

        with contextlib.suppress(EngineDeadError):
            core.check()
            if isinstance(tree, TieredTree):
                size = self._config.cache_folder_size
                cache_folder.save(tree, self.info, Path(self._config.cache_folder), size, self.order, core.check)


def new_scheduler(info: EngineInfo, seed: int) -> Scheduler:
    """A scheduler with the limits and the memory of a built engine."""
    cache = CacheManager(
        info.num_blocks,
        info.num_slots,
        info.block_size,
        keep_prefixes=info.keeps_prefixes,
        num_snapshots=info.num_snapshots if info.bytes_per_sequence else None,
        num_host_blocks=info.num_host_blocks,
        num_host_snapshots=info.num_host_snapshots,
    )
    grid = snapshot_grid(info.block_size)
    return Scheduler(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        cache=cache,
        eos_token_ids=frozenset(info.eos_token_ids),
        seed=seed,
        snapshot_grid=grid,
        snapshot_interval=max(1, info.snapshot_interval // grid) * grid,
        state_chunk=STATE_CHUNK,
        most_boundaries=info.num_staged,
        long_prefill_token_threshold=info.long_prefill_token_threshold,
    )


def snapshot_grid(block_size: int) -> int:
    """Tokens between places where snapshots may be taken: ends of blocks and of the chunks of kernels. If these meet
    too seldom, as with blocks of 127 tokens, ends of blocks alone, at which prefills are then cut."""
    grid = math.lcm(block_size, STATE_CHUNK)
    return grid if grid <= max(COARSEST_GRID, block_size) else -(-STATE_CHUNK // block_size) * block_size


def _vocabulary(config: EngineConfig) -> Vocabulary:
    codec = load_codec(config)
    return codec.tokenizer, codec.source.config.vocab_size, frozenset(codec.source.eos_token_ids)
