"""Talk to a model of the mesh from the terminal, through the gateway on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.client import HTTPResponse
from typing import Any

import click

from meshnode.cli.api import ApiError, NodeApi, find_node
from meshnode.cli.edge import api_option, config_from, data_dir_option, json_option
from meshnode.cli.output import print_json, printable, short_peer

ANSWER_TOKENS_DEFAULT = 1024
"""A page of text. Small models left alone go in circles until their context is full."""
LINE_BYTES_MAX = 1024 * 1024
"""One event of a stream; a token's is a few hundred bytes."""


@dataclass
class Answer:
    """An answer as it comes in: `ask()` fills it."""

    served_by: str = ""
    route: str = ""
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    def credit(self) -> str:
        """Who answered, by which way, and what it took."""
        where = "this node" if self.route == "local" else f"peer {short_peer(self.served_by)}"
        if not self.usage:
            return f"[{where}]"
        details = self.usage.get("prompt_tokens_details") or {}
        return (
            f"[{where}: {self.usage.get('prompt_tokens')} tokens in "
            f"({details.get('cached_tokens', 0)} remembered), "
            f"{self.usage.get('completion_tokens')} out]"
        )


@click.command()
@click.option(
    "--model", metavar="NAME", help="Which model. [default: the first that is ready and whole]"
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=ANSWER_TOKENS_DEFAULT,
    show_default=True,
    help="Where an answer is cut off.",
)
@click.option("--once", metavar="TEXT", help="Ask this one thing, print the answer, and end.")
@click.option(
    "--api-key",
    envvar="MESHNODE_API_KEY",
    metavar="KEY",
    help="If the node asks for one. MESHNODE_API_KEY keeps it out of the process list.",
)
@api_option
@data_dir_option
@json_option
def chat(
    model: str | None,
    max_tokens: int,
    once: str | None,
    api_key: str | None,
    api: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Talk to a model in the terminal, wherever in the mesh it runs.

    After each answer stands who gave it. Ctrl-C stops an answer, Ctrl-D ends the talk.

    \b
    Examples:
      meshnode chat
      meshnode chat --model qwen3 --once "Why is the sky blue?"
      meshnode chat --once "Name a colour." --json
    """
    if as_json and once is None:
        raise click.UsageError("--json needs --once TEXT: a conversation is not one document")
    node = find_node(api, config_from({"data_dir": data_dir}).data_dir)
    node = replace(node, key=api_key.strip() if api_key else None)
    model = model or _first_ready(node)
    if once is None:
        _converse(node, model, max_tokens)
        return
    answer = Answer()
    for piece in ask(node, model, [{"role": "user", "content": once}], answer, max_tokens):
        if not as_json:
            _show(piece)
    if as_json:
        print_json(
            {
                "model": model,
                "text": answer.text,
                "served_by": answer.served_by,
                "route": answer.route,
                "usage": answer.usage,
            }
        )
    else:
        click.echo()
        click.secho(answer.credit(), dim=True, err=True)


def ask(
    node: NodeApi, model: str, messages: list[dict[str, str]], answer: Answer, max_tokens: int
) -> Iterator[str]:
    """Stream an answer: fills `answer`, and yields each piece of text as it comes.

    Leaving the loop hangs up, which stops the generation. Raises `ApiError`, `NoNodeError`.
    """
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with node.answering("POST", "/v1/chat/completions", body) as response:
        answer.served_by = response.headers.get("x-meshnode-served-by", "")
        answer.route = response.headers.get("x-meshnode-route", "")
        for event in _events(response):
            if usage := event.get("usage"):
                answer.usage = usage
            for choice in event.get("choices", ()):
                if piece := choice.get("delta", {}).get("content"):
                    answer.text += piece
                    yield piece


def _show(piece: str) -> None:
    click.echo(printable(piece), nl=False)
    sys.stdout.flush()


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line up to `[DONE]`. An answer that ends before it is an error."""
    while line := response.readline(LINE_BYTES_MAX):
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ApiError(response.status, "the answer cannot be read: versions differ")
        if error := event.get("error"):
            raise ApiError(response.status, f"the answer broke off: {error.get('message')}")
        yield event
    raise ApiError(response.status, "the answer broke off: the node hung up")


def _first_ready(node: NodeApi) -> str:
    found = sorted(node.status().mesh_models, key=lambda model: model.approximate is not None)
    ready = [model.id for model in found if model.state == "ready" and model.served_by]
    if ready:
        return ready[0]
    loading = ", ".join(model.id for model in found if model.state == "loading")
    hint = f"still loading: {loading}" if loading else "serve one with `meshnode serve --model`"
    raise ApiError(503, f"no model in the mesh can answer now; {hint}")


def _converse(node: NodeApi, model: str, max_tokens: int) -> None:
    import readline  # noqa: F401  (importing it gives input() editing and history)

    click.secho(f"{printable(model)}: Ctrl-C stops an answer, Ctrl-D ends.", dim=True, err=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.secho("\n(Ctrl-D ends)", dim=True, err=True)
            continue
        if text.strip():
            _exchange(node, model, messages, text, max_tokens)


def _exchange(
    node: NodeApi, model: str, messages: list[dict[str, str]], text: str, max_tokens: int
) -> None:
    """One turn; `messages` grows by it only if there was an answer, whole or stopped."""
    question = {"role": "user", "content": text}
    answer = Answer()
    try:
        for piece in ask(node, model, [*messages, question], answer, max_tokens):
            _show(piece)
    except KeyboardInterrupt:
        click.secho(" (stopped)", dim=True, nl=False, err=True)
    except ApiError as error:
        click.secho(f"\n{error}", fg="red", err=True)
        return
    click.echo()
    if answer.text:
        click.secho(answer.credit(), dim=True, err=True)
        messages += [question, {"role": "assistant", "content": answer.text}]
