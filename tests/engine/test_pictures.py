"""Pictures are bytes of strangers: what is none, or too much, is refused; nothing else happens."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image as Pillow

from meshnode.engine import Image
from meshnode.engine.pictures import PIXELS_MAX, check, pixels
from meshnode.errors import RequestError
from tests.engine.eyes import picture


def saved(image: Pillow.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def animated(form: str) -> bytes:
    frames = [Pillow.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return saved(frames[0], form, save_all=True, append_images=frames[1:])


BAD = {
    "nothing": (b"", "not a whole PNG"),
    "text": (b"a picture of a cat", "not a whole PNG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a whole PNG"),
    "bmp": (saved(Pillow.new("RGB", (8, 8)), "BMP"), "not a whole PNG"),
    "magic": (b"\x89PNG\r\n\x1a\n", "not a whole PNG"),
    "truncated png": (picture()[:-40], "not a whole PNG"),
    "truncated jpeg": (picture(size=(400, 400), form="JPEG")[:-300], "not a whole PNG"),
    "truncated webp": (picture(size=(400, 400), form="WEBP")[:-20], "not a whole PNG"),
    "no pixels": (png(8, 8), "not a whole PNG"),
    "bomb": (png(60_000, 60_000, bytes(1000)), "has over 16777216 pixels"),
    "just over": (png(4097, 4096), "4097 x 4096"),
    "zero": (png(0, 8), "not a whole PNG|empty"),
    "thin": (png(8000, 8), "too thin"),
    "gif": (animated("GIF"), "several frames"),
    "webp": (animated("WEBP"), "several frames"),
    "apng": (animated("PNG"), "several frames"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused(name: str) -> None:
    data, why = BAD[name]
    with pytest.raises(RequestError, match=why) as refused:
        check(Image(data, 0))
    assert (refused.value.param, refused.value.code) == ("messages", "invalid_image")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_become_pixels(form: str) -> None:
    image = Image(picture("red", (64, 48), form), 0)
    check(image)
    found = pixels(image)
    assert (found.width, found.height, len(found.rgb)) == (64, 48, 64 * 48 * 3)
    red, green, blue = found.rgb[-3:]
    assert red > 200 > 100 > max(green, blue)


def test_the_largest_fits_into_the_trial() -> None:
    side = int(PIXELS_MAX**0.5)
    data = saved(Pillow.new("RGBA", (side, side), "red"), "PNG", compress_level=1)
    check(Image(data, 0))


def test_a_camera_that_was_held_upright_is_believed() -> None:
    image = Pillow.new("RGB", (64, 32))
    exif = image.getexif()
    exif[0x0112] = 6  # turn a quarter
    found = pixels(Image(saved(image, "JPEG", exif=exif), 0))
    assert (found.width, found.height) == (32, 64)


def test_low_detail_is_a_smaller_picture() -> None:
    found = pixels(Image(picture(size=(2000, 1000)), 0, low_detail=True))
    assert (found.width, found.height) == (512, 256)
