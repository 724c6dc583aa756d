"""A model that is cut by layers, run by several nodes as a ring.

    head: tokens ──► stage 0 ──► stage 1 ──► … ──► head: its own layers, logits, the next tokens

* `opening.py`   who may be what to whom: the first frame of a stage's stream against the register
* `parts.py`     a part of a model on this node, from its duty to a process that computes it
* `ring.py`      the streams between the owners, for a stage and for the head
* `selftest.py`  whether a ring says what was said before

The head is the engine of the last part. It answers requests as any engine does, and what reaches
it does not know that it is cut. What goes round is `engine/stages/steps.py`'s; who owns which
layers the mesh decides (`protocol/agreement.py`). A ring that breaks anywhere is broken everywhere
within a round trip, since each stage closes both its streams; the head then has all sequences
computed again by the next ring, and the answers go on from the very token they had reached.
"""
