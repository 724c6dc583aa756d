"""What people see of a node, and what they may ask of it and of its mesh, as JSON over HTTP.

* `snapshot.py`    what is shown: frozen snapshots
* `requests.py`    what may be asked, and the answers
* `agreed.py`      what the mesh has agreed on, as a snapshot
* `names.py`       which node and which model people mean
* `preview.py`     placement: what if?
* `proof.py`       whether a file proves a decision
* `operations.py`  orders, rights and previews of a running node
* `routes.py`      all of it under `/api/` on the API port, for callers on this machine only
"""
