"""Which mesh this node is in, and by what right: decided once, before anything starts."""

from __future__ import annotations

import time

from meshnode.config import Config, is_mesh_name
from meshnode.credentials import MeshDescriptor, issue_certificate, parse_invite, verify_chain
from meshnode.errors import ConfigError, NotAuthorizedError
from meshnode.identity import KeyPair
from meshnode.messages import Role
from meshnode.public_mesh import PUBLIC_MESH_NAME, public_mesh
from meshnode.store import DataDir, Membership

HOME_MESH = "home"


async def find_membership(config: Config, data: DataDir, key: KeyPair) -> Membership:
    """The membership that the operator asked for.

    `--join` presents a token; `--mesh NAME` names a mesh joined or made before, or the public
    one; with neither, the mesh of the last run is meant, and a first run makes one called
    "home", so that a single node is a mesh that others can be invited to. Raises `ConfigError`.
    """
    if config.mesh == PUBLIC_MESH_NAME:
        return _public(key, config.role)
    if config.join is not None:
        from meshnode.joining import join_mesh  # libp2p: seconds that `mesh create` is spared

        membership = await join_mesh(key, parse_invite(config.join), data)
    else:
        membership = _stored(config.mesh, data, key, config.role)
    try:
        verify_chain(membership.mesh, key.peer_id, membership.chain, int(time.time()))
    except NotAuthorizedError as error:
        raise ConfigError(f"not a member of {membership.mesh.name}: {error}") from error
    data.save_last_used(data.name_of(membership.mesh) or membership.mesh.name)
    return membership


def create_mesh(name: str, data: DataDir, key: KeyPair, role: Role = "node") -> Membership:
    """Make a private mesh: root key, descriptor, and this node's own certificate.

    Raises `ConfigError` if the name is taken or cannot be one.
    """
    if not is_mesh_name(name) or name == PUBLIC_MESH_NAME:
        raise ConfigError(f"a mesh of your own cannot be called {name!r}: choose another name")
    if data.membership(name) is not None:
        raise ConfigError(f"there is a mesh called {name} here already: meshnode mesh show {name}")
    root = data.create_root_key(name)
    mesh = MeshDescriptor(name=name, root=root.public.hex(), admission="invite")
    return _certify(mesh, root, data, key, role)


def _stored(name: str | None, data: DataDir, key: KeyPair, role: Role) -> Membership:
    known = data.mesh_names()
    wanted = name or data.last_used() or (known[0] if len(known) == 1 else HOME_MESH)
    membership = data.membership(wanted)
    if membership is not None:
        root = data.root_key(wanted)
        return membership if root is None else _certify(membership.mesh, root, data, key, role)
    if name is None and not known:
        return create_mesh(HOME_MESH, data, key, role)
    if name is None:
        raise ConfigError(f"this node is in several meshes, say which: --mesh {' | '.join(known)}")
    raise ConfigError(
        f"this node is not in a mesh called {name} (it is in: {', '.join(known) or 'none'}); "
        f"make it with `meshnode mesh create {name}` or join one with --join TOKEN"
    )


def _certify(
    mesh: MeshDescriptor, root: KeyPair, data: DataDir, key: KeyPair, role: Role
) -> Membership:
    """Whoever holds the root key is a member; at each start anew, so never locked out."""
    chain = (issue_certificate(root, mesh, key.peer_id, (role, "issuer"), int(time.time())),)
    membership = Membership(mesh, chain)
    data.save_membership(membership)
    return membership


def _public(key: KeyPair, role: Role) -> Membership:
    """An open mesh: every peer certifies itself."""
    mesh = public_mesh()
    chain = (issue_certificate(key, mesh, key.peer_id, (role,), int(time.time())),)
    return Membership(mesh, chain)
