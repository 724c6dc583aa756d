"""One server's models while it is well: what is offered of them, and requests within bounds.

Decides when the server is asked how it is, when its models are withdrawn and offered again, and
how many requests it gets at once. Does not know meshes; what a request says is not looked at, but
for the model's name, which becomes the server's own.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import trio

from meshnode.config import Config, split_upstream
from meshnode.console.snapshot import ModelSnapshot
from meshnode.errors import (
    EngineBusyError,
    EngineError,
    MeshnodeError,
    PeerUnreachableError,
    RemoteProtocolError,
    RequestError,
)
from meshnode.gateway import PassedAnswer
from meshnode.messages import Offer
from meshnode.upstream.caller import Caller, SilentError
from meshnode.upstream.keys import read_keys
from meshnode.upstream.listing import choose, read_models, read_props

__all__ = ["Fronted", "find_upstreams"]

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0
"""How old the news of a silent death may be; a request that fails has the server looked at now."""
LOOK_TIMEOUT_S = 10.0
"""A list of names; a server too busy to give it would not take a request either."""
BACK_OFF_FIRST_S = 1.0
BACK_OFF_MAX_S = 30.0
"""A server that loads a model for minutes is back in the mesh half a minute after it is up."""
SLOW_LOOKS_MAX = 2
"""Silences in a row that make a server count as down: a long prefill may block some for once.
One that refuses connections, or answers nonsense, is down at once."""
LISTING_BYTES_MAX = 4 * 1024 * 1024
"""The longest listing known, of a hub with hundreds of models, has half a megabyte."""
WAITING_MAX = 32
"""As many as wait for an engine of our own; others are told at once that it is busy."""
BUSY_RETRY_AFTER_S = 2.0
"""As for an engine."""
ERROR_CHARS_MAX = 200
"""Of what is told of a failure: some errors repeat what the server sent."""
VIA_MAX = 4
"""Nodes in front of nodes: two are a plan, more are a mistake."""
_REDIRECTS = range(300, 400)
_UNAUTHORIZED = 401


@dataclass(frozen=True, slots=True)
class FrontedModel:
    """One model of a server. Implements `gateway.Upstream`."""

    name: str
    digest: str
    own_name: str
    """The server's."""
    context_tokens: int
    server: Fronted

    @asynccontextmanager
    async def ask(
        self, path: str, body: bytes, via: tuple[str, ...]
    ) -> AsyncIterator[PassedAnswer]:
        """See `gateway.Upstream.ask`."""
        async with self.server.ask(path, _renamed(body, self.own_name), via) as answer:
            yield answer


