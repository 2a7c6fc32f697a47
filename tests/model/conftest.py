"""The runtimes of path routers."""

from __future__ import annotations

import pytest

from pregate.model.path_computer import PathComputer
from tests.model.random_routers import KINDS, Kind, random_router


@pytest.fixture(scope="module", params=KINDS, ids=str)
def every(request: pytest.FixtureRequest) -> PathComputer:
    """The runtime of a router of each kind."""
    return PathComputer(random_router(request.param))


@pytest.fixture(scope="module")
def computer() -> PathComputer:
    return PathComputer(random_router(Kind()))
