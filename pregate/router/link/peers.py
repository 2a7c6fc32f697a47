"""Which front door waits for which request: the link's book-keeping. No sockets, no clock, one thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pregate.base.telemetry import NO_SPAN, Span


@dataclass
class _Peer:
    last_heard_s: float
    request_ids: set[str] = field(default_factory=set)


class Peers:
    """Front doors by their socket's id, and the requests (submits and routes) each waits for."""

    def __init__(self) -> None:
        self._peers: dict[bytes, _Peer] = {}
        self._owners: dict[str, bytes] = {}
        self._told: dict[str, tuple[str, Span]] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._peers))

    def __contains__(self, peer_id: bytes) -> bool:
        return peer_id in self._peers

    @property
    def requests(self) -> list[str]:
        """Every request somebody waits for."""
        return list(self._owners)

    def heard(self, peer_id: bytes, now_s: float) -> None:
        """Note a sign of life; a door that was not known is known from now on."""
        self._peers.setdefault(peer_id, _Peer(now_s)).last_heard_s = now_s

    def silent(self, before_s: float) -> list[bytes]:
        """Doors that were last heard before `before_s`."""
        return [peer_id for peer_id, peer in self._peers.items() if peer.last_heard_s < before_s]

    def owner(self, request_id: str) -> bytes | None:
        """The door that waits for a request, None when nobody does."""
        return self._owners.get(request_id)

    def told(self, request_id: str) -> tuple[str, Span]:
        """What its caller calls a request that somebody waits for, and its span."""
        return self._told[request_id]

    def add(self, peer_id: bytes, request_id: str, called: str = "", span: Span = NO_SPAN) -> None:
        """Let a door wait for a request that nobody waits for yet."""
        assert request_id not in self._owners
        self._owners[request_id], self._told[request_id] = peer_id, (called, span)
        self._peers[peer_id].request_ids.add(request_id)

    def remove(self, request_id: str) -> None:
        """Nobody waits for this request any more; unknown ones are ignored."""
        self._told.pop(request_id, None)
        peer = self._peers.get(self._owners.pop(request_id, b""))
        if peer is not None:
            peer.request_ids.discard(request_id)

    def compare(self, peer_id: bytes, listed: Iterable[str]) -> tuple[list[str], list[str]]:
        """Hold what a door says it waits for against the book: (unknown here, no longer wanted there)."""
        peer, listed = self._peers.get(peer_id), set(listed)
        unknown = [i for i in listed if self._owners.get(i) != peer_id]
        return unknown, [] if peer is None else list(peer.request_ids - listed)

    def drop(self, peer_id: bytes) -> list[str]:
        """Forget a door; returns the requests it waits for, each of which is to be removed."""
        peer = self._peers.pop(peer_id, None)
        return [] if peer is None else list(peer.request_ids)
