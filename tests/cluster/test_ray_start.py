"""Ray is started once more where its node was too slow, and for no other reason."""

import logging
import shutil
import tempfile
from pathlib import Path

import pytest
import ray
from ray._private import services

from pregate.cluster import ray_start
from pregate.cluster.ray_start import children, init_local, stop_ray


@pytest.fixture
def short_folder():
    others, folder = children(), tempfile.mkdtemp(prefix="pgt-", dir="/tmp")
    yield Path(folder) / "ray"
    stop_ray(others)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slow_starts(monkeypatch):
    """A list of errors, raised one by one where Ray waits for its node, and of what each found running there."""
    errors, found, get_node = [], [], services.get_node

    def get_or_raise(*args, **options):
        if errors:
            found.append(children())
            raise errors.pop()
        return get_node(*args, **options)

    monkeypatch.setattr(services, "get_node", get_or_raise)
    return errors, found


@pytest.fixture
def starts(monkeypatch):
    """What every start was asked."""
    asked, start = [], ray.init

    def init(**options):
        asked.append(options)
        return start(**options)

    monkeypatch.setattr(ray, "init", init)
    return asked


def too_slow():
    return Exception("The current node timed out during startup. This could happen because ...")  # Ray's own words


@pytest.mark.ray
@pytest.mark.slow
def test_a_slow_start_is_cleared_away_and_tried_again(slow_starts, starts, short_folder, caplog):
    errors, found = slow_starts
    errors.append(too_slow())
    with caplog.at_level(logging.WARNING, "pregate"):
        init_local(short_folder, 1)
    assert ray.cluster_resources()["CPU"] == 1
    assert len(starts) == 2
    assert found[0]
    assert not any(process.is_running() for process in found[0])
    assert caplog.messages == ["Ray did not come up in time, starting it once more"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_last_start_that_is_slow_fails_and_leaves_nothing(slow_starts, starts, short_folder, monkeypatch):
    monkeypatch.setattr(ray_start, "ATTEMPTS", 1)
    errors, found = slow_starts
    errors.append(too_slow())
    before = children()
    with pytest.raises(Exception, match="timed out during startup"):
        init_local(short_folder, 1)
    assert len(starts) == len(found) == 1
    assert all(found)
    assert [p for p in children() if p not in before] == []
    assert not short_folder.exists()


def test_another_error_is_not_tried_again(starts, short_folder):
    with pytest.raises(RuntimeError, match="no_such"):
        init_local(short_folder, 1, no_such=1)
    assert len(starts) == 1
