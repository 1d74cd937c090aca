"""What an engine says of itself once it is built: plain data for the front end, `inspect`, logs and metrics."""

from __future__ import annotations

import msgspec


class OpSpan(msgspec.Struct, frozen=True):
    """Who serves an op for `first` to `last` tokens; None: no end."""

    first: int
    last: int | None
    implementation: str

    def __str__(self) -> str:
        tokens = f"{self.first}-{self.last or ''}" if self.last != self.first else f"{self.first}"
        return self.implementation if tokens == "1-" else f"{tokens}: {self.implementation}"


class OpChoice(msgspec.Struct, frozen=True):
    """What serves an op, for which dimensions, by the number of tokens, and why each other one serves none."""

    op: str
    dims: dict[str, bool | int | str | tuple[int, ...]]
    table: list[OpSpan]  # in ascending order, without gaps
    refused: list[tuple[str, str]]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # the served model's name: its folder's last part
    folder: str
    architecture: str
    device: str
    dtype: str
    state_dtype: str  # that recurrent states are stored in
    quantization: str | None  # of the experts' weights
    tensor_parallel_size: int
    data_parallel_size: int
    experts: str | None  # how data-parallel ranks divide them
    vocab_size: int
    parameters: int  # over all ranks, as the checkpoint counts them
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int  # tokens of a prompt beside rows that decode, at most; 0: as many as fit
    block_size: int
    num_blocks: int
    num_slots: int
    keeps_prefixes: bool  # whether the prefix cache is on
    num_snapshots: int  # of states, for the prefix cache
    bytes_per_snapshot: int  # per rank
    num_staged: int  # snapshots that a step's prefills may write; 0: any number
    snapshot_interval: int  # tokens
    num_host_blocks: int  # places in host memory for what falls out of the device's cache
    num_host_snapshots: int
    identity: str  # of the model, this version and all else that cached bytes depend on
    bytes_per_token: int  # paged cache, per rank
    bytes_per_sequence: int  # state, per rank
    weight_bytes: int  # per rank
    memory_split: list[str]
    layers: list[str]  # one line each: what it is and what it caches
    eos_token_ids: list[int]
    decode_steps: str  # how steps of decode rows alone run, and why
    prefill_steps: str  # and those with prompts
    ops: list[OpChoice]
    start_seconds: dict[str, float]  # what building took, part by part, in order

    @property
    def most_session_points(self) -> int | None:
        """Points that sessions may keep: as many as half of the snapshots, 1 at least; None if nothing needs any."""
        if not self.bytes_per_sequence or not self.keeps_prefixes:
            return None
        return max(1, (self.num_snapshots + self.num_host_snapshots) // 2)

    @property
    def sequences_at_once(self) -> int:
        """Over all data-parallel ranks."""
        return self.max_num_seqs * self.data_parallel_size

    @property
    def load_seconds(self) -> float:
        return sum(self.start_seconds.values())
