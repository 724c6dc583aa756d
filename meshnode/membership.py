"""Which mesh this node is in, and by what right: decided once, before anything starts."""

from __future__ import annotations

import time

from meshnode.config import Config
from meshnode.credentials import MeshDescriptor, issue_certificate, parse_invite, verify_chain
from meshnode.errors import ConfigError, NotAuthorizedError
from meshnode.identity import KeyPair
from meshnode.joining import join_mesh
from meshnode.messages import Role
from meshnode.public_mesh import public_mesh
from meshnode.store import DataDir, Membership

HOME_MESH = "home"
PUBLIC_MESH = "public"


async def find_membership(config: Config, data: DataDir, key: KeyPair) -> Membership:
    """The membership that the operator asked for.

    `--join` presents a token; `--mesh NAME` names a mesh joined or made before, or the public
    one; with neither, the only mesh of the data directory is meant, and a first run makes one
    called "home", so that a single node is a mesh that others can be invited to.
    Raises `ConfigError`.
    """
    if config.join is not None:
        membership = await join_mesh(key, parse_invite(config.join), data)
    elif config.mesh == PUBLIC_MESH:
        return _public(key)
    else:
        membership = _stored(config.mesh, data, key)
    try:
        verify_chain(membership.mesh, key.peer_id, membership.chain, int(time.time()))
    except NotAuthorizedError as error:
        raise ConfigError(f"not a member of {membership.mesh.name}: {error}") from error
    return membership


def create_mesh(name: str, data: DataDir, key: KeyPair) -> Membership:
    """Make a private mesh: root key, descriptor, and this node's own certificate.

    Raises `ConfigError` if the name is taken or cannot be one.
    """
    if data.membership(name) is not None:
        raise ConfigError(f"there is a mesh called {name} here already: meshnode mesh show {name}")
    root = data.create_root_key(name)
    mesh = MeshDescriptor(name=name, root=root.public.hex(), admission="invite")
    roles: tuple[Role, ...] = ("node", "issuer")
    chain = (issue_certificate(root, mesh, key.peer_id, roles, int(time.time())),)
    membership = Membership(mesh, chain)
    data.save_membership(membership)
    return membership


def _stored(name: str | None, data: DataDir, key: KeyPair) -> Membership:
    known = data.mesh_names()
    if name is None and len(known) > 1:
        raise ConfigError(f"this node is in several meshes, say which: --mesh {' | '.join(known)}")
    wanted = name or (known[0] if known else HOME_MESH)
    membership = data.membership(wanted)
    if membership is not None:
        root = data.root_key(wanted)
        return membership if root is None else _renewed(membership, root, data, key)
    if name is None:
        return create_mesh(HOME_MESH, data, key)
    raise ConfigError(
        f"this node is not in a mesh called {name} (it is in: {', '.join(known) or 'none'}); "
        f"make it with `meshnode mesh create {name}` or join one with --join TOKEN"
    )


def _renewed(membership: Membership, root: KeyPair, data: DataDir, key: KeyPair) -> Membership:
    """Whoever holds the root key never locks itself out: its certificate is made anew."""
    roles: tuple[Role, ...] = ("node", "issuer")
    chain = (issue_certificate(root, membership.mesh, key.peer_id, roles, int(time.time())),)
    renewed = Membership(membership.mesh, chain)
    data.save_membership(renewed)
    return renewed


def _public(key: KeyPair) -> Membership:
    """An open mesh: every peer certifies itself."""
    mesh = public_mesh()
    chain = (issue_certificate(key, mesh, key.peer_id, ("node",), int(time.time())),)
    return Membership(mesh, chain)
