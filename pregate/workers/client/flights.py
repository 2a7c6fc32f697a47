"""The groups that are on their way to a host and back.

Shape letters: N rows of a group, D hidden width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from pregate.workers.link.protocol import Failure, GroupIndex, GroupKey, RowsMessage


@dataclass
class Flight:
    """A group on its way: the identity it was last sent under, what to send again, and its answer. `idle_beats`:
    heartbeats since then of a host with nothing to do. `sent_s` is monotonic."""

    key: GroupKey
    rows_ND: torch.Tensor
    index: GroupIndex | None
    answer: RowsMessage | Failure | None = None
    idle_beats: int = 0
    sent_s: float = field(default_factory=time.monotonic)


class Flights:
    """Groups that were sent and not yet received, by the identity they were first sent under."""

    def __init__(self) -> None:
        self._by_key: dict[GroupKey, Flight] = {}

    def add(self, flight: Flight) -> None:
        self._by_key[flight.key] = flight

    def __getitem__(self, key: GroupKey) -> Flight:
        return self._by_key[key]

    def abandon(self, key: GroupKey | None = None) -> None:
        """Forget a group, or all of them."""
        self._by_key = {k: flight for k, flight in self._by_key.items() if key not in (None, k)}

    def waiting_for(self, key: GroupKey | None) -> Flight | None:
        """The group that was last sent under `key` and has no answer."""
        return next((f for f in self._by_key.values() if f.key == key and f.answer is None), None)

    def missed(self, idle: bool, after_s: float) -> bool:
        """Take in a heartbeat. Return whether a host with nothing to do seems never to have got a group that was sent
        `after_s` ago, or its answer was lost: after two heartbeats, then four, eight, for large ones may be long on
        their way."""
        for flight in self.unanswered:
            flight.idle_beats = flight.idle_beats + 1 if idle else 0
        late = [f for f in self.unanswered if time.monotonic() - f.sent_s > after_s]
        return any(flight.idle_beats > 1 << (flight.key.attempt + 1) for flight in late)

    @property
    def unanswered(self) -> list[Flight]:
        return [flight for flight in self._by_key.values() if flight.answer is None]
