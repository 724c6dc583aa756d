"""Images in requests: base64 in, bytes out. Pure.

Decides how many images of which size a request may carry, and that their bytes come with it: an
address to fetch them from is refused, whatever it points to, so that nobody can make a node ask
what only the node can reach. Does not know pixels: an engine decodes them (`engine/pictures.py`).
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from meshnode.engine import (
    IMAGE_BYTES_MAX,
    IMAGES_BYTES_MAX,
    IMAGES_MAX,
    ChatMessage,
    Image,
    images_of,
)
from meshnode.errors import RequestError
from meshnode.gateway.fields import invalid_body, unsupported

__all__ = ["bare_image", "check_images", "content_of", "image_part", "linked_image"]

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
_DATA_URL = re.compile(rf"data:(?:{'|'.join(MEDIA_TYPES)}|image/jpg);base64,", re.IGNORECASE)
_DETAILS = (None, "auto", "low", "high")


def image_part(part: dict[str, Any], path: str, at: int) -> Image:
    """The image of a content part `{"type": "image_url", "image_url": {...}}`.

    Raises `RequestError` naming the field.
    """
    for field in part:
        if field not in ("type", "image_url"):
            raise invalid_body(f"Object contains unknown field `{field}` - at `$.{path}`")
    given = part.get("image_url")
    if not isinstance(given, dict) or not isinstance(given.get("url"), str):
        raise _bad(f"{path}.image_url.url", "must be a string")
    for field in given:
        if field not in ("url", "detail"):
            raise invalid_body(f"Object contains unknown field `{field}` - at `$.{path}.image_url`")
    if given.get("detail") not in _DETAILS:
        raise unsupported(f"{path}.image_url.detail")
    return Image(_bytes(given["url"], f"{path}.image_url.url"), at, given.get("detail") == "low")


def bare_image(data: str, path: str) -> dict[str, Any]:
    """The content part for an image that another dialect carries as mere base64, at `path`.

    What its caller says of its type is no matter: what a file is, it says itself.
    Raises `RequestError`.
    """
    _decoded(data, path)
    url = f"data:{MEDIA_TYPES[0]};base64,{data}"
    return {"type": "image_url", "image_url": {"url": url}}


def linked_image(url: str, detail: str | None, path: str) -> dict[str, Any]:
    """The content part for an image that another dialect carries as a URL, at `path`.

    Raises `RequestError`.
    """
    part = {"type": "image_url", "image_url": {"url": url, "detail": detail or "auto"}}
    _bytes(url, path)
    return part


def content_of(message: ChatMessage) -> str | list[dict[str, Any]]:
    """A message's content as a chat request has it: the reverse of how it was read."""
    if not message.images:
        return message.content
    parts: list[dict[str, Any]] = []
    start = 0
    for image in message.images:
        parts += _text(message.content[start : image.at])
        part = bare_image(base64.b64encode(image.data).decode(), "messages")
        part["image_url"]["detail"] = "low" if image.low_detail else "auto"
        parts.append(part)
        start = image.at
    return parts + _text(message.content[start:])


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def check_images(messages: tuple[ChatMessage, ...]) -> None:
    """Raises `RequestError` if they are too many or too large together."""
    images = images_of(messages)
    if len(images) > IMAGES_MAX or sum(len(image.data) for image in images) > IMAGES_BYTES_MAX:
        raise _bad(
            "messages", f"has over {IMAGES_MAX} images, or over {_mib(IMAGES_BYTES_MAX)} of them"
        )


def _bytes(url: str, path: str) -> bytes:
    found = _DATA_URL.match(url)
    if found is None:
        raise _bad(
            path,
            "must be a data: URL of a PNG, JPEG, WebP or GIF in base64; a node fetches no images",
        )
    return _decoded(url[found.end() :], path)


def _decoded(data: str, path: str) -> bytes:
    if len(data) > -(-IMAGE_BYTES_MAX // 3) * 4:
        raise _bad(path, f"is an image of over {_mib(IMAGE_BYTES_MAX)}")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise _bad(path, "is not base64") from None


def _bad(param: str, why: str) -> RequestError:
    return RequestError(f"`{param}` {why}.", param=param, code="invalid_image")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes // 2**20} MiB"
