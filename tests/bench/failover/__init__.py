"""How long a killed owner is missed; `python -m tests.bench.failover` measures it."""
