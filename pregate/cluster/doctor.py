"""`pregate doctor`: what this machine has, what would fail, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pregate.base.errors import UserError
from pregate.base.memory import available_bytes
from pregate.cluster import preflight
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.cluster.finding import Finding, gigabytes
from pregate.cluster.local_ray import OBJECT_STORE_BYTES, TOKEN_WAY_OUT, token_path
from pregate.router.doors.access import AccessOptions
from pregate.router.doors.grpc_options import GrpcOptions

#: Ray keeps logs, sockets and spilled objects there.
MIN_TEMP_BYTES = 2 * 10**9
MIN_OPEN_FILES = 4096
_PACKAGES = ("torch", "ray", "transformers", "grpcio", "pyzmq", "safetensors", "tokenizers")
_MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}


def print_findings(findings: list[Finding]) -> None:
    """Print a line for each finding, and below it how to mend it. Nothing is cut to the terminal's width."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        console.print(f"{_MARKS[finding.state]} {finding.what:<{width}}  ", end="")
        console.print(finding.value, markup=False)
        if finding.mend:
            console.print(f"     {'':<{width}}  -> {finding.mend}", markup=False)


def examine_machine(door: GrpcOptions) -> Iterator[Finding]:
    """What holds for any model: versions, devices, ports and files of the door, shared memory, limits, memory."""
    yield _python()
    yield from (_package(name) for name in _PACKAGES)
    yield from _devices()
    yield from _ports(door)
    yield from _files(door.access)
    yield _shared_memory()
    yield _open_files()
    yield _temp_folder()
    yield _token()
    yield Finding("memory available", "ok", gigabytes(available_bytes()))


def examine_model(config: ServeConfig, fits_here: bool = True) -> list[Finding]:
    """Bytes of each role of a deployment, and with `fits_here` whether they fit here."""
    from pregate.cluster.footprint import PROCESS_BYTES, measure
    from pregate.model.checkpoint import CheckpointReader

    try:
        preflight.check_config(config, whole=True)
        roles = measure(CheckpointReader(config.model, config.parent), config)
    except UserError as error:
        return [Finding("model", "fail", error.for_command_line)]  # the sentence says what to do
    each = f"{gigabytes(min(roles.units_bytes))} to {gigabytes(max(roles.units_bytes))}"
    found = [
        Finding("backbone", "ok", gigabytes(roles.backbone_bytes)),
        Finding("shared experts", "ok", gigabytes(roles.shared_bytes)),
        Finding("KV cache", "ok", gigabytes(roles.kv_cache_bytes)),
        Finding("units", "ok", f"{gigabytes(sum(roles.units_bytes))}; {each} per host"),
        Finding("processes", "ok", f"{roles.num_processes} x {gigabytes(PROCESS_BYTES)}"),
    ]
    if roles.kept_bytes:
        found.append(Finding("host memory", "ok", gigabytes(roles.kept_bytes)))
    if not fits_here:
        return found
    available, needed = available_bytes(), roles.total_bytes
    fits = needed <= available
    mend = "fewer bytes: --resident-experts, --dtype bfloat16 or float16 where supported, or more machines"
    value = f"{gigabytes(needed)} of {gigabytes(available)}"
    return [*found, Finding("all of it here", "ok" if fits else "fail", value, "" if fits else mend)]


def examine_cluster(address: str, config: ServeConfig) -> list[Finding]:
    """What the nodes of the Ray at `address` have, and whether the deployment finds room among them.

    UserError and UnavailableError as of joining it.
    """
    import ray

    from pregate.cluster import room
    from pregate.cluster.joining import connect
    from pregate.cluster.nodes import ask_nodes, compare, versions_here

    connect(config, RayAccess(address), lambda stage: None)
    try:
        reports, found = ask_nodes(config.model or None, config.parent)
        found = [*compare(versions_here(), reports, config.device), *found]
        bundles = room.bundles_of(config, ray.util.get_node_ip_address())
        lacks = room.lacking(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        has = room.describe(config, ray.cluster_resources(), ray.available_resources())
    finally:
        ray.shutdown()
    mend = "fewer hosts, a smaller --gpus-per-host, or more nodes: it would wait for the cluster to grow"
    room_found = Finding("room", "warn" if lacks else "ok", has, mend if lacks else "")
    return [*found, room_found]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 10) <= sys.version_info[:2] < (3, 14)
    return Finding("python", "ok" if good else "fail", version, "" if good else "use Python 3.10 to 3.13")


