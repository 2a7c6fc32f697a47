"""An engine in this process, and where it may listen; what a file wants otherwise it defines itself."""

import pytest

from tests.router.running import local_engine, socket_folder


@pytest.fixture(scope="module")
def engine(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint) as engine:
        yield engine


@pytest.fixture
def endpoint():
    with socket_folder() as folder:
        yield f"ipc://{folder}/engine.sock"
