"""`Members`: the hosts of an exchange, which of them answer, and who serves each unit meanwhile.

Shape letters: H hosts, L layers, R routed experts, C copies of a unit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pregate.base.backoff import Backoff
from pregate.base.errors import HostLostError, PregateError
from pregate.base.log import get_logger
from pregate.router.engine.assignment import adopt, choose_hosts, hosts_of_pairs, share_rows
from pregate.workers.client.host_client import HostClient
from pregate.workers.link.protocol import Hello

#: Rows that are computed in the time in which a unit is read (benchmarks/results/scale.json).
UNIT_ROWS = 12.0
#: And in which one is loaded into its slot: measured on one CPU, units of 1.3 MB from the system's cache of the file.
LOAD_ROWS = 500.0

_log = get_logger(__name__)

#: A lost host waits so long before it is taken back, twice as long when it is lost again soon.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 30.0


class Members:
    """`copies_LRC` int16: hosts that hold each unit, its home first, -1 past the last. Used by the engine's one thread.

    A lost host is fenced: its units are served by those that live, which read what they lack, until it has been greeted
    anew. `hosts_of_LR` int16: who is each unit's home now.
    """

    def __init__(self, clients: Sequence[HostClient], copies_LRC: np.ndarray, hello: Hello | None = None) -> None:
        self.clients, self.copies_LRC, self._hello = list(clients), copies_LRC, hello
        #: How many rows each unit was asked for.
        self.rows_LR = np.zeros(copies_LRC.shape[:2], dtype=np.int64)
        #: Why hosts that are lost are lost.
        self.lost: dict[int, str] = {}
        #: And since when (monotonic).
        self.lost_at_s: dict[int, float] = {}
        self._pause_s: dict[int, float] = {}
        self._backoffs = {host: Backoff(FIRST_PAUSE_S, MAX_PAUSE_S) for host in range(len(clients))}
        #: How often it has changed who serves what.
        self.version = 0
        self._settle()

    def _settle(self) -> None:
        alive_H = np.array([host not in self.lost for host in range(len(self.clients))])
        self._living_LRC = adopt(self.copies_LRC, alive_H) if alive_H.any() else self.copies_LRC
        self.hosts_of_LR = hosts_of_LR = choose_hosts(self._living_LRC)
        adopted_LR, self.version = hosts_of_LR != self.copies_LRC[..., 0], self.version + 1
        #: Of each host that serves units of one that is lost, which: their layers and experts.
        self.adopted = {int(h): np.nonzero(adopted_LR & (hosts_of_LR == h)) for h in np.unique(hosts_of_LR[adopted_LR])}

    @property
    def catching_up(self) -> bool:
        """Whether some host, as it last said, neither holds nor loads all that it serves for one that is lost."""
        for host, units in self.adopted.items():
            units_LR = self.clients[host].units_LR
            if units_LR is not None and units_LR.shape == self.hosts_of_LR.shape and not units_LR[units].all():
                return True
        return False

    def held_LRC(self) -> np.ndarray | None:  # noqa: N802
        """Which of each unit's copies are in a slot or on their way there, bool [L, R, C], as hosts last said; None
        where all are."""
        copies_LRC, held_LRC = self._living_LRC, None
        for host, client in enumerate(self.clients):
            held_LR = None if host in self.lost else client.held_LR
            if held_LR is not None and held_LR.shape == copies_LRC.shape[:2]:  # else `poll` finds it
                held_LRC = copies_LRC >= 0 if held_LRC is None else held_LRC
                held_LRC &= held_LR[..., None] | (copies_LRC != host)
        return held_LRC

    def first_LR(self) -> np.ndarray:  # noqa: N802
        """Whom to tell what is expected of a unit, int16 [L, R]: of its copies the first that is held or on its way,
        else its home."""
        held_LRC = self.held_LRC() if self._living_LRC.shape[2] > 1 else None
        if held_LRC is None:
            return self.hosts_of_LR
        return np.take_along_axis(self._living_LRC, held_LRC.argmax(axis=2)[..., None], axis=2)[..., 0]

    def hosts_for(self, ids_TLK: np.ndarray, first_layer: int = 0) -> np.ndarray:
        """Return who serves a step whose tokens visit these experts of layers from `first_layer` on, -1 past a token's
        last: the host of each unit int16 [L, R], or, where units have copies, of each token's experts int16 [T, L, K],
        so that the slowest host is fast. A copy that must be loaded first takes its time for that."""
        layers = slice(first_layer, first_layer + ids_TLK.shape[1])
        living_LRC = self._living_LRC[layers]
        num_layers, num_routed = living_LRC.shape[:2]
        units = (ids_TLK + num_routed * np.arange(num_layers)[:, None])[ids_TLK >= 0]
        rows_LR = np.bincount(units, minlength=num_layers * num_routed).reshape(num_layers, num_routed)
        self.rows_LR[layers] += rows_LR
        if living_LRC.shape[2] == 1:
            return self.hosts_of_LR[layers]
        held_LRC = self.held_LRC()
        unit_rows = UNIT_ROWS if held_LRC is None else np.where(held_LRC[layers], UNIT_ROWS, LOAD_ROWS)
        rows_LRC = share_rows(living_LRC, rows_LR, len(self.clients), unit_rows)
        return hosts_of_pairs(ids_TLK, living_LRC, rows_LRC)

    def lose(self, host: int, error: HostLostError) -> None:
        """Fence a host; HostLostError where no other lives."""
        if host not in self.lost:
            now_s = time.monotonic()
            self._pause_s[host] = self._backoffs[host].failed(now_s)
            self.lost[host], self.lost_at_s[host] = error.reason, now_s
            self.clients[host].fence()
            self._settle()
            _log.warning("%s; %d of %d hosts serve on", error, self.num_alive, len(self.clients))
        self.check()

    @property
    def num_alive(self) -> int:
        return len(self.clients) - len(self.lost)

    def check(self) -> None:
        """HostLostError where nobody lives; it says of every host why."""
        if not self.num_alive:
            *others, host = self.lost
            reasons = [self.lost[host], *(f"so is host {other}: {self.lost[other]}" for other in reversed(others))]
            raise HostLostError(host, "; ".join(reasons))

    def look_after_lost(self) -> None:
        """Take back who answers again, without waiting. HostLostError while nobody does."""
        now_s = time.monotonic()
        for host in [h for h in self.lost if now_s - self.lost_at_s[h] >= self._pause_s[h]]:
            if self.clients[host].returned():
                self._backoffs[host].runs(now_s)
                del self.lost[host]
                self._settle()
                _log.warning("expert host %d is back after %.1f s", host, now_s - self.lost_at_s[host])
        self.check()

    def poll(self) -> None:
        """Take in what hosts say, without waiting; find who has fallen silent. HostLostError while nobody lives."""
        for host, client in enumerate(self.clients):
            if host not in self.lost:
                try:
                    held_LR = client.held_LR
                    if held_LR is not None and held_LR.shape != self.copies_LRC.shape[:2]:
                        raise HostLostError(host, f"it says what it holds of {held_LR.shape} units")
                    client.poll()
                except HostLostError as error:
                    self.lose(host, error)
                except PregateError as error:  # it says what we do not understand
                    self.lose(host, HostLostError(host, str(error)))
        self.look_after_lost()

    def place(self, copies_LRC: np.ndarray, num_hosts: int) -> None:
        """Let these hosts serve these units from now on, between two steps; those beyond `num_hosts` are left."""
        assert copies_LRC.max() < num_hosts <= len(self.clients), "units go to hosts that there are"
        for client in self.clients[num_hosts:]:
            client.close()
        del self.clients[num_hosts:]
        self.lost = {host: why for host, why in self.lost.items() if host < num_hosts}
        self.copies_LRC = copies_LRC
        self._settle()

    def replace(self, host: int, client: HostClient) -> None:
        """Let another process be this host from now on, or the next one. It serves when it has been greeted."""
        assert host <= len(self.clients), "hosts are added one after another"
        reason = "it was replaced"
        if host == len(self.clients):
            self.clients.append(client)
            reason = "it was added"
        else:
            self.clients[host].close()
            self.clients[host] = client
        client.fence(self._hello)
        if host not in self.lost:
            self.lost[host], self.lost_at_s[host] = reason, time.monotonic()
            self._settle()
        self._pause_s[host], self._backoffs[host] = 0.0, Backoff(FIRST_PAUSE_S, MAX_PAUSE_S)
