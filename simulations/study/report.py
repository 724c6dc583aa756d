"""One HTML file for a run, a sweep or a comparison, that needs nothing else.

Plots are inside of it, there is no script, and nothing is fetched: it can be mailed, archived
with a paper, and read in ten years. What it says is worked out from the results alone.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshnode_simulations.record import Result
from meshnode_simulations.scenario import toml_of
from meshnode_simulations.study import plots, results
from meshnode_simulations.study.summary import (
    Variant,
    expectations,
    figure_names,
    figure_of,
    variants,
    write_table,
)

REPORT, TABLE, PLOTS = "report.html", "figures.parquet", "plots"
"""What a report's folder gets: the page, one row for each run, and the plots as files."""
PLOTS_MAX = 6
"""Of one kind: a report is read by people."""
COLUMNS_MAX = 6
"""With more variants than this each is a row of its own instead."""
VIOLATIONS_MAX = 50
"""Shown; the others are counted."""

Keep = Callable[[str, str, bytes], None]
"""Takes a plot: its name, the kind of file, and what is in it."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block;
        overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eee }
.met { color: #00664a } .unmet { color: #a83c00; font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1rem }
figure { margin: 0 } figure img { width: 100% } figcaption { color: #666; font-size: 13px }
code, pre { font: 13px/1.4 ui-monospace, monospace } pre { overflow-x: auto; background: #f6f6f6;
      padding: .8rem } dt { font-weight: 600 } dd { margin: 0 0 .6rem }
"""


