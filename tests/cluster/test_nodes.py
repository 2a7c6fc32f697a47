"""What `pregate doctor --ray-address` says of nodes; over real ones: tests/deploy/test_ray_up.py."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pregate.cluster.config import ServeConfig
from pregate.cluster.doctor import examine_cluster
from pregate.cluster.nodes import NodeReport, compare, report_node, versions_here
from pregate.cluster.ray_start import init_local, stop_ray

HERE = {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.23.0", "pregate": "0.1.0"}
WELL = NodeReport("10.0.0.1", "one", HERE, 10**9, 10**10, fingerprint="a")


def test_a_node_that_is_well_is_one_line():
    (found,) = compare(HERE, [WELL])
    assert (found.what, found.state, found.value) == ("node 10.0.0.1", "ok", "one: 10.00 GB of memory free")


@pytest.mark.parametrize(
    ("change", "state", "value", "mend"),
    [
        ({"versions": HERE | {"python": "3.12.1"}}, "fail", "python 3.12.1; here 3.11.2", "use one Python everywhere"),
        ({"versions": HERE | {"ray": "2.59.0"}}, "fail", "ray 2.59.0; here 2.60.0", "pip install 'ray==2.60.0' there"),
        ({"versions": HERE | {"pregate": None}}, "fail", "pregate missing; here 0.1.0", "pip install 'pregate==0.1.0'"),
        ({"shm_bytes": 64 * 2**20}, "warn", "0.07 GB of /dev/shm, 0.21 GB needed", "--shm-size=1g"),
        ({"gpus": 2}, "warn", "2 GPUs, of which Ray knows 0", "ray start --num-gpus=2"),
        ({"gpus": 1, "ray_gpus": 1.0}, "fail", "torch sees no CUDA", "install torch's CUDA build"),
        ({"model_error": "--model /m: no such folder"}, "fail", "--model /m: no such folder", "put the checkpoint"),
    ],
)
def test_what_is_not_well_is_named_with_its_mend(change, state, value, mend):
    (found,) = compare(HERE, [replace(WELL, **change)], device="cuda")
    assert (found.what, found.state, found.value) == ("node 10.0.0.1", state, value)
    assert mend in found.mend


def test_another_checkpoint_on_one_node_is_found():
    others = [WELL, replace(WELL, address="10.0.0.2"), replace(WELL, address="10.0.0.3", fingerprint="b")]
    (found,) = (f for f in compare(HERE, others) if f.what == "checkpoint")
    assert found.failed
    assert "10.0.0.3" in found.value


def test_a_report_of_this_machine(path_checkpoint, tmp_path):
    report = report_node("10.0.0.1", 0.0, str(path_checkpoint), None)
    assert report.versions == versions_here()
    assert report.fingerprint
    assert not report.model_error
    assert "no such" in report_node("10.0.0.1", 0.0, str(tmp_path / "none"), None).model_error.lower()


@pytest.mark.ray
def test_doctor_asks_the_nodes_of_a_cluster(path_checkpoint):
    with tempfile.TemporaryDirectory(prefix="pgd-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        init_local(Path(folder), num_cpus=2)
        try:
            address = ray.get_runtime_context().gcs_address
            found = examine_cluster(address, ServeConfig(model=str(path_checkpoint), hosts=2))
        finally:
            stop_ray()
    states = {f.what.split()[0]: f.state for f in found}
    assert states == {"node": "ok", "room": "ok"}, found
