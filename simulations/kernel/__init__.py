"""What a simulation runs on: virtual time, a network, machines with the node's real cores.

* `loop.py`     one heap of events, integer nanoseconds
* `streams.py`  randomness: a stream of its own for every node and purpose
* `keys.py`     signatures that cost a microsecond and cannot be forged from inside
* `trace.py`    what happened, as a digest that is equal for equal runs
* `network.py`  how long a message takes, and who can reach whom
* `machine.py`  one computer: a `Stack`, a disk, a clock, the models it has
* `narrator.py` what happens, in words
* `world.py`    performs what the stacks decide; everything that can be done to them

Nothing here reads a clock, a file or global randomness.
"""
