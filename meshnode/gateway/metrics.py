"""What this node's engines have done, for Prometheus: requests, tokens, how long first tokens took.

Decides what is counted, under which names, and when a request counts as what. Counts what is
computed here, for clients of this node and of others alike: the sum over all nodes is the mesh's.
Labels are the names of models that this node serves, never what clients wrote. Does not know HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Literal, Self

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from meshnode.engine import (
    Delta,
    Embedded,
    EmbedRequest,
    Engine,
    EngineStats,
    Finish,
    Request,
)
from meshnode.errors import EngineBusyError, EngineError, RequestError

__all__ = ["METRICS_TYPE", "Metrics"]

METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"
"""Of what `Metrics.text` writes, in Prometheus's words."""

# From a cached prompt on a GPU to a long one on a busy CPU.
FIRST_TOKEN_BUCKETS_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_Outcome = Literal["finished", "left", "busy", "refused", "failed"]


class Metrics:
    """The counters of one node."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "meshnode_requests",
            "Requests that an engine of this node was asked; `left` by the client before the end",
            ("model", "outcome"),
            registry=self._registry,
        )
        self._prompt = self._counter("meshnode_prompt_tokens", "Tokens of prompts")
        self._cached = self._counter(
            "meshnode_cached_prompt_tokens", "Those that were found in a kept KV cache"
        )
        self._completion = self._counter("meshnode_completion_tokens", "Tokens of answers")
        self._first_token_s = Histogram(
            "meshnode_time_to_first_token_seconds",
            "From a request's arrival at the engine to the first text of its answer",
            ("model",),
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._queue_depth = self._gauge("meshnode_queue_depth", "Requests that wait for a slot")
        self._slots_busy = self._gauge("meshnode_slots_busy", "Slots that compute now")
        self._slots = self._gauge("meshnode_slots", "Slots that there are")

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ("model",), registry=self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(name, about, ("model",), registry=self._registry)

    def metered(self, engine: Engine) -> Engine:
        """The same engine, whose requests are counted."""
        return _Metered(engine, self)

    def text(self, engines: Iterable[EngineStats]) -> bytes:
        """All of it in Prometheus's text format; `engines` are those that are loaded now."""
        gauges = (self._queue_depth, self._slots_busy, self._slots)
        for gauge in gauges:
            gauge.clear()
        for stats in engines:
            values = (stats.queue_depth, stats.slots_busy, stats.slots)
            for gauge, value in zip(gauges, values, strict=True):
                gauge.labels(stats.card.name).set(value)
        return generate_latest(self._registry)

    def count_request(self, model: str, outcome: _Outcome) -> None:
        self._requests.labels(model, outcome).inc()

    def count_first_token(self, model: str, took_s: float) -> None:
        self._first_token_s.labels(model).observe(took_s)

    def count_tokens(self, model: str, prompt: int, cached: int, completion: int) -> None:
        self._prompt.labels(model).inc(prompt)
        self._cached.labels(model).inc(cached)
        self._completion.labels(model).inc(completion)


class _Metered:
    """Implements `Engine`, by another one."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def count(self, request: Request) -> int:
        return await self._engine.count(request)

    @asynccontextmanager
    async def generate(self, request: Request) -> AsyncIterator[AsyncIterator[Delta | Finish]]:
        with _Counted(self._engine, self._metrics) as counted:
            async with self._engine.generate(request) as events:
                yield _Events(events, counted, request.n)

    @asynccontextmanager
    async def embed(self, request: EmbedRequest) -> AsyncIterator[Embedded]:
        with _Counted(self._engine, self._metrics) as counted:
            async with self._engine.embed(request) as embedded:
                self._metrics.count_tokens(counted.model, embedded.prompt_tokens, 0, 0)
                vectors = _Vectors(embedded.vectors, counted, len(request.inputs))
                yield Embedded(embedded.prompt_tokens, vectors)


class _Counted:
    """One request, which is counted when it is over."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.model = engine.stats().card.name
        self.metrics = metrics
        self.began_s = trio.current_time()
        self.outcome: _Outcome = "left"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.outcome == "left" and isinstance(error, EngineError):
            self.fail(error)
        self.metrics.count_request(self.model, self.outcome)

    def fail(self, error: EngineError) -> None:
        if isinstance(error, RequestError):
            self.outcome = "refused"
        else:
            self.outcome = "busy" if isinstance(error, EngineBusyError) else "failed"


class _Events:
    """An answer, watched on its way."""

    def __init__(
        self, events: AsyncIterator[Delta | Finish], counted: _Counted, choices: int
    ) -> None:
        self._events = events
        self._counted = counted
        self._choices = self._choices_left = choices
        self._has_begun = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta | Finish:
        counted, metrics = self._counted, self._counted.metrics
        try:
            event = await anext(self._events)
        except EngineError as error:
            counted.fail(error)
            raise
        if isinstance(event, Delta):
            if not self._has_begun:
                metrics.count_first_token(counted.model, trio.current_time() - counted.began_s)
            self._has_begun = True
            return event
        usage = event.usage
        # All choices share one prompt, which is computed once.
        is_first = self._choices_left == self._choices
        prompt = (usage.prompt_tokens, usage.cached_tokens) if is_first else (0, 0)
        metrics.count_tokens(counted.model, *prompt, usage.completion_tokens)
        self._choices_left -= 1
        if not self._choices_left:
            counted.outcome = "finished"
        return event


class _Vectors:
    """The vectors of one request, watched on their way."""

    def __init__(self, vectors: AsyncIterator[bytes], counted: _Counted, inputs: int) -> None:
        self._vectors = vectors
        self._counted = counted
        self._left = inputs

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            vector = await anext(self._vectors)
        except EngineError as error:
            self._counted.fail(error)
            raise
        self._left -= 1
        if not self._left:
            self._counted.outcome = "finished"
        return vector
