"""Ray is started once more where its node was too slow, and for no other reason."""

import logging
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest
import ray

from pregate.cluster.ray_start import ATTEMPTS, init_local, stop_ray


@pytest.fixture
def short_folder():
    folder = tempfile.mkdtemp(prefix="pgt-", dir="/tmp")
    yield Path(folder) / "ray"
    stop_ray()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def attempts(monkeypatch):
    """Make starts fail, after the real thing, while the list holds errors; collects the processes each one left."""
    errors, left, start = [], [], ray.init

    def init(**options):
        context = start(**options)
        left.append(psutil.Process().children(recursive=True))
        if errors:
            raise errors.pop()
        return context

    monkeypatch.setattr(ray, "init", init)
    return errors, left


def too_slow():
    return Exception("The current node timed out during startup. This could happen because ...")  # Ray's own words


@pytest.mark.ray
@pytest.mark.slow
def test_a_slow_start_is_cleared_away_and_tried_again(attempts, short_folder, caplog):
    errors, left = attempts
    errors.append(too_slow())
    with caplog.at_level(logging.WARNING, "pregate"):
        init_local(short_folder, 1)
    assert ray.cluster_resources()["CPU"] == 1
    assert len(left) == 2
    assert left[0]
    assert not any(process.is_running() for process in left[0])
    assert caplog.messages == ["Ray did not come up in time, starting it once more"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_start_that_stays_slow_fails(attempts, short_folder):
    errors, left = attempts
    errors.extend(too_slow() for _ in range(ATTEMPTS))
    with pytest.raises(Exception, match="timed out during startup"):
        init_local(short_folder, 1)
    assert len(left) == ATTEMPTS


def test_another_error_is_not_tried_again(attempts, short_folder):
    _, left = attempts
    with pytest.raises(ValueError, match="no_such"):
        init_local(short_folder, 1, resources={"no_such": -1})
    assert left == []
