"""Why a plan is as it is, in words for people: reasons, predictions, and what is missing.

Everything here is read off the finished plan; nothing is decided.
"""

from __future__ import annotations

from meshnode.protocol.placement.cost import (
    bottleneck_us,
    fits_one,
    holding,
    hop_us,
    layers_max,
    part_bytes,
    replica_us,
    runs_stages,
    stage_us,
    units,
    want,
    whole_bytes,
    whole_us,
)
from meshnode.protocol.placement.terms import (
    Host,
    Model,
    Prediction,
    Problem,
    Replica,
    Verdict,
)

_TENTH_GB = 10**8
_MILLITOKENS = 10**9  # a token a microsecond, in thousandths of tokens a second


def verdicts(problem: Problem, replicas: tuple[Replica, ...]) -> tuple[Verdict, ...]:
    """One for every model and host, in that order."""
    free = _free(problem, replicas)
    said = []
    for digest, model in sorted(problem.models.items()):
        own = [replica for replica in replicas if replica.model == digest]
        scene = _Scene(problem, model, own, free)
        for peer, host in sorted(problem.hosts.items()):
            included, reason = scene.verdict(peer, host)
            said.append(Verdict(digest, peer, included, f"{'in' if included else 'out'}: {reason}"))
    return tuple(said)


def predictions(problem: Problem, replicas: tuple[Replica, ...]) -> tuple[Prediction, ...]:
    """One for every replica, in the same order."""
    singles = {digest: _best_single(problem, model) for digest, model in problem.models.items()}
    return tuple(_prediction(problem, replica, singles[replica.model]) for replica in replicas)


def missing(problem: Problem, replicas: tuple[Replica, ...]) -> tuple[tuple[str, str], ...]:
    """The models that are wanted and have no replica, and what would give them one."""
    free = _free(problem, replicas)
    placed = {replica.model for replica in replicas}
    return tuple(
        (digest, _remedy(problem, problem.models[digest], free))
        for digest in sorted(problem.models)
        if digest not in placed and want(problem, digest).replicas > 0
    )


def _free(problem: Problem, replicas: tuple[Replica, ...]) -> dict[str, int]:
    free = {peer: host.memory_bytes for peer, host in problem.hosts.items()}
    for replica in replicas:
        for part in replica.parts:
            free[part.owner] -= part.bytes
    return free


# --- in words ------------------------------------------------------------------------------------


