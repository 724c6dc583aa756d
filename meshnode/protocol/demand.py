"""How many replicas each model deserves, from what gateways count and how busy its replicas are.

Gateways sign how often they were asked for a model, and how often every replica was full
(`messages.Demand`). The mesh's demand is the sum over signers, each capped: one liar raises it by
no more than the cap, whatever it says. The sum weighs models against each other. Whether a model
gets one replica more or less follows from its replicas' own load, and changes by one step at a
time after a while of the same opinion. Between the two thresholds nothing changes, and no step
may leave a load that calls for the opposite one: that is what keeps the number from flapping.

Not known here: where a replica would fit (`placement.py`), or whether a signer is a gateway at
all; a mesh that admits strangers must expect as many caps of invented demand as it has strangers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshnode.messages import ITEMS_MAX, MODELS_MAX, Demand

__all__ = ["SIGNER_RATE_MAX_PER_S", "DemandBook", "Load"]

SIGNER_RATE_MAX_PER_S = 10.0
"""All that one gateway can claim, its models together. More than a home gateway ever sees; a
busier one is told apart by its load, which needs no belief."""
REFUSED_FLOOR_PER_S = 0.02
"""Four refusals within a half-life of the gateways' averages (2 minutes): fewer are bad luck."""
UTILISATION_HIGH = 0.8
CROWDED_FOR_S = 30.0
"""Above `UTILISATION_HIGH` for so long, a queue is not a burst: one replica more."""
UTILISATION_LOW = 0.3
IDLE_FOR_S = 300.0
"""Loading again costs more than idling: ten times as long an opinion before one replica less."""
UTILISATION_TARGET_MIN = 0.6
"""Who is refused below this was unlucky or lies."""
UTILISATION_TARGET_MAX = 0.7
"""What the others may be loaded to when one goes."""
SIGNERS_MAX = 4096
"""As many as a node holds adverts of."""
LOADED_MODELS_MAX = ITEMS_MAX
"""A group serves no more."""
LOADS_TTL_S = 150.0
"""The life of the adverts that loads are read from."""


@dataclass(frozen=True, slots=True)
class Load:
    """One ready replica: `busy` of its `slots` are taken; waiting requests count as busy."""

    slots: int
    busy: int


@dataclass(frozen=True, slots=True)
class _Rates:
    requests_per_s: float
    refused_per_s: float


