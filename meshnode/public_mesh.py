"""The descriptor of the public mesh, as its operators publish it in `bootstrap/public.json`.

Knows where the file lies, installed or in a checkout; what the descriptor means is decided in
`credentials`, as for every other mesh.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec

from meshnode.credentials import MeshDescriptor
from meshnode.errors import ConfigError

PUBLIC_MESH_NAME = "public"
PLACEHOLDER_ROOT = "00" * 32
"""Stands in the published file until an operator has made the mesh's root key. It is a point of
small order on the curve, not a key: nobody holds its private half, so it must never be a root."""


def public_mesh() -> MeshDescriptor:
    """The public mesh. Raises `ConfigError` while no operator has filled in its descriptor."""
    return read_descriptor(_public_json())


def read_descriptor(text: bytes) -> MeshDescriptor:
    """The content of a `public.json`, checked. Raises `ConfigError`."""
    try:
        mesh = msgspec.json.decode(text, type=MeshDescriptor)
    except msgspec.DecodeError as error:
        raise ConfigError(f"bootstrap/public.json is not a mesh descriptor: {error}") from error
    if mesh.root == PLACEHOLDER_ROOT:
        raise ConfigError(
            "the public mesh has no operator yet: bootstrap/public.json still holds a "
            "placeholder for its root key (bootstrap/README.md says how to fill it in). "
            "To start a mesh of your own: meshnode mesh create NAME"
        )
    if mesh.name != PUBLIC_MESH_NAME or mesh.admission != "open":
        raise ConfigError(
            f"bootstrap/public.json describes {mesh.name!r} ({mesh.admission}); "
            f'the public mesh is named "{PUBLIC_MESH_NAME}" and open'
        )
    return mesh


def _public_json() -> bytes:
    try:
        return resources.files("meshnode_bootstrap").joinpath("public.json").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        # Not installed: a checkout that is run in place.
        file = Path(__file__).parent.parent / "bootstrap" / "public.json"
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            "this installation has no descriptor of the public mesh "
            "(package meshnode_bootstrap): install meshnode again"
        ) from error
