"""What one hop through the mesh costs; `python -m tests.bench.hop` measures it.

* `engine.py`   a paced engine whose tokens say when they were made
* `serve.py`    the processes: a whole node around that engine, and a bare app for comparison
* `client.py`   a client so lean that it does not show in the figures
* `routers.py`  a router of others, in front of the same node
* `measure.py`  the rounds, and what is made of them

Not reachable from the product: no option of `meshnode` selects the paced engine.
"""
