"""What must hold after every event, and what must come true once all is well.

* `safety.py`    S1 to S10 of the design: a broken one is a bug, whatever has happened
* `liveness.py`  L1 to L4: deadlines that count from when nothing goes wrong any more
"""
