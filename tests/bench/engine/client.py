"""Sessions that ask one server all at once, each with a conversation of its own."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from tests.e2e.mesh import events_of

HANG_S = 300.0
"""Sixteen long prompts on a busy machine take a minute."""
FOLLOW_UP_WORDS = 12
TEMPLATE_WORDS = 20
"""What the instruction and the marks of a chat template add to the words of a prompt, about."""
# Words that are one token each in the usual vocabularies, so that words count as tokens.
_WORDS = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city community name president team minute idea"
)
WORDS = _WORDS.split()

Message = dict[str, str]


@dataclass(frozen=True)
class Told:
    """One answer as its client saw it."""

    first_s: float
    text: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int


@dataclass(frozen=True)
class Seen:
    """One load on one server: answers in the order of their sessions, seconds until the last."""

    told: tuple[Told, ...]
    took_s: float

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.told)


@dataclass
class Conversation:
    """A chat like no other, so that nothing of it is cached before its first turn.

    Even the instruction is its own: a common one would leave part of the prompt in the cache.
    """

    messages: list[Message] = field(default_factory=list)

    @classmethod
    def of(cls, words: int, seed: int) -> Conversation:
        chosen = random.Random(seed)
        text = " ".join(chosen.choices(WORDS, k=max(1, words - TEMPLATE_WORDS)))
        return cls(
            [
                {"role": "system", "content": f"{seed} {chosen.choice(WORDS)}"},
                {"role": "user", "content": text},
            ]
        )

    def go_on(self, answer: str, seed: int) -> None:
        """Take the answer, and ask for more."""
        more = " ".join(random.Random(seed).choices(WORDS, k=FOLLOW_UP_WORDS))
        self.messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": more},
        ]


def ask_all(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    tokens: int,
    never: Mapping[str, float],
) -> Seen:
    """Stream the next answer of all at once, each of exactly `tokens` tokens, greedily.

    `never` is the logit bias that keeps an answer from ending earlier.
    Raises `RuntimeError` on any other answer.
    """
    at_once = threading.Barrier(len(conversations) + 1)

    def ask(conversation: Conversation) -> Told:
        return _ask(url, model, conversation.messages, tokens, never, at_once)

    with ThreadPoolExecutor(len(conversations)) as sessions:
        asked = [sessions.submit(ask, each) for each in conversations]
        at_once.wait(HANG_S)
        begun_at = time.perf_counter()
        told = tuple(each.result() for each in asked)
        took_s = time.perf_counter() - begun_at
    return Seen(told, took_s)


def _ask(
    url: str,
    model: str,
    messages: Sequence[Message],
    tokens: int,
    never: Mapping[str, float],
    at_once: threading.Barrier,
) -> Told:
    body = json.dumps(
        {
            "model": model,
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "logit_bias": never,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    connection = HTTPConnection(urlsplit(url).netloc, timeout=HANG_S)
    try:
        connection.connect()
        at_once.wait(HANG_S)
        begun_at = time.perf_counter()
        path, kind = "/v1/chat/completions", {"content-type": "application/json"}
        connection.request("POST", path, body, kind)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {response.read()!r}")
        first_s, text, usage = 0.0, "", dict[str, Any]()
        for event in events_of(response):
            if event == "[DONE]":
                break
            chunk = json.loads(event)
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if said := choice["delta"].get("content"):
                    first_s = first_s or time.perf_counter() - begun_at
                    text += said
    finally:
        connection.close()
    if usage.get("completion_tokens") != tokens:
        raise RuntimeError(f"{url} gave {usage}, not {tokens} tokens: {text!r}")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Told(first_s, text, usage["prompt_tokens"], cached, tokens)
