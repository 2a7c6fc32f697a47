"""Who still wants the deployment. Pure bookkeeping: the time is a parameter, in seconds of one monotonic clock."""

from __future__ import annotations

#: A launcher that has not renewed for this long is taken for dead.
LEASE_TTL_S = 15.0
#: How often a launcher renews.
RENEW_EVERY_S = 1.0


class Leases:
    """The launchers' leases. A launcher takes one, renews it, and releases it or lets it lapse."""

    def __init__(self, ttl_s: float = LEASE_TTL_S) -> None:
        self._ttl_s = ttl_s
        self._expiry_s: dict[str, float] = {}

    def take(self, launcher_id: str, now_s: float) -> None:
        """Take a lease, or renew the one already held."""
        self._expiry_s[launcher_id] = now_s + self._ttl_s

    def renew(self, launcher_id: str, now_s: float) -> bool:
        """Renew a lease; False when it lapsed or was released, for a dead launcher must not come back unseen."""
        if self._expiry_s.get(launcher_id, now_s) <= now_s:
            return False
        self._expiry_s[launcher_id] = now_s + self._ttl_s
        return True

    def release(self, launcher_id: str) -> bool:
        """Give a lease back; False when there was none, so that a repeat is harmless."""
        return self._expiry_s.pop(launcher_id, None) is not None

    def lapse(self, now_s: float) -> list[str]:
        """Drop every lease whose time is over and return the launchers that held them."""
        gone = [launcher for launcher, expiry_s in self._expiry_s.items() if expiry_s <= now_s]
        for launcher in gone:
            del self._expiry_s[launcher]
        return gone

    @property
    def holders(self) -> tuple[str, ...]:
        return tuple(self._expiry_s)

    def __bool__(self) -> bool:
        return bool(self._expiry_s)
