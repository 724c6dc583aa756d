"""What people see of a node: frozen snapshots as JSON, and the routes that serve them.

`snapshot.py` says what is shown; `routes.py` puts it under `/api/` on the API port, for callers
on this machine only. The console is handed callables; it reads no core and changes none.
"""
