"""Model files between members: leaves of a file on request, each batch with what proves it.

`shelf.py` gives what this node has verified, `fetch.py` brings what others have, and `partial.py`
is the file that it goes into: of the whole one's size, with holes where nothing was asked for.
`remote.py` is a model that a node stands by for without having its file. Nobody is believed: a
model is the root of its file's hash tree, and nothing is written that it does not prove. Who has
which file its owners say (`listing.py`), or the mesh.
"""

from __future__ import annotations

from meshnode.weights.fetch import Fetch, Peers
from meshnode.weights.listing import Listing
from meshnode.weights.partial import PartialFile
from meshnode.weights.remote import REMOTE_PREFIX, RemoteFile
from meshnode.weights.shelf import WEIGHTS_PROTOCOL, File, Shelf

__all__ = [
    "REMOTE_PREFIX",
    "WEIGHTS_PROTOCOL",
    "Fetch",
    "File",
    "Listing",
    "PartialFile",
    "Peers",
    "RemoteFile",
    "Shelf",
]