class Fronted:
    """A server, and its models."""

    def __init__(
        self,
        caller: Caller,
        peer_id: str,
        *,
        name: str | None = None,
        digest: str | None = None,
        slots: int,
        context_tokens: int | None = None,
    ) -> None:
        """`name` picks or renames one model, of which `digest` may be declared; `slots` requests
        are asked at once; `context_tokens` is what is told of models that do not tell theirs."""
        self._caller = caller
        self._peer_id = peer_id
        self._name = name
        self._digest = digest
        self._slots = slots
        self._context_tokens = context_tokens or 0
        self._context_by_props = 0
        self._models: tuple[FrontedModel, ...] = ()
        self._error: str | None = None
        self._has_been_up = False
        self._limit = trio.Semaphore(slots)
        self._in_flight = 0
        self._doubt = trio.Event()

    # --- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look after the server until cancelled."""
        slow, back_off_s = 0, BACK_OFF_FIRST_S
        try:
            while True:
                self._doubt = trio.Event()
                try:
                    await self._look()
                except MeshnodeError as error:
                    slow = slow + 1 if isinstance(error, SilentError) else SLOW_LOOKS_MAX
                    if slow >= SLOW_LOOKS_MAX or not self._has_been_up:
                        self._withdraw(_told(error))
                    await trio.sleep(back_off_s)
                    back_off_s = min(2 * back_off_s, BACK_OFF_MAX_S)
                else:
                    slow, back_off_s = 0, BACK_OFF_FIRST_S
                    with trio.move_on_after(LOOK_EVERY_S):
                        await self._doubt.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._caller.aclose()

    async def _look(self) -> None:
        """Ask the server what it has. Raises `MeshnodeError`, worded for the operator."""
        listed = read_models(await self._read("/v1/models"))
        chosen = choose(listed, self._name, self._digest, own=self._peer_id, url=self._caller.url)
        if self.state != "ready" and not all(named.listed.context_tokens for named in chosen):
            self._context_by_props = await self._told_by_props()
        or_else = self._context_by_props or self._context_tokens
        models = [
            FrontedModel(
                named.name,
                named.digest,
                named.listed.name,
                named.listed.context_tokens or or_else,
                self,
            )
            for named in chosen
        ]
        if self._error is not None or not self._has_been_up:
            names = ", ".join(model.name for model in models)
            _log.info("upstream %s: up, with %s", self._caller.url, names)
        left_out = 0 if self._name is not None else len(listed) - len(models)
        if left_out and len(models) != len(self._models):
            _log.warning("upstream %s: %d more models are not offered; --upstream URL=NAME picks",
                         self._caller.url, left_out)  # fmt: skip
        self._models, self._error, self._has_been_up = tuple(models), None, True

    async def _read(self, path: str) -> bytes:
        try:
            async with self._caller.ask("GET", path, idle_s=LOOK_TIMEOUT_S) as answer:
                if answer.status != 200:
                    raise RemoteProtocolError(f"it answers {path} with status {answer.status}")
                body = bytearray()
                with trio.fail_after(LOOK_TIMEOUT_S):
                    async for chunk in answer.body:
                        body += chunk
                        if len(body) > LISTING_BYTES_MAX:
                            raise RemoteProtocolError(f"its {path} is too long")
        except trio.TooSlowError:
            raise SilentError(f"its {path} did not end within {LOOK_TIMEOUT_S:.0f} s") from None
        return bytes(body)

    async def _told_by_props(self) -> int:
        """The context that llama-server tells; 0 for every other server."""
        try:
            return read_props(await self._read("/props"))
        except MeshnodeError:
            return 0  # a question that only one kind of server knows: no answer is no error

    def _withdraw(self, why: str) -> None:
        if self._error != why:
            _log.warning("upstream %s: down: %s", self._caller.url, why)
        self._error = why

    # --- requests -------------------------------------------------------------------------------

    @asynccontextmanager
    async def ask(
        self, path: str, body: bytes, via: tuple[str, ...]
    ) -> AsyncIterator[PassedAnswer]:
        """One request within the server's bounds. Raises `EngineError`, also from the body."""
        if self._peer_id in via or len(via) >= VIA_MAX:
            raise EngineError("This request goes in a circle of nodes behind nodes.")
        if self._in_flight >= self._slots + WAITING_MAX:
            raise EngineBusyError(
                f"The server behind this node has {self._in_flight} requests already; "
                "try again soon.",
                BUSY_RETRY_AFTER_S,
            )
        self._in_flight += 1
        try:
            async with self._limit, self._asked(path, body, via) as answer:
                yield answer
        finally:
            self._in_flight -= 1

    @asynccontextmanager
    async def _asked(
        self, path: str, body: bytes, via: tuple[str, ...]
    ) -> AsyncIterator[PassedAnswer]:
        via = (*via, self._peer_id)
        async with AsyncExitStack() as stack:
            try:
                answer = await stack.enter_async_context(
                    self._caller.ask("POST", path, body, via=via)
                )
            except (PeerUnreachableError, RemoteProtocolError) as error:
                raise self._lost(error) from error
            if answer.status in _REDIRECTS:
                raise EngineError("The server behind this node sends requests elsewhere.")
            if answer.status == _UNAUTHORIZED:
                # Our key, not the client's, and perhaps a part of it in the body.
                raise EngineError("The server behind this node does not accept the node's key.")
            chunks = await stack.enter_async_context(aclosing(self._chunks(answer)))
            yield replace(answer, body=chunks)

    async def _chunks(self, answer: PassedAnswer) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in answer.body:
                yield chunk
        except (PeerUnreachableError, RemoteProtocolError) as error:
            raise self._lost(error) from error

    def _lost(self, error: MeshnodeError) -> EngineError:
        self._doubt.set()
        return EngineError(f"The server behind this node failed: {_told(error)}.")

    # --- what others see ------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests on their way, those that wait included."""
        return self._in_flight

    def model(self, digest: str) -> FrontedModel | None:
        """The model of this digest, if requests may be sent to it now."""
        if self._error is not None:
            return None
        return next((each for each in self._models if each.digest == digest), None)

    def offers(self) -> tuple[Offer, ...]:
        """What the mesh is told. Of a server that is down: that its models are known and cannot
        answer, so that who asks is told to try later, and not that there is no such model."""
        return tuple(
            Offer(
                name=model.name,
                digest=model.digest,
                state="ready" if self._error is None else "failed",
                context_tokens=model.context_tokens,
                slots=self._slots,
                slots_busy=self._slots_busy,
                queue_depth=self._in_flight - self._slots_busy,
                kv_tokens_free=0,
                prefill_tokens_per_s=0.0,
                decode_tokens_per_s=0.0,
                upstream=True,
            )
            for model in self._models
        )

    def snapshots(self) -> tuple[ModelSnapshot, ...]:
        """A row for each model; one for the server while none is known."""
        rows = [(model.name, model.digest, model.context_tokens) for model in self._models]
        return tuple(
            ModelSnapshot(
                name=name,
                digest=digest,
                state=self.state,
                progress=0.0,
                error=None if self._error is None else f"{self._caller.url}: {self._error}",
                slots=self._slots,
                slots_busy=self._slots_busy,
                queue_depth=self._in_flight - self._slots_busy,
                context_tokens=context_tokens,
                prefill_tokens_per_s=0.0,
                decode_tokens_per_s=0.0,
                memory_bytes=0,
            )
            for name, digest, context_tokens in rows or [(self._name or self._caller.url, "", 0)]
        )

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        """As people see it; "loading" until the server has been asked."""
        if self._error is not None:
            return "failed"
        return "ready" if self._has_been_up else "loading"

    @property
    def _slots_busy(self) -> int:
        return min(self._in_flight, self._slots)


def find_upstreams(config: Config, peer_id: str) -> tuple[Fronted, ...]:
    """The servers of the configuration. Raises `ConfigError` for a key file that cannot be used."""
    specs = [split_upstream(text) for text in config.upstreams]
    if not specs:
        return ()
    keys = (
        {}
        if config.upstream_key_file is None
        else read_keys(config.upstream_key_file, tuple(dict.fromkeys(spec.url for spec in specs)))
    )
    return tuple(
        Fronted(
            Caller(spec.url, keys.get(spec.url)),
            peer_id,
            name=spec.name,
            digest=spec.digest,
            slots=config.slots,
            context_tokens=config.context_tokens,
        )
        for spec in specs
    )


def _told(error: MeshnodeError) -> str:
    return str(error)[:ERROR_CHARS_MAX]


def _renamed(body: bytes, name: str) -> bytes:
    """A JSON object with another `model`; every other member as it came, to the byte."""
    try:
        members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RequestError("The body is not a JSON object.", code="invalid_json") from None
    members["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(members)
