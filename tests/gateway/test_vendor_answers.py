"""Answers are what the vendors' own clients' types say: streamed and whole, in strict mode."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import ollama
import pytest
import trio
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from meshnode.engine import ChatStyle, Delta, Finish, Logprob, Request, TokenLogprobs, Usage
from meshnode.gateway.app import create_api_app
from tests.fakes import MODEL, WordEngine, local_mesh

HANG_S = 20.0
JSON = {"content-type": "application/json"}
TURN = {"role": "user", "content": "hi"}
PIECE_CHARS = 3
SAID = "<think>\nHm, so.\n</think>\n\nIt is known."
CALLED = f'{SAID}\n<tool_call>\n{{"name": "f", "arguments": {{"city": "Rome"}}}}\n</tool_call>'
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
CHAT_TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
ANTHROPIC_TOOLS = {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}


class Scripted(WordEngine):
    """Says one text, a few characters a token."""

    def __init__(self, text: str) -> None:
        super().__init__(style=ChatStyle("may", "may", "none"))
        self._text = text

    async def _tokens(self, request: Request) -> AsyncGenerator[Delta | Finish, None]:
        pieces = [
            self._text[at : at + PIECE_CHARS] for at in range(0, len(self._text), PIECE_CHARS)
        ]
        for index in range(request.n):
            for piece in pieces:
                await trio.lowlevel.checkpoint()
                drawn = Logprob(piece.encode(), -0.5)
                told = TokenLogprobs(drawn, (drawn,) * (request.logprobs or 0))
                asked = () if request.logprobs is None else (told,)
                yield Delta(piece, logprobs=asked, index=index)
            yield Finish("stop", Usage(4, 1, len(pieces)), index)


# Path, whether it calls a tool, what is asked, and the types of a whole answer and of its events.
RESPONSE_EVENT = TypeAdapter(ResponseStreamEvent)
MESSAGE_EVENT = TypeAdapter(RawMessageStreamEvent)
CHUNK, TEXT = TypeAdapter(ChatCompletionChunk), TypeAdapter(Completion)
OLLAMA_CHAT, OLLAMA_TEXT = TypeAdapter(ollama.ChatResponse), TypeAdapter(ollama.GenerateResponse)
CHAT = {"messages": [TURN]}
CASES: dict[str, tuple[str, str, dict[str, Any], type[BaseModel], TypeAdapter[Any]]] = {
    "chat": ("/v1/chat/completions", SAID, CHAT, ChatCompletion, CHUNK),
    "chat, probabilities": (
        "/v1/chat/completions",
        SAID,
        {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2},
        ChatCompletion,
        CHUNK,
    ),
    "chat, calls": (
        "/v1/chat/completions",
        CALLED,
        {**CHAT, **CHAT_TOOLS, "logprobs": True},
        ChatCompletion,
        CHUNK,
    ),
    "text": ("/v1/completions", SAID, {"prompt": "hi", "logprobs": 2}, Completion, TEXT),
    "response": ("/v1/responses", SAID, {"input": "hi"}, Response, RESPONSE_EVENT),
    "response, calls": (
        "/v1/responses",
        CALLED,
        {"input": "hi", "tools": [{"type": "function", **FUNCTION}], "metadata": {"a": "b"}},
        Response,
        RESPONSE_EVENT,
    ),
    "message": ("/v1/messages", SAID, {**CHAT, "max_tokens": 99}, Message, MESSAGE_EVENT),
    "message, calls": (
        "/v1/messages",
        CALLED,
        {**CHAT, **ANTHROPIC_TOOLS, "max_tokens": 99},
        Message,
        MESSAGE_EVENT,
    ),
    "ollama chat": ("/api/chat", SAID, CHAT, ollama.ChatResponse, OLLAMA_CHAT),
    "ollama chat, calls": (
        "/api/chat",
        CALLED,
        {**CHAT, **CHAT_TOOLS},
        ollama.ChatResponse,
        OLLAMA_CHAT,
    ),
    "ollama text": ("/api/generate", SAID, {"prompt": "hi"}, ollama.GenerateResponse, OLLAMA_TEXT),
}


async def post(text: str, path: str, **fields: Any) -> bytes:
    api = create_api_app(local_mesh(Scripted(text))).test_client()
    body = b""
    # Piece by piece: the client's own `post` hangs after ten.
    with trio.fail_after(HANG_S):
        async with api.request(path, method="POST", headers=JSON) as connection:
            await connection.send(json.dumps({"model": MODEL, **fields}).encode())
            await connection.send_complete()
            with suppress(trio.EndOfChannel):
                while True:
                    body += await connection.receive()
    assert connection.status_code == 200, body
    return body


def objects(body: bytes) -> list[str]:
    """Those of a stream, as JSON text: of events, or of lines."""
    lines = body.decode().splitlines()
    if not body.startswith(b"{"):
        lines = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [line for line in lines if line not in ("", "[DONE]", '{"type":"ping"}')]


@pytest.mark.parametrize("name", CASES)
async def test_answers_are_what_the_clients_types_say(name: str) -> None:
    path, text, fields, whole, event = CASES[name]
    body = await post(text, path, **fields, stream=False)
    whole.model_validate_json(body, strict=True)
    body = await post(text, path, **fields, stream=True)
    events = objects(body)
    assert len(events) > 3
    for each in events:
        if event is TEXT:  # whose type forgets that OpenAI's own stream has null there, too
            each = each.replace('"finish_reason":null', '"finish_reason":"stop"')
        event.validate_json(each, strict=True)


async def test_embeddings_and_models_are_what_the_clients_types_say() -> None:
    body = await post("", "/v1/embeddings", input=["to be", "or"])
    CreateEmbeddingResponse.model_validate_json(body, strict=True)
    ollama.EmbedResponse.model_validate_json(
        await post("", "/api/embed", input="to be"), strict=True
    )
    ollama.EmbeddingsResponse.model_validate_json(
        await post("", "/api/embeddings", prompt="to be"), strict=True
    )
    ollama.ShowResponse.model_validate_json(await post("", "/api/show"))
    api = create_api_app(local_mesh(Scripted(""))).test_client()
    listed = json.loads(await (await api.get("/v1/models")).get_data())
    for each in listed["data"]:
        Model.model_validate(each, strict=True)
    tags = ollama.ListResponse.model_validate_json(await (await api.get("/api/tags")).get_data())
    assert [each.model for each in tags.models] == [MODEL]
