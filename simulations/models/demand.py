"""Who asks what, and when.

* `poisson`   requests that know nothing of each other, at a constant mean rate
* `flash`     the same, `flash_times` as many of them for a while
* `chats`     people: new chats come as a Poisson process, each takes `turns`, with a pause to read
  and think (exponential) before the next; every turn's prompt is the whole chat so far
* `mooncake`  the trace of Kimi's conversations (Mooncake, FAST 2025): arrival, lengths and the
  ids of 512-token prefix blocks, sped up `speedup` times
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from meshnode.errors import ConfigError
from meshnode_simulations.kernel.loop import NS_PER_S
from meshnode_simulations.kernel.machine import Machine
from meshnode_simulations.kernel.streams import number, stream
from meshnode_simulations.models.gateway import Ask, Gateways
from meshnode_simulations.run import Run

CHAT_BLOCK_TOKENS = 16
"""How finely the prefix of a chat is told apart."""
TRACE_BLOCK_TOKENS = 512
TRACE_SHARED_BLOCKS = 1
"""All requests of the trace begin with the same block, a system prompt; a session is what comes
after it."""


class Clients:
    """Asks through gateways drawn at random from the nodes that run.

    Each chat draws from a stream of its own: what others do, and when, changes nothing of what it
    asks, so that two policies or tiers can be compared request by request.
    """

    def __init__(self, run: Run, gateways: Gateways) -> None:
        self._run = run
        self._world = run.world
        self._gateways = gateways
        self._demand = run.scenario.demand
        self._rng = stream(run.seed, "clients")
        self._chats = 0
        popularity = self._demand.popularity
        names = [model.name for model in run.scenario.models]
        if self._demand.model:
            names = [self._demand.model]
        self._names = list(popularity) or names
        self._weights = [popularity.get(name, 1.0) for name in self._names]
        if self._demand.kind != "none" and not self._names:
            raise ConfigError("demand: there is no model to ask for")
        start_ns = int(self._demand.start_s * NS_PER_S)
        match self._demand.kind:
            case "poisson" | "flash" | "chats":
                self._world.loop.at(start_ns, self._arrive_later)
            case "mooncake":
                self._trace = _mooncake()
                self._next_of_trace(start_ns)

    # --- arrivals -------------------------------------------------------------------------------

    def _arrive_later(self) -> None:
        rate = self._demand.per_s * self._burst()
        if rate <= 0.0:
            return
        wait_ns = int(self._rng.expovariate(rate) * NS_PER_S)
        self._world.loop.after(wait_ns, self._arrive)

    def _burst(self) -> float:
        demand, now_s = self._demand, self._run.now_s
        is_on = demand.flash_at_s <= now_s < demand.flash_at_s + demand.flash_for_s
        return demand.flash_times if demand.kind == "flash" and is_on else 1.0

    def _arrive(self) -> None:
        demand = self._demand
        self._chats += 1
        rng = stream(self._run.seed, "chat", self._chats)
        prompt = _length(rng, demand.prompt_tokens)
        if demand.kind == "chats":
            self._take_turn(_Chat(self._chats, rng, self._model(rng), demand.turns), prompt)
        else:
            answer = _length(rng, demand.answer_tokens)
            self._ask(self._model(rng), self._chats, prompt, answer, rng)
        self._arrive_later()

    def _model(self, rng: random.Random) -> str:
        return rng.choices(self._names, self._weights)[0]

    # --- one request ----------------------------------------------------------------------------

    def _gateway(self, rng: random.Random) -> Machine | None:
        running = [machine for machine in self._world.machines if machine.is_awake]
        return rng.choice(running) if running else None

    def _ask(self, model: str, session: int, prompt: int, answer: int, rng: random.Random) -> None:
        gateway = self._gateway(rng)
        if gateway is not None:
            ask = Ask(model, _key(session), prompt, answer, (), CHAT_BLOCK_TOKENS)
            self._gateways.ask(gateway, ask)

    def _take_turn(self, chat: _Chat, said_tokens: int) -> None:
        """The chat so far and what is said now are the prompt."""
        gateway = self._gateway(chat.rng)
        if gateway is None:
            return
        chat.tokens += said_tokens
        answer = _length(chat.rng, self._demand.answer_tokens)
        limit = next(m.context_tokens for m in self._run.scenario.models if m.name == chat.model)
        if chat.tokens + answer > limit:
            return  # a new chat is begun when this one is full
        said = chat.tokens // CHAT_BLOCK_TOKENS
        told = (chat.tokens + answer) // CHAT_BLOCK_TOKENS
        blocks = tuple(number(chat.number, place) for place in range(told))

        def answered(whole: bool) -> None:
            chat.turns -= 1
            chat.tokens += answer
            if whole and chat.turns > 0:
                pause_s = chat.rng.expovariate(1.0 / max(self._demand.think_s, 1e-3))
                more = _length(chat.rng, self._demand.prompt_tokens)
                self._world.loop.after(int(pause_s * NS_PER_S), self._take_turn, chat, more)

        key = _key(chat.number)
        ask = Ask(chat.model, key, chat.tokens, answer, blocks[:said], CHAT_BLOCK_TOKENS, answered)
        ask.answer_blocks = blocks[said:]
        self._gateways.ask(gateway, ask)

    # --- the trace ------------------------------------------------------------------------------

    def _next_of_trace(self, start_ns: int) -> None:
        request = next(self._trace, None)
        if request is not None:
            at_ns = start_ns + int(request.at_s / self._demand.speedup * NS_PER_S)
            self._world.loop.at(at_ns, self._replay, request, start_ns)

    def _replay(self, request: _Traced, start_ns: int) -> None:
        gateway = self._gateway(self._rng)
        if gateway is not None:
            ask = Ask(
                self._model(self._rng),
                request.session,
                request.prompt_tokens,
                request.answer_tokens,
                request.blocks,
                TRACE_BLOCK_TOKENS,
            )
            self._gateways.ask(gateway, ask)
        self._next_of_trace(start_ns)


def _length(rng: random.Random, mean: int) -> int:
    """Tokens, exponential: many texts are short, some are long."""
    return max(1, int(rng.expovariate(1.0 / mean)))


@dataclass(slots=True)
class _Chat:
    number: int
    rng: random.Random
    model: str
    turns: int
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Traced:
    at_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]
    session: bytes


def _mooncake() -> Iterator[_Traced]:
    """The requests of the trace in order of time."""
    path = files("meshnode_simulations") / "data" / "mooncake_conversation.jsonl.gz"
    with path.open("rb") as raw, gzip.open(raw, "rt") as lines:
        for line in lines:
            entry = json.loads(line)
            blocks = tuple(entry["hash_ids"])
            opening = blocks[: TRACE_SHARED_BLOCKS + 1]
            yield _Traced(
                entry["timestamp"] / 1000.0,
                max(entry["input_length"], 1),
                max(entry["output_length"], 1),
                blocks,
                _key(*opening),
            )


def _key(*parts: int) -> bytes:
    """A session key of 16 bytes."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
