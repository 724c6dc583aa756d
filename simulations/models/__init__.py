"""What surrounds the cores in a simulation, each a small model with its source.

* `latency.py`    how far machines are from each other: measured, by region, or drawn
* `access.py`     what homes and data centres can send and receive
* `pipelines.py`  models cut by layers over several hosts
* `transfers.py`  big transfers, which share links fairly
* `fetching.py`   model files that come from other members
* `nat.py`        who can be dialled
* `churn.py`      who is there when
* `pubsub.py`     gossipsub, as production sets it up
* `kademlia.py`   the DHT, and what a node's driver does with it
* `engine.py`     how long an engine takes, and which prefixes it has kept
* `gateway.py`    a client's request on its way: routed, answered, continued elsewhere
* `demand.py`     who asks what, and when
"""
