"""What an error of ours looks like to whoever asked: status, headers, OpenAI's error object. Pure.

Both apps speak through it, so a client sees the same whether its gateway refused or a peer did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from meshnode.errors import (
    EngineBusyError,
    EngineError,
    MeshnodeError,
    NoReplicaError,
    RequestError,
    UnknownModelError,
)
from meshnode.gateway.answer import RETRY_HEADER, NobodyAnsweredError
from meshnode.gateway.dialects.kept import UnknownResponseError
from meshnode.gateway.keys import BadKeyError, LimitError
from meshnode.gateway.openai import encode_error

ENGINE_RETRY_AFTER_S = 1.0
"""An engine that died is back in about a second (engine notes: 1.2 s)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A whole answer that says no; `body` is JSON."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def refusal_of(error: MeshnodeError) -> Refusal | None:
    """How to say it; None for an error that should never have come this far."""
    text = str(error)
    match error:
        case RequestError(param=param, code=code):
            body = encode_error(text, "invalid_request_error", param=param, code=code)
            return Refusal(400, body, {RETRY_HEADER: "elsewhere"} if error.retry_elsewhere else {})
        case UnknownModelError(known=known):
            body = encode_error(
                text,
                "invalid_request_error",
                param="model",
                code="model_not_found",
                models=known,
            )
            return Refusal(404, body)
        case UnknownResponseError(param=param):
            code = f"{param.removesuffix('_id')}_not_found"
            return Refusal(404, encode_error(text, "invalid_request_error", param=param, code=code))
        case NoReplicaError(state=state, retry_after_s=seconds):
            body = encode_error(text, "server_error", param="model", code="no_replica", state=state)
            return Refusal(503, body, _retry_after(seconds))
        case NobodyAnsweredError(state=state, attempts=attempts, retry_after_s=seconds):
            tried = [{"peer": each.peer_id, "reason": each.reason} for each in attempts]
            body = encode_error(
                text, "server_error", code="replicas_failed", state=state, attempts=tried
            )
            return Refusal(503, body, _retry_after(seconds))
        case EngineBusyError(retry_after_s=seconds):
            return _elsewhere(text, "busy", seconds)
        case EngineError():
            return _elsewhere(text, "engine_failed", ENGINE_RETRY_AFTER_S)
        case BadKeyError():
            body = encode_error(text, "invalid_request_error", code="invalid_api_key")
            return Refusal(401, body, {"www-authenticate": "Bearer"})
        case LimitError(retry_after_s=seconds):
            body = encode_error(text, "requests", code="rate_limit_exceeded")
            return Refusal(429, body, _retry_after(seconds))
    return None


def _elsewhere(text: str, code: str, retry_after_s: float) -> Refusal:
    """To a peer: ask the next one. The API app never says it, it turns there by itself."""
    headers = {RETRY_HEADER: "elsewhere", **_retry_after(retry_after_s)}
    return Refusal(503, encode_error(text, "server_error", code=code), headers)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}
