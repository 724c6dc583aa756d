"""A few registers in one room: every message takes the same time, and a test says what gets lost.

`trace` is the conversation as it was said, fit to be read and compared.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import count

from meshnode.messages import Control, Genesis, Header, decode, encode
from meshnode.protocol import Effect, Persist, Send
from meshnode.protocol.consensus import Register
from tests.protocol.consensus.parts import (
    Said,
    Wishes,
    a_register,
    block_in_words,
    in_words,
    name_of,
    peer,
)

LATENCY_S = 0.01


class Room:
    """Registers by name, what they have stored, and the clock that moves them."""

    def __init__(self, genesis: Genesis, *others: str) -> None:
        self.genesis = genesis
        self.now = 0.0
        self.trace: list[str] = []
        self.registers: dict[str, Register] = {}
        self.applications: dict[str, Wishes] = {}
        self.disks: dict[str, bytes] = {}
        self.is_lost: Callable[[str, str, Said], bool] = lambda sender, to, message: False
        self._heads: dict[str, Header] = {}
        self._order = count()
        self._queue: list[tuple[float, int, str, str, Said]] = []
        for name in (*map(name_of, genesis.voters), *others):
            self.applications[name] = Wishes()
            self.start(name)

    def start(self, name: str) -> None:
        """Come (back) to life with what is on the disk."""
        journal = self.disks.get(name)
        register = a_register(name, self.genesis, self.applications[name], journal=journal)
        self.registers[name] = register
        if journal is not None:
            self.note(f"{name} comes back")
        self.do(name, register.tick(self.now))

    def kill(self, name: str) -> None:
        del self.registers[name]
        self.note(f"{name} is killed")

    def want(self, *names: str) -> None:
        for name in names:
            self.do(name, self.registers[name].want(True, self.now))

    def tell(self, sender: str, to: str, message: Said) -> None:
        self._say(sender, (to,), message)

    def run(self, seconds: float) -> None:
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Let time pass until it is so; whether it came to that."""
        end = self.now + seconds
        while not condition():
            timers = [
                (deadline, name)
                for name, register in self.registers.items()
                if (deadline := register.deadline()) is not None
            ]
            timer = min(timers, default=(end, ""))
            if self._queue and self._queue[0][0] <= min(timer[0], end):
                self.now, _, sender, to, message = heapq.heappop(self._queue)
                if to in self.registers:
                    heard: Said = decode(encode(message), Control)  # type: ignore[arg-type]
                    effects = self.registers[to].receive(peer(sender), heard, self.now)
                    self.do(to, effects)
            elif timer[0] < end:
                self.now = max(self.now, timer[0])
                name = timer[1]
                self.do(name, self.registers[name].tick(self.now))
                later = self.registers[name].deadline()
                assert later is None or later > self.now, f"{name} spins"
            else:
                self.now = end
                return condition()
        return True

    def heads(self) -> dict[str, int]:
        return {name: register.head.epoch for name, register in self.registers.items()}

    def do(self, name: str, effects: Iterable[Effect]) -> None:
        said: dict[int, tuple[Said, list[str]]] = {}
        for effect in effects:
            match effect:
                case Persist():
                    self.disks[name] = effect.data
                case Send():
                    message: Said = effect.message  # type: ignore[assignment]
                    said.setdefault(id(message), (message, []))[1].append(name_of(effect.peer))
        for message, heard_by in said.values():
            self._say(name, tuple(heard_by), message)
        self._note_head(name)

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now:9.3f}  {text}")

    def _say(self, sender: str, heard_by: tuple[str, ...], message: Said) -> None:
        lost = [to for to in heard_by if self.is_lost(sender, to, message)]
        line = f"{sender} → {', '.join(heard_by)}: {in_words(message)}"
        self.note(f"{line} (lost: {', '.join(lost)})" if lost else line)
        for to in heard_by:
            if to not in lost:
                at = self.now + LATENCY_S
                heapq.heappush(self._queue, (at, next(self._order), sender, to, message))

    def _note_head(self, name: str) -> None:
        head: Header = self.registers[name].head.header
        if head.epoch and self._heads.get(name) != head:
            self._heads[name] = head
            self.note(f"{name}: epoch {head.epoch} is block {block_in_words(head)}")
