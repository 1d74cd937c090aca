"""POST /tokenize and /detokenize"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from thalweg.errors import InvalidRequest
from thalweg.server.errors import ApiError
from thalweg.server.params import refuse_special_tokens
from thalweg.server.responses import json_response
from thalweg.server.schemas import DetokenizeBody, TokenizeBody
from thalweg.server.service import ServiceDep
from thalweg.text.prompts import check_token_ids

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request, service: ServiceDep) -> Response:
    """The ids that `prompt`, or `messages` by the chat template, would have as a request's prompt."""
    service.check(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt and messages are both given or both missing; expected one of them", param="prompt")
    tokenizer = service.client.codec.tokenizer
    refuse_special_tokens(body.add_special_tokens, tokenizer)
    if body.messages is not None:
        ids = await service.encode_chat(request, body.messages, tools=body.tools, **body.template_options())
    else:
        assert body.prompt is not None
        ids = (await service.encode_prompts([body.prompt]))[0] if body.prompt else []
    answer = {"tokens": ids, "count": len(ids), "max_model_len": service.client.info.max_model_len}
    if body.return_token_strs and tokenizer is not None:
        answer["token_strs"] = [tokenizer.decode([i]) for i in ids]
    return json_response(answer)


@router.get("/tokenizer_info")
async def tokenizer_info(service: ServiceDep) -> Response:
    """The names of the control tokens and the chat template: what evaluation harnesses need to use /tokenize."""
    front = service.client.codec
    if (tokenizer := front.tokenizer) is None:
        raise ApiError(404, "the model folder has no tokenizer; only token ids go in and out")
    return json_response(
        {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "chat_template": None if front.template is None else front.template.source,
        }
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, service: ServiceDep) -> Response:
    """The text of token ids, special tokens included."""
    service.check(body.model)
    try:
        ids = check_token_ids(body.tokens, service.client.info.vocab_size)
    except InvalidRequest as error:
        raise ApiError(400, str(error).removeprefix("prompt "), param="tokens") from None
    return json_response({"prompt": await service.decode(ids)})
