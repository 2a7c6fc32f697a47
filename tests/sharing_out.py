"""How the tests are shared among the processes of `pytest -n`, and which are left to `make chaos`; conftest.py takes
the hooks from here."""

from __future__ import annotations

import os
from typing import Any

import pytest

DEPLOYMENTS = "deployments"
#: For one more start of a deployment whose parts others test one by one: `make test` has twelve minutes.
only_in_chaos = pytest.mark.skipif("PREGATE_CHAOS_KILLS" not in os.environ, reason="make chaos")
#: Files that go together. Tests that start deployments or look for what one left run one after another, whatever runs
#: beside them; those of families share the checkpoints that are made of them.
TOGETHER = {
    DEPLOYMENTS: (
        "tests/cluster",
        "tests/chaos/test_scaling",
        "tests/cli",
        "tests/workers/host/test_actor",
        "tests/deploy",
        "tests/docs",
    ),
    "families": (
        "tests/convert/test_families",
        "tests/router/engine/test_served_families",
        "tests/convert/tune/test_run",
    ),
}


def unit_of(nodeid: str) -> str:
    """What one process gets as a whole: a file, as its tests share its fixtures, or files that go together."""
    file = nodeid.partition("::")[0]
    return next((unit for unit, files in TOGETHER.items() if file.startswith(files)), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, lest one process be left with it at the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    slow = {unit_of(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ((unit := unit_of(item.nodeid)) != DEPLOYMENTS, unit not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Ours, by `unit_of`: under pytest 9.2, xdist 3.8 silently ignores its own group marks (its issue 1386)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return Scheduler(config, log)
