"""From the bytes of a picture, which are a client's, to pixels.

Decides which formats, sizes and shapes of picture are taken. Dimensions are read from the header
before anything is decoded, and no byte reaches a decoder in this process that has not passed
through one in a copy of it (`trial.py`). Does not know models: these make of pixels what they can.
"""

from __future__ import annotations

import io
import mmap
from dataclasses import dataclass

from PIL import Image as Pillow
from PIL import ImageOps

from meshnode.engine import Image
from meshnode.engine.trial import survives
from meshnode.errors import RequestError

# A photo of a telephone has 12 million; models look at far fewer. Decoded: 48 MiB.
PIXELS_MAX = 4096 * 4096
# Thinner ones would have no pixel left on their short side when a model has scaled them.
ASPECT_MAX = 50
# What OpenAI says of `detail: "low"`.
LOW_DETAIL_SIDE = 512
# Others have decoders that nobody needs here, and bugs with them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# A sentence.
_WHY_BYTES_MAX = 256


@dataclass(frozen=True, slots=True)
class Pixels:
    """`rgb` has 3 bytes per pixel, row by row from the top."""

    width: int
    height: int
    rgb: bytes


class _BadPictureError(Exception):
    """What is wrong with a picture."""


def check(image: Image) -> None:
    """Decode a picture where a crash costs nothing. Raises `RequestError` saying what is wrong."""
    with mmap.mmap(-1, _WHY_BYTES_MAX) as why:

        def attempt() -> bool:
            try:
                pixels(image)
            except _BadPictureError as error:
                why.write(str(error).encode()[:_WHY_BYTES_MAX])
                return False
            return True

        if survives(attempt):
            return
        said = bytes(why).rstrip(b"\0").decode("utf-8", "replace")
    raise RequestError(
        f"An image {said or 'cannot be decoded'}.", param="messages", code="invalid_image"
    )


def pixels(image: Image) -> Pixels:
    """Decode a picture that has passed `check`."""
    try:
        with Pillow.open(io.BytesIO(image.data), formats=FORMATS) as opened:
            _check_header(opened)
            # Cameras turn the picture by a note in the file, not by its pixels.
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except Pillow.DecompressionBombError as error:  # Pillow's own bound, above ours
        raise _BadPictureError(f"has over {PIXELS_MAX} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow's own words may quote the file.
        raise _BadPictureError("is not a whole PNG, JPEG, WebP or GIF") from error
    if image.low_detail:
        upright.thumbnail((LOW_DETAIL_SIDE, LOW_DETAIL_SIDE))
    return Pixels(upright.width, upright.height, upright.tobytes())


def _check_header(opened: Pillow.Image) -> None:
    """Before anything is decoded."""
    width, height = opened.size
    if width * height > PIXELS_MAX:
        raise _BadPictureError(f"is {width} x {height}: it has over {PIXELS_MAX} pixels")
    if max(width, height) > ASPECT_MAX * min(width, height):
        raise _BadPictureError(f"is {width} x {height}: too thin, or empty")
    # A telephone's JPEG may carry its preview as a second frame, and is called MPO then.
    if opened.format != "MPO" and getattr(opened, "is_animated", False):
        raise _BadPictureError("has several frames; send one of them")
