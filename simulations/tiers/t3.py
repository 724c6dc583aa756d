"""Tier 3: whole nodes in processes on the loopback, with libp2p, QUIC, engines and HTTP.

In real time, so a run takes as long as it says. What happens before the first request or fault of
the scenario is left out once the nodes have met and serve. Clients ask as the scenario's do, with
words instead of token counts. There is one model, the packaged one, whatever its name here; nodes
without its file are gateways. A kill is a power cut (`NodeProcess.stop_the_power`).
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from meshnode.errors import ConfigError
from meshnode.models.catalog import DEFAULT_ALIAS
from meshnode.models.catalog import resolve as find_model
from meshnode.models.quantize import requantized
from meshnode_simulations.kernel.streams import stream
from meshnode_simulations.record import Recorder, Result, quantile
from meshnode_simulations.scenario import Fault, Scenario
from meshnode_simulations.tiers.processes import GONE, NodeFailedError, NodeProcess, Processes

NODES_MAX = 8
"""Each takes 100 MB, and starting so many keeps two cores busy for half a minute."""
LOOK_S = 0.05
"""How often a node is asked whether a model is served again."""
SETTLE_S_MAX = 120.0
"""Until all have met, and whoever is to serve has loaded."""
BEFORE_S = 1.0
"""Quiet time that is left before the first thing that happens."""
CONTEXT_TOKENS = 2048
WORDS = ("river", "stone", "letter", "garden", "window", "winter", "engine", "market", "paper")
"""A token each, or nearly."""


def check(scenario: Scenario) -> None:
    """Raises `ConfigError` for what real nodes on one machine cannot be asked to do."""
    if not 2 <= scenario.mesh.nodes <= NODES_MAX:
        raise ConfigError(f"mesh.nodes: tier 3 runs 2 to {NODES_MAX}, not {scenario.mesh.nodes}")
    if len(scenario.models) > 1:
        raise ConfigError("models: tier 3 has one, the packaged one")
    if any(model.activation_bytes or model.fetched for model in scenario.models):
        raise ConfigError("models: tier 3's fits on every node, which has its file")
    if scenario.demand.kind not in ("none", "poisson", "chats"):
        raise ConfigError(f"demand.kind: tier 3 has poisson and chats, not {scenario.demand.kind}")
    if scenario.routing.policy != "ours":
        raise ConfigError("routing.policy: real nodes have but ours")
    if scenario.churn.kind != "none" or scenario.chaos.kinds or scenario.adversaries.kind != "none":
        raise ConfigError("tier 3 has neither churn nor chaos nor adversaries")
    for fault in scenario.faults:
        if fault.kind != "kill" or not fault.target.startswith(("owner:", "n")):
            raise ConfigError(f"tier 3 can kill an owner or a node by name, not {fault}")


def run(scenario: Scenario, seed: int) -> Result:
    """One run; its processes are ended whatever happens. Raises `ConfigError`, and
    `NodeFailedError` if a node does not start or the mesh does not come together."""
    check(scenario)
    try:
        return trio.run(_run, scenario, seed)
    except ExceptionGroup as group:
        failed, others = group.split(NodeFailedError)
        if failed is None or others is not None:
            raise
        raise _first(failed) from None


def _first(failed: ExceptionGroup[NodeFailedError]) -> NodeFailedError:
    found = failed.exceptions[0]
    return _first(found) if isinstance(found, ExceptionGroup) else found


async def _run(scenario: Scenario, seed: int) -> Result:
    started_s, cpu_s = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="meshnode-t3-", ignore_cleanup_errors=True) as folder:
        async with trio.open_nursery() as nursery:
            processes = Processes(Path(folder), nursery)
            try:
                trial = _Trial(scenario, seed, processes, Recorder())
                await trial.start(Path(folder))
                await trial.pass_time()
                figures = trial.figures()
            finally:
                processes.end()
    return Result(
        scenario=scenario,
        seed=seed,
        checked=False,
        digest="",
        virtual_s=time.monotonic() - started_s,
        cpu_s=time.process_time() - cpu_s,
        events=0,
        series=trial.recorder.series(),
        tables=dict(trial.recorder.tables),
        figures=figures,
        violations=(),
    )


@dataclass(slots=True)
class _Trial:
    """One run in motion."""

    scenario: Scenario
    seed: int
    processes: Processes
    recorder: Recorder
    killed_s: dict[str, float] = field(default_factory=dict)
    promotions_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    asked: int = 0
    answered: int = 0
    under_way: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    rates: list[tuple[float, float]] = field(default_factory=list)
    chats: int = 0

    # --- start ----------------------------------------------------------------------------------

    async def start(self, folder: Path) -> None:
        """All nodes, each a member of all others, and the model served as the scenario wants."""
        mesh = self.scenario.mesh
        model = await self._model_file(folder)
        first = await self.processes.start("n0", *self._flags(0, model))
        await first.wait_started()
        token = await first.call("POST", "/api/invite", {"uses": mesh.nodes, "role": "node"})
        for place in range(1, mesh.nodes):
            flags = self._flags(place, model)
            await self.processes.start(f"n{place}", *flags, "--join", token["token"])
        for node in self.processes.nodes:
            await node.wait_started()
        with trio.move_on_after(SETTLE_S_MAX):
            while not await self._is_settled():  # noqa: ASYNC110  other processes know no events
                await trio.sleep(LOOK_S * 4)
            return
        raise NodeFailedError(f"the nodes did not come together in {SETTLE_S_MAX:g} s")

    async def _model_file(self, folder: Path) -> Path | None:
        """In the form that nodes make of it, so that it is made once."""
        if not self.scenario.models:
            return None
        packaged = find_model(DEFAULT_ALIAS, folder).path
        return await requantized(packaged, "0" * 64, folder)

    def _flags(self, place: int, path: Path | None) -> tuple[str, ...]:
        if path is None or place >= self.scenario.models[0].files:
            return ("client",)
        model = self.scenario.models[0]
        option = "--model" if place < model.wanted else "--standby"
        sizes = ("--context", str(CONTEXT_TOKENS), "--slots", str(model.slots))
        return ("serve", option, f"{path}={model.name}", *sizes, "--memory", "2GiB")

    async def _is_settled(self) -> bool:
        nodes = self.processes.nodes
        wanted = max((model.wanted for model in self.scenario.models), default=0)
        serving = min(max(wanted, 1), len(nodes)) if self.scenario.models else 0
        for node in nodes:
            status = await node.status()
            connected = len(status["peers"]) >= len(nodes) - 1
            if not connected or len(_servers(status)) < serving:
                return False
        return True

    async def _look_at_engines(self) -> None:
        """How fast they are, once they have worked."""
        for node in self.processes.nodes:
            if node.is_up:
                status = await node.status()
                self.rates += [
                    (model["prefill_tokens_per_s"], model["decode_tokens_per_s"])
                    for model in status["models"]
                    if model["decode_tokens_per_s"] > 0
                ]

    # --- what happens ---------------------------------------------------------------------------

    async def pass_time(self) -> None:
        """Demand and faults, each at its time; the clock starts shortly before the first."""
        demand, faults = self.scenario.demand, self.scenario.faults
        first = [fault.at_s for fault in faults]
        first += [demand.start_s] if demand.kind != "none" else []
        end_s = self.scenario.scenario.duration_s
        begins_s = max(min(first, default=end_s) - BEFORE_S, 0.0)
        zero = trio.current_time() - begins_s
        async with trio.open_nursery() as nursery:
            for fault in faults:
                nursery.start_soon(self._strike, fault, zero)
            if demand.kind != "none":
                nursery.start_soon(self._arrive, nursery, zero)
            await trio.sleep_until(zero + end_s if first else trio.current_time())
            nursery.cancel_scope.cancel()
        await self._look_at_engines()

    async def _strike(self, fault: Fault, zero: float) -> None:
        await trio.sleep_until(zero + fault.at_s)
        target = await self._target(fault.target)
        if target is None:
            return
        at_s = time.time()
        target.stop_the_power()
        self.killed_s[target.peer_id] = at_s
        self.recorder.row("faults", time_s=fault.at_s, kind=fault.kind, nodes=target.name)
        if self.scenario.models:
            witness = next(node for node in self.processes.nodes if node.is_up)
            while not _servers(await witness.status()) - set(self.killed_s):  # noqa: ASYNC110
                await trio.sleep(LOOK_S)
            self.promotions_s.append(time.time() - at_s)

    async def _target(self, text: str) -> NodeProcess | None:
        up = [node for node in self.processes.nodes if node.is_up]
        if not text.startswith("owner:"):
            return next((node for node in up if node.name == text), None)
        serving = _servers(await up[0].status())
        return next((node for node in up if node.peer_id in serving), None)

    # --- clients --------------------------------------------------------------------------------

    async def _arrive(self, nursery: trio.Nursery, zero: float) -> None:
        demand, rng = self.scenario.demand, stream(self.seed, "clients")
        await trio.sleep_until(zero + demand.start_s)
        while True:
            await trio.sleep(rng.expovariate(demand.per_s))
            self.chats += 1
            nursery.start_soon(self._chat, stream(self.seed, "chat", self.chats))

    async def _chat(self, rng: random.Random) -> None:
        """One chat, of one turn under `poisson`: at a random gateway each time."""
        demand = self.scenario.demand
        turns = demand.turns if demand.kind == "chats" else 1
        messages: list[dict[str, str]] = []
        for turn in range(turns):
            if turn:
                await trio.sleep(rng.expovariate(1.0 / max(demand.think_s, 1e-3)))
            words = max(1, int(rng.expovariate(1.0 / demand.prompt_tokens)))
            said = " ".join(rng.choice(WORDS) for _ in range(words))
            messages.append({"role": "user", "content": said})
            answer_tokens = max(1, int(rng.expovariate(1.0 / demand.answer_tokens)))
            tokens = sum(len(message["content"].split()) for message in messages) * 2
            if tokens + answer_tokens > CONTEXT_TOKENS:
                return
            up = [node for node in self.processes.nodes if node.is_up]
            answer = await self._ask(rng.choice(up), messages, answer_tokens)
            if answer is None:
                return
            messages.append({"role": "assistant", "content": answer})

    async def _ask(
        self, gateway: NodeProcess, messages: list[dict[str, str]], answer_tokens: int
    ) -> str | None:
        self.asked += 1
        self.under_way += 1
        body = {
            "model": self.scenario.models[0].name,
            "messages": messages,
            "max_tokens": answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            answer = await trio.to_thread.run_sync(
                partial(_answer, gateway, body), abandon_on_cancel=True
            )
        except GONE:
            answer = None
        self.under_way -= 1
        if answer is None:
            return None
        self.answered += 1
        self.ttft_s.append(answer.first_s)
        self.pauses_s.append(answer.longest_s)
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        return answer.text

    # --- figures --------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """By the names that tier 1 has for them."""
        nodes = {node.peer_id: node for node in self.processes.nodes}
        first_s: list[float] = []
        met_s: list[float] = []
        seen_s: list[float] = []
        for node in self.processes.nodes:
            joined = list(node.times_of("member joined: "))
            if joined and node.name != "n0":
                first_s.append(max(joined[0][0] - node.since_s, 0.0))
            for at_s, peer in joined:
                if peer in nodes:
                    later_s = max(node.since_s, nodes[peer].since_s)
                    met_s.append(max(at_s - later_s, 0.0))
            for at_s, peer in node.times_of("member lost: "):
                if peer in self.killed_s:
                    seen_s.append(at_s - self.killed_s[peer])
        found = {
            "join_first_p50_s": quantile(first_s, 0.5),
            "meet_p50_s": quantile(met_s, 0.5),
            "meet_p99_s": quantile(met_s, 0.99),
        }
        if seen_s:
            found |= {
                "death_seen_p50_s": quantile(seen_s, 0.5),
                "death_seen_max_s": max(seen_s),
            }
        if self.promotions_s:
            found["promotion_p50_s"] = quantile(self.promotions_s, 0.5)
        if self.asked:
            found |= {
                "requests": float(self.asked),
                "answered_share": self.answered / max(self.asked - self.under_way, 1),
                "ttft_p50_s": quantile(self.ttft_s, 0.5),
                "ttft_p95_s": quantile(self.ttft_s, 0.95),
                "hit_share": self.cached_tokens / max(self.prompt_tokens, 1),
            }
        if self.rates:
            found["engine_prefill_tokens_per_s"] = quantile([r[0] for r in self.rates], 0.5)
            found["engine_decode_tokens_per_s"] = quantile([r[1] for r in self.rates], 0.5)
        return found


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    first_s: float
    longest_s: float
    prompt_tokens: int
    cached_tokens: int


def _answer(gateway: NodeProcess, body: dict[str, Any]) -> _Answer | None:
    """A streamed answer as a client takes it, in a thread; None if it is refused or breaks."""
    asked_s = heard_s = time.monotonic()
    first_s, longest_s, text = math.nan, 0.0, ""
    with gateway.answering("POST", "/v1/chat/completions", body) as response:
        if response.status != 200:
            return None
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return None
            now_s = time.monotonic()
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                if math.isnan(first_s):
                    first_s = now_s - asked_s
                else:
                    longest_s = max(longest_s, now_s - heard_s)
                heard_s = now_s
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
            if (usage := chunk.get("usage")) is not None:
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                first_s = now_s - asked_s if math.isnan(first_s) else first_s
                return _Answer(text, first_s, longest_s, usage["prompt_tokens"], cached)
    return None


def _servers(status: dict[str, Any]) -> set[str]:
    """Who serves the model, in the eyes of a node."""
    return {peer for model in status["mesh_models"] for peer in model["served_by"]}
