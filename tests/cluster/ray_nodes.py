"""A Ray of several nodes on this machine."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import ray._private.utils
from ray.cluster_utils import Cluster

from pregate.cluster import local_ray


@contextmanager
def ray_nodes(*nodes, **options):
    """A Ray of nodes with these arguments, the first its head, which this process is connected to with these options.

    Gives Ray's `Cluster`, its nodes, and a folder in which `home-0`, `home-1` are the homes of nodes' users.
    """
    folder, patch = Path(tempfile.mkdtemp(prefix="pgt-", dir="/tmp")), pytest.MonkeyPatch()
    local_ray.ensure_token()
    if (token := local_ray.token_path()) is not None:  # it is below the home that is the tests' own
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    patch.setattr(ray._private.utils, "write_ray_address", lambda address: None)  # for others' `auto`
    of_head = {"temp_dir": str(folder / "ray"), "include_dashboard": False}
    cluster, made = Cluster(shutdown_at_exit=False), []
    try:
        for number, arguments in enumerate(nodes):
            home = folder / f"home-{number}"
            home.mkdir()
            with pytest.MonkeyPatch.context() as there:
                there.setenv("HOME", str(home))
                made.append(cluster.add_node(**arguments, **({} if number else of_head)))
        ray.init(address=cluster.address, log_to_driver=False, **options)
        yield cluster, made, folder
    finally:
        ray.shutdown()
        cluster.shutdown()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)
