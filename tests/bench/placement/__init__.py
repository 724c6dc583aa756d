"""How good plans are, and what they cost; `python -m tests.bench.placement [--quick]` measures it.

* `clusters.py`   random meshes from a seed, so that two runs judge the same ones
* `exact.py`      the best there is, for meshes small enough to find it
* `baselines.py`  what others do, written from their published formulas
* `measure.py`    the rounds, and what is made of them

What is compared, and why:

latency       One pipeline of a model that fits on no host: time of a token, stages and hops. The
              optimum is over all sets of hosts and all orders. Ratio to it, at least 1.
pipelines     As many pipelines as can be, sharing no host: the sum of their rates, where a rate is
              that of the slowest stage. This is what a plan is made of. The optimum is over all
              partitions into that many; "any number" also over their number, which a plan does
              not choose: whoever asks for three replicas gets three. Ratio to it, at most 1.
coverage      The objective of Petals: every host serves one span as long as its memory allows,
              spans may overlap anyhow, and the layer with the least summed rate counts. No plan of
              ours does that, since a replica is complete or it is none; shown to say what that
              costs. A plan may cut shorter spans than memory allows, so its ratio can exceed 1.
time          CPU time of one plan for 6 models, two of which must be cut.
churn         Loads that an event causes in a mesh in use, next to planning it from nothing, and
              next to those that nobody could avoid: what was lost and has to be somewhere.
"""
