"""What a plan is made from: signed words, adverts and orders, as the planner's terms.

Pure. Figures that jitter (measured rates, demand) are rounded, so that equal facts give an equal
problem and nobody plans anew for the noise in a measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from meshnode.messages import Advert, Body, Consent, Order
from meshnode.protocol.draft import current_replicas
from meshnode.protocol.placement import Holding, Host, Model, Problem, Want, Way
from meshnode.protocol.words import Word

__all__ = ["LOAD_BYTES_PER_S", "US_PER_GB_UNMEASURED", "problem_of"]

US_PER_GB_UNMEASURED = 100_000
"""A token reads all weights once; ten GB/s is what an ordinary machine's memory yields."""
LOAD_BYTES_PER_S = 500_000_000
"""From a disk of today. Used to weigh moves against each other, not to promise anything."""


def problem_of(
    body: Body,
    words: Mapping[tuple[str, str], Word],
    orders: Iterable[Order],
    adverts: Mapping[str, Advert],
    replicas_wanted: Callable[[str, str], tuple[int, int]],
) -> Problem:
    """The planner's view of a group.

    `words` are those of living peers, by (peer, model); `replicas_wanted(model, name)` says how
    many replicas demand calls for, and the model's weight.
    """
    said = {key: word.consent for key, word in sorted(words.items())}
    said = {key: consent for key, consent in said.items() if consent.state != "gone"}
    drained, pins = _ordered(orders)
    rates = {
        (peer, offer.digest): offer.decode_tokens_per_s
        for peer, advert in adverts.items()
        for offer in advert.offers
    }
    models: dict[str, Model] = {}
    holdings: dict[str, dict[str, Holding]] = {}
    memory: dict[str, tuple[int, int]] = {}
    us_per_gb: dict[str, int] = {}
    for (peer, model), consent in said.items():
        models[model] = Model(
            digest=model,
            name=consent.name,
            # Nobody says which part has the embeddings and the head: each is taken to.
            weight_bytes=_layers_bytes(consent),
            layers=consent.units,
            kv_bytes_per_token=consent.kv_bytes,
            context_tokens=1,  # `kv_bytes` is for all of the context already
            compute_bytes=max(consent.bytes - consent.weight_bytes - consent.kv_bytes, 0)
            + consent.edge_bytes,
            activation_bytes=consent.activation_bytes,
            cut_every=consent.cut_every,
            depth=consent.layers,
        )
        # The rate of a pipeline says nothing about the one host that offers it.
        rate = rates.get((peer, model), 0.0) if consent.state == "ready" else 0.0
        decode_us = _rounded(round(1e6 / rate)) if rate > 0 else 0
        if decode_us and _layers_bytes(consent):
            us_per_gb[peer] = max(1, decode_us * 10**9 // _layers_bytes(consent))
        assert consent.state != "gone"
        holdings.setdefault(peer, {})[model] = Holding(
            consent.state,
            consent.wanted,
            consent.bytes,
            decode_us,
            cuts=consent.activation_bytes > 0 and consent.units > 1,
        )
        memory[peer] = max(memory.get(peer, (-1, 0)), (consent.sequence, consent.memory_bytes))
    leaving: Counter[str] = Counter()
    stays = {(i.owner, i.model, i.shard) for i in body.items if i.state != "draining"}
    for item in body.items:
        if item.state == "draining" and (item.owner, item.model, item.shard) not in stays:
            leaving[item.owner] += item.bytes
    wants: dict[str, Want] = {}
    for model, fact in models.items():
        replicas, weight = replicas_wanted(model, fact.name)
        wants[model] = Want(replicas, pins.get(model, ()), _rounded(weight))
    # Who has not been measured is thought no faster than those who have: a guess must not lure
    # a model away from an owner that is merely busy.
    unmeasured = max(us_per_gb.values(), default=US_PER_GB_UNMEASURED)
    return Problem(
        models=models,
        hosts={
            peer: Host(
                peer=peer,
                memory_bytes=max(memory[peer][1] - leaving[peer], 0),
                us_per_gb=us_per_gb.get(peer, unmeasured),
                load_bytes_per_s=LOAD_BYTES_PER_S,
                holdings=held,
                stages=True,
                draining=peer in drained,
            )
            for peer, held in holdings.items()
        },
        wants=wants,
        ways={
            (peer, link.peer): Way(_rounded(link.rtt_us), _rounded(link.bytes_per_s))
            for peer, advert in adverts.items()
            for link in advert.links
        },
        current=current_replicas(
            body.items, {model: consent.cut_every for (_, model), consent in said.items()}
        ),
    )


def _layers_bytes(consent: Consent) -> int:
    """The weights that are in layers: what speeds are reckoned by, measured and expected alike."""
    return max(consent.weight_bytes - consent.edge_bytes, 0)


def _ordered(orders: Iterable[Order]) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """Who is drained, and where each model is pinned."""
    drained: set[str] = set()
    pins: dict[str, tuple[str, ...]] = {}
    for order in orders:
        if order.action == "drain":
            drained.add(order.peer)
        elif order.action == "pin":
            pins[order.subject] = (*pins.get(order.subject, ()), order.peer)
    return drained, pins


def _rounded(value: int) -> int:
    """To within a quarter."""
    step = 1 << max(value.bit_length() - 3, 0)
    return value // step * step
