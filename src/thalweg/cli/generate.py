"""`thalweg generate`: continue one prompt."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from thalweg.cli.answer import stream_answer
from thalweg.cli.options import GivenParams, engine_config, sampling_params, takes
from thalweg.config.engine import EngineConfig


@takes(params=sampling_params, config=engine_config)
def generate(
    config: EngineConfig,
    params: GivenParams,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask TEXT as a user's message, with the model's chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
) -> None:
    """Continue a prompt. The text goes to stdout while it is generated, figures go to stderr."""
    from thalweg.engine.llm import LLM
    from thalweg.text.prompts import encode_prompt

    with LLM.of(config) as llm:
        if chat:
            ids = llm.codec.chat_ids([{"role": "user", "content": prompt}])
        else:
            ids = encode_prompt(prompt, llm.tokenizer, llm.info.vocab_size)
        chosen = params.over(llm.suggested)
        if as_json:
            answer = stream_answer(llm, ids, chosen)
        else:
            answer = stream_answer(llm, ids, chosen, lambda text: print(text, end="", flush=True))
    if not as_json:
        print(flush=True)
        print(answer.figures, file=sys.stderr)
        return
    print(
        json.dumps(
            {
                "prompt": prompt,
                "text": answer.text,
                "prompt_tokens": answer.prompt_tokens,
                "generated_tokens": len(answer.token_ids),
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "ttft_s": round(answer.ttft_s, 6),
                "tokens_per_s": round(answer.tokens_per_s, 3),
            }
        )
    )
