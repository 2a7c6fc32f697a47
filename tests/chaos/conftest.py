import pytest

from tests.chaos.attacked import started


@pytest.fixture(scope="module")
def target(tiny_path_checkpoint, tmp_path_factory):
    with started(tiny_path_checkpoint, tmp_path_factory.mktemp("attack") / "log") as target:
        yield target
