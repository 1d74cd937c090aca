"""Options that several commands share, each written once: groups of parameters, and how a command takes a group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from thalweg.config.engine import EngineConfig, parse_size
from thalweg.core import SamplingParams
from thalweg.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., None])
_DEFAULTS = EngineConfig()  # checked, and the same as every other entry has
_ENGINE, _SAMPLING = "Engine", "Sampling"


def _engine(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_ENGINE, **options)


def _hosts(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Several hosts, which share THALWEG_CLUSTER_KEY", **options)


def _sampling(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_SAMPLING, **options)


def engine_config(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, GGUF file, or OWNER/NAME on Hugging Face. Default: the bundled model.",
        ),
    ] = None,
    revision: Annotated[
        str | None, _engine(metavar="REVISION", help="Branch, tag or commit of a MODEL named OWNER/NAME.")
    ] = None,
    tokenizer: Annotated[
        str | None, _engine(metavar="FOLDER", help="Folder of another tokenizer and chat template.")
    ] = None,
    generation_config: Annotated[
        str,
        _engine(
            metavar="SOURCE",
            help="Where sampling defaults come from: auto is the model's generation_config.json, FOLDER has another"
            " one, vllm or none are the engine's own.",
        ),
    ] = _DEFAULTS.generation_config,
    dtype: Annotated[
        str,
        _engine(help="auto, float32, bfloat16 or float16. auto is float32 on a CPU, else the checkpoint's."),
    ] = "auto",
    quantization: Annotated[
        str | None,
        _engine(
            metavar="METHOD", help="fp8 quantizes the experts' weights while they are loaded. Default: no quantization."
        ),
    ] = None,
    dequantize: Annotated[
        bool | None,
        _engine(
            "--dequantize/--no-dequantize",
            help="Convert a GGUF file's quantized weights to --dtype while they are loaded, or keep them quantized."
            " Default: keep them on a CPU, convert them on a GPU.",
        ),
    ] = None,
    quantize_activations: Annotated[
        bool,
        _engine(
            "--quantize-activations/--no-quantize-activations",
            help="Allow products with quantized weights to round activations to 8 bits where that is faster: a GGUF"
            " file's on a CPU, as in llama.cpp, and prompts over float8.",
        ),
    ] = _DEFAULTS.quantize_activations,
    state_dtype: Annotated[
        str,
        _engine(
            help="float32 or bfloat16. bfloat16 halves the memory and traffic of recurrent states, but rounds them at"
            " every token, so that long outputs lose accuracy."
        ),
    ] = _DEFAULTS.state_dtype,
    device: Annotated[str, _engine(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_model_len: Annotated[
        str | None,
        _engine(
            metavar="TOKENS",
            help="Most tokens of one request, prompt and output, e.g. 32k. Default: the model's, or what fits.",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        _engine(
            metavar="N",
            help="Most sequences that run at once. Default: 64 on a CPU, else what fits, up to 512.",
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        str | None,
        _engine(metavar="TOKENS", help="Most tokens of one step, e.g. 8k. Default: 2k on a CPU, else 16k."),
    ] = None,
    long_prefill_token_threshold: Annotated[
        str,
        _engine(
            metavar="TOKENS",
            help="Most tokens of a prompt in a step that also decodes, e.g. 2k. With fewer, long prompts delay other"
            " requests less and take longer. 0 is as many as fit.",
        ),
    ] = str(_DEFAULTS.long_prefill_token_threshold),
    block_size: Annotated[int, _engine(metavar="TOKENS", help="Tokens per block of the cache.")] = _DEFAULTS.block_size,
    enable_prefix_caching: Annotated[
        bool,
        _engine(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Prefix cache: keep what was computed, so that a prompt that begins alike costs only its new tokens.",
        ),
    ] = _DEFAULTS.enable_prefix_caching,
    snapshot_interval: Annotated[
        str,
        _engine(
            metavar="TOKENS",
            help="Prefix cache: take a snapshot of the states every so many tokens of a long prompt, and at its end.",
        ),
    ] = f"{_DEFAULTS.snapshot_interval // 1024}k",
    snapshot_dtype: Annotated[
        str,
        _engine(
            help="Prefix cache: auto keeps snapshots as they are. bfloat16 and int8 round their recurrent states: more"
            " snapshots fit, and prompts that continue from them differ a little."
        ),
    ] = _DEFAULTS.snapshot_dtype,
    cpu_cache_memory: Annotated[
        str | None,
        _engine(
            metavar="SIZE",
            help="Prefix cache: host memory per rank for what has to leave the device, e.g. 32GiB. It comes back when a"
            " prompt needs it. Default: none.",
        ),
    ] = None,
    cache_folder: Annotated[
        str | None,
        _engine(
            metavar="FOLDER",
            help="Prefix cache: write it here at the end, and read it at the next start of the same model. Needs"
            " --cpu-cache-memory. The files contain what prompts said.",
        ),
    ] = None,
    cache_folder_size: Annotated[
        str | None, _engine(metavar="SIZE", help="Most bytes in --cache-folder, over all ranks. Default: everything.")
    ] = None,
    cache_memory: Annotated[
        str | None,
        _engine(
            metavar="SIZE",
            help="Memory for blocks, states and snapshots, e.g. 4GiB, instead of --gpu-memory-utilization.",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, _engine(metavar="SHARE", help="Share of a GPU's memory for weights and cache.")
    ] = _DEFAULTS.gpu_memory_utilization,
    tensor_parallel_size: Annotated[
        int,
        _engine("--tensor-parallel-size", "-tp", metavar="N", help="Number of ranks (GPUs) that share the model."),
    ] = _DEFAULTS.tensor_parallel_size,
    data_parallel_size: Annotated[
        int,
        _engine(
            "--data-parallel-size",
            "-dp",
            metavar="N",
            help="Number of ranks (GPUs) that each serve requests of their own. Needs --enable-expert-parallel.",
        ),
    ] = _DEFAULTS.data_parallel_size,
    enable_expert_parallel: Annotated[
        bool,
        _engine("--enable-expert-parallel", help="Divide the routed experts over the data-parallel ranks."),
    ] = _DEFAULTS.enable_expert_parallel,
    expert_placement: Annotated[
        str | None,
        _engine(
            metavar="FILE", help="Which data-parallel rank has which experts, with copies: a file of place-experts."
        ),
    ] = None,
    nnodes: Annotated[
        int, _hosts(metavar="N", help="Hosts that the ranks are spread over, evenly; all run the same command.")
    ] = _DEFAULTS.nnodes,
    node_rank: Annotated[
        int, _hosts(metavar="K", help="Which host this is: node 0 serves requests, others only run their ranks.")
    ] = _DEFAULTS.node_rank,
    master_addr: Annotated[
        str, _hosts(metavar="ADDRESS", help="Address of node 0 in the network of the hosts.")
    ] = _DEFAULTS.master_addr,
    master_port: Annotated[
        int, _hosts(metavar="PORT", help="Port of node 0 for the other hosts; the --nnodes - 1 ports after it, too.")
    ] = _DEFAULTS.master_port,
    distributed_executor_backend: Annotated[
        str, _hosts(metavar="BACKEND", help="mp starts ranks as processes; ray has a running Ray cluster place them.")
    ] = _DEFAULTS.distributed_executor_backend,
    load_format: Annotated[
        str, _engine(help="auto reads the checkpoint; dummy draws random weights of the real shapes.")
    ] = "auto",
    seed: Annotated[int, _engine(metavar="S", help="Seed of sampling and of dummy weights.")] = _DEFAULTS.seed,
    enforce_eager: Annotated[
        bool, _engine("--enforce-eager", help="Neither CUDA graphs nor steps recorded on a CPU: slower steps.")
    ] = False,
    prefill_graph_tokens: Annotated[
        str | None,
        _engine(
            metavar="TOKENS",
            help="Run steps of up to so many prompt tokens as CUDA graphs; 0: none. Default: 2k; with more than 32"
            " layers, 2 ranks or data-parallel ones: 4k; with more tensor-parallel ranks: 0.",
        ),
    ] = None,
    step_timeout: Annotated[
        float, _engine(metavar="SECONDS", help="End the engine if a step takes longer, since a rank must be hanging.")
    ] = _DEFAULTS.step_timeout,
    config_file: Annotated[
        str | None,
        _engine(
            "--config-file",
            "--config",
            metavar="FILE",
            help="Run the model of this config.json, with --load-format dummy.",
        ),
    ] = None,
    num_layers: Annotated[
        int | None, _engine(metavar="N", help="Run only the first N layers, with --load-format dummy.")
    ] = None,
    ignore_config_key: Annotated[
        list[str] | None,
        _engine(
            "--ignore-config-key",
            metavar="KEY",
            help="Ignore this key of config.json, e.g. sliding_window or section.key. May be repeated.",
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        _engine(
            "--op",
            metavar="OP=IMPL",
            help="Let implementation IMPL serve OP, or all ops ('*'), e.g. '*=reference'. May be repeated.",
        ),
    ] = None,
    trust_remote_code: Annotated[bool, _engine("--trust-remote-code", hidden=True)] = False,
) -> EngineConfig:
    """The options of an engine. Raises ConfigError in the command line's spelling."""
    if trust_remote_code:
        raise ConfigError(
            "--trust-remote-code is refused: a checkpoint's Python is never run, only its data is read; leave it out"
        )
    return EngineConfig(
        model=model,
        revision=revision,
        tokenizer=tokenizer,
        generation_config=generation_config,
        dtype=dtype,
        quantization=quantization,
        dequantize=dequantize,
        quantize_activations=quantize_activations,
        state_dtype=state_dtype,
        device=device,
        max_model_len=_size(max_model_len, "--max-model-len"),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=_size(max_num_batched_tokens, "--max-num-batched-tokens"),
        long_prefill_token_threshold=parse_size(long_prefill_token_threshold, "--long-prefill-token-threshold"),
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
        snapshot_interval=parse_size(snapshot_interval, "--snapshot-interval"),
        snapshot_dtype=snapshot_dtype,
        cpu_cache_memory=_size(cpu_cache_memory, "--cpu-cache-memory"),
        cache_folder=cache_folder,
        cache_folder_size=_size(cache_folder_size, "--cache-folder-size"),
        cache_memory=_size(cache_memory, "--cache-memory"),
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        expert_placement=expert_placement,
        nnodes=nnodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        distributed_executor_backend=distributed_executor_backend,
        load_format=load_format,
        seed=seed,
        enforce_eager=enforce_eager,
        prefill_graph_tokens=_size(prefill_graph_tokens, "--prefill-graph-tokens"),
        step_timeout=step_timeout,
        config_file=config_file,
        num_layers=num_layers,
        ignore_config_key=ignore_config_key or (),
        op_preference=_preferences(op or []),
    )


