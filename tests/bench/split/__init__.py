"""What a model costs that is cut by layers, next to a whole one and to llama.cpp's own RPC.

`python -m tests.bench.split` puts the same chats on all of them in turns, over links with a delay:

* `links.py`    the links, in a process of their own: they delay and count what crosses them
* `serve.py`    a node whose peers reach it by a link alone
* `systems.py`  the stages, the whole model, and llama-server with an RPC server for half of it
* `reading.py`  which bytes of a file have been read to load a part of it
* `measure.py`  the rounds, and what is made of them
* `rpc/`        how the RPC backend is compiled
"""