def _package(name: str) -> Finding:
    wanted = _wanted().get(name)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "fail", "missing", f"pip install {name}{wanted or ''}")
    if wanted is None or _satisfies(version, wanted):
        return Finding(name, "ok", version)
    return Finding(name, "fail", f"{version}; {wanted} is needed", f"pip install '{name}{wanted}'")


def _wanted() -> dict[str, str]:
    """Version bounds of our own metadata; empty when pregate runs from its folder without being installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("pregate") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needs = [Requirement(line) for line in lines]
    return {need.name: str(need.specifier) for need in needs if need.marker is None}


def _satisfies(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("cpu", "ok", f"{os.cpu_count()} logical CPUs")
    if not torch.cuda.is_available():
        yield Finding("gpu", "ok", "none; serve with --device cpu")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"gpu {index}", "ok", f"{properties.name}, {gigabytes(properties.total_memory)}")
    try:
        yield Finding("triton", "ok", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("triton", "warn", "missing", "pip install 'pregate[gpu]'")


def _ports(door: GrpcOptions) -> Iterator[Finding]:
    """A port in use may be the very server's that is asked about: a warning."""
    for option, port in (("--grpc-port", door.port), ("--metrics-port", door.metrics_port)):
        if port is None:
            continue
        try:
            preflight.check_port(option, door.access.host, port)
        except UserError as error:
            yield Finding(f"port {port}", "warn", error.for_command_line, f"give `pregate serve` another {option}")
        else:
            yield Finding(f"port {port}", "ok", "free")


def _files(access: AccessOptions) -> Iterator[Finding]:
    """Of certificates and tokens, where there are any to be read."""
    if access.tls_cert is None and access.token_file is None:
        return
    try:
        access.read_tls()
        access.open_tokens()
    except UserError as error:
        yield Finding("door's files", "fail", error.for_command_line)
    else:
        yield Finding("door's files", "ok", "can be read")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm; Ray uses the temporary folder")
    free = shutil.disk_usage(folder).free
    value = f"{gigabytes(free)} free in /dev/shm, {gigabytes(OBJECT_STORE_BYTES)} needed"
    if free >= OBJECT_STORE_BYTES:
        return Finding("shared memory", "ok", value)
    return Finding("shared memory", "warn", value, "docker run --shm-size=1g; Ray falls back to slower disk")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        return Finding("open files", "ok", f"{soft} (hard limit {hard})")
    return Finding("open files", "warn", f"{soft} (hard limit {hard})", f"ulimit -n {MIN_OPEN_FILES} or more")


def _temp_folder() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    value = f"{gigabytes(free)} free in {folder}"
    if free >= MIN_TEMP_BYTES:
        return Finding("temporary folder", "ok", value)
    return Finding("temporary folder", "fail", value, f"free {gigabytes(MIN_TEMP_BYTES)} there, or set TMPDIR")


def _token() -> Finding:
    """Whether Ray's token can be kept: a home that cannot be written is usual in containers."""
    try:
        path = token_path()
    except UserError:
        return Finding("Ray's token", "warn", "this user has no home folder to keep it in", TOKEN_WAY_OUT)
    if path is None or os.access(path, os.R_OK):
        return Finding("Ray's token", "ok", "in RAY_AUTH_TOKEN" if path is None else str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        pass
    else:
        return Finding("Ray's token", "ok", f"will be made at {path}")
    return Finding("Ray's token", "warn", f"{path} cannot be written", TOKEN_WAY_OUT)
