"""Activations as bytes: the rows that one stage of a cut model sends to the next.

Decides how each codec of `steps.py` is laid out, and which numbers a stage takes from a peer. Does
not know what the numbers mean.

"f32" is exact, so a cut model answers bit for bit as the whole one does. llama.cpp rounds
activations to 8 bits itself, so whatever changes them at all, were it by a millionth, turns about
3 % of the near ties; "f16" and "i8" cost no more than that, for a half and a quarter of the bytes.
In "i8" each row has a scale, and its `OUTLIERS` largest numbers travel apart: a few places of a
row are hundreds of times larger than the rest, and would take all its precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from meshnode.engine.stages.steps import OUTLIERS, Codec, row_bytes
from meshnode.errors import RemoteProtocolError

# Far beyond a model's own: the largest of SmolLM2's is 24 552. From peers more is refused, since
# llama.cpp has no defence against numbers that grow into infinity and NaN in it: up to this bound,
# even the sum of squares of a row is finite.
MAGNITUDE_MAX = 1e12
_F16_MAX = float(np.finfo(np.float16).max)
_I8_MAX = 127
# A scale is divided by, so it is a normal number; no activation as small as this matters.
_SCALE_MIN = float(np.finfo(np.float32).tiny)

Rows = npt.NDArray[np.float32]


def pack(rows: Rows, codec: Codec) -> tuple[Codec, bytes]:
    """The bytes of `rows`, float32[n, width], and the codec they are in: "f32" if a number is
    larger than this codec can say.

    Raises `ValueError` if something in them is no number.
    """
    peak = float(np.abs(rows).max(initial=0.0))
    if not peak <= MAGNITUDE_MAX:
        raise ValueError(f"an activation of {peak}")
    if codec == "f32" or peak > _F16_MAX or rows.shape[1] < OUTLIERS:
        return "f32", rows.astype("<f4", copy=False).tobytes()
    if codec == "f16":
        return "f16", rows.astype("<f2").tobytes()
    return "i8", _pack_i8(rows)


def unpack(data: bytes, codec: Codec, width: int) -> Rows:
    """The rows that were packed, float32[n, width], writable and of nobody else.

    Raises `RemoteProtocolError` unless all are whole and are numbers up to `MAGNITUDE_MAX`.
    """
    count, rest = divmod(len(data), row_bytes(codec, width))
    if rest:
        raise RemoteProtocolError(f"{len(data)} bytes are no rows of {width} numbers as {codec}")
    # Whatever a hostile scale makes of a row is seen below.
    with np.errstate(over="ignore", invalid="ignore"):
        if codec == "f32":
            rows = np.frombuffer(data, "<f4").reshape(count, width).astype(np.float32)
        elif codec == "f16":
            rows = np.frombuffer(data, "<f2").reshape(count, width).astype(np.float32)
        else:
            rows = _unpack_i8(data, count, width)
        # Not "above the bound": a NaN is not above anything.
        if not np.abs(rows).max(initial=0.0) <= MAGNITUDE_MAX:
            raise RemoteProtocolError("activations that are no numbers, or too large for a model")
    return rows


def _row_of_i8(width: int) -> np.dtype[Any]:
    row = np.dtype(
        [
            ("scale", "<f4"),
            ("places", "<u2", OUTLIERS),
            ("outliers", "<f2", OUTLIERS),
            ("cells", "i1", width),
        ]
    )
    assert row.itemsize == row_bytes("i8", width)
    return row


def _pack_i8(rows: Rows) -> bytes:
    count, width = rows.shape
    packed = np.zeros(count, _row_of_i8(width))
    places = np.argpartition(np.abs(rows), width - OUTLIERS, axis=1)[:, -OUTLIERS:]
    packed["places"] = places
    packed["outliers"] = np.take_along_axis(rows, places, axis=1)
    others = rows.copy()
    np.put_along_axis(others, places, 0.0, axis=1)
    scale = np.maximum(np.abs(others).max(axis=1, initial=0.0) / _I8_MAX, _SCALE_MIN)
    packed["scale"] = scale
    packed["cells"] = np.rint(others / scale[:, np.newaxis])
    return packed.tobytes()


def _unpack_i8(data: bytes, count: int, width: int) -> Rows:
    packed = np.frombuffer(data, _row_of_i8(width), count)
    places = packed["places"].astype(np.int64)
    if places.max(initial=0) >= width:
        raise RemoteProtocolError(f"an activation beyond the width of {width}")
    rows: Rows = packed["cells"].astype(np.float32) * packed["scale"][:, np.newaxis]
    np.put_along_axis(rows, places, packed["outliers"].astype(np.float32), axis=1)
    return rows
