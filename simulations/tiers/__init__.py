"""The same scenario on three tiers, each with more of the real thing and room for fewer nodes.

* T1, `simulation.py`: the real cores in virtual time; thousands of nodes
* T2, `t2.py`: the real Trio driver too, over the links of `memory.py`, in virtual time; dozens
* T3, `t3.py`: whole nodes in processes, with libp2p, QUIC, engines and HTTP; a handful

`compare.py` runs them beside each other, `command.py` is `meshnode-sim tiers`. Where two tiers
differ, the lower one has a modelling error or the upper one a behaviour worth knowing about.
"""
