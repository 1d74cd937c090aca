"""What an engine is told: one frozen dataclass, checked when it is made, completed once by resolve()."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from thalweg.errors import ConfigError
from thalweg.quant import QUANTIZATIONS

DTYPES = ("auto", "float32", "bfloat16", "float16")
STATE_DTYPES = ("float32", "bfloat16")
SNAPSHOT_DTYPES = ("auto", "bfloat16", "int8")
LOAD_FORMATS = ("auto", "dummy", "safetensors")
EXECUTOR_BACKENDS = ("mp", "ray")
MAX_TENSOR_PARALLEL = 1024
MAX_DATA_PARALLEL = 1024

_DEVICE = re.compile(r"auto|cpu|(?:cuda|xpu|mps)(?::\d{1,3})?")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine. Raises ConfigError, in the command line's spelling, on a value out of range.

    model: a folder, a GGUF file, or OWNER/NAME on a hub; None is the bundled model.
    revision: branch, tag or commit of OWNER/NAME.
    tokenizer: another folder to take tokenizer and chat template from.
    generation_config: where sampling defaults come from: "auto" is the model's generation_config.json, a folder has
        another one, "vllm" and "none" are the engine's own.
    dtype: of weights and activations; "auto" is float32 on a CPU, else the checkpoint's.
    quantization: "fp8" quantizes the experts' weights while they are loaded.
    dequantize: whether weights in GGUF's blocks become `dtype` while they are loaded. None: on an accelerator, whose
        kernels need that, and not on a CPU.
    quantize_activations: whether products with quantized weights may round activations to 8 bits.
    state_dtype: what recurrent states are stored in, whatever they are computed in.
    device: "auto", "cpu", "cuda" or "cuda:N".
    max_num_seqs: sequences that run at once. None: 64 on a CPU; on a GPU what its memory allows
        (cache.memory.default_num_seqs).
    max_num_batched_tokens: tokens of one step at most. None: 16384 on an accelerator, where a step that reads all
        experts anyway should have many tokens, and 2048 on a CPU.
    long_prefill_token_threshold: tokens of a prompt at most in a step that also decodes, which has twice as many of
        all prompts; 0 is as many as fit.
    max_model_len: tokens of a request at most, prompt and output. None: the model's context length, or what fits.
    block_size: tokens per block of the cache.
    enable_prefix_caching: whether what was computed of prompts and answers is kept for prompts that begin alike.
    snapshot_interval: prompt tokens after which the prefix cache takes a further snapshot of a model's states.
    snapshot_dtype: what snapshots of recurrent states are stored in: "auto" as the states are, or rounded to
        "bfloat16" or "int8".
    cpu_cache_memory: bytes of host memory per rank for what has to leave the prefix cache on the device.
    cache_folder: where the prefix cache is written when the engine ends, and read from when it starts.
    cache_folder_size: bytes in `cache_folder` at most, over all ranks. None: everything.
    cache_memory: bytes for blocks, states and snapshots, instead of `gpu_memory_utilization`.
    gpu_memory_utilization: share of the device's memory for weights and cache.
    tensor_parallel_size: ranks that share the model.
    data_parallel_size: ranks that each serve requests of their own, with their own cache.
    enable_expert_parallel: whether data-parallel ranks divide the routed experts.
    expert_placement: a file that says which rank has which experts (assembly/expert_placement.py). None: in order.
    nnodes: hosts that the ranks are spread over, evenly and in order.
    node_rank: which of them this one is; node 0 has the server, or the LLM.
    master_addr, master_port: node 0's address, and the first of `nnodes` ports there, for the other hosts.
    distributed_executor_backend: "mp" starts ranks as processes of this host, and of those that join it (`nnodes`);
        "ray" has a Ray cluster place them.
    load_format: "auto" or "safetensors" read the checkpoint, "dummy" draws random weights.
    seed: of sampling and of dummy weights.
    enforce_eager: whether steps run without CUDA graphs, and on a CPU without being recorded.
    expert_metrics: whether data-parallel ranks are to count the tokens of each expert, which CUDA graphs do not: their
        steps are padded with tokens that are nobody's.
    prefill_graph_tokens: steps with so many prompt tokens at most run as CUDA graphs, if there are graphs for so many.
        None: on one rank 2048, or 4096 with more than 32 layers, or with data-parallel ones; 4096 on two of one host,
        which are done with a prompt before its kernels are launched; and 0 otherwise.
    step_timeout: seconds after which a step that has not ended ends the engine.
    config_file: a config.json to run with dummy weights.
    num_layers: how many of the model's layers run, with dummy weights.
    ignore_config_key: keys of config.json that are ignored.
    op_preference: an op's name, or "*", to the implementation that must serve it.
    """

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    generation_config: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    dequantize: bool | None = None
    quantize_activations: bool = True
    state_dtype: str = "float32"
    device: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int = 4096
    max_model_len: int | None = None
    block_size: int = 64
    enable_prefix_caching: bool = True
    snapshot_interval: int = 8192
    snapshot_dtype: str = "auto"
    cpu_cache_memory: int | None = None
    cache_folder: str | None = None
    cache_folder_size: int | None = None
    cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    expert_placement: str | None = None
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    distributed_executor_backend: str = "mp"
    load_format: str = "auto"
    seed: int = 0
    enforce_eager: bool = False
    expert_metrics: bool = False
    prefill_graph_tokens: int | None = None
    step_timeout: float = 300.0
    config_file: str | None = None
    num_layers: int | None = None
    ignore_config_key: Sequence[str] = ()
    op_preference: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._integer("max_num_seqs", 1, 65_536, optional=True)
        self._integer("max_num_batched_tokens", 1, 2**24, optional=True)
        self._integer("long_prefill_token_threshold", 0, 2**24)
        self._integer("max_model_len", 1, 2**31 - 1, optional=True)
        self._integer("prefill_graph_tokens", 0, 2**24, optional=True)
        self._integer("block_size", 1, 65_536)
        self._integer("cache_memory", 1, 2**50, optional=True)
        self._integer("cpu_cache_memory", 1, 2**50, optional=True)
        self._integer("cache_folder_size", 1, 2**50, optional=True)
        self._integer("tensor_parallel_size", 1, MAX_TENSOR_PARALLEL)
        self._integer("data_parallel_size", 1, MAX_DATA_PARALLEL)
        self._need(isinstance(self.enable_expert_parallel, bool), "enable_expert_parallel", "true or false")
        self._check_data_parallel()
        self._integer("num_layers", 1, 1_000, optional=True)
        self._integer("seed", -(2**63), 2**64 - 1)
        share = self.gpu_memory_utilization
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        self._need(
            is_number and math.isfinite(share) and 0 < share <= 1,
            "gpu_memory_utilization",
            "a number in (0, 1]",
        )
        self._need(self.dtype in DTYPES, "dtype", _one_of(DTYPES))
        self._need(
            self.quantization is None or self.quantization in QUANTIZATIONS,
            "quantization",
            f"{_one_of(QUANTIZATIONS)}, or none at all",
        )
        self._need(self.state_dtype in STATE_DTYPES, "state_dtype", " or ".join(STATE_DTYPES))
        self._need(self.snapshot_dtype in SNAPSHOT_DTYPES, "snapshot_dtype", _one_of(SNAPSHOT_DTYPES))
        self._need(self.load_format in LOAD_FORMATS, "load_format", _one_of(LOAD_FORMATS))
        for name, kind in (
            ("model", "a folder"),
            ("revision", "a branch, tag or commit"),
            ("tokenizer", "a folder"),
            ("config_file", "a config.json"),
            ("expert_placement", "a file"),
        ):
            value = getattr(self, name)
            self._need(value is None or (isinstance(value, str) and value != ""), name, kind)
        source = self.generation_config
        self._need(isinstance(source, str) and source != "", "generation_config", "auto, vllm, none or a folder")
        if self.load_format != "dummy":
            for option, value in (("--config-file", self.config_file), ("--num-layers", self.num_layers)):
                if value is not None:
                    raise ConfigError(f"{option} is {value!r}, which needs --load-format dummy")
        seconds = self.step_timeout
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        self._need(is_number and 0 < seconds <= 1e6, "step_timeout", "a number of seconds above 0")
        self._integer("snapshot_interval", 1, 2**31 - 1)
        self._need(isinstance(self.enforce_eager, bool), "enforce_eager", "true or false")
        self._need(isinstance(self.enable_prefix_caching, bool), "enable_prefix_caching", "true or false")
        if self.cpu_cache_memory is not None and not self.enable_prefix_caching:
            raise ConfigError("--cpu-cache-memory is for the prefix cache, which --no-enable-prefix-caching turns off")
        if self.cache_folder is not None and self.cpu_cache_memory is None:
            raise ConfigError("--cache-folder keeps what is in host memory; expected --cpu-cache-memory too")
        if self.cache_folder_size is not None and self.cache_folder is None:
            raise ConfigError("--cache-folder-size is given without --cache-folder; expected both")
        self._check_nodes()
        self._need(isinstance(self.dequantize, bool | None), "dequantize", "true or false")
        self._need(isinstance(self.quantize_activations, bool), "quantize_activations", "true or false")
        device = self.device
        self._need(isinstance(device, str) and bool(_DEVICE.fullmatch(device)), "device", "auto, cpu, cuda or cuda:N")
        keys = self.ignore_config_key
        keys_ok = isinstance(keys, (list, tuple)) and all(isinstance(key, str) and key for key in keys)
        self._need(keys_ok, "ignore_config_key", "names of keys in config.json")
        object.__setattr__(self, "ignore_config_key", tuple(keys))
        prefer = self.op_preference
        pairs_ok = isinstance(prefer, Mapping) and all(isinstance(x, str) and x for kv in prefer.items() for x in kv)
        self._need(pairs_ok, "op_preference", "a mapping of op names to implementation names")
        # A copy nobody can write to: a frozen config must not change through the caller's dict.
        object.__setattr__(self, "op_preference", MappingProxyType(dict(prefer)))

    def _check_nodes(self) -> None:
        self._integer("nnodes", 1, MAX_TENSOR_PARALLEL)
        self._integer("node_rank", 0, self.nnodes - 1)
        self._integer("master_port", 1, 65_536 - self.nnodes)
        self._need(isinstance(self.master_addr, str) and self.master_addr != "", "master_addr", "node 0's address")
        option, size = "--tensor-parallel-size", self.tensor_parallel_size
        if self.data_parallel_size > 1:  # the ranks that share a model are on one host
            option, size = "--data-parallel-size", self.data_parallel_size
        if size % self.nnodes:
            raise ConfigError(f"--nnodes is {self.nnodes}; it must divide {option}, which is {size}")
        backend = self.distributed_executor_backend
        self._need(backend in EXECUTOR_BACKENDS, "distributed_executor_backend", _one_of(EXECUTOR_BACKENDS))
        if backend == "ray" and (self.nnodes > 1 or self.tensor_parallel_size == 1):
            raise ConfigError(
                "--distributed-executor-backend ray places the ranks of --tensor-parallel-size, which is"
                f" {self.tensor_parallel_size}; expected 2 or more, and no --nnodes"
            )
        if self.cache_folder is not None and not self.one_host:
            raise ConfigError("--cache-folder needs all ranks on one host; expected neither --nnodes nor Ray with it")

    @property
    def one_host(self) -> bool:
        """Whether all ranks are sure to be on this host."""
        return self.nnodes == 1 and self.distributed_executor_backend == "mp"

    @property
    def ranks_per_node(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size // self.nnodes

    @property
    def nodes_per_model(self) -> int:
        """Over how many hosts the tensor-parallel ranks of one model are spread."""
        return self.nnodes if self.data_parallel_size == 1 else 1

    @property
    def tensor_ranks_here(self) -> range:
        """The tensor-parallel ranks on this host of each model that is here."""
        count = self.tensor_parallel_size // self.nodes_per_model
        first = 0 if self.nodes_per_model == 1 else self.node_rank * count
        return range(first, first + count)

    def data_ranks_of(self, node: int) -> range:
        """The data-parallel ranks on a host, or of which it has a part."""
        if self.data_parallel_size == 1:
            return range(1)
        count = self.data_parallel_size // self.nnodes
        return range(node * count, (node + 1) * count)

    def resolve(self, *, device: str, checkpoint_dtype: str, context_len: int, layers: int) -> EngineConfig:
        """The same options with every "auto" decided, given what the machine and the checkpoint are. `max_num_seqs`
        stays open, since it waits for what the weights leave of the memory.

        `device` is what "auto" stands for here. dtype "auto" is the checkpoint's own on an accelerator; on a
        CPU it is float32, since bfloat16 is slow there and less exact. Raises ConfigError when
        --max-model-len is more than `context_len`, the model's context length in tokens.
        """
        if self.max_model_len is not None and self.max_model_len > context_len:
            raise ConfigError(
                f"--max-model-len is {self.max_model_len}; expected at most {context_len}, the model's context length"
            )
        chosen = device if self.device == "auto" else self.device
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if chosen == "cpu" else checkpoint_dtype
        load_format = "auto" if self.load_format == "safetensors" else self.load_format
        tokens = self.max_num_batched_tokens or (2048 if chosen == "cpu" else 16384)
        return replace(
            self,
            device=chosen,
            dtype=dtype,
            dequantize=chosen != "cpu" if self.dequantize is None else self.dequantize,
            load_format=load_format,
            max_num_batched_tokens=tokens,
            prefill_graph_tokens=self._graph_tokens(layers),
        )

    def _check_data_parallel(self) -> None:
        size = f"--data-parallel-size is {self.data_parallel_size}"
        if self.enable_expert_parallel and self.data_parallel_size == 1:
            raise ConfigError(f"--enable-expert-parallel divides experts among data-parallel ranks; {size}, raise it")
        if self.expert_placement is not None and self.data_parallel_size == 1:
            raise ConfigError(f"--expert-placement places experts on data-parallel ranks; {size}, raise it")
        if self.expert_metrics and self.data_parallel_size == 1:
            raise ConfigError(f"--expert-metrics counts what data-parallel ranks exchange; {size}, raise it")
        if self.data_parallel_size == 1:
            return
        if not self.enable_expert_parallel:
            raise ConfigError(f"{size}, which needs --enable-expert-parallel: ranks with all experts are not offered")
        if self.distributed_executor_backend == "ray":
            raise ConfigError(f"{size}, whose ranks Ray does not place; start the hosts with --nnodes")
        if self.cache_folder is not None:
            raise ConfigError(f"{size}, and --cache-folder is for one rank; leave one of them out")

    def _graph_tokens(self, layers: int) -> int:
        if self.prefill_graph_tokens is not None:
            return self.prefill_graph_tokens
        if self.nodes_per_model > 1:
            return 0  # graphs with NCCL's sums of prompts inside, as with more than two ranks, have not been run yet
        # Launching takes as long as there are layers, about a millisecond for each.
        alone = layers <= 32 and self.data_parallel_size == 1
        return {1: 2048 if alone else 4096, 2: 4096}.get(self.tensor_parallel_size, 0)

    @property
    def keeps_halves(self) -> bool:
        """Whether matrices that a GGUF file has in 16 bits are multiplied as they are. Of a resolved config."""
        return self.device == "cpu" and self.dtype == "float32" and self.quantization is None and not self.dequantize

    def to_dict(self) -> dict[str, Any]:
        """Plain values by option name, for messages; EngineConfig(**d) gives the same config."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **values,
            "ignore_config_key": list(self.ignore_config_key),
            "op_preference": dict(self.op_preference),
        }

    def _integer(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        expected = f"an integer from {low} to {high}"
        self._need(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high, name, expected)

    def _need(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is {getattr(self, name)!r}; expected {expected}")


def parse_size(text: str, option: str) -> int:
    """The integer a size stands for: "4096", "32k", "1.5m", "2GiB", "40gb".

    A suffix means powers of 1024 ("32k" is 32768), except kb, mb, gb and tb, which mean powers of 1000.
    Raises ConfigError that names `option`.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{option} is {text!r}; expected a size such as 4096, 32k, 1m or 2GiB")
    number, suffix, binary, is_bytes = match.groups()
    base = 1000 if is_bytes and not binary else 1024
    value = float(number) * base ** " kmgt".index(suffix.lower() or " ")
    if not value.is_integer() or value > 2**53:
        raise ConfigError(f"{option} is {text!r}, which is not a whole number below 2**53; expected e.g. 4096 or 32k")
    return int(value)


def _one_of(names: tuple[str, ...]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
