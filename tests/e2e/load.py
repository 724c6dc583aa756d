"""Clients that never stop asking, and what each of them saw."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException

from tests.e2e.mesh import HANG_S, POLL_S, NodeProcess, chat, events_of

RETRY_S = 0.1
"""Sooner than a client should, to notice soon when somebody answers again."""


@dataclass
class Told:
    """One request as its client saw it. Times are of `time.monotonic`."""

    gateway: str
    asked_at: float
    status: int = 0
    code: str = ""
    """Of the error, if there was one; "cut" if the answer ended without a word."""
    served_by: str = ""
    at: list[float] = field(default_factory=list)
    """When each event with text came."""
    text: str = ""
    is_whole: bool = False
    ended_at: float = 0.0

    @property
    def pause_s(self) -> float:
        """The longest wait between two pieces of text."""
        return max((b - a for a, b in itertools.pairwise(self.at)), default=0.0)


def ask(gate: NodeProcess, prompt: str, max_tokens: int) -> Told:
    """One streamed answer, whatever becomes of it."""
    return _ask(Told(gate.name, time.monotonic()), gate, prompt, max_tokens)


def _ask(told: Told, gate: NodeProcess, prompt: str, max_tokens: int) -> Told:
    asked = chat(prompt, stream=True, max_tokens=max_tokens)
    try:
        with gate.answering("POST", "/v1/chat/completions", asked) as response:
            told.status = response.status
            if response.status != 200:
                told.code = str(json.loads(response.read())["error"]["code"])
                return told
            told.served_by = str(response.headers["x-meshnode-served-by"])
            for event in events_of(response):
                if event == "[DONE]":
                    told.is_whole = True
                    return told
                _add(told, json.loads(event))
        told.code = told.code or "cut"
    except (OSError, HTTPException) as error:
        told.code = f"cut: {error!r}"
    finally:
        told.ended_at = time.monotonic()
    return told


def _add(told: Told, chunk: dict[str, object]) -> None:
    if "error" in chunk:
        told.code = str(chunk["error"]["code"])  # type: ignore[index]
        return
    choices = chunk.get("choices") or [{}]
    text = choices[0].get("delta", {}).get("content")  # type: ignore[index]
    if text:
        told.at.append(time.monotonic())
        told.text += text


class Clients:
    """A thread per gateway that asks, reads to the end, and asks again."""

    def __init__(self, gateways: Sequence[NodeProcess], max_tokens: int = 40) -> None:
        self.told: list[Told] = []
        """In the order of asking; the last of each thread may not have ended."""
        self._gates = [gate.name for gate in gateways]
        self._max_tokens = max_tokens
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(gate,), daemon=True) for gate in gateways
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(HANG_S)

    def _run(self, gate: NodeProcess) -> None:
        for number in itertools.count():
            if self._over.is_set():
                return
            prompt = f"Tell me story number {number} about the sea, as {gate.name} would."
            told = Told(gate.name, time.monotonic())
            self.told.append(told)
            _ask(told, gate, prompt, self._max_tokens)
            if not told.is_whole:
                self._over.wait(RETRY_S)

    def wait_text(self, since: float) -> None:
        """Until every gateway has passed on text that came after `since`."""
        deadline = time.monotonic() + HANG_S
        while not all(any(at > since for at in self._text_at(gate)) for gate in self._gates):
            assert time.monotonic() < deadline, self.told
            time.sleep(POLL_S)

    def silence_s(self, since: float) -> float:
        """The longest that a client of one gateway went without text, from `since` to its last."""
        return max(
            max((b - a for a, b in itertools.pairwise([since, *times])), default=math.inf)
            for times in ([at for at in self._text_at(g) if at > since] for g in self._gates)
        )

    def refused(self) -> list[Told]:
        """Those that were told to come again: nobody had the model loaded."""
        return [told for told in self.told if told.status == 503]

    def broken(self) -> list[Told]:
        """Those that saw what no client should."""
        return [told for told in self.told if not told.is_whole and told.status != 503]

    def _text_at(self, gate: str) -> list[float]:
        return [at for told in tuple(self.told) if told.gateway == gate for at in tuple(told.at)]
