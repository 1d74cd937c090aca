"""POST /tokenize and /detokenize"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from thalweg.errors import InvalidRequest
from thalweg.server.bodies import BodyRoute
from thalweg.server.errors import ApiError
from thalweg.server.params import refuse_special_tokens
from thalweg.server.responses import encode, json_response
from thalweg.server.schemas import DetokenizeBody, TokenizeBody
from thalweg.server.service import ServiceDep, maybe_in_thread

PIECE_IDS = 16_384

router = APIRouter(route_class=BodyRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request, service: ServiceDep) -> Response:
    """The ids that `prompt`, or `messages` by the chat template, would have as a request's prompt."""
    service.check(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt and messages are both given or both missing; expected one of them", param="prompt")
    tokenizer = service.client.codec.tokenizer
    refuse_special_tokens(body.add_special_tokens, tokenizer)
    if body.messages is not None:
        size = len(await request.body())
        ids = await service.encode_chat(size, body.messages, tools=body.tools, **body.template_options())
    else:
        assert body.prompt is not None
        ids = (await service.encode_prompts([body.prompt]))[0] if body.prompt else []
    figures = {"count": len(ids), "max_model_len": service.client.info.max_model_len}

    def answer() -> list[bytes]:
        pieces = [b'{"tokens":[', *_listed(ids), b"]"]
        if body.return_token_strs and tokenizer is not None:
            pieces += [b',"token_strs":[', *_listed(ids, lambda i: tokenizer.decode([i])), b"]"]
        return [*pieces, b",", encode(figures)[1:]]

    return _in_pieces(await maybe_in_thread(len(ids), answer))


def _listed(ids: list[int], made: Callable[[int], Any] | None = None) -> Iterator[bytes]:
    """The inside of a JSON list of the ids, or of what is `made` of them, in pieces that are quick to write."""
    for begin in range(0, len(ids), PIECE_IDS):
        part: list[Any] = ids[begin : begin + PIECE_IDS]
        yield b"," * (begin > 0) + encode(part if made is None else [*map(made, part)])[1:-1]


def _in_pieces(pieces: list[bytes]) -> Response:
    """A body that is sent as fast as the client reads it, not copied in one go while others wait."""
    if len(pieces) < 8:
        return Response(b"".join(pieces), media_type="application/json")
    length = {"Content-Length": str(sum(map(len, pieces)))}
    return StreamingResponse(_each(pieces), headers=length, media_type="application/json")


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


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
        text = await service.decode(body.tokens)
    except InvalidRequest as error:
        raise ApiError(400, str(error).removeprefix("prompt "), param="tokens") from None
    return json_response({"prompt": text})
