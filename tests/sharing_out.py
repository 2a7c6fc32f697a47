"""How the tests are shared among the processes of `pytest -n`; conftest.py takes the hooks from here."""

from __future__ import annotations

import os
from typing import Any

import pytest

#: Tests that start deployments or look for what one left: one after another, whatever runs beside them.
ONE_BY_ONE = ("tests/cluster", "tests/cli", "tests/workers/host/test_actor")
DEPLOYMENTS = "deployments"


def unit_of(nodeid: str) -> str:
    """What one process gets as a whole: a file, as its tests share its fixtures, or all of `ONE_BY_ONE`."""
    file = nodeid.partition("::")[0]
    return DEPLOYMENTS if file.startswith(ONE_BY_ONE) else file


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
