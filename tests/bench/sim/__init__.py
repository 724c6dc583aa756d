"""How fast the simulator is, and where its time goes: `python -m tests.bench.sim --help`.

* `measure.py`   the runs: meshes with the real cores, idle after a staggered join; the bare loop
* `pingpong.py`  one workload for the bare loop and for SimPy

CPU time of one process (`time.process_time`), so that a busy machine does not count. A mesh joins
first, which costs many times what idling does; both are shown. Memory is what the process has
grown by per node once the mesh stands.
"""
