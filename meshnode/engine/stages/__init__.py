"""The engine's side of a model that is cut by layers.

* `steps.py`, `activations.py`  what goes from stage to stage: frames, and the numbers in them
* `model.py`                    layers that are not the last: rows in, rows out
* `child.py`, `wire.py`         their process, and what the node and it say to each other
* `process.py`                  that process as the node sees it
* `head.py`, `head_model.py`    the last layers: an engine like any other, that plans for all stages
"""
