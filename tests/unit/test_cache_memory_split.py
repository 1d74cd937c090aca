"""How cache memory is divided between state slots and blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.cache.memory import MemorySplit, default_num_seqs, split_memory
from thalweg.cache.specs import LayerSpecs, PagedSpec, StateSpec, bytes_per_sequence, bytes_per_token
from thalweg.errors import ConfigError

GIB = 2**30
PAGED: LayerSpecs = {"latent": PagedSpec((576,), "bfloat16")}  # 1152 bytes per token
STATE: LayerSpecs = {
    "recurrent": StateSpec((32, 128, 128), "float32"),
    "conv": StateSpec((3, 12288), "bfloat16"),
}
KIMI = [STATE] * 20 + [PAGED] * 7


def split(specs: list[LayerSpecs] = KIMI, **options: object) -> MemorySplit:
    defaults = {"block_size": 64, "memory_bytes": 20 * GIB, "max_num_seqs": 64, "max_model_len": None}
    return split_memory(specs, **{**defaults, "model_max_len": 1_048_576, **options})  # type: ignore[arg-type]


def test_the_published_model() -> None:
    s = split()
    assert s.bytes_per_slot == 20 * (2 * 2**20 + 3 * 12288 * 2)
    assert s.bytes_per_block == 64 * 8064
    assert s.num_slots == 64
    assert s.num_blocks == (20 * GIB - 65 * s.bytes_per_slot) // (64 * 8064) - 1
    assert s.max_model_len == 1_048_576
    assert 0 <= s.unused_bytes < s.bytes_per_block
    assert s.state_bytes + s.blocks_bytes + s.unused_bytes == 20 * GIB


def test_no_more_blocks_than_the_sequences_can_fill() -> None:
    s = split(max_num_seqs=4, max_model_len=1000)
    assert s.num_blocks == 4 * 16
    assert s.unused_bytes > 19 * GIB


def test_a_layer_may_keep_several_parts_of_both_kinds() -> None:
    keys = PagedSpec((2, 128), "float8_e4m3fn")
    scales = PagedSpec((2,), "float32")
    layer: LayerSpecs = {"keys": keys, "values": keys, "scales": scales, "state": StateSpec((4, 3), "int8")}
    assert (bytes_per_token([layer]), bytes_per_sequence([layer])) == (2 * 256 + 8, 12)
    assert split([layer, STATE]).bytes_per_block == 64 * (2 * 256 + 8)


def test_a_dtype_that_the_cache_cannot_store() -> None:
    with pytest.raises(
        ValueError, match="'float64'; expected one of float32, int32, bfloat16, float16, float8_e4m3fn, int8"
    ):
        StateSpec((3,), "float64")


def refusal(**options: object) -> str:
    with pytest.raises(ConfigError) as e:
        split(**options)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_max_model_len_is_lowered_only_if_it_was_not_asked_for() -> None:
    s = split(memory_bytes=4 * GIB)
    assert s.max_model_len == s.num_blocks * 64 < 1_048_576
    text = refusal(memory_bytes=4 * GIB, max_model_len=s.max_model_len + 1)
    assert f"lower --max-model-len to {s.max_model_len} or lower --max-num-seqs to 63" in text
    assert split(memory_bytes=4 * GIB, max_model_len=s.max_model_len) == s
    assert split(memory_bytes=4 * GIB, max_model_len=s.max_model_len + 1, max_num_seqs=63).num_slots == 63


def test_slots_that_do_not_fit() -> None:
    assert refusal(memory_bytes=GIB) == (
        "the cache has 1.00 GiB; --max-num-seqs 64 needs 2.63 GiB of state and one sequence of any length"
        " 1008.00 KiB of blocks; raise --cache-memory / --gpu-memory-utilization or lower --max-num-seqs to 23"
    )
    assert split(memory_bytes=GIB, max_num_seqs=23).num_slots == 23
    assert refusal(memory_bytes=GIB, max_num_seqs=24)
    assert refusal(memory_bytes=2**26, max_num_seqs=1).endswith("raise --cache-memory / --gpu-memory-utilization")


def test_slots_fit_and_no_block_does() -> None:
    slots = 65 * split().bytes_per_slot
    assert "lower --max-num-seqs to 63" in refusal(memory_bytes=slots + 2 * 64 * 8064 - 1)
    assert split(memory_bytes=slots + 2 * 64 * 8064).num_blocks == 1


def test_without_paged_layers() -> None:
    s = split([STATE], memory_bytes=GIB)
    assert (s.num_blocks, s.blocks_bytes, s.max_model_len) == (0, 0, 1_048_576)
    assert "blocks          none, no layer caches by token" in s.describe()
    s = split([STATE], memory_bytes=GIB, prefix_caching=True)
    assert s.keeps_prefixes
    assert s.describe()[3].startswith(
        f"prefix cache    {s.snapshot_bytes / 2**20:.2f} MiB = {s.num_snapshots} snapshots"
    )


def test_without_state_layers() -> None:
    s = split([PAGED], memory_bytes=100 * 1152 * 64)
    assert (s.num_slots, s.state_bytes, s.num_blocks, s.max_model_len) == (64, 0, 99, 6336)
    assert "state slots     64 sequences, no state kept" in s.describe()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"block_size": 0}, "--block-size"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"max_model_len": 1_048_577}, "--max-model-len"),
        ({"memory_bytes": 0}, "--cache-memory"),
        ({"memory_bytes": -5}, "--gpu-memory-utilization"),
    ],
)
def test_options_out_of_range(options: dict[str, int], option: str) -> None:
    for specs in (KIMI, [PAGED], [STATE]):
        with pytest.raises(ConfigError, match=option) as e:
            split(specs, **options)
        assert "\n" not in str(e.value)


def test_describe() -> None:
    lines = split([{"s": StateSpec((256,), "float32")}, PAGED], memory_bytes=2**22).describe()
    assert lines == [
        "cache memory    4.00 MiB, of which 71.00 KiB stay unused",
        "state slots     65.00 KiB = 64 sequences + 1 sink x 1.00 KiB",
        "blocks          3.87 MiB = 54 blocks + 1 sink x 72.00 KiB; 3456 tokens in blocks of 64",
        "prefix cache    off (--no-enable-prefix-caching)",
        "max model len   3456 tokens",
        "max num seqs    64: --max-num-seqs",
    ]


def test_snapshots_of_the_published_model() -> None:
    s = split(prefix_caching=True)
    left = 20 * GIB - s.state_bytes
    assert s.num_snapshots == left // 2 // s.bytes_per_slot
    assert s.max_model_len == 1_048_576
    assert s.num_blocks * 64 >= s.max_model_len
    assert s.keeps_prefixes
    assert f"{s.num_snapshots} snapshots of states x 41.41 MiB, as much as blocks of 5384 tokens" in s.describe()[3]


def test_host_memory_is_divided_between_snapshots_and_blocks() -> None:
    s = split(prefix_caching=True, host_bytes=40 * GIB)
    assert s.num_host_snapshots == 20 * GIB // s.bytes_per_slot
    assert 40 * GIB - s.num_host_snapshots * s.bytes_per_slot >= s.num_host_blocks * s.bytes_per_block
    assert 40 * GIB - s.num_host_snapshots * s.bytes_per_slot < (s.num_host_blocks + 1) * s.bytes_per_block
    assert any(line.startswith("host memory     40.00 GiB = 494 snapshots x 41.41 MiB + ") for line in s.describe())
    assert split([PAGED], prefix_caching=True, host_bytes=GIB).num_host_snapshots == 0
    only = split([STATE], memory_bytes=GIB, prefix_caching=True, host_bytes=GIB)
    assert (only.num_host_snapshots, only.num_host_blocks) == (GIB // only.bytes_per_slot, 0)
    with pytest.raises(ConfigError, match=r"--cpu-cache-memory is 1\.00 MiB; expected at least"):
        split(prefix_caching=True, host_bytes=1 << 20)


def test_host_memory_without_a_prefix_cache_is_said_to_be_unused() -> None:
    s = split(host_bytes=GIB)
    assert (s.num_host_blocks, s.num_host_snapshots) == (0, 0)
    assert "host memory     1.00 GiB, unused: the prefix cache is off" in s.describe()


def test_snapshots_are_few_if_few_sequences_run() -> None:
    s = split(max_num_seqs=4, max_model_len=1000, prefix_caching=True)
    assert s.num_snapshots == 16 + 4 * 4
    assert s.num_blocks == 2 * 4 * 16


def test_snapshots_lower_the_length_by_a_quarter_unless_it_was_asked_for() -> None:
    whole = split(memory_bytes=4 * GIB)
    s = split(memory_bytes=4 * GIB, prefix_caching=True)
    assert 0.7 * whole.max_model_len < s.max_model_len < 0.8 * whole.max_model_len
    assert s.keeps_prefixes
    asked = split(memory_bytes=4 * GIB, max_model_len=whole.max_model_len, prefix_caching=True)
    assert (asked.num_snapshots, asked.keeps_prefixes) == (0, False)
    assert asked.max_model_len == whole.max_model_len
    assert "prefix cache    off: one sequence of --max-model-len leaves no room" in asked.describe()[3]


def test_prefixes_without_states_need_no_snapshots() -> None:
    s = split([PAGED], memory_bytes=GIB, prefix_caching=True)
    assert (s.num_snapshots, s.keeps_prefixes) == (0, True)
    assert "prefix cache    on; every full block can be shared" in s.describe()


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 2**24),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 5000)),
    st.integers(0, 2000),
    st.integers(0, 50),
    st.booleans(),
)
def test_a_split_fits_and_wastes_nothing(
    block_size: int, memory: int, seqs: int, length: int | None, state: int, values: int, prefixes: bool
) -> None:
    specs: list[LayerSpecs] = [{"s": StateSpec((state,), "float32")}] if state else []
    specs += [{"v": PagedSpec((values,), "float32")}] if values else []
    try:
        s = split_memory(
            specs,
            block_size=block_size,
            memory_bytes=memory,
            max_num_seqs=seqs,
            max_model_len=length,
            model_max_len=5000,
            prefix_caching=prefixes,
        )
    except ConfigError:
        need = 1 if length is None else -(-length // block_size)
        assert (seqs + 1) * state * 4 + (need + 1) * block_size * values * 4 > memory
        return
    full = -(-s.max_model_len // block_size)
    assert s.unused_bytes >= 0
    assert s.max_model_len == length or length is None
    if values:
        assert full <= s.num_blocks <= seqs * full * (2 if prefixes else 1)
        assert s.num_blocks >= seqs * full or s.unused_bytes < s.bytes_per_block
    else:
        assert s.num_blocks == 0


def default(
    cache: float, device: float, specs: list[LayerSpecs] = KIMI, max_model_len: int | None = None
) -> tuple[int, str]:
    """Of `cache` and `device` GiB."""
    memory = {"memory_bytes": int(cache * GIB), "device_bytes": int(device * GIB)}
    return default_num_seqs(specs, block_size=64, max_model_len=max_model_len, most=512, **memory)


@pytest.mark.parametrize(
    ("cache", "device", "seqs", "because"),
    [
        (34, 139.8, 256, "states fill a third of the cache"),  # the published model in bfloat16 on one H200
        (79, 139.8, 512, "at most 512"),  # in float8
        (34, 31.5, 192, "one for each 128 MiB of the device"),
        (4, 24, 24, "states fill a third of the cache"),
        (0.3, 24, 1, "states fill a third of the cache"),
    ],
)
def test_sequences_by_default_fit_the_device(cache: float, device: float, seqs: int, because: str) -> None:
    n, reason = default(cache, device)
    assert n == seqs
    assert because in reason
    s = split(memory_bytes=int(cache * GIB), max_num_seqs=n)
    assert n == 1 or s.state_bytes <= s.memory_bytes / 3


def test_sequences_by_default_leave_room_for_the_length_that_was_asked_for() -> None:
    n, reason = default(10, 139.8, max_model_len=1_048_576)
    assert (n, default(10, 139.8)[0]) == (48, 64)
    assert "1048576 tokens" in reason
    assert split(memory_bytes=10 * GIB, max_num_seqs=n, max_model_len=1_048_576).max_model_len == 1_048_576


def test_sequences_by_default_without_states() -> None:
    assert default(1, 24, [PAGED] * 7)[0] == 192
