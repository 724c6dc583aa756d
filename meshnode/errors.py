"""Errors, named by whose fault they are.

Every error that crosses a layer is one of these; anything else that escapes is a bug and is left
to propagate. A message is written for the person who has to act on it: what happened, and what
to do next. None of them ever carries a prompt, an answer, a key or a token.
"""

from __future__ import annotations


class MeshnodeError(Exception):
    """Base of all errors that meshnode raises on purpose."""


class LocalProtocolError(MeshnodeError):
    """Our own code called a protocol wrongly; sending it would have been illegal."""


class RemoteProtocolError(MeshnodeError):
    """A peer sent bytes that are malformed, oversized, forged, expired or out of turn."""


class ConfigError(MeshnodeError):
    """The operator's flags, environment, file or data directory cannot work as they are."""


class NotAuthorizedError(MeshnodeError):
    """A peer is not a member of this mesh, or its credential was refused."""


class PeerUnreachableError(MeshnodeError):
    """No address of the peer answered, or its connection broke."""


class EngineError(MeshnodeError):
    """An engine cannot answer; `retry_elsewhere` says whether another replica might."""

    retry_elsewhere = True


class EngineBusyError(EngineError):
    """The engine's bounded queue is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShardError(MeshnodeError):
    """A model file cannot be cut into an expert shard, or not measured as one."""


class ModelLoadError(EngineError):
    """A model file is missing, corrupt, unsupported or too large for this machine."""


class FetchError(MeshnodeError):
    """A model's file, or the part that is needed, does not come from any peer."""


class StageError(EngineError):
    """A model, or a stage of it, cannot be cut out by layers; the message says why."""


class RequestError(EngineError):
    """The request itself cannot be served by any replica of this model (HTTP 400)."""

    retry_elsewhere = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class NoVisionError(RequestError):
    """The replica that was asked cannot see images; another of the same model may."""

    CODE = "no_vision"
    retry_elsewhere = True

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{model}` cannot see images here; its node needs an --mmproj file for it.",
            param="messages",
            code=self.CODE,
        )


class ApproximateOnlyError(RequestError):
    """The request demands an exact model, and the one that it names is an approximation."""

    def __init__(self, model: str, approximate: str) -> None:
        super().__init__(
            f"The model `{model}` is an approximation ({approximate}), and the request demands an "
            "exact one. Name the whole model, or do not demand it.",
            param="model",
            code="approximate_only",
        )


class ContextLengthError(RequestError):
    """Prompt plus requested tokens exceed the model's context."""

    def __init__(self, prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> None:
        asked = f" and {max_tokens} tokens were asked for" if max_tokens is not None else ""
        super().__init__(
            f"This model's context is {context_tokens} tokens; "
            f"the prompt has {prompt_tokens}{asked}. Shorten the messages or max_tokens.",
            param="messages",
            code="context_length_exceeded",
        )


class UnknownModelError(MeshnodeError):
    """No peer of the mesh has ever said that it has this model (HTTP 404)."""

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        listed = ", ".join(known) if known else "none yet"
        super().__init__(f"The model `{model}` does not exist in this mesh. Models here: {listed}.")
        self.model = model
        self.known = known


class NoReplicaError(MeshnodeError):
    """The model is known, but nobody can serve it right now (HTTP 503 with Retry-After)."""

    def __init__(self, model: str, state: str, retry_after_s: float) -> None:
        super().__init__(f"The model `{model}` has no replica that can answer now ({state}).")
        self.model = model
        self.state = state
        self.retry_after_s = retry_after_s
