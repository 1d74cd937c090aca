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


def _sampling(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_SAMPLING, **options)


def engine_config(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, GGUF file, or OWNER/NAME on Hugging Face; the bundled model if left out.",
        ),
    ] = None,
    revision: Annotated[
        str | None, _engine(metavar="REVISION", help="Branch, tag or commit of a MODEL named OWNER/NAME.")
    ] = None,
    tokenizer: Annotated[
        str | None, _engine(metavar="FOLDER", help="Take tokenizer and chat template from here.")
    ] = None,
    generation_config: Annotated[
        str,
        _engine(
            metavar="SOURCE",
            help="Sampling defaults: auto, from the model's generation_config.json; a FOLDER with another one; vllm or"
            " none, the engine's own.",
        ),
    ] = _DEFAULTS.generation_config,
    dtype: Annotated[
        str,
        _engine(help="auto, float32, bfloat16 or float16. auto: float32 on a CPU, else the checkpoint's."),
    ] = "auto",
    quantization: Annotated[
        str | None,
        _engine(metavar="METHOD", help="fp8: quantize the experts' weights as they are loaded. Default: not at all."),
    ] = None,
    dequantize: Annotated[
        bool | None,
        _engine(
            "--dequantize/--no-dequantize",
            help="Bring a GGUF file's quantized weights to --dtype as they are loaded, or keep them as they are."
            " Default: kept on a CPU.",
        ),
    ] = None,
    state_dtype: Annotated[
        str,
        _engine(
            help="float32, or bfloat16: half the memory and traffic of recurrent states, which are then rounded at"
            " every token and lose accuracy over long outputs."
        ),
    ] = _DEFAULTS.state_dtype,
    device: Annotated[str, _engine(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_model_len: Annotated[
        str | None,
        _engine(
            metavar="TOKENS",
            help="Prompt and output of one request at most, e.g. 32k. Default: the model's, or what fits.",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        _engine(metavar="N", help="Requests that run at once. Default: 64 on a CPU, else what memory allows, to 512."),
    ] = None,
    max_num_batched_tokens: Annotated[
        str | None,
        _engine(metavar="TOKENS", help="Tokens of one step at most, e.g. 8k. Default: 2k on a CPU, else 8k."),
    ] = None,
    long_prefill_token_threshold: Annotated[
        str,
        _engine(
            metavar="TOKENS",
            help="Tokens of a prompt at most in a step that also decodes, e.g. 2k: long prompts hold up other requests"
            " less, and take longer. 0: as many as fit.",
        ),
    ] = str(_DEFAULTS.long_prefill_token_threshold),
    block_size: Annotated[int, _engine(metavar="TOKENS", help="Tokens per block of the cache.")] = _DEFAULTS.block_size,
    enable_prefix_caching: Annotated[
        bool,
        _engine(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep what was computed, so that a prompt that begins alike costs only its new tokens.",
        ),
    ] = _DEFAULTS.enable_prefix_caching,
    snapshot_interval: Annotated[
        str,
        _engine(
            metavar="TOKENS",
            help="Prefix cache: keep the states about every so many tokens of a long prompt, besides at its end.",
        ),
    ] = f"{_DEFAULTS.snapshot_interval // 1024}k",
    snapshot_dtype: Annotated[
        str,
        _engine(
            help="Prefix cache: auto keeps states as they are; bfloat16 or int8 round the recurrent ones, so that more"
            " fit, and prompts that go on from them differ a little."
        ),
    ] = _DEFAULTS.snapshot_dtype,
    cpu_cache_memory: Annotated[
        str | None,
        _engine(
            metavar="SIZE",
            help="Host memory per rank for what falls out of the prefix cache on the device, e.g. 32GiB; it comes back"
            " when a prompt needs it. Default: none.",
        ),
    ] = None,
    cache_folder: Annotated[
        str | None,
        _engine(
            metavar="FOLDER",
            help="Write what --cpu-cache-memory holds there at the end, and read it at the next start of the same"
            " model. It has what prompts said.",
        ),
    ] = None,
    cache_folder_size: Annotated[
        str | None, _engine(metavar="SIZE", help="How much that may be, over all ranks. Default: all of it.")
    ] = None,
    cache_memory: Annotated[
        str | None,
        _engine(
            metavar="SIZE",
            help="Memory for blocks and state, e.g. 4GiB; takes the place of --gpu-memory-utilization.",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, _engine(metavar="SHARE", help="Share of a GPU's memory that weights and cache may fill.")
    ] = _DEFAULTS.gpu_memory_utilization,
    tensor_parallel_size: Annotated[
        int,
        _engine("--tensor-parallel-size", "-tp", metavar="N", help="Ranks that the model is sharded over."),
    ] = _DEFAULTS.tensor_parallel_size,
    load_format: Annotated[
        str, _engine(help="auto (safetensors) or dummy (random weights of the real shapes).")
    ] = "auto",
    seed: Annotated[int, _engine(metavar="S", help="Seed of sampling, and of dummy weights.")] = _DEFAULTS.seed,
    enforce_eager: Annotated[
        bool, _engine("--enforce-eager", help="Launch every kernel by itself: no CUDA graphs, a quicker start.")
    ] = False,
    prefill_graph_tokens: Annotated[
        str | None,
        _engine(
            metavar="TOKENS",
            help="Run steps with at most so many prompt tokens as CUDA graphs. Default: 2k on one rank, else 0: none.",
        ),
    ] = None,
    step_timeout: Annotated[
        float, _engine(metavar="SECONDS", help="A step that takes longer ends the engine: a rank hangs.")
    ] = _DEFAULTS.step_timeout,
    config_file: Annotated[
        str | None,
        _engine("--config-file", "--config", metavar="FILE", help="A config.json to run with --load-format dummy."),
    ] = None,
    num_layers: Annotated[
        int | None, _engine(metavar="N", help="Run the first N layers only, with --load-format dummy.")
    ] = None,
    ignore_config_key: Annotated[
        list[str] | None,
        _engine(
            "--ignore-config-key",
            metavar="KEY",
            help="Read config.json as though it had no KEY, e.g. sliding_window or section.key. May be repeated.",
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        _engine(
            "--op",
            metavar="OP=IMPL",
            help="Let IMPL serve OP ('*': all ops), e.g. '*=reference'. May be repeated.",
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
        _sampling(metavar="N", help="Tokens to generate at most; never more than the context holds."),
    ] = 256,
    temperature: Annotated[
        float | None, _sampling(metavar="T", help="0 takes the likeliest token each time. Default: the model's, or 0.")
    ] = None,
    top_p: Annotated[
        float | None,
        _sampling(metavar="P", help="Keep the likeliest tokens that make up this probability. Default: the model's."),
    ] = None,
    top_k: Annotated[
        int | None,
        _sampling(metavar="K", help="Keep this many of the likeliest tokens; 0 keeps all. Default: the model's."),
    ] = None,
    min_p: Annotated[
        float | None,
        _sampling(
            metavar="P", help="Drop tokens below this share of the likeliest one's probability. Default: the model's."
        ),
    ] = None,
    stop: Annotated[list[str] | None, _sampling(metavar="TEXT", help="End before this text. May be repeated.")] = None,
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", help="Go on past the model's end-of-text tokens.")] = False,
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
