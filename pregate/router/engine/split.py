"""A token group split up: what a lost host was to compute, by those that serve its units now. NumPy only.

Shape letters: U units used, P (row, expert) pairs, R routed experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pregate.workers.link.protocol import GroupIndex


class Part(NamedTuple):
    """What one host is asked for of another's group: `rows` of it, ascending, and as which of its `pairs`."""

    host: int
    rows: np.ndarray
    index: GroupIndex
    pairs: np.ndarray


def split(index: GroupIndex, hosts_R: np.ndarray) -> list[Part]:
    """Split a group by the hosts that serve its units now, `hosts_R` int [R] of its layer.

    Example: experts [1, 4], counts [2, 2], row_index [0, 2, 0, 1], with expert 1 on host 0 and 4 on host 2: host 0 gets
    rows [0, 2] as pairs [0, 1], row_index [0, 1]; host 2 rows [0, 1] as pairs [2, 3], row_index [0, 1].
    """
    hosts_U, parts = hosts_R[index.expert_ids], []
    for host in np.unique(hosts_U).tolist():
        pairs = np.flatnonzero(np.repeat(hosts_U == host, index.counts))
        rows, row_index = np.unique(index.row_index[pairs], return_inverse=True)
        mine = hosts_U == host
        part = GroupIndex(index.expert_ids[mine], index.counts[mine], row_index.reshape(-1).astype(np.int32))
        parts.append(Part(host, rows, part, pairs))
    return parts