def _needed(size: int) -> str:
    """Gigabytes, rounded up: with less it does not fit."""
    tenths = -(-size // _TENTH_GB)
    return f"{tenths // 10}.{tenths % 10} GB"


def _available(size: int) -> str:
    """Gigabytes, rounded down."""
    tenths = max(0, size) // _TENTH_GB
    return f"{tenths // 10}.{tenths % 10} GB"


def _ms(us: int) -> str:
    """Milliseconds without a unit; with a decimal where it matters."""
    tenths = (us + 50) // 100
    return f"{tenths // 10}.{tenths % 10}" if tenths < 100 else str(tenths // 10)


# --- reasons -------------------------------------------------------------------------------------


class _Scene:
    """One model and everything that its verdicts compare with."""

    def __init__(
        self, problem: Problem, model: Model, own: list[Replica], free: dict[str, int]
    ) -> None:
        self._problem = problem
        self._model = model
        self._own = own
        self._free = free
        self._wanted = want(problem, model.digest)
        self._parts = {part.owner: part for one in own for part in one.parts}
        self._standbys = {peer for one in own for peers in one.standbys for peer in peers}
        self._cut = not fits_one(problem, model)
        self._fastest = _best_single(problem, model)[1]
        self._before = {
            part.owner for one in problem.current if one.model == model.digest for part in one.parts
        }

    def verdict(self, peer: str, host: Host) -> tuple[bool, str]:
        if peer in self._parts:
            return True, self._why_in(peer, host)
        return False, self._why_out(peer, host)

    def _why_in(self, peer: str, host: Host) -> str:
        if host.draining:
            return "it is draining, but no other node can take it"
        part = self._parts[peer]
        if part.end - part.first < units(self._model):
            return f"layers {part.first} to {part.end - 1} of {units(self._model)}"
        if peer in self._wanted.pins:
            return "pinned here"
        if self._is_asked_for(peer):
            return "its operator serves it here"
        if peer == self._fastest:
            return "holds the file, fastest"
        return "serves it already" if peer in self._before else "holds the file and has room"

    def _why_out(self, peer: str, host: Host) -> str:
        held = host.holdings.get(self._model.digest)
        if held is None:
            return "does not have the file"
        if held.state == "failed":
            return "could not load it"
        if host.draining:
            return "it is draining"
        if peer in self._standbys:
            return "stands by"
        size = whole_bytes(self._model, host)
        if size <= self._free[peer]:
            return self._why_spare(host)
        if not self._cut or self._whole_elsewhere():
            return f"{_needed(size)} needed, {_available(self._free[peer])} free"
        if not runs_stages(host, self._model.digest):
            return (
                f"{_needed(size)} needed, {_available(self._free[peer])} free, "
                "and it cannot run stages"
            )
        layers = layers_max(self._model, self._free[peer])
        if layers == 0:
            least = part_bytes(self._model, 1)
            return f"{_needed(least)} needed for one layer, {_available(self._free[peer])} free"
        return self._why_no_stage(peer, host, layers)

    def _whole_elsewhere(self) -> bool:
        return any(len(one.parts) == 1 for one in self._own)

    def _why_spare(self, host: Host) -> str:
        if not self._own:
            return "nobody asks for it"
        if len(self._own) < self._wanted.replicas:
            return "waits for other loads to end"
        ours = whole_us(self._model, host)
        theirs = max((replica_us(self._problem, one) for one in self._movable()), default=0)
        if ours < theirs:
            return (
                f"{_ms(ours)} instead of {_ms(theirs)} ms a token, which does not repay a move now"
            )
        return f"not needed, replicas: {len(self._own)}, wanted: {self._wanted.replicas}"

    def _movable(self) -> list[Replica]:
        """The replicas that are not where an operator wants them."""
        return [
            one
            for one in self._own
            if len(one.parts) > 1 or not self._is_asked_for(one.parts[0].owner)
        ]

    def _is_asked_for(self, peer: str) -> bool:
        held = holding(self._problem.hosts[peer], self._model.digest)
        return peer in self._wanted.pins or (held is not None and held.wanted)

    def _why_no_stage(self, peer: str, host: Host, layers: int) -> str:
        if not self._own:
            return "too little room in all nodes together"
        with_it = [self._us_with(one, peer, host, layers) for one in self._own]
        changes = [
            (us - replica_us(self._problem, one), us)
            for one, us in zip(self._own, with_it, strict=True)
        ]
        loss, us = min(changes)
        if loss > 0:
            return f"would slow the pipeline from {_ms(us - loss)} to {_ms(us)} ms a token"
        return f"would bring the pipeline from {_ms(us - loss)} to {_ms(us)} ms a token, too little"

    def _us_with(self, replica: Replica, peer: str, host: Host, layers_max: int) -> int:
        """What a token of `replica` would cost with one stage more, where that costs least.

        The new stage takes layers off the slowest owners; it has one at least.
        """
        layers = units(self._model)
        hops = [
            (one.owner, other.owner)
            for one, other in zip(replica.parts, replica.parts[1:] + replica.parts[:1], strict=True)
        ]
        detour = min(
            self._hop(one, peer)
            + self._hop(peer, other)
            - (0 if one == other else self._hop(one, other))
            for one, other in hops
        )
        own_us = whole_us(self._model, host)
        stages = [
            (whole_us(self._model, self._problem.hosts[part.owner]), part.end - part.first)
            for part in replica.parts
        ]
        saved, taken = 0, 0
        for us, count in sorted(stages, reverse=True):
            if us <= own_us and taken > 0:
                break
            moved = min(layers_max - taken, count) if us > own_us else 1
            saved += stage_us(us, moved, layers)
            taken += moved
        extra = detour + stage_us(own_us, taken, layers) - saved
        return replica_us(self._problem, replica) + extra

    def _hop(self, one: str, other: str) -> int:
        return hop_us(self._problem, self._model, one, other)


# --- figures -------------------------------------------------------------------------------------


def _best_single(problem: Problem, model: Model) -> tuple[int, str]:
    """The fastest host that could hold all of `model` if it held nothing else; (0, "") if none."""
    return min(
        (
            (whole_us(model, host), peer)
            for peer, host in problem.hosts.items()
            if not host.draining
            and holding(host, model.digest) is not None
            and whole_bytes(model, host) <= host.memory_bytes
        ),
        default=(0, ""),
    )


def _prediction(problem: Problem, replica: Replica, single: tuple[int, str]) -> Prediction:
    us = replica_us(problem, replica)
    best_us, best = single
    owners = tuple(part.owner for part in replica.parts)
    if not best:
        note = "no node can hold all of it"
    elif us > best_us and best not in owners:
        note = f"slower than {best} alone: {_ms(us)} ms a token, not {_ms(best_us)}"
    else:
        note = ""
    rate = _MILLITOKENS // bottleneck_us(problem, replica)
    return Prediction(replica.model, owners, us, rate, best_us, note)


def _remedy(problem: Problem, model: Model, free: dict[str, int]) -> str:
    """What would give `model` its first replica."""
    having = {peer: host for peer, host in problem.hosts.items() if model.digest in host.holdings}
    if not having:
        return "no node has the file"
    able = {
        peer: host
        for peer, host in having.items()
        if holding(host, model.digest) is not None and not host.draining
    }
    if not able:
        return "every node that has the file is draining or could not load it"
    short = min(whole_bytes(model, host) - free[peer] for peer, host in able.items())
    stages = [peer for peer, host in able.items() if runs_stages(host, model.digest)]
    layers = units(model) - sum(layers_max(model, free[peer]) for peer in stages)
    if not stages or layers <= 0:
        return f"needs {_needed(short)} more on one node, or nodes that can run stages"
    more = part_bytes(model, layers)
    return (
        f"needs {_needed(short)} more on one node, or {_needed(more)} more on nodes that run stages"
    )
