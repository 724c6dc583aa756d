"""The fields of a request body: decoded strictly, and refused by name. Pure.

Decides how a bad body is told apart from an unknown, a missing and an unsupported field. Does not
know which fields there are: every API brings structs and tables of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from meshnode.errors import RequestError

__all__ = ["Shape", "decode_body", "invalid_body", "refuse_unsupported", "unsupported"]

_PATH = re.compile(r" - at `(?:key in )?\$\.?(?P<path>.*)`$")
_FIELD = re.compile(r"(?P<problem>unknown field|missing required field) `(?P<field>.*?)`")


@dataclass(frozen=True, slots=True)
class Shape:
    """All that a body may say: a struct, and of it and those within it the fields that only take
    null or the values beside them."""

    body: type[msgspec.Struct]
    neutral: Mapping[type[msgspec.Struct], Mapping[str, tuple[Any, ...]]]


def decode_body(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """What `decoder` makes of a body. Raises `RequestError` naming the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid_body(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # The message of a DecodeError gives a position, never the text.
        detail = str(error) if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise RequestError(f"The body is not valid JSON: {detail}.", code="invalid_json") from None


def invalid_body(message: str) -> RequestError:
    """msgspec's "Expected `int`, got `str` - at `$.max_tokens`", with the field as `param`."""
    found = _PATH.search(message)
    path = found["path"] if found else ""
    problem = message[: found.start()] if found else message
    field = _FIELD.search(problem)
    if field is None:
        code, param = "invalid_value", path
    elif field["problem"] == "unknown field":
        code, param = "unknown_parameter", f"{path}.{field['field']}" if path else field["field"]
    else:
        code = "missing_required_parameter"
        param = f"{path}.{field['field']}" if path else field["field"]
    where = f"`{param}`: " if param else ""
    return RequestError(f"{where}{problem}.", param=param or None, code=code)


def refuse_unsupported(
    struct: msgspec.Struct, neutral: Mapping[str, tuple[Any, ...]], path: str = ""
) -> None:
    """Refuse each field of `neutral` that is neither null nor one of the values beside it.

    Raises `RequestError`; `path` goes before the field's name.
    """
    for field, values in neutral.items():
        given = getattr(struct, field)
        # JSON's true is not 1, though Python's is.
        if given is None or any(type(given) is type(v) and given == v for v in values):
            continue
        raise unsupported(path + field)


def unsupported(param: str) -> RequestError:
    return RequestError(
        f"`{param}` is not supported with this value; leave it out.",
        param=param,
        code="unsupported_parameter",
    )
