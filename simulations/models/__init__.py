"""What surrounds the cores in a simulation, each a small model with its source.

* `engine.py`   how long an engine takes, and which prefixes it has kept
* `gateway.py`  a client's request on its way: routed, answered, continued elsewhere
* `demand.py`   who asks what, and when
"""
