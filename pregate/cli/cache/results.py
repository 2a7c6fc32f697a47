"""What a replay found, policy by policy, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pregate.cli.cache.policies import POLICIES
from pregate.cli.cache.recording import Recording
from pregate.cli.cache.replay import count_hits, time_stalls

#: What knows nothing of the future loads on demand, the others ahead.
ON_DEMAND = ("random", "lru", "lfu", "hot set")


@dataclass(frozen=True)
class Row:
    """One policy with `held` units held between layers: hits, bytes loaded without fetching ahead; and on a clock, with
    as many slots more as a layer uses at most, the share of time that layers waited and of loads that went unused.

    The shares are None where nothing was put on a clock.
    """

    policy: str
    held: int
    hit_rate: float
    loaded_bytes: int
    stall_share: float | None = None
    wasted_share: float | None = None


def replay_all(
    recording: Recording, held: Sequence[int], seed: int, *, bandwidth: float | None, layer_s: float, lead: int
) -> list[Row]:
    """Replay every policy at every capacity; without `bandwidth` (bytes a second) nothing is put on a clock."""
    rows = []
    staging = int(recording.used_SLR.sum(axis=2).max())
    for num_held in held:
        for name, make in POLICIES.items():
            counts = count_hits(recording, make(recording, seed), num_held)
            stall = wasted = None
            if bandwidth is not None:
                timing = time_stalls(
                    recording,
                    make(recording, seed),
                    num_held + staging,
                    load_s=float(recording.unit_bytes) / bandwidth,
                    layer_s=layer_s,
                    lead=0 if name in ON_DEMAND else lead,
                )
                stall = timing.stall_s / (timing.stall_s + timing.compute_s)
                wasted = timing.wasted / max(timing.loads, 1)
            loaded = counts.loads * int(recording.unit_bytes)
            rows.append(Row(name, num_held, counts.hit_rate, loaded, stall, wasted))
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a picture: hit rate by capacity, and the share of time waited where it is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = all(row.stall_share is not None for row in rows)
    figure, axes = pyplot.subplots(1, 1 + timed, figsize=(5 + 4 * timed, 4), squeeze=False)
    panels = [("hit rate", lambda row: row.hit_rate), ("share of time waited", lambda row: row.stall_share)]
    for axis, (title, value) in zip(axes[0], panels, strict=False):
        for name in dict.fromkeys(row.policy for row in rows):
            mine = [row for row in rows if row.policy == name]
            axis.plot([row.held for row in mine], [value(row) for row in mine], marker="o", label=name)
        axis.set(xlabel="units held", ylabel=title, ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