_NO_RATES = _Rates(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Heard:
    rates: dict[str, _Rates]
    expires_at: float


@dataclass(slots=True)
class _Model:
    """A model's replicas as last seen, and since when they call for a step."""

    loads: tuple[Load, ...] = ()
    expires_at: float = -math.inf
    replicas: int | None = None
    crowded_since: float | None = None
    idle_since: float | None = None


class DemandBook:
    """What the mesh asks for, and what follows from it; a sans-IO core."""

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}
        self._models: dict[str, _Model] = {}
        self._expires_at = math.inf  # nothing that we keep expires before

    # --- what is seen ---------------------------------------------------------------------------

    def observe(self, signer: str, demand: tuple[Demand, ...], ttl_s: float, now: float) -> None:
        """Take a gateway's newest counters in place of its former; they count for `ttl_s`.

        If they exceed the cap, all of them shrink alike. Unheard, if the book is full.
        """
        self._forget_expired(now)
        if signer not in self._heard and len(self._heard) >= SIGNERS_MAX:
            return
        rates = _capped(demand[:MODELS_MAX]) if demand else {}
        self._heard[signer] = _Heard(rates, now + ttl_s)
        self._expires_at = min(self._expires_at, now + ttl_s)
        for model in self._models:
            if model in rates:
                self._judge(model, now)

    def loads(self, model: str, loads: tuple[Load, ...], now: float) -> None:
        """Take the current load of all *ready* replicas of `model`; call it when it changes.

        Unheard, if the book is full.
        """
        self._forget_expired(now)
        if model not in self._models:
            if len(self._models) >= LOADED_MODELS_MAX:
                return
            self._models[model] = _Model()
        state = self._models[model]
        state.loads = loads
        state.expires_at = now + LOADS_TTL_S
        self._expires_at = min(self._expires_at, state.expires_at)
        self._judge(model, now)

    # --- what follows ---------------------------------------------------------------------------

    def rate(self, model: str, now: float) -> float:
        """Requests per second for `model`, all gateways together."""
        return math.fsum(rates.requests_per_s for rates in self._rates(model, now))

    def weight(self, model: str, now: float) -> int:
        """Requests per 1000 seconds for `model`, at least 1."""
        return max(1, round(1000 * self.rate(model, now)))

    def wanted(self, model: str, replicas: int, now: float) -> int:
        """How many replicas `model` should have, given that it is meant to have `replicas` now.

        At most one more or less; at least one. The answer stays until `replicas` changes, and then
        the opinion must form anew. While one that is meant to be there is not ready, none is added.
        """
        state = self._models.get(model)
        if state is None or state.expires_at <= now:
            return max(replicas, 1)
        if state.replicas not in (None, replicas):
            state.crowded_since = state.idle_since = None
            self._judge(model, now)
        state.replicas = replicas
        if replicas < 1 or len(state.loads) < replicas:
            return max(replicas, 1)
        if _has_lasted(state.crowded_since, CROWDED_FOR_S, now):
            return replicas + 1
        if replicas > 1 and _has_lasted(state.idle_since, IDLE_FOR_S, now):
            return replicas - 1
        return replicas

    def tick(self, now: float) -> None:
        """Let go of what has expired. Harmless when early."""
        self._forget_expired(now)

    def deadline(self) -> float | None:
        """When `tick` has work next; None for never."""
        return min(self._expiries(), default=None)

    # --- within ---------------------------------------------------------------------------------

    def _rates(self, model: str, now: float) -> list[_Rates]:
        return [
            heard.rates.get(model, _NO_RATES)
            for heard in self._heard.values()
            if heard.expires_at > now
        ]

    def _judge(self, model: str, now: float) -> None:
        """Note since when the replicas are crowded or idle."""
        state = self._models[model]
        refused_per_s = math.fsum(rates.refused_per_s for rates in self._rates(model, now))
        is_crowded = _is_crowded(state.loads, refused_per_s)
        is_idle = _is_idle(state.loads)
        state.crowded_since = _since(state.crowded_since, is_crowded, now)
        state.idle_since = _since(state.idle_since, is_idle, now)

    def _forget_expired(self, now: float) -> None:
        if self._expires_at > now:
            return
        gone = [signer for signer, heard in self._heard.items() if heard.expires_at <= now]
        affected = {model for signer in gone for model in self._heard.pop(signer).rates}
        for model in [model for model, state in self._models.items() if state.expires_at <= now]:
            del self._models[model]
        for model in self._models:
            if model in affected:
                self._judge(model, now)
        self._expires_at = min(self._expiries(), default=math.inf)

    def _expiries(self) -> list[float]:
        times = [heard.expires_at for heard in self._heard.values()]
        return times + [state.expires_at for state in self._models.values()]


def _capped(demand: tuple[Demand, ...]) -> dict[str, _Rates]:
    """One gateway's counters by model, shrunk alike if together they exceed the cap."""
    claimed = math.fsum(entry.requests_per_s for entry in demand)
    shrink = min(1.0, SIGNER_RATE_MAX_PER_S / claimed) if claimed > 0 else 1.0
    return {
        entry.model: _Rates(
            shrink * entry.requests_per_s,
            # Who was refused had asked.
            shrink * min(entry.refused_per_s, entry.requests_per_s),
        )
        for entry in demand
    }


def _is_crowded(loads: tuple[Load, ...], refused_per_s: float) -> bool:
    """Whether one more is called for: by the load alone, or by refusals that the load bears out.

    Refusals are a gateway's word, so they only move the threshold, from high to the target's lower
    end. Twice as many replicas would then still not be idle: no step up is followed by one down.
    """
    slots, busy = _sums(loads)
    if slots == 0:
        return False
    is_refusing = refused_per_s > REFUSED_FLOOR_PER_S
    return busy > (UTILISATION_TARGET_MIN if is_refusing else UTILISATION_HIGH) * slots


def _is_idle(loads: tuple[Load, ...]) -> bool:
    """Whether one could go: whichever it is, the rest would not be loaded above the target."""
    slots, busy = _sums(loads)
    if slots == 0:
        return False
    rest = slots - max(load.slots for load in loads)
    return busy < UTILISATION_LOW * slots and busy <= UTILISATION_TARGET_MAX * rest


def _sums(loads: tuple[Load, ...]) -> tuple[int, int]:
    return sum(load.slots for load in loads), sum(load.busy for load in loads)


def _since(since: float | None, holds: bool, now: float) -> float | None:
    if not holds:
        return None
    return now if since is None else since


def _has_lasted(since: float | None, for_s: float, now: float) -> bool:
    return since is not None and now - since >= for_s
