"""What crossed the boundary, message by message, in bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedbench.api.messages import ClientId
from fedbench.run.payloads import Parcel

Direction = Literal["down", "up"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger: a message that crossed. `bytes` is the payload's length."""

    round: int
    direction: Direction
    client: ClientId
    kind: str
    bytes: int
    elements: int

    def to_json(self) -> list[Any]:
        return [self.round, self.direction, self.client, self.kind, self.bytes, self.elements]


@dataclass(slots=True)
class Ledger:
    """What crossed, message by message, kept by round."""

    rounds: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))

    @property
    def entries(self) -> list[Entry]:
        """Of all rounds, in the order in which these were first charged."""
        return [entry for entries in self.rounds.values() for entry in entries]

    def charge(self, round: int, direction: Direction, client: ClientId, parcels: Iterable[Parcel]) -> None:
        """Note what was sent to a client or by it; one that is refused was sent all the same."""
        self.rounds[round] += [Entry(round, direction, client, p.kind, p.size, p.elements) for p in parcels]

    def total(self, direction: Direction, kinds: Iterable[str] | None = None, round: int | None = None) -> int:
        """Bytes in one direction, over all rounds and kinds unless told."""
        wanted = None if kinds is None else set(kinds)
        entries = self.entries if round is None else self.rounds[round]
        return sum(e.bytes for e in entries if e.direction == direction and (wanted is None or e.kind in wanted))

    def by_kind(self, direction: Direction) -> dict[str, dict[str, int]]:
        """kind -> bytes, elements and number of messages."""
        out: dict[str, dict[str, int]] = defaultdict(lambda: {"bytes": 0, "elements": 0, "messages": 0})
        for e in self.entries:
            if e.direction == direction:
                cell = out[e.kind]
                cell["bytes"] += e.bytes
                cell["elements"] += e.elements
                cell["messages"] += 1
        return {kind: dict(out[kind]) for kind in sorted(out)}

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[Any]]) -> Ledger:
        ledger = cls()
        for entry in (Entry(*row) for row in rows):
            ledger.rounds[entry.round].append(entry)
        return ledger
