"""A stranger with a token becomes a member, once per use; every other token fails with a reason."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio

from meshnode.credentials import (
    MeshDescriptor,
    create_invite,
    issue_certificate,
    parse_invite,
    verify_chain,
)
from meshnode.errors import ConfigError
from meshnode.identity import KeyPair
from meshnode.joining import JOIN_PROTOCOL, Issuer, join_mesh
from meshnode.messages import MESSAGE_BYTES_MAX, JoinDenied, decode
from meshnode.store import DataDir, Membership
from meshnode.transport.frames import receive_frame, send_frame
from tests.driver.nodes import MESH, ROOT, LiveNode, make_node, running, stranger, until

SOON = 3600


@dataclass
class Honourer:
    """A node that holds the root key and answers join requests."""

    node: LiveNode
    data: DataDir

    @property
    def bootstrap(self) -> tuple[str, ...]:
        return tuple(f"{address}/p2p/{self.node.peer_id}" for address in self.node.addrs)

    def invite(
        self,
        *,
        uses_max: int = 1,
        lasts_s: int = SOON,
        root: KeyPair = ROOT,
        mesh: MeshDescriptor = MESH,
        honoured_by: str | None = None,
    ) -> str:
        return create_invite(
            root,
            msgspec.structs.replace(mesh, bootstrap=self.bootstrap),
            honoured_by=honoured_by or self.node.peer_id,
            roles=("node",),
            uses_max=uses_max,
            not_after=int(time.time()) + lasts_s,
        )


@asynccontextmanager
async def honourer(path: Path) -> AsyncIterator[Honourer]:
    node, data = make_node(), DataDir(path / "issuer")
    issuer = Issuer(ROOT, node.peer_id, MESH, data)
    node.host.handle(JOIN_PROTOCOL, issuer.serve, members_only=False)
    async with running(node):
        yield Honourer(node, data)


async def join(token: str, path: Path, key: KeyPair | None = None) -> Membership:
    """What `meshnode serve --join` does."""
    return await join_mesh(key or KeyPair.generate(), parse_invite(token), DataDir(path))


async def test_a_token_makes_a_member(tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer:
            key = KeyPair.generate()
            membership = await join(issuer.invite(), tmp_path / "new", key)
            assert DataDir(tmp_path / "new").membership(MESH.name) == membership
            newcomer = make_node(key, chain=membership.chain)
            async with running(newcomer):
                newcomer.meet(issuer.node)
                await until(lambda: newcomer.members() == {issuer.node.peer_id})


async def test_a_token_for_one_admits_one(tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer:
            token = issuer.invite(uses_max=1)
            await join(token, tmp_path / "first")
            with pytest.raises(ConfigError, match="used up"):
                await join(token, tmp_path / "second")
            assert DataDir(tmp_path / "second").membership(MESH.name) is None


async def test_a_token_for_two_admits_two_even_at_once(tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer:
            token = issuer.invite(uses_max=2)
            outcomes: list[str] = []

            async def try_it(place: int) -> None:
                try:
                    await join(token, tmp_path / str(place))
                except ConfigError as error:
                    outcomes.append(str(error))
                else:
                    outcomes.append("joined")

            async with trio.open_nursery() as nursery:
                for place in range(4):
                    nursery.start_soon(try_it, place)
            assert outcomes.count("joined") == 2
            assert sum("used up" in outcome for outcome in outcomes) == 2


async def test_a_restarted_issuer_still_knows_what_was_used(tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer:
            token = issuer.invite()
            await join(token, tmp_path / "first")
        assert not DataDir(tmp_path / "issuer").count_use(
            parse_invite(token).invitation.key.hex(), "somebody else", 1
        )


async def test_tokens_that_must_not_work(tmp_path: Path) -> None:
    other_root = KeyPair.from_seed(b"o" * 32)
    other_mesh = MeshDescriptor(name="other", root=other_root.public.hex(), admission="invite")
    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer:
            tokens = [
                ("expired", issuer.invite(lasts_s=-SOON)),
                ("not made by this mesh", issuer.invite(root=other_root)),
                ("not made by this mesh", issuer.invite(root=other_root, mesh=other_mesh)),
            ]
            for place, (reason, token) in enumerate(tokens):
                with pytest.raises(ConfigError, match=reason):
                    await join(token, tmp_path / str(place))
                assert DataDir(tmp_path / str(place)).mesh_names() == ()
            with pytest.raises(ConfigError, match="names no address"):
                await join(issuer.invite(honoured_by=KeyPair.generate().peer_id), tmp_path / "x")


async def test_an_issuer_that_is_away_is_named(tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer:
            token = issuer.invite()
        with pytest.raises(ConfigError, match="cannot reach the node that honours"):
            await join(token, tmp_path / "new")


async def test_a_member_joins_again_without_asking(tmp_path: Path) -> None:
    """A unit file may carry the token for ever; a used-up one must not stop a member."""
    with trio.fail_after(60):
        key = KeyPair.generate()
        async with honourer(tmp_path) as issuer:
            token = issuer.invite()
            membership = await join(token, tmp_path / "new", key)
        assert await join(token, tmp_path / "new", key) == membership


async def test_a_member_whose_certificate_ended_gets_a_new_one(tmp_path: Path) -> None:
    with trio.fail_after(60):
        key = KeyPair.generate()
        now = int(time.time())
        stale = (issue_certificate(ROOT, MESH, key.peer_id, ("node",), now, lifetime_s=-SOON),)
        DataDir(tmp_path / "old").save_membership(Membership(MESH, stale))
        async with honourer(tmp_path) as issuer:
            membership = await join(issuer.invite(), tmp_path / "old", key)
        verify_chain(MESH, key.peer_id, membership.chain, now)


async def test_a_full_disk_at_the_issuer_is_told_and_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise ConfigError("cannot write: No space left on device")

    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer:
            token = issuer.invite()
            monkeypatch.setattr(issuer.data, "_write", full)
            with pytest.raises(ConfigError, match="cannot write to its disk"):
                await join(token, tmp_path / "new")
            monkeypatch.undo()
            await join(token, tmp_path / "new")


async def test_whoever_talks_nonsense_to_the_issuer_is_denied(tmp_path: Path) -> None:
    with trio.fail_after(60):
        async with honourer(tmp_path) as issuer, stranger() as host:
            await host.dial(issuer.node.peer_id, issuer.node.addrs)
            async with await host.open_stream(issuer.node.peer_id, JOIN_PROTOCOL) as stream:
                await send_frame(stream, b"\xc1")
                frame = await receive_frame(stream, MESSAGE_BYTES_MAX)
                assert "malformed" in decode(frame or b"", JoinDenied).reason
