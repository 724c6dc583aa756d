"""A node pools its machine with others into one OpenAI-compatible API, peer to peer.

What a node is, in the order in which a request and its answer flow:

1. `identity`, `messages`, `credentials`: a key, what it may sign, and by what right it is here
2. `transport`: how bytes reach other nodes (libp2p over QUIC or TCP)
3. `protocol`: who is there, what each has and wants, and which replica should answer; sans-IO
4. `driver`, `store`: what turns the protocol's clockwork, and what it keeps on disk
5. `models`, `engine`: from a model file and a request to tokens, in a process of its own
6. `gateway`: HTTP in, tokens out, answered here or through a tunnel to a peer
7. `node`: the one place where all of it is started and stopped
8. `cli`, `doctor`: what a person sees of it

A module imports those above it, never those below; `make lint` holds it to that. Importing
`meshnode` itself costs nothing.
"""

__version__ = "0.1.0"
