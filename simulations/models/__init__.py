"""What a simulation plugs into the machine room: distances, links, people and py-libp2p's parts.

* `latency.py`    how far machines are from each other: measured, by region, or drawn
* `access.py`     what homes and data centres can send and receive
* `transfers.py`  big transfers, which share links fairly
* `nat.py`        who can be dialled
* `churn.py`      who is there when
* `pubsub.py`     gossipsub, as production sets it up
* `kademlia.py`   the DHT, and what a node's driver does with it
"""
