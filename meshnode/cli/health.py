"""The `doctor` command: what `meshnode.doctor` found, and what to do about it."""

from __future__ import annotations

import sys

import click

from meshnode.cli.api import ApiError, NoNodeError, find_node
from meshnode.cli.edge import EXIT_FAILED, config_from, data_dir_option, json_option
from meshnode.cli.output import print_json, printable

_MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command()
@click.option(
    "--model", multiple=True, metavar="PATH_OR_NAME[=ALIAS]", help="Also look at this model."
)
@click.option(
    "--standby", multiple=True, metavar="PATH_OR_NAME[=ALIAS]", help="And at this one on standby."
)
@click.option("--api", metavar="HOST:PORT", help="The API address you want to use.")
@click.option("--listen", multiple=True, metavar="MULTIADDR", help="As you would serve with it.")
@click.option("--config", metavar="FILE", help="The configuration you want to use.")
@data_dir_option
@json_option
def doctor(as_json: bool, **options: object) -> None:
    """Check this machine and say what to do about what it finds.

    Looks at Python, the engine, model files, disk and memory, ports, UDP buffers, open-file
    limits and the clock. Give it the flags you want to serve with. Ends with 1 if something
    will not work; warnings alone end with 0.

    \b
    Examples:
      meshnode doctor
      meshnode doctor --model ~/models/qwen3-8b-q4_0.gguf
      meshnode doctor --json | jq '.checks[] | select(.outcome != "ok")'
    """
    config = config_from(options)
    from meshnode.doctor import examine

    try:
        running = find_node(None, config.data_dir).status()
    except (NoNodeError, ApiError):
        running = None  # most often the doctor comes before the first start
    checks = examine(config, running)
    if as_json:
        print_json(
            {
                "ok": all(check.outcome != "fail" for check in checks),
                "checks": [
                    {"name": c.name, "outcome": c.outcome, "what": c.what, "fix": c.fix}
                    for c in checks
                ],
            }
        )
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark, colour = _MARKS[check.outcome]
            what = printable(check.what)
            click.echo(f"{click.style(mark, fg=colour)}  {check.name:<{width}}  {what}")
            if check.fix:
                click.echo(f"{'':<{width + 6}}  → {printable(check.fix)}")
    if any(check.outcome == "fail" for check in checks):
        sys.exit(EXIT_FAILED)
