"""Fields of other servers' requests that are not fields here: those that are ignored, and those that are refused.

Fields that are honoured are those of schemas.py. docs/api.md has all three kinds in one table, which the tests read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from thalweg.server.errors import ApiError, shown

_log = logging.getLogger(__name__)
MAX_NAMES_LOGGED = 100

# They tune or annotate, or shape what another field asks for, which is refused unless it is off.
IGNORED = frozenset(
    (
        *("user", "safety_identifier", "metadata", "store", "service_tier", "prediction", "moderation"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("request_id", "rid", "priority", "extra_key", "kv_transfer_params", "data_parallel_rank"),
        *("bootstrap_host", "bootstrap_port", "bootstrap_room", "skip_reading_prefix_cache"),
        *("guided_decoding_backend", "spaces_between_special_tokens"),
        *("cache_prompt", "id_slot", "slot_id", "n_keep", "n_discard", "n_cache_reuse", "keep_alive"),
        *("timings_per_token", "return_progress", "post_sampling_probs"),
        *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "xtc_threshold", "smoothing_curve"),
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    )
)

# They change the answer unless they have one of these values; false and 0 too if there are none. Null and what is
# empty never say anything.
REFUSED: dict[str, tuple[Any, ...]] = {
    # how tokens are chosen
    "use_beam_search": (),
    "num_beams": (1,),
    "beam_width": (1,),
    "length_penalty": (1,),
    "early_stopping": (),
    "do_sample": (True,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (),
    "top_n_sigma": (-1, 0),
    "mirostat": (),
    "mirostat_mode": (),
    "dynatemp_range": (),
    "dry_multiplier": (),
    "xtc_probability": (),
    "adaptive_target": (-1,),
    "smoothing_factor": (),
    "epsilon_cutoff": (),
    "eta_cutoff": (),
    "guidance_scale": (1,),
    "cfg_scale": (1,),
    "negative_prompt": (),
    "no_repeat_ngram_size": (),
    "encoder_repetition_penalty": (1,),
    "repetition_detection": (),
    "min_keep": (),
    "samplers": (),
    "sampler_priority": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "logits_processors": (),
    "custom_logit_processor": (),
    "custom_params": (),
    "vllm_xargs": (),
    "watermark": (),
    # when it ends
    "stop_regex": (),
    "t_max_predict_ms": (-1, 0),
    "n_indent": (),
    # what it must be
    "structural_tag": (),
    "guided_whitespace_pattern": (),
    "parse_tool_calls": (True,),
    # which model
    "lora": (),
    "lora_path": (),
    "lora_request": (),
    "adapter_id": (),
    # what goes in
    "chat_template": (),
    "truncation_side": ("left",),
    "prompt_embeds": (),
    "mm_processor_kwargs": (),
    "multi_modal_data": (),
    "image_data": (),
    "images": (),
    "input_prefix": (),
    "input_suffix": (),
    "input_extra": (),
    "session_params": (),
    "web_search_options": (),
    "inputs": (),
    "parameters": (),
    "options": (),
    # what comes out
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "reasoning": (),
    "think": (),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "reasoning_format": ("auto", "deepseek"),
    "thinking_forced_open": (),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (),
    "return_tokens": (),
    "return_full_text": (),
    "return_hidden_states": (),
    "return_routed_experts": (),
    "return_logprob": (),
    "top_logprobs_num": (),
    "n_probs": (),
    "top_n_tokens": (),
    "details": (),
    "decoder_input_details": (),
    "detokenize": (True,),
    "response_fields": (),
    "format": (),
    "raw": (),
}

_logged: set[str] = set()


def check(body: Mapping[str, Any], own: Collection[str], elsewhere: Mapping[str, str]) -> None:
    """Raise ApiError for a field of `body` that would change the answer and is not supported.

    `own`: fields of this request. `elsewhere`: fields of other requests, and the route that has them.
    """
    for name, value in body.items():
        if name in own or name in IGNORED:
            continue
        if name in REFUSED:
            if not neutral(value, REFUSED[name]):
                raise unsupported(name, value, REFUSED[name])
        elif name in elsewhere:
            if not neutral(value) and value not in ("none", "auto"):
                raise ApiError(400, f"{name} is a field of {elsewhere[name]}; expected it left out", param=name)
        elif name not in _logged and len(_logged) < MAX_NAMES_LOGGED:
            _logged.add(name)
            _log.warning("a request has the field %r, which is not known and is ignored", name[:64])


def neutral(value: Any, values: tuple[Any, ...] = ()) -> bool:
    """Whether `value` says nothing, by the rule of REFUSED."""
    if not value and (not values or isinstance(value, str | list | dict | None)):
        return True
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)


def unsupported(name: str, value: Any, values: tuple[Any, ...] = ()) -> ApiError:
    """The refusal of a field that is known and not supported."""
    expected = " or ".join(["it left out", *map(shown, values)])
    message = f"{name} is {shown(value)}, which is not supported; expected {expected}"
    return ApiError(400, message, param=name, code="unsupported")
