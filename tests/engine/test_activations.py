"""Activations as bytes: how near they come back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.engine.stages.activations import MAGNITUDE_MAX, pack, unpack
from meshnode.engine.stages.steps import CODECS, OUTLIERS, Codec, row_bytes
from meshnode.errors import RemoteProtocolError

WIDTH = 64


def like_a_models(count: int = 40, width: int = WIDTH) -> np.ndarray:
    """Of the size of ordinary activations, with a few places far larger than the rest."""
    random = np.random.default_rng(1)
    rows = random.normal(0.0, 3.0, (count, width)).astype(np.float32)
    rows[:, [5, 17]] *= 900
    rows[0, 3] = 24_552.0
    return rows


def there_and_back(rows: np.ndarray, codec: Codec) -> np.ndarray:
    used, data = pack(rows, codec)
    assert used == codec
    assert len(data) == len(rows) * row_bytes(codec, rows.shape[1])
    return unpack(data, codec, rows.shape[1])


def test_f32_is_exact() -> None:
    rows = like_a_models()
    rows[1, :3] = (-0.0, 1e-42, MAGNITUDE_MAX)
    back = there_and_back(rows, "f32")
    assert back.tobytes() == rows.tobytes()
    back[0, 0] = 1.0  # it is the caller's own


def test_f16_is_near() -> None:
    rows = like_a_models()
    assert (np.abs(there_and_back(rows, "f16") - rows) <= np.abs(rows) / 2048).all()


def test_i8_keeps_the_largest_apart() -> None:
    rows = like_a_models()
    back = there_and_back(rows, "i8")
    largest = np.argsort(-np.abs(rows), axis=1)
    outliers, others = largest[:, :OUTLIERS], largest[:, OUTLIERS:]
    errors = np.abs(back - rows)
    of_outliers = np.take_along_axis(errors, outliers, axis=1)
    assert (of_outliers <= np.abs(np.take_along_axis(rows, outliers, axis=1)) / 2048).all()
    # Half a step of 127 to the largest of the others.
    step = np.abs(np.take_along_axis(rows, others, axis=1)).max(axis=1, keepdims=True) / 127
    assert (np.take_along_axis(errors, others, axis=1) <= 0.501 * step).all()


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_and_zeros(codec: Codec) -> None:
    assert there_and_back(np.zeros((0, WIDTH), np.float32), codec).shape == (0, WIDTH)
    assert not there_and_back(np.zeros((2, WIDTH), np.float32), codec).any()


@pytest.mark.parametrize("codec", ["f16", "i8"])
def test_what_is_too_large_for_a_codec_goes_as_f32(codec: Codec) -> None:
    rows = like_a_models()
    rows[7, 9] = -70_000.0
    used, data = pack(rows, codec)
    assert used == "f32"
    assert np.array_equal(unpack(data, used, WIDTH), rows)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * MAGNITUDE_MAX])
def test_what_is_no_activation_is_not_sent(codec: Codec, value: float) -> None:
    rows = like_a_models()
    rows[3, 4] = value
    with pytest.raises(ValueError, match="an activation of"):
        pack(rows, codec)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -2 * MAGNITUDE_MAX])
def test_what_is_no_activation_is_not_taken(value: float) -> None:
    rows = like_a_models()
    rows[3, 4] = value
    with pytest.raises(RemoteProtocolError, match="no numbers"):
        unpack(rows.tobytes(), "f32", WIDTH)
    if abs(value) != 2 * MAGNITUDE_MAX:
        with pytest.raises(RemoteProtocolError, match="no numbers"):
            unpack(rows.astype(np.float16).tobytes(), "f16", WIDTH)


def test_hostile_scales_and_places_are_refused() -> None:
    _, good = pack(like_a_models(2), "i8")
    for scale in (np.nan, np.inf, -np.inf, 3e38, 1e12):
        with pytest.raises(RemoteProtocolError, match="no numbers"):
            unpack(np.float32(scale).tobytes() + good[4:], "i8", WIDTH)
    with pytest.raises(RemoteProtocolError, match="beyond the width"):
        unpack(good[:4] + np.uint16(WIDTH).tobytes() + good[6:], "i8", WIDTH)


@given(data=st.binary(max_size=3 * 4 * 16), codec=st.sampled_from(CODECS))
def test_any_bytes_are_rows_of_numbers_or_refused(data: bytes, codec: Codec) -> None:
    width = 16
    try:
        rows = unpack(data, codec, width)
    except RemoteProtocolError:
        return
    assert rows.dtype == np.float32
    assert rows.shape == (len(data) // row_bytes(codec, width), width)
    assert np.abs(rows).max(initial=0.0) <= MAGNITUDE_MAX


@given(
    numbers=st.lists(st.floats(-60_000, 60_000, width=32), min_size=16, max_size=16),
    codec=st.sampled_from(CODECS),
)
def test_any_activations_come_back_near(numbers: list[float], codec: Codec) -> None:
    rows = np.array([numbers], np.float32)
    back = there_and_back(rows, codec)
    ordinary = np.sort(np.abs(rows[0]))[:-OUTLIERS].max()
    bound = {"f32": 0.0, "f16": 1e-3, "i8": 1e-3}[codec] * np.abs(rows) + 1e-7
    if codec == "i8":
        bound = bound + ordinary / 200
    assert (np.abs(back - rows) <= bound).all()
