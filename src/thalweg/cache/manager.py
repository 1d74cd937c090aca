"""Who holds which blocks and which slot, and how cache memory is split between the two. No tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from thalweg.cache.blocks import BlockPool, CacheAccountingError
from thalweg.cache.slots import SlotPool
from thalweg.cache.specs import LayerSpecs, bytes_per_sequence, bytes_per_token
from thalweg.errors import ConfigError

# Of the default --max-num-seqs on a GPU. A row of a step also costs memory outside the cache, logits that decode graphs
# keep and activations, so that small devices run fewer; and blocks, not states, are what long sequences need.
DEVICE_MIB_PER_SEQUENCE = 128
STATE_SHARE = 3


class CacheManager:
    """Accounts for the blocks and the slot of every running sequence, which a caller names by any string.

    num_blocks 0 means a model without paged layers: its sequences need no block, whatever their length.
    """

    def __init__(self, num_blocks: int, num_slots: int, block_size: int) -> None:
        if num_slots < 1 or block_size < 1:
            raise CacheAccountingError(f"{num_slots} slots, blocks of {block_size} tokens; expected 1 or more of each")
        self.block_size = block_size
        self.blocks = BlockPool(num_blocks)
        self.slots = SlotPool(num_slots)
        self._blocks_of: dict[str, list[int]] = {}
        self._slot_of: dict[str, int] = {}

    @property
    def max_tokens(self) -> int:
        """Tokens that one sequence could cache with every block to itself."""
        return self.tokens_in(self.blocks.num_blocks)

    def tokens_in(self, num_blocks: int) -> int:
        """Tokens that num_blocks blocks hold; no bound for a model without paged layers."""
        return num_blocks * self.block_size if self.blocks.num_blocks else sys.maxsize

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that num_tokens tokens of one sequence fill, the last perhaps in part."""
        return -(-num_tokens // self.block_size) if self.blocks.num_blocks else 0

    def can_admit(self, num_tokens: int, reserve: int = 0) -> bool:
        """Whether a slot and the blocks for num_tokens are free, and `reserve` blocks would be left after."""
        return self.slots.num_free > 0 and self.blocks_for(num_tokens) + reserve <= self.blocks.num_free

    def admit(self, seq: str, num_tokens: int) -> tuple[int, list[int]]:
        """Gives `seq` a slot and the blocks for num_tokens: (slot, its block table so far).

        Raises CacheAccountingError when can_admit() says no, or `seq` is admitted already.
        """
        if seq in self._slot_of:
            raise CacheAccountingError(f"sequence {seq!r} was admitted twice")
        if not self.can_admit(num_tokens):
            raise CacheAccountingError(
                f"sequence {seq!r} of {num_tokens} tokens was admitted; "
                f"{self.slots.num_free} slots and {self.blocks.num_free} blocks are free"
            )
        slot = self.slots.allocate()
        blocks = self.blocks.allocate(self.blocks_for(num_tokens))
        self._slot_of[seq] = slot
        self._blocks_of[seq] = blocks
        return slot, blocks[:]

    def grow(self, seq: str, num_tokens: int) -> list[int] | None:
        """The blocks `seq` gets so that it holds num_tokens, at the end of its table; [] if it has enough.

        None, and nothing changes, when too few are free.
        """
        held = self._held(seq)
        need = self.blocks_for(num_tokens) - len(held)
        if need <= 0:
            return []
        if need > self.blocks.num_free:
            return None
        new = self.blocks.allocate(need)
        held.extend(new)
        return new

    def release(self, seq: str) -> None:
        """Frees the slot and every block of `seq` at once. Raises CacheAccountingError when it has none."""
        self.blocks.free(self._held(seq))
        self.slots.free(self._slot_of.pop(seq))
        del self._blocks_of[seq]

    def check_idle(self) -> None:
        """Raises CacheAccountingError that lists what is still taken. For when no sequence should be left."""
        blocks, slots = self.blocks.taken(), self.slots.taken()
        if blocks or slots or self._slot_of:
            raise CacheAccountingError(
                f"leaked at idle: blocks {blocks}, slots {slots}, held by sequences {sorted(self._slot_of)}"
            )

    def _held(self, seq: str) -> list[int]:
        blocks = self._blocks_of.get(seq)
        if blocks is None:
            raise CacheAccountingError(f"sequence {seq!r} holds nothing; it was never admitted or is released")
        return blocks


@dataclass(frozen=True, slots=True)
class MemorySplit:
    """How cache memory is divided. Storage holds one slot and one block more than counted here: the sinks."""

    num_slots: int  # sequences that run at once
    num_blocks: int  # 0 when the model has no paged layer
    block_size: int  # tokens
    max_model_len: int  # tokens of one sequence, prompt and output
    bytes_per_slot: int
    bytes_per_block: int
    memory_bytes: int  # what the cache was offered
    num_slots_from: str = "--max-num-seqs"  # what decided how many sequences run at once

    @property
    def state_bytes(self) -> int:
        return (self.num_slots + 1) * self.bytes_per_slot

    @property
    def blocks_bytes(self) -> int:
        return (self.num_blocks + 1) * self.bytes_per_block

    @property
    def unused_bytes(self) -> int:
        return self.memory_bytes - self.state_bytes - self.blocks_bytes

    def describe(self) -> list[str]:
        """The split in a few lines, for the log at start and `inspect`."""
        lines = [f"cache memory    {_size(self.memory_bytes)}, of which {_size(self.unused_bytes)} stay unused"]
        if self.bytes_per_slot:
            lines.append(
                f"state slots     {_size(self.state_bytes)} = {self.num_slots} sequences + 1 sink"
                f" x {_size(self.bytes_per_slot)}"
            )
        else:
            lines.append(f"state slots     {self.num_slots} sequences, no state kept")
        if self.bytes_per_block:
            lines.append(
                f"blocks          {_size(self.blocks_bytes)} = {self.num_blocks} blocks + 1 sink"
                f" x {_size(self.bytes_per_block)}; {self.num_blocks * self.block_size} tokens"
                f" in blocks of {self.block_size}"
            )
        else:
            lines.append("blocks          none, no layer caches by token")
        lines.append(f"max model len   {self.max_model_len} tokens")
        lines.append(f"max num seqs    {self.num_slots}: {self.num_slots_from}")
        return lines


def default_num_seqs(
    specs: Sequence[LayerSpecs],
    *,
    block_size: int,
    memory_bytes: int,
    device_bytes: int,
    max_model_len: int | None,
    most: int,
) -> tuple[int, str]:
    """Sequences that run at once on a GPU unless --max-num-seqs says how many, and the rule that bound: the least of
    `most`, one for each 128 MiB of the device, and as many as leave two thirds of the cache, and enough for a sequence
    of max_model_len, to blocks.

    Rounded down to a multiple of 8 (of 64 from 64 on); 1 at least.
    """
    limits = [
        (most, f"at most {most} by default"),
        (device_bytes // (DEVICE_MIB_PER_SEQUENCE << 20), f"one for each {DEVICE_MIB_PER_SEQUENCE} MiB of the device"),
    ]
    if slot := bytes_per_sequence(specs):
        limits.append((memory_bytes // STATE_SHARE // slot - 1, "states fill a third of the cache at most"))
        if max_model_len is not None:
            blocks = (1 + -(-max_model_len // block_size)) * bytes_per_token(specs) * block_size
            limits.append(((memory_bytes - blocks) // slot - 1, f"one sequence of {max_model_len} tokens has to fit"))
    fit, rule = min(limits)
    step = 64 if fit >= 64 else 8 if fit >= 8 else 1
    return max(1, fit // step * step), f"{rule} (--max-num-seqs takes another number)"


def split_memory(
    specs: Sequence[LayerSpecs],
    *,
    block_size: int,
    memory_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
    model_max_len: int,
) -> MemorySplit:
    """Divides memory_bytes: state slots first, which cost the same whatever is run, then blocks from the rest.

    No more blocks are taken than max_num_seqs sequences of full length fill. max_model_len None means
    model_max_len (tokens, from the model's config), lowered to what one sequence can cache.
    Raises ConfigError when the slots, or the blocks of one sequence of max_model_len, do not fit.
    """
    for option, value in (("--block-size", block_size), ("--max-num-seqs", max_num_seqs)):
        if value < 1:
            raise ConfigError(f"{option} is {value}; expected 1 or more")
    if memory_bytes < 1:
        raise ConfigError(
            f"{memory_bytes} bytes are left for the cache; raise --cache-memory / --gpu-memory-utilization"
        )
    if max_model_len is not None and not 1 <= max_model_len <= model_max_len:
        raise ConfigError(f"--max-model-len is {max_model_len}; expected 1 to {model_max_len}, the model's own context")

    slot, block = bytes_per_sequence(specs), bytes_per_token(specs) * block_size
    length = max_model_len or model_max_len
    # One sequence of the length that was asked for must run, or one of any length; and a block is the sink.
    least = (1 + (-(-length // block_size) if max_model_len else 1)) * block
    left = memory_bytes - (max_num_seqs + 1) * slot
    if left < least:
        ways = ["raise --cache-memory / --gpu-memory-utilization"]
        if max_model_len and block and (fit := left // block - 1) >= 1:
            ways.append(f"lower --max-model-len to {fit * block_size}")
        if slot and (fit := (memory_bytes - least) // slot - 1) >= 1:
            ways.append(f"lower --max-num-seqs to {fit}")
        raise ConfigError(
            f"the cache has {_size(memory_bytes)}; --max-num-seqs {max_num_seqs} needs"
            f" {_size((max_num_seqs + 1) * slot)} of state and one sequence of"
            f" {f'--max-model-len {length}' if max_model_len else 'any length'} {_size(least)} of blocks;"
            f" {' or '.join(ways)}"
        )
    num_blocks = 0
    if block:
        num_blocks = min(left // block - 1, max_num_seqs * -(-length // block_size))
        if max_model_len is None:
            length = min(length, num_blocks * block_size)
    return MemorySplit(max_num_seqs, num_blocks, block_size, length, slot, block, memory_bytes)


def _size(num_bytes: int) -> str:
    """Bytes for a reader: 1536 -> 1.50 KiB."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    power = min((num_bytes.bit_length() - 1) // 10, 4)
    return f"{num_bytes / 1024**power:.2f} {'KMGT'[power - 1]}iB"
