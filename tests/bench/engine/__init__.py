"""What engines cost, each command with its own --help.

`python -m tests.bench.engine` measures our node against llama-server, in turns:

* `build.py`    llama-server, compiled once around the libraries of the installed llama-cpp-python
* `servers.py`  the two servers, and a neighbour that wants the CPU as well
* `serve.py`    a node whose engine has a fixed number of threads, for equal settings
* `client.py`   sessions that ask all at once, and what they saw
* `measure.py`  the pairs, and what is made of them

Others look at the engine alone, such as `python -m tests.bench.engine.speculation`.
"""
