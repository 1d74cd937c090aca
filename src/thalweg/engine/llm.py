"""The offline API: an engine for the callers of one process, for scripts, evaluations and benchmarks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, cast

from thalweg import tracing
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate, SamplingParams
from thalweg.engine.llm_sessions import LLMSessions, WithSessions
from thalweg.engine.offline import OfflineEngine, start_engine
from thalweg.errors import EngineDeadError, InvalidRequest
from thalweg.text.codec import load_codec
from thalweg.text.output import Delta, OutputProcessor
from thalweg.text.prompts import Prompt, check_params, check_token_ids, encode_prompt
from thalweg.text.results import CompletionOutput, RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from torch import Tensor

Messages = Sequence[Mapping[str, Any]]


class LLM(WithSessions):
    """Loads a model and generates for many prompts at a time. Calls may overlap, also from several threads.

    `model` is a folder in Hugging Face layout, a GGUF file, or OWNER/NAME on Hugging Face; None is the bundled model.
    EngineConfig describes the other options. Use an LLM as a context manager, or call close(). Raises ConfigError or
    CheckpointError, one line each, if it cannot start.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        generation_config: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        dequantize: bool | None = None,
        quantize_activations: bool = True,
        state_dtype: str = "float32",
        device: str = "auto",
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        long_prefill_token_threshold: int = 4096,
        max_model_len: int | None = None,
        block_size: int = 64,
        enable_prefix_caching: bool = True,
        snapshot_interval: int = 8192,
        snapshot_dtype: str = "auto",
        cpu_cache_memory: int | None = None,
        cache_folder: str | None = None,
        cache_folder_size: int | None = None,
        cache_memory: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        expert_placement: str | None = None,
        nnodes: int = 1,
        node_rank: int = 0,
        master_addr: str = "127.0.0.1",
        master_port: int = 29500,
        distributed_executor_backend: str = "mp",
        load_format: str = "auto",
        seed: int = 0,
        enforce_eager: bool = False,
        prefill_graph_tokens: int | None = None,
        step_timeout: float = 300.0,
        config_file: str | None = None,
        num_layers: int | None = None,
        ignore_config_key: Sequence[str] = (),
        op_preference: Mapping[str, str] | None = None,
    ) -> None:
        self.config = EngineConfig(
            model=None if model is None else str(model),
            revision=revision,
            tokenizer=tokenizer,
            generation_config=generation_config,
            dtype=dtype,
            quantization=quantization,
            dequantize=dequantize,
            quantize_activations=quantize_activations,
            state_dtype=state_dtype,
            device=device,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            long_prefill_token_threshold=long_prefill_token_threshold,
            max_model_len=max_model_len,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            snapshot_interval=snapshot_interval,
            snapshot_dtype=snapshot_dtype,
            cpu_cache_memory=cpu_cache_memory,
            cache_folder=None if cache_folder is None else str(cache_folder),
            cache_folder_size=cache_folder_size,
            cache_memory=cache_memory,
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
            prefill_graph_tokens=prefill_graph_tokens,
            step_timeout=step_timeout,
            config_file=config_file,
            num_layers=num_layers,
            ignore_config_key=ignore_config_key,
            op_preference=op_preference or {},
        )
        self._start()

    @classmethod
    def of(cls, config: EngineConfig) -> Self:
        """The LLM that `config` describes. Raises as LLM does."""
        llm = cls.__new__(cls)
        llm.config = config
        llm._start()
        return llm

    def _start(self) -> None:
        self._engine: OfflineEngine | None = None
        self.codec = load_codec(self.config)
        self.tokenizer = self.codec.tokenizer
        self._engine = start_engine(self.config)
        self.info = self._engine.info
        self._ids = itertools.count()
        self._sessions = LLMSessions(self)

    @property
    def suggested(self) -> dict[str, Any]:
        """The sampling defaults of generation_config.json, under the names of SamplingParams."""
        return self.codec.source.generation.sampling

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that `generate` and `stream` use if none are given."""
        return SamplingParams(**self.suggested)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_finished: Callable[[RequestOutput], object] = lambda _: None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many; outputs come in the order of the prompts.

        A prompt is a text or a list of token ids. `sampling_params` is one object for all prompts or one per prompt;
        None is get_default_sampling_params(). `on_finished` is called when a request ends.

        Raises InvalidRequest, before anything runs, if a prompt or parameter cannot be served. A request that fails
        while it runs ends alone, with the finish_reason "error".
        """
        items = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(items)
        else:
            params = list(sampling_params)
            if len(params) != len(items):
                raise InvalidRequest(f"{len(params)} sampling_params came for {len(items)} prompts; expected one each")
        requests = [self._request(p, s) for p, s in zip(items, params, strict=True)]
        return self._collect(requests, items, on_finished)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, with the model's chat template. Messages have "role" and "content".

        Without `sampling_params`, the values of generation_config.json hold; what it does not give is greedy, up to the
        end of the context. `template_options` are variables of the template. Raises InvalidRequest.
        """
        if isinstance(messages, (str, bytes, Mapping)) or not messages:
            raise InvalidRequest(f"messages are {messages!r:.40}; expected a list with one message or more")
        one = isinstance(messages[0], Mapping)
        many = cast(Sequence[Messages], [messages] if one else messages)
        prompts = [self.codec.chat_ids(conversation, **template_options) for conversation in many]
        params = sampling_params or SamplingParams(**{"temperature": 0.0, "max_tokens": None, **self.suggested})
        return self._collect([self._request(p, params) for p in prompts], prompts)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue one prompt and yield what is new after each step; the last Delta has a finish_reason.

        Closing the iterator early aborts the request.
        """
        request = self._request(prompt, sampling_params or self.get_default_sampling_params())
        outputs = self._outputs()
        outputs.add(request)
        with self.engine.pump.running([request]) as news:
            while True:
                for update in news():
                    delta = outputs.process(update)
                    if delta is not None:
                        yield delta
                        if delta.finish_reason is not None:
                            return

    def prompt_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits [T, V] after each of the T tokens, which are prefilled in chunks as any prompt is. Raises
        InvalidRequest, also with several data-parallel ranks, which are other processes."""
        import torch

        ids = check_token_ids(token_ids, self.info.vocab_size)
        request = Request(
            id=self._next_id(), prompt_token_ids=ids, params=SamplingParams(max_tokens=0), prompt_logits=True
        )
        chunks, ended = [], False
        with self.engine.pump.running([request]) as news:
            while not ended:
                for update in news():
                    if update.error is not None:
                        raise EngineDeadError(f"the prompt's logits could not be computed: {update.error}")
                    if update.prompt_logits is not None:
                        chunks.append(update.prompt_logits)
                    ended = update.finish_reason is not None
        return torch.cat(chunks)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def engine(self) -> OfflineEngine:
        """The engine. Raises EngineDeadError after close(), and in a process that was forked since."""
        if self._engine is None:
            raise EngineDeadError("this LLM is closed; make a new one")
        if self._engine.forked:
            raise EngineDeadError("this LLM works only in the process that made it, of which this one is a fork")
        return self._engine

    def _next_id(self) -> str:
        return f"offline-{next(self._ids)}"

    def _outputs(self, *, late: bool = False) -> OutputProcessor:
        return OutputProcessor(self.tokenizer, frozenset(self.info.eos_token_ids), late=late)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = encode_prompt(prompt, self.tokenizer, self.info.vocab_size)
        check_params(params, self.tokenizer, self.info.vocab_size)
        return Request(id=self._next_id(), prompt_token_ids=ids, params=params)

    def _collect(
        self,
        requests: list[Request],
        prompts: Sequence[Any],
        on_finished: Callable[[RequestOutput], object] = lambda _: None,
    ) -> list[RequestOutput]:
        outputs = self._outputs(late=True)
        results: dict[str, RequestOutput] = {}
        with self.engine.pump.running(requests) as news:
            for request, prompt in zip(requests, prompts, strict=True):
                outputs.add(request)
                results[request.id] = RequestOutput(
                    request.id,
                    prompt if isinstance(prompt, str) else None,
                    request.prompt_token_ids,
                    [CompletionOutput(logprobs=None if request.params.logprobs is None else [])],
                    RequestMetrics(time.perf_counter()),
                    None if request.params.prompt_logprobs is None else [None],
                )
            unfinished = len(results)
            while unfinished:
                updates = news()
                with tracing.span("output"):
                    ended = self._take(updates, outputs, results)
                unfinished -= len(ended)
                for result in ended:
                    on_finished(result)
        return list(results.values())

    def _take(
        self, updates: list[RequestUpdate], outputs: OutputProcessor, results: dict[str, RequestOutput]
    ) -> list[RequestOutput]:
        """Add a step's news to the results; returns those that ended with it."""
        now, ended = time.perf_counter(), []
        for update in updates:
            delta = outputs.process(update)
            if delta is not None:
                _append(results[delta.request_id], delta, now)
                if isinstance(delta.stop_reason, str):
                    self.engine.pump.abort(delta.request_id)
                if delta.finish_reason is not None:
                    ended.append(results[delta.request_id])
        return ended


def _append(result: RequestOutput, delta: Delta, now: float) -> None:
    output = result.outputs[0]
    if delta.token_ids and result.metrics.first_token is None:
        result.metrics.first_token = now
    result.num_cached_tokens += delta.num_cached_tokens
    output.text += delta.text
    output.token_ids += delta.token_ids
    if delta.logprobs is not None and output.logprobs is not None:
        output.logprobs.append(delta.logprobs)
    if delta.prompt_logprobs is not None and result.prompt_logprobs is not None:
        result.prompt_logprobs += delta.prompt_logprobs
    if delta.finish_reason is not None:
        output.finish_reason, output.stop_reason, result.error = (
            delta.finish_reason,
            delta.stop_reason,
            delta.error,
        )
        result.metrics.finished = now


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many; a flat list of integers is one prompt. Raises InvalidRequest for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"the prompts are a {type(prompts).__name__}; expected texts or lists of token ids")
    items = list(prompts)
    return [items] if items and isinstance(items[0], SupportsIndex) else items
