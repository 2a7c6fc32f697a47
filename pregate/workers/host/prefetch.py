"""`Prefetcher`: the thread that brings units to a host's slots before they are asked for."""

from __future__ import annotations

import threading

from pregate.base.log import get_logger
from pregate.workers.host.store import UnitStore

#: A unit is loaded at most so many layers before its own: far enough to load while others compute, near enough to leave
#: most slots to units that stay.
LEAD_LAYERS = 2
#: Longest sleep before the thread looks whether it should end.
_WAIT_S = 0.5

_log = get_logger(__name__)


class Prefetcher:
    """Loads one unit after another, few of them begun at a time (`ahead.AT_ONCE`), always those that are needed next as
    things stand, so that little has to be taken back when they change: no more is no longer wanted than was begun."""

    def __init__(self, store: UnitStore) -> None:
        self._store, self._stopping = store, threading.Event()
        self._thread = threading.Thread(target=self._run, name="pregate-prefetch", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End after the units that are begun."""
        self._stopping.set()
        self._store.wake()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                loads = self._store.next_fetches(LEAD_LAYERS, _WAIT_S)
            except Exception:  # noqa: BLE001 (logged; compute loads what is missing)
                # A defect here must not leave the host without this thread unnoticed, nor let it spin.
                _log.exception("choosing what to fetch ahead failed")
                self._stopping.wait(_WAIT_S)
                continue
            for load in loads:  # each has its slot: none may be left out
                try:
                    self._store.finish(load)
                except Exception:  # noqa: BLE001 (logged; it is not tried again)
                    _log.exception("unit %s could not be fetched ahead", load.unit)