def write(folder: Path, runs: Sequence[Result], file: Path | None = None) -> Path:
    """Write report, table and plots of `runs` into `folder`; returns the report's path, which is
    `file` if that is given."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / REPORT if file is None else file

    def keep(name: str, kind: str, data: bytes) -> None:
        (folder / PLOTS).mkdir(exist_ok=True)
        (folder / PLOTS / f"{name}.{kind}").write_bytes(data)

    write_table(runs, folder / TABLE)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(runs, keep))
    return file


def page(runs: Sequence[Result], keep: Keep | None = None) -> str:
    """The report of one scenario's runs, whether they differ in more than their seeds or not.

    `keep` is given every plot that is in it, as SVG and as PNG.
    """
    found = variants(runs)
    groups = {variant.label: variant.runs for variant in found}
    return _page(groups, found, None, keep)


def compared(groups: plots.Groups, title: str, judged: str) -> str:
    """A report that shows groups of runs side by side, such as one scenario in several tiers.

    Their scenarios may differ; question and expectations are those of the first. `judged` is how
    near they are to each other, as text.
    """
    found = [Variant(label, {"": label}, tuple(group)) for label, group in groups.items() if group]
    shown = {variant.label: variant.runs for variant in found}
    return _page(shown, found, title, None, ["<h2>How near</h2>", f"<pre>{_text(judged)}</pre>"])


def _page(
    groups: Mapping[str, Sequence[Result]],
    found: Sequence[Variant],
    title: str | None,
    keep: Keep | None,
    judged: Sequence[str] = (),
) -> str:
    about = found[0].runs[0].scenario.scenario
    runs = [run for variant in found for run in variant.runs]
    title = title or about.title or found[0].runs[0].scenario.name
    parts = [
        f"<h1>{_text(title)}</h1>",
        "<dl>",
        *(
            f"<dt>{word}</dt><dd>{_text(said)}</dd>"
            for word, said in (("Question", about.question), ("Hypothesis", about.hypothesis))
            if said
        ),
        "</dl>",
        f"<p>{_extent(found, runs)}</p>",
        "<h2>Expected and found</h2>",
        _expected(found),
        *judged,
        *_violations(runs),
        "<h2>Plots</h2>",
        "<p>Lines are medians over seeds, bands reach from 5 to 95 %.</p>",
        '<div class="plots">',
        *_plots(groups, found, keep),
        "</div>",
        "<h2>All figures</h2>",
        "<p>Median over seeds (5 % .. 95 %).</p>",
        _figures(found),
        "<h2>How this was made</h2>",
        _manifest(found),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _extent(found: Sequence[Variant], runs: Sequence[Result]) -> str:
    seeds = {run.seed for run in runs}
    virtual_s, cpu_s = sum(run.virtual_s for run in runs), sum(run.cpu_s for run in runs)
    said = [
        f"{len(runs)} runs" if len(runs) > 1 else "1 run",
        f"{len(found)} variants" if len(found) > 1 else "",
        f"seeds {min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"seed {min(seeds)}",
        f"{virtual_s:,.0f} virtual seconds in {cpu_s:,.1f} of CPU",
        f"{sum(run.events for run in runs):,} events",
    ]
    return ", ".join(each for each in said if each) + "."


def _expected(found: Sequence[Variant]) -> str:
    several = len(found) > 1
    rows = []
    for variant in found:
        for each in expectations(variant.runs):
            verdict = f'<span class="{"met" if each.is_met else "unmet"}">{each.verdict}</span>'
            row = [_text(each.figure), each.bounds, _text(str(each.found)), verdict]
            rows.append([_text(variant.label), *row] if several else row)
    if not rows:
        return "<p>The scenario expects nothing of its figures.</p>"
    header = ["figure", "expected", "found", "verdict"]
    return _table(["variant", *header] if several else header, rows)


def _violations(runs: Sequence[Result]) -> list[str]:
    broken = [(run, violation) for run in runs for violation in run.violations]
    unchecked = sum(not run.checked for run in runs)
    parts = ["<h2>Promises</h2>"]
    if unchecked:
        parts.append(
            f"<p>In {unchecked} of {len(runs)} runs the promises S1 to S10 were not checked "
            "(<code>--check</code>).</p>"
        )
    if not broken:
        parts.append("<p>None was seen to break.</p>")
        return parts
    rows = [
        [violation.promise, f"{violation.time_s:.3f}", _text(violation.what),
         f"<code>{_text(run.replay)}</code>"]
        for run, violation in broken[:VIOLATIONS_MAX]
    ]  # fmt: skip
    parts.append(_table(["promise", "at (s)", "what", "again"], rows))
    if len(broken) > len(rows):
        parts.append(f"<p>… and {len(broken) - len(rows)} more.</p>")
    return parts


def _plots(
    groups: Mapping[str, Sequence[Result]],
    found: Sequence[Variant],
    keep: Keep | None,
) -> list[str]:
    runs = [run for variant in found for run in variant.runs]
    parts = []

    def show(name: str, caption: str, figure: Any) -> None:
        drawn = plots.rendered(figure, "svg")
        if keep is not None:
            keep(name, "svg", drawn)
            keep(name, "png", plots.rendered(figure, "png"))
        data = base64.b64encode(drawn).decode()
        parts.append(
            f'<figure><img alt="{_text(caption)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )

    key = _across(found)
    if key:
        for figure in _telling(found)[:PLOTS_MAX]:
            show(figure, f"{figure} over {key}", plots.over_parameter(found, key, figure))
    if len(groups) <= plots.LINES_MAX:
        for table, column in plots.distributions(runs)[:PLOTS_MAX]:
            show(
                f"{table}.{column}",
                f"{table}: {column}",
                plots.distribution(groups, table, column),
            )
        for name in plots.moving_series(runs)[:PLOTS_MAX]:
            show(name, f"{name} over time", plots.over_time(groups, name))
    return parts


def _across(found: Sequence[Variant]) -> str | None:
    """What goes on the x axis: the number with the most values, or else the first word."""
    if len(found) < 2 or not found[0].values or "" in found[0].values:
        return None

    def rank(key: str) -> tuple[bool, int]:
        values = [variant.values[key] for variant in found]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        return numbers, len({str(value) for value in values})

    return max(found[0].values, key=rank)


def _telling(found: Sequence[Variant]) -> list[str]:
    """Figures that are not equal in all variants; those that the scenario speaks of first."""
    runs = [run for variant in found for run in variant.runs]
    expected = list(runs[0].scenario.scenario.expect)

    def moves(name: str) -> bool:
        medians = [figure_of(variant.runs, name).median for variant in found]
        known = {median for median in medians if math.isfinite(median)}
        return len(known) > 1

    names = [name for name in figure_names(runs) if name not in expected]
    return [name for name in (*expected, *names) if moves(name)]


def _figures(found: Sequence[Variant]) -> str:
    runs = [run for variant in found for run in variant.runs]
    names = figure_names(runs)
    cells = {
        (variant.label, name): _text(str(figure_of(variant.runs, name)))
        for variant in found
        for name in names
    }
    if len(found) > COLUMNS_MAX:
        rows = [[_text(v.label), *(cells[v.label, name] for name in names)] for v in found]
        return _table(["variant", *map(_text, names)], rows)
    rows = [[_text(name), *(cells[v.label, name] for v in found)] for name in names]
    return _table(["figure", *(_text(v.label) or "found" for v in found)], rows)


def _manifest(found: Sequence[Variant]) -> str:
    made = {json.dumps(run.made or results.made_here()): None for v in found for run in v.runs}
    rows = [
        [_text(variant.label), str(run.seed), f"<code>{run.digest}</code>", f"{run.events:,}",
         f"{run.cpu_s:.2f}", f"<code>{_text(run.replay)}</code>"]
        for variant in found
        for run in variant.runs
    ]  # fmt: skip
    scenarios = "".join(
        f"<details><summary>scenario {_text(variant.label)}</summary>"
        f"<pre>{_text(toml_of(variant.runs[0].scenario))}</pre></details>"
        for variant in found
    )
    return (
        "".join(f"<p>{_tools(json.loads(each))}</p>" for each in made)
        + "<p>Equal seeds give equal digests on every machine, with equal code.</p>"
        + scenarios
        + "<details><summary>runs</summary>"
        + _table(["variant", "seed", "digest", "events", "CPU (s)", "again"], rows)
        + "</details>"
    )


def _tools(made: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    told = f"Python {made['python']} on {made['platform']}; {versions}; code {made['code']}."
    return _text(told)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _text(words: str) -> str:
    return html.escape(words)
