"""What the thread that loads ahead does, in the test's own."""

from pregate.workers.host.prefetch import LEAD_LAYERS
from pregate.workers.host.store import UnitStore


def fetch_all(store: UnitStore) -> list[tuple[int, int]]:
    """Do what the thread does, while there is something to do."""
    fetched = []
    while loads := store.next_fetches(LEAD_LAYERS):
        for load in loads:
            fetched.append(load.unit)
            store.finish(load)
    return fetched
