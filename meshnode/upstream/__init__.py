"""Servers of other kinds behind a node: vLLM, SGLang, Ollama, llama-server, LM Studio, a meshnode.

In data-flow order: `listing.py` (pure: what a server says it has, and what the mesh calls it),
`keys.py` (what opens whose door), `caller.py` (HTTP to one server), `fronted.py` (its models, while
it is well).

Decided here, for all of them:

* **Untouched.** A request goes on as it came, but for `model`, which becomes the server's own name
  for it; the answer comes back byte for byte. What a field means, and whether it is legal, is the
  server's to say: only sizes, numbers and keys are ours.
* **Identity.** Nobody can see which bytes a server computes with, and one name means other weights
  or another quantization on every machine. So a model's digest is drawn from this node's peer id,
  the server's address and its name for the model, and nobody else's model is ever taken for the
  same, unless the operator declares the digest of the bytes (`--upstream URL=NAME@DIGEST`).
* **No memory, no moves.** The mesh plans with files that nodes can load; a server's models are told
  as offers and not as holdings, so nothing counts their memory and no decision moves them.
* **The HTTP stack** is the tunnel's, h11 on a Trio stream. It has what this needs (keep-alive,
  bounded heads, back-pressure, a cut that is told from an end); httpx would bring a second pool and
  second limits, decodes bodies that must stay as they are, and runs on Trio through one layer more.
* **The address is the operator's word**, so this machine and its network are allowed. Redirects are
  not followed: they would be somebody else's word.
"""
