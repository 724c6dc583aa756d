"""A scenario that takes a twentieth of a second, and one that breaks a promise."""

from __future__ import annotations

from pathlib import Path

TINY = """
[scenario]
title = "A few nodes"
question = "Does <anything> work?"
hypothesis = "It does."
duration_s = 12.0
seeds = 2
[scenario.expect]
joined_share = [1.0, 1.0]
join_p99_s = [0.0, 0.001]
[mesh]
nodes = 4
[network]
jitter = 0.1
[[models]]
name = "small"
files = 2
[demand]
kind = "poisson"
start_s = 2.0
"""

BROKEN = """
[scenario]
title = "Faults that go on after all is to be well"
duration_s = 97.0
[mesh]
nodes = 3
[chaos]
heal_at_s = 20.0
[[faults]]
at_s = 5.0
kind = "freeze"
target = "n1"
for_s = 1.0
[[faults]]
at_s = 6.0
kind = "cut"
target = "n1"
other = "n2"
[[faults]]
at_s = 8.0
kind = "lose"
value = 0.01
for_s = 2.0
[[faults]]
at_s = 20.01
kind = "sever"
target = "n1"
other = "n2"
[[faults]]
at_s = 20.02
kind = "cut"
target = "n1"
other = "n2"
[[faults]]
at_s = 20.03
kind = "jump"
target = "n2"
value = 60.0
for_s = 2.0
"""
"""They are still connected when it is looked at, unless they were cut; and they find back to each
other at once, unless there is no way. So it takes two of the six."""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path
