"""The groups that are on their way to a host and back.

Shape letters: N rows of a group, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pregate.workers.link.protocol import Failure, GroupIndex, GroupKey, RowsMessage


@dataclass
class Flight:
    """A group on its way: the identity it was last sent under, what to send again, and its answer. `unheard`: the host
    did not know us and looked at none of it. `idle_beats`: heartbeats since then of a host with nothing to do."""

    key: GroupKey
    rows_ND: torch.Tensor
    index: GroupIndex | None
    answer: RowsMessage | Failure | None = None
    unheard: bool = False
    idle_beats: int = 0


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

    def mark_unheard(self, key: GroupKey | None) -> None:
        """The host looked at nothing of the group last sent under `key`."""
        for flight in self._by_key.values():
            flight.unheard |= flight.key == key

    def missed(self, idle: bool) -> list[Flight]:
        """Take in a heartbeat. Return groups without an answer that a host with nothing to do seems never to have got,
        or whose answer was lost: after two heartbeats, then four, eight, for large ones may be long on their way."""
        late = []
        for flight in self._by_key.values():
            flight.idle_beats = flight.idle_beats + 1 if idle and flight.answer is None else 0
            if flight.idle_beats > 1 << (flight.key.attempt + 1):
                late.append(flight)
        return late

    def to_send_again(self, to_another: bool) -> Iterator[Flight]:
        """Groups without an answer that the host did not hear: where it is another one, all of them."""
        return (f for f in self._by_key.values() if f.answer is None and (to_another or f.unheard))
