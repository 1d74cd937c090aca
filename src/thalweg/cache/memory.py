"""How cache memory is divided between state slots, snapshots and blocks, and how many sequences run at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thalweg.cache.specs import LayerSpecs, bytes_per_sequence, bytes_per_snapshot, bytes_per_token
from thalweg.errors import ConfigError

# Of the default --max-num-seqs on a GPU. A row of a step also costs memory outside the cache, logits that decode graphs
# keep and activations, so that small devices run fewer; and blocks, not states, are what long sequences need.
DEVICE_MIB_PER_SEQUENCE = 128
STATE_SHARE = 3
STAGED = 8  # snapshots that one step's prefills may write if they are packed after
SNAPSHOTS_LEAST, SNAPSHOTS_PER_SEQUENCE = 16, 4  # at most, in sum


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
    prefix_caching: bool = False
    num_snapshots: int = 0  # of states, for the prefix cache
    bytes_per_snapshot: int = 0
    snapshot_dtype: str = "auto"
    num_staged: int = 0  # rows of states that prefills write snapshots to before they are packed
    host_bytes: int = 0  # what the prefix cache was offered of host memory
    num_host_blocks: int = 0
    num_host_snapshots: int = 0

    @property
    def state_bytes(self) -> int:
        return (self.num_slots + 1) * self.bytes_per_slot

    @property
    def blocks_bytes(self) -> int:
        return (self.num_blocks + 1) * self.bytes_per_block

    @property
    def unused_bytes(self) -> int:
        return self.memory_bytes - self.state_bytes - self.snapshot_bytes - self.blocks_bytes

    @property
    def snapshot_bytes(self) -> int:
        return self.num_snapshots * self.bytes_per_snapshot + self.num_staged * self.bytes_per_slot

    @property
    def keeps_prefixes(self) -> bool:
        """Whether the prefix cache is on and can serve anything: a model with states needs snapshots of them."""
        return self.prefix_caching and (self.num_snapshots > 0 or not self.bytes_per_slot)

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
        lines.append(f"prefix cache    {self._describe_prefixes()}")
        if self.host_bytes:
            lines.append(f"host memory     {self._describe_host()}")
        lines.append(f"max model len   {self.max_model_len} tokens")
        lines.append(f"max num seqs    {self.num_slots}: {self.num_slots_from}")
        return lines

    def _describe_host(self) -> str:
        if not self.keeps_prefixes:
            return f"{_size(self.host_bytes)}, unused: the prefix cache is off"
        parts = []
        if self.num_host_snapshots:
            parts.append(f"{self.num_host_snapshots} snapshots x {_size(self.bytes_per_snapshot)}")
        if self.num_host_blocks:
            parts.append(f"{self.num_host_blocks} blocks x {_size(self.bytes_per_block)}")
        return f"{_size(self.host_bytes)} = {' + '.join(parts)}, for what falls out of the device's cache"

    def _describe_prefixes(self) -> str:
        if not self.prefix_caching:
            return "off (--no-enable-prefix-caching)"
        if not self.bytes_per_slot:
            return "on; every full block can be shared"
        if not self.num_snapshots:
            return (
                "off: one sequence of --max-model-len leaves no room for a snapshot of states; lower it or"
                " --max-num-seqs, or raise --cache-memory / --gpu-memory-utilization"
            )
        each = self.bytes_per_snapshot
        line = f"{_size(self.snapshot_bytes)} = {self.num_snapshots} snapshots of states x {_size(each)}"
        if self.num_staged:
            line += (
                f" in {self.snapshot_dtype} + {self.num_staged} that are being written x {_size(self.bytes_per_slot)}"
            )
        if self.bytes_per_block:
            line += f", as much as blocks of {each * self.block_size // self.bytes_per_block} tokens"
        return line


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
    prefix_caching: bool = False,
    host_bytes: int = 0,
    snapshot_dtype: str = "auto",
) -> MemorySplit:
    """Divides memory_bytes: state slots first, which cost the same whatever is run, then snapshots of states if
    prefixes are cached, then blocks from the rest.

    No more blocks are taken than max_num_seqs sequences of full length fill, or twice that if prefixes are cached.
    max_model_len None means model_max_len (tokens, from the model's config), lowered to what one sequence can cache.
    Snapshots get half of what the slots leave, since blocks without a snapshot are of no use to the next request, nor
    snapshots without blocks; but not what one sequence of full length needs, be it that its length is lowered, when
    they get a quarter. There are at most 16 and 4 for each sequence that runs, and as many more as a `snapshot_dtype`
    makes them smaller. `host_bytes` of host memory are divided between snapshots and blocks in halves, or go to what
    there is of them.
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
    num_snapshots = num_staged = 0
    snapshot = bytes_per_snapshot(specs, snapshot_dtype)
    if prefix_caching and slot:
        full = (1 + -(-length // block_size)) * block
        room = max(left - full, 0 if max_model_len else min(left // 4, left - least))
        num_staged = 0 if snapshot_dtype == "auto" else STAGED
        share = min(left // 2, room) - num_staged * slot
        most = SNAPSHOTS_LEAST + SNAPSHOTS_PER_SEQUENCE * max_num_seqs
        num_snapshots = max(0, min(share // snapshot, most * slot // snapshot))
        num_staged = num_staged if num_snapshots else 0
        left -= num_snapshots * snapshot + num_staged * slot
    num_blocks = 0
    if block:
        most = max_num_seqs * -(-length // block_size) * (2 if prefix_caching else 1)
        num_blocks = min(left // block - 1, most)
        if max_model_len is None:
            length = min(length, num_blocks * block_size)
    split = MemorySplit(max_num_seqs, num_blocks, block_size, length, slot, block, memory_bytes)
    split = replace(
        split,
        prefix_caching=prefix_caching,
        num_snapshots=num_snapshots,
        bytes_per_snapshot=snapshot,
        snapshot_dtype=snapshot_dtype,
        num_staged=num_staged,
        host_bytes=host_bytes,
    )
    if not split.keeps_prefixes or not host_bytes:
        return split
    host_snapshots = host_bytes // (2 if block else 1) // snapshot if slot else 0
    host_blocks = (host_bytes - host_snapshots * snapshot) // block if block else 0
    if (slot and not host_snapshots) or (block and not host_blocks):
        raise ConfigError(
            f"--cpu-cache-memory is {_size(host_bytes)}; expected at least {_size(2 * max(snapshot, block))}, which"
            " holds a block and a snapshot of states, or leave it out"
        )
    return replace(split, num_host_snapshots=host_snapshots, num_host_blocks=host_blocks)


def _size(num_bytes: int) -> str:
    """Bytes for a reader: 1536 -> 1.50 KiB."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    power = min((num_bytes.bit_length() - 1) // 10, 4)
    return f"{num_bytes / 1024**power:.2f} {'KMGT'[power - 1]}iB"
