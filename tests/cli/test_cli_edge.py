"""How commands end: words and exit codes, in text and in JSON, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from meshnode.cli.edge import EdgeCommand
from meshnode.errors import ConfigError, EngineError

Run = Callable[..., Result]


def ending_with(error: BaseException, *arguments: str) -> Result:
    def callback(**_: object) -> None:
        raise error

    command = EdgeCommand(
        "test", callback=callback, params=[click.Option(["--json"], is_flag=True)]
    )
    return CliRunner().invoke(command, arguments)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (EngineError("it broke"), 1, "error: it broke\n"),
        (ConfigError("wrong"), 2, "error: wrong\n"),
        (ExceptionGroup("", [ExceptionGroup("", [ConfigError("deep")])]), 2, "error: deep\n"),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), 130, ""),
    ],
)
def test_an_error_becomes_words_and_a_code(error: BaseException, code: int, said: str) -> None:
    result = ending_with(error)
    assert (result.exit_code, result.stderr.lstrip(), result.stdout) == (code, said, "")


def test_with_json_an_error_is_the_one_document() -> None:
    result = ending_with(EngineError("it broke"), "--json")
    assert json.loads(result.stdout) == {
        "error": {"type": "EngineError", "message": "it broke", "exit_code": 1}
    }
    assert result.stderr == ""


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError(), ExceptionGroup("", [EngineError("x"), ZeroDivisionError()])]
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    assert ending_with(bug).exception is bug


def test_wrong_usage_is_code_2_in_both_forms(meshnode: Run) -> None:
    plain = meshnode("status", "--bogus")
    assert plain.exit_code == 2
    assert "No such option" in plain.stderr
    as_json = meshnode("status", "--bogus", "--json")
    assert as_json.exit_code == 2
    assert "--bogus" in json.loads(as_json.stdout)["error"]["message"]


def test_a_configuration_that_cannot_work_is_refused_before_anything_starts(
    meshnode: Run,
) -> None:
    for arguments in (("serve", "--api", "nowhere"), ("client", "--listen", "0.0.0.0:1")):
        result = meshnode(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {arguments[1]} must be ")
