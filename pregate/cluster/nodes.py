"""What each node of a cluster has, asked by a small task on every one, and in what they differ.

Versions that differ, a GPU that Ray does not see or torch cannot use, little shared memory, a checkpoint that is not
there: each fails a deployment late, and on another machine than where one looks.
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pregate.base.errors import PregateError
from pregate.base.memory import available_bytes
from pregate.cluster.finding import Finding, gigabytes

#: A node's first task starts a process there, and torch in it.
NODE_TIMEOUT_S = 120.0
MIN_SHM_BYTES = 200 * 2**20
COMPARED = ("python", "ray", "torch", "transformers", "pregate")


@dataclass(frozen=True)
class NodeReport:
    """What one node has. `versions` None: not installed. `model_error` "": the checkpoint could be read, or none was
    asked for; `fingerprint` is the checkpoint's. `ray_gpus` are those Ray knows of, `gpus` those the machine has."""

    address: str
    name: str
    versions: Mapping[str, str | None]
    shm_bytes: int
    memory_bytes: int
    ray_gpus: float = 0.0
    gpus: int = 0
    torch_cuda: bool = False
    model_error: str = ""
    fingerprint: str = ""


def report_node(address: str, ray_gpus: float, model: str | None, parent: str | None) -> NodeReport:
    """Look at the machine this process runs on; with a `model` read its headers too, which loads torch."""
    shm = Path("/dev/shm")
    error = fingerprint = ""
    if model is not None:
        try:
            fingerprint = _read_model(model, parent)
        except (PregateError, OSError) as failure:
            error = failure.for_command_line if isinstance(failure, PregateError) else str(failure)
    return NodeReport(
        address=address,
        name=os.uname().nodename,
        versions={name: _version(name) for name in COMPARED},
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else 0,
        memory_bytes=available_bytes(),
        ray_gpus=ray_gpus,
        gpus=len(glob.glob("/dev/nvidia[0-9]*")),
        torch_cuda=_torch_cuda(),
        model_error=error,
        fingerprint=fingerprint,
    )


def each_node() -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Every node that is alive, as Ray describes it, and Ray's options of what is to run there, however busy it is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            yield node, {"num_cpus": 0, "scheduling_strategy": here}


def ask_nodes(model: str | None, parent: str | None) -> tuple[list[NodeReport], list[Finding]]:
    """Reports of all nodes of the Ray that this process is connected to, and a finding for each that gave none."""
    import ray
    import ray.exceptions

    asked: dict[Any, str] = {}
    for node, here in each_node():
        task = ray.remote(report_node).options(max_retries=0, **here)
        address = node["NodeManagerAddress"]
        asked[task.remote(address, node["Resources"].get("GPU", 0.0), model, parent)] = address
    ray.wait(list(asked), num_returns=len(asked), timeout=NODE_TIMEOUT_S)
    reports, silent = [], []
    for reference, address in asked.items():
        try:
            reports.append(ray.get(reference, timeout=0))
        except ray.exceptions.GetTimeoutError:
            mend = f"look at raylet.err there, in /tmp/ray/session_latest/logs; ray status; a port of {address} closed?"
            silent.append(Finding(f"node {address}", "fail", f"no answer in {NODE_TIMEOUT_S:.0f} s", mend))
        except ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            mend = "install the same Python, Ray, torch and pregate there as here, and start Ray from that environment"
            silent.append(Finding(f"node {address}", "fail", lines[-1] if lines else type(error).__name__, mend))
    return sorted(reports, key=lambda report: report.address), silent


def compare(here: Mapping[str, str | None], reports: Sequence[NodeReport], device: str = "cpu") -> list[Finding]:
    """Findings about nodes: one line for each that is well, else one for each thing that is not, and how to mend it.

    `here` are the versions on this machine, with which the others are compared.
    """
    found = [finding for report in reports for finding in _of_node(here, report, device)]
    prints = Counter(report.fingerprint for report in reports if report.fingerprint)
    if len(prints) > 1:
        most = prints.most_common(1)[0][0]
        others = ", ".join(report.address for report in reports if report.fingerprint not in (most, ""))
        found.append(
            Finding("checkpoint", "fail", f"another one on {others}", "copy the same checkpoint to every node")
        )
    return found


def versions_here() -> dict[str, str | None]:
    """Versions of what must agree, in this process."""
    return {name: _version(name) for name in COMPARED}


def _of_node(here: Mapping[str, str | None], report: NodeReport, device: str) -> list[Finding]:
    what = f"node {report.address}"
    found = []
    for name, version in report.versions.items():
        if version != here[name]:
            value = f"{name} {version or 'missing'}; here {here[name] or 'missing'}"
            mend = "use one Python everywhere" if name == "python" else f"pip install '{name}=={here[name]}' there"
            found.append(Finding(what, "fail", value, f"{mend}, then start Ray there again"))
    if report.model_error:
        mend = "put the checkpoint at this path there (`pregate push`), or on a disk that all nodes share"
        found.append(Finding(what, "fail", report.model_error, mend))
    if report.shm_bytes < MIN_SHM_BYTES:
        value = f"{gigabytes(report.shm_bytes)} of /dev/shm, {gigabytes(MIN_SHM_BYTES)} needed"
        mend = "docker run --shm-size=1g; on Kubernetes an emptyDir of medium Memory at /dev/shm"
        found.append(Finding(what, "warn", value, mend))
    if report.gpus > report.ray_gpus:
        value = f"{report.gpus} GPUs, of which Ray knows {report.ray_gpus:g}"
        found.append(Finding(what, "warn", value, f"ray start --num-gpus={report.gpus}, without CUDA_VISIBLE_DEVICES"))
    if report.ray_gpus and device == "cuda" and not report.torch_cuda:
        found.append(Finding(what, "fail", "torch sees no CUDA", "install torch's CUDA build, and the driver, there"))
    if not found:
        gpus = f", {report.ray_gpus:g} GPUs" if report.ray_gpus else ""
        found.append(Finding(what, "ok", f"{report.name}: {gigabytes(report.memory_bytes)} of memory free{gpus}"))
    return found


def _read_model(model: str, parent: str | None) -> str:
    from pregate.model.checkpoint import CheckpointReader

    return CheckpointReader(model, parent).fingerprint


def _torch_cuda() -> bool:
    """Whether torch could use a GPU: built for CUDA, with a driver. (Ray hides GPUs from a task that asks for none.)"""
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None and os.path.exists("/proc/driver/nvidia/version")


def _version(name: str) -> str | None:
    if name == "python":
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
