"""Whether a model's stages say what they said before, or what the whole model said here.

A short text is continued greedily, and the tokens are remembered by model and kind of KV. A ring
whose stages hold other bytes, or compute them wrongly, says something else: that is shown, and
nothing is refused for it, since other CPUs may draw another token at a near tie. Decides what is
asked and compared; does not know who owns which layers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import trio

from meshnode.config import KvType
from meshnode.engine import Delta, Engine, Request, Sampling
from meshnode.errors import EngineError

__all__ = ["SelfTests", "Verdict"]

logger = logging.getLogger(__name__)

PROMPT = "The sun rises in the east and sets in the"
TOKENS = 8
REMEMBERED_MAX = 256
"""Models; the oldest are forgotten."""
HANG_S = 60.0
"""A round over slow links takes half a second for each token, and the prompt some more."""

Verdict = Literal["", "first", "as before", "as the whole model", "differs", "no answer"]
"""Empty until there is one; "first" if there is nothing to compare with."""


class SelfTests:
    """What models have said on this node, in a file of its cache."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def run(self, engine: Engine, kv_type: KvType, *, whole: bool) -> Verdict:
        """Ask `engine`, compare with what is remembered of its model, remember what the whole
        model says for good, and what stages say until then."""
        key = _key(engine.stats().card.digest, kv_type)
        said = await _said(engine)
        if said is None:
            return "no answer"
        known = await trio.to_thread.run_sync(self._read)
        before, was_whole = known.get(key, ("", False))
        if whole or not before:
            known.pop(key, None)
            known[key] = (said, whole)
            await trio.to_thread.run_sync(self._write, known)
        if not before:
            return "first"
        if said != before:
            return "differs"
        return "as the whole model" if was_whole else "as before"

    async def knows(self, digest: str, kv_type: KvType) -> bool:
        """Whether the whole model has said its part here."""
        known = await trio.to_thread.run_sync(self._read)
        return known.get(_key(digest, kv_type), ("", False))[1]

    def _read(self) -> dict[str, tuple[str, bool]]:
        """Nothing, if there is no such file or it is not ours any more."""
        try:
            found = json.loads(self._path.read_bytes())
            return {str(key): (str(said), whole is True) for key, (said, whole) in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _write(self, known: dict[str, tuple[str, bool]]) -> None:
        kept = dict(list(known.items())[-REMEMBERED_MAX:])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(kept, indent=1))
        os.replace(draft, self._path)


def _key(digest: str, kv_type: KvType) -> str:
    """Another llama.cpp may round otherwise."""
    return f"{digest}|{kv_type}|{version('llama_cpp_python')}"


async def _said(engine: Engine) -> str | None:
    """A digest of the tokens; None if the engine does not answer in time."""
    request = Request(
        id="self-test",
        session=hashlib.blake2b(b"self-test", digest_size=16).digest(),
        prompt=PROMPT,
        sampling=Sampling(temperature=0.0),
        max_tokens=TOKENS,
    )
    tokens: list[int] = []
    try:
        with trio.fail_after(HANG_S):
            async with engine.generate(request) as answer:
                async for part in answer:
                    if isinstance(part, Delta):
                        tokens += part.ids
    except (EngineError, trio.TooSlowError) as error:
        logger.warning("self-test: %s", error or "no answer in time")
        return None
    return hashlib.blake2b(repr(tokens).encode(), digest_size=16).hexdigest()
