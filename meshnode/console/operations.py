"""What operators and programs ask of their mesh through this node: orders, rights, previews.

Finds out what the names in a request mean, asks the stack, and, where a decision is the answer,
waits for it within bounds. Decides nothing itself: that is the mesh's to do.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping

import trio

from meshnode import clock
from meshnode.console.agreed import group_snapshot
from meshnode.console.names import find_model, find_node
from meshnode.console.preview import Changed, report, with_file, with_idle, with_what_ifs
from meshnode.console.requests import (
    ClaimAnswer,
    ClaimRequest,
    OrderGiven,
    OrderRequest,
    PlacementReport,
    PreviewRequest,
    Proof,
    Recovered,
)
from meshnode.console.snapshot import GroupSnapshot
from meshnode.errors import ConfigError, MeshnodeError
from meshnode.messages import Decided, decode
from meshnode.protocol import Input
from meshnode.protocol.agreement import GroupView
from meshnode.protocol.placement import Problem
from meshnode.protocol.stack import GiveOrder, RecoverQuorum, Stack

LOOK_S = 0.02
"""How often somebody who waits for a decision looks for it: a decision takes tens of ms."""
_NO_GROUP = (
    "this mesh has agreed on nothing yet: the node that made it founds its group, and has to be "
    "seen once"
)
_NOTHING = Problem(models={}, hosts={}, wants={})


class NotDecidedError(MeshnodeError):
    """The mesh did not decide for us in time, or decided for another; `answer` says how it is."""

    def __init__(self, message: str, answer: ClaimAnswer) -> None:
        super().__init__(message)
        self.answer = answer


class Operations:
    """Of one node. `submit` gives its stack a command; `serves`: it may own models."""

    def __init__(self, stack: Stack, submit: Callable[[Input], None], *, serves: bool) -> None:
        self._stack = stack
        self._serves = serves
        self._agreement = stack.agreement
        self._own = str(stack.own)
        self._submit = submit

    def groups(self) -> tuple[GroupSnapshot, ...]:
        names = self._model_names(self._facts())
        return tuple(group_snapshot(view, names) for view in self._views())

    def proof(self) -> Proof:
        """Of the newest decision that this node knows. Raises `ConfigError` if there is none."""
        view = self._group()
        data = self._agreement.proof(view.group)
        if data is None:
            raise ConfigError(_NO_GROUP)
        if decode(data, Decided).newest is None and view.epoch > 0:
            raise ConfigError("the voters have changed too often for one file to prove it all")
        return Proof(view.group, view.epoch, base64.b64encode(data).decode())

    # --- placement ------------------------------------------------------------------------------

    async def preview(self, request: PreviewRequest) -> PlacementReport:
        """Raises `ConfigError` for names that nobody has and what-ifs that cannot be."""
        view = self._group()
        facts = with_idle(self._facts(), self._memory_bytes())
        if request.file is not None:
            changed = with_file(facts, request.file)
        else:
            model = None
            if request.model is not None:
                names = {digest: model.name for digest, model in facts.models.items()}
                model = find_model(request.model, names)
            changed = Changed(facts, (), model)
        changed = with_what_ifs(changed, request.what_if, self._find_node)
        return await trio.to_thread.run_sync(report, changed, view.epoch)

    def _facts(self) -> Problem:
        """What this node would plan from; looked at on the way to a plan of nothing."""
        seen = [_NOTHING]

        def look(problem: Problem) -> Problem:
            seen.append(problem)
            return _NOTHING

        self._agreement.preview(look, clock.now())
        return seen[-1]

    def _memory_bytes(self) -> dict[str, int]:
        """What all nodes that could own something offer, ourselves included."""
        offered = {
            str(member.peer): member.advert.memory_bytes
            for member in self._stack.members()
            if member.advert is not None and "node" in member.roles
        }
        if self._serves:
            offered[self._own] = self._stack.adverts.own(clock.now()).memory_bytes
        return offered

    # --- orders ---------------------------------------------------------------------------------

    def give(self, request: OrderRequest) -> OrderGiven:
        """Ask the mesh; the answer does not wait for its decision. Raises `ConfigError`."""
        view, facts = self._group(), self._facts()
        peer = self._find_node(request.node)
        names = self._model_names(facts)
        is_pin = request.action in ("pin", "unpin")
        if is_pin is (request.model is None):
            what = "needs a model" if is_pin else "is about all models of a node: name none"
            raise ConfigError(f"{request.action} {what}")
        digest = "" if request.model is None else find_model(request.model, names)
        if view.faults == "byzantine" and (is_pin or peer != self._own):
            raise ConfigError("in an open mesh an operator can drain this node, and no other")
        if request.action == "pin":
            self._check_pin(facts, digest, names[digest], peer)
        in_force = {(action, subject, where) for action, subject, where, _ in view.orders}
        taken_back = {"unpin": "pin", "undrain": "drain"}.get(request.action)
        there = (taken_back or request.action, digest, peer) in in_force
        is_decided = there is (taken_back is None)
        if not is_decided:
            self._submit(GiveOrder(request.action, digest, peer))
        return OrderGiven(
            request.action, digest, names.get(digest, ""), peer, view.group, view.epoch, is_decided
        )

    def _check_pin(self, facts: Problem, digest: str, name: str, peer: str) -> None:
        host = facts.hosts.get(peer)
        if host is None and peer not in self._memory_bytes():
            raise ConfigError(f"…{peer[-8:]} cannot serve {name} now: it is away, or no node")
        if host is None or digest not in host.holdings:
            raise ConfigError(
                f"…{peer[-8:]} does not have the file of {name}: "
                f"start it with `meshnode serve --standby {name}`, then pin"
            )

    def recover(self) -> Recovered:
        """Go on without the lost voters. Raises `ConfigError` where that may not or need not be."""
        views = self._views()
        if not views:
            raise ConfigError(_NO_GROUP)
        for view in views:
            alive = sum(alive for _, alive in view.voters)
            if alive >= view.quorum and not view.is_deciding:
                raise ConfigError(
                    f"nothing is lost: {alive} of {len(view.voters)} voters answer, and a quorum "
                    f"is {view.quorum}"
                )
        self._submit(RecoverQuorum())
        return Recovered({view.group: view.epoch for view in self._views()})

    # --- exclusive rights -----------------------------------------------------------------------

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Raises `NotDecidedError` if a claim or release does not come to pass in time."""
        self._group()
        match request.action:
            case "claim":
                return await self._claim(request.right, request.wait_s)
            case "release":
                return await self._release(request.right, request.wait_s)
        return self._holder(request.right)

    async def _claim(self, right: str, wait_s: float) -> ClaimAnswer:
        before = self._holder(right)
        if before.holds:
            return before
        self._submit(GiveOrder("claim", right, ""))
        with trio.move_on_after(wait_s):
            # The cores tell nobody of a claim.
            while not (now := self._holder(right)).holds or now.since == before.since:  # noqa: ASYNC110
                await trio.sleep(LOOK_S)
            return now
        now = self._holder(right)
        if now.holder == self._own and now.since != before.since:
            return now  # decided; that the voters' promises have not arrived yet is in `holds`
        # Nobody waits for it any more: it must not come true behind the asker's back.
        self._submit(GiveOrder("release", right, ""))
        why = f"…{now.holder[-8:]} holds it" if now.holder else "no quorum has answered in time"
        raise NotDecidedError(f"the right {right} was not given to this node: {why}", now)

    async def _release(self, right: str, wait_s: float) -> ClaimAnswer:
        before = self._holder(right)
        if before.holder != self._own:
            return before
        self._submit(GiveOrder("release", right, ""))
        with trio.move_on_after(wait_s):
            while (now := self._holder(right)).since == before.since:  # noqa: ASYNC110
                await trio.sleep(LOOK_S)
            return now
        raise NotDecidedError(
            f"this node uses the right {right} no more, but no quorum has heard of it in time",
            self._holder(right),
        )

    def _holder(self, right: str) -> ClaimAnswer:
        epoch = 0
        for view in self._views():
            epoch = view.epoch
            for name, holder, since in view.claims:
                if name == right:
                    holds = self._agreement.holds_right(right, clock.now())
                    return ClaimAnswer(right, holder, since, epoch, holds)
        return ClaimAnswer(right, "", 0, epoch, holds=False)

    # --- files ----------------------------------------------------------------------------------

    def models(self) -> Mapping[str, str]:
        """The names of all models of the mesh, by digest."""
        return self._model_names(self._facts())

    def holders(self, digest: str) -> set[str]:
        """The peers that say that they have the model's file."""
        hosts = self._facts().hosts
        told = {peer for peer, host in hosts.items() if digest in host.holdings}
        return told | {
            str(peer)
            for peer, offers in self._stack.offers().items()
            for offer in offers
            if offer.digest == digest and not offer.upstream
        }

    # --- what there is --------------------------------------------------------------------------

    def _views(self) -> tuple[GroupView, ...]:
        return self._agreement.views(clock.now())

    def _group(self) -> GroupView:
        """The group of this mesh. Raises `ConfigError` if it has none yet."""
        views = self._views()
        if not views:
            raise ConfigError(_NO_GROUP)
        return views[0]

    def _model_names(self, facts: Problem) -> Mapping[str, str]:
        """By digest: models that somebody has on disk, offers, or owns by the register."""
        names = {
            offer.digest: offer.name
            for offers in self._stack.offers().values()
            for offer in offers
        }  # fmt: skip
        for view in self._views():
            names |= {item.model: item.name for item in view.items}
        return names | {digest: model.name for digest, model in facts.models.items()}

    def _find_node(self, text: str) -> str:
        known = {str(member.peer) for member in self._stack.members()}
        for view in self._views():
            known |= {voter for voter, _ in view.voters}
            known |= {peer for item in view.items for peer in (item.owner, *item.standbys)}
            known |= {peer for _, _, peer, _ in view.orders if peer}
        return find_node(text, self._own, known)
