"""What must hold whatever happens, watched while registers run: S1, S2, S3, S9 and S10.

`Promises` remembers every block that anybody took for decided and every word that anybody gave,
through crashes too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshnode.messages import Genesis, Header, Vote
from meshnode.protocol.consensus import Register
from tests.protocol.consensus.parts import (
    Said,
    Violation,
    excludes,
    in_words,
    is_proven,
    name_of,
    votes_in,
)


@dataclass
class Promises:
    """The record of one run in which nobody lies, but for `liars`."""

    genesis: Genesis
    liars: frozenset[str] = frozenset()
    epochs: dict[str, int] = field(default_factory=dict)
    """The newest epoch that each has ever stood in."""
    blocks: dict[int, Header] = field(default_factory=dict)
    words: dict[tuple[str, int, int], list[Vote]] = field(default_factory=dict)

    def voters(self) -> tuple[str, ...]:
        """Who decides the next epoch."""
        return self.blocks[max(self.blocks)].voters if self.blocks else self.genesis.voters

    def note(self, message: Said) -> None:
        """Something was said by an honest voter, or passed on by one."""
        for vote in votes_in(message):
            if name_of(vote.voter) in self.liars:
                continue
            said = self.words.setdefault((vote.voter, vote.epoch, vote.view), [])
            if vote in said:
                continue
            if any(excludes(vote, other) for other in said):
                raise Violation(f"S10: {name_of(vote.voter)} has also said {in_words(vote)}")
            said.append(vote)

    def check(self, name: str, register: Register) -> None:
        """Something has happened to a register."""
        head, before = register.head, self.epochs.get(name, 0)
        if head.epoch < before:
            raise Violation(f"S3: {name} was in epoch {before}, now {head.epoch}")
        if {name_of(each) for each in register.equivocations} - self.liars:
            raise Violation(f"{name} convicts an honest voter")
        if register.refused["proposal without justification"] and not self.liars:
            raise Violation(f"{name} was shown an honest proposal without justification")
        if head.epoch > before:
            self.epochs[name] = head.epoch
            self._check_head(name, register)

    def _check_head(self, name: str, register: Register) -> None:
        head = register.head
        known = self.blocks.setdefault(head.epoch, head.header)
        if known != head.header:
            raise Violation(f"S1: {name} has another block in epoch {head.epoch}")
        changes = [handover.header.epoch for handover in register.lineage.handovers]
        if changes != sorted(set(changes)):
            raise Violation(f"S9: {name} keeps the changes of voters out of order: {changes}")
        before = self.blocks.get(head.epoch - 1)
        if before is None and head.epoch > 1:
            return  # who first stood in it crashed before it could be asked
        voters = self.genesis.voters if before is None else before.voters
        assert head.proof is not None
        if not is_proven(head.proof, voters, self.genesis.faults):
            raise Violation(f"S2: {name} stands in epoch {head.epoch} without a quorum")
        if len(set(voters) - set(head.header.voters)) > 1:
            raise Violation(f"S9: too many voters are replaced in epoch {head.epoch}")
        if register.lineage.voters_of(head.epoch) != voters:
            raise Violation(f"S9: {name} is wrong about who decided epoch {head.epoch}")
