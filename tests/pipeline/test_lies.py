"""A real stage in a ring with an owner that lies to it: nothing is computed of a lie.

These are lies that only its process can see; `test_ring.py` has those that its node sees.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import trio
from msgspec.structs import replace

from meshnode.engine import ModelCard
from meshnode.engine.process import EngineOptions
from meshnode.engine.stages import steps
from meshnode.engine.stages.steps import Shape
from meshnode.pipeline.parts import StagePart
from tests.engine.conftest import q4_0_card  # noqa: F401
from tests.pipeline.rings import ANN, BEA, CAT, CONTEXT, WIDTH, Adder, world

THREE = ((ANN, 0, 3), (BEA, 3, 7), (CAT, 7, 9))
HANG_S = 60.0
"""A load takes half a second on a free machine."""
SHAPE = Shape(WIDTH, CONTEXT, CONTEXT, 0)


def rows(value: float) -> Callable[[bytes], bytes]:
    """The rows of a frame, all of that value."""

    def spoil(frame: bytes) -> bytes:
        step = steps.decode(frame, SHAPE)
        lies = np.full((step.count, WIDTH), value, "<f4").tobytes()
        return steps.encode(replace(step, rows=lies))

    return spoil


def changed(**changes: object) -> Callable[[bytes], bytes]:
    return lambda frame: steps.encode(replace(steps.decode(frame, SHAPE), **changes))


LIES: dict[str, Callable[[bytes], bytes]] = {
    "no number": rows(float("nan")),
    "endless": rows(float("inf")),
    "a hole before it": changed(positions=np.array([5], "<i4").tobytes()),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_ends_the_ring_and_the_connection_and_not_the_stage(
    lie: str,
    q4_0_card: ModelCard,  # noqa: F811
) -> None:
    with trio.fail_after(HANG_S):
        async with world(*THREE) as (mesh, head):
            del mesh.stages[BEA, 3, 7]  # no ring before the real one is loaded
            stage = StagePart(q4_0_card, 3, 7, CONTEXT, EngineOptions(threads=1))
            mesh.nursery.start_soon(stage.run)
            await stage.process.wait_ready()
            mesh.stages[BEA, 3, 7] = stage
            liar = mesh.stages[ANN, 0, 3]
            assert isinstance(liar, Adder)
            await head.wait_open()
            liar.spoil = LIES[lie]
            closed = len(head.reasons)
            await head.ask(head.step(5))
            await head.wait_closed(closed + 1)
            assert mesh.dropped == [(BEA, ANN)]
            liar.spoil = bytes
            await head.wait_open()
            await head.ask(head.step(5))
            (said,) = await head.answer()
            assert np.isfinite(said)
            assert stage.process.stats().state == "ready"
