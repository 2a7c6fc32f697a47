"""What a supervisor looks after, as it sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Health:
    """`lost`: who is dead for good, and why. `notes`: what happened that the deployment survives, a sentence each."""

    lost: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Children(Protocol):
    """What the supervisor owns (children.py). All calls come from its event loop."""

    stage: str

    async def start(self) -> dict[str, Any]:
        """Bring everything up and return what launchers need to know (plain values)."""
        ...

    def saved(self) -> dict[str, Any]:
        """What `adopt` needs, once it has started."""
        ...

    def adopt(self, saved: dict[str, Any]) -> dict[str, Any]:
        """In place of `start`: take up what runs already, started by a supervisor that died; returns what that did."""
        ...

    async def add_door(self, owner: str, options: dict[str, Any]) -> dict[str, Any]:
        """Start a front door for a launcher, unless it has one with these options; returns its host and port."""
        ...

    async def drop_doors(self, owner: str, grace_s: float) -> None:
        """Drain and stop a launcher's doors."""
        ...

    async def scale(self, hosts: int) -> dict[str, Any]:
        """Have so many hosts; returns how many there are when that is reached, or superseded."""
        ...

    async def check(self) -> Health:
        """Look after every part; what can be started again is."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Drain the doors, then remove every process and placement group."""
        ...