def sampling_params(
    max_tokens: Annotated[
        int | None,
        _sampling(metavar="N", help="Most tokens to generate; never more than the context holds."),
    ] = 256,
    temperature: Annotated[
        float | None,
        _sampling(
            metavar="T", help="Sampling temperature; 0 always takes the likeliest token. Default: the model's, or 0."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        _sampling(
            metavar="P",
            help="Sample from the likeliest tokens that together have this probability. Default: the model's.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        _sampling(
            metavar="K", help="Sample from so many of the likeliest tokens; 0 is all of them. Default: the model's."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        _sampling(
            metavar="P",
            help="Leave out tokens below this share of the likeliest one's probability. Default: the model's.",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, _sampling(metavar="TEXT", help="End the output before this text. May be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool, _sampling("--ignore-eos", help="Continue past the model's end-of-text tokens.")
    ] = False,
) -> GivenParams:
    """How tokens are chosen, as far as it is said. Raises InvalidRequest."""
    numbers: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
    }
    given = {name: value for name, value in numbers.items() if value is not None}
    given |= {"stop": tuple(stop or ()), "ignore_eos": ignore_eos}
    SamplingParams(**given)  # refuses early
    return GivenParams(given)


@dataclass(frozen=True, slots=True)
class GivenParams:
    """Sampling options of a command line."""

    given: dict[str, Any]

    def over(self, suggested: dict[str, Any]) -> SamplingParams:
        """With the model's defaults for what is left out; greedy up to the context's end if they are silent too."""
        return SamplingParams(**{"max_tokens": None, "temperature": 0.0, **suggested, **self.given})


def takes(*, leave_out: tuple[str, ...] = (), **groups: Callable[..., Any]) -> Callable[[Command], Callable[..., None]]:
    """Give a command whole groups of options.

    With `@takes(config=engine_config)` the command's parameter `config` becomes the parameters of engine_config and
    receives what that returns. Parameters named in `leave_out` are not offered and keep their defaults.
    """
    offered = {
        name: [p for p in inspect.signature(group, eval_str=True).parameters.values() if p.name not in leave_out]
        for name, group in groups.items()
    }

    def decorate(command: Command) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in groups]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in [*own, *(p for ps in offered.values() for p in ps)]]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {
                name: group(**{p.name: values.pop(p.name) for p in offered[name]}) for name, group in groups.items()
            }
            command(**made, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _size(text: str | None, option: str) -> int | None:
    return None if text is None else parse_size(text, option)


def _preferences(pairs: list[str]) -> dict[str, str]:
    preferences = {}
    for pair in pairs:
        op, equals, implementation = pair.partition("=")
        if not (op and equals and implementation):
            raise ConfigError(f"--op is {pair!r}; expected OP=IMPL, e.g. kda_mixer_prefill=reference")
        preferences[op] = implementation
    return preferences
