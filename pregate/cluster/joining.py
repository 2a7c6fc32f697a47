"""Being connected to Ray: to the one that runs at an address, or to one of our own on this machine."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray._private.worker

from pregate.base.errors import UnavailableError, UserError
from pregate.base.log import get_logger
from pregate.cluster import local_ray
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.cluster.local_ray import NAMESPACE, STOP_MARGIN_S, SUPERVISOR_PREFIX, LocalRay
from pregate.cluster.stage import stage as long_stage

logger = get_logger(__name__)
#: How long a --ray-address may take to prove that a gRPC server is there.
ADDRESS_TIMEOUT_S = 5.0
#: Messages of Ray about a deployment's processes: the supervisor watches over those, and launchers over it.
_SAID_BETTER = re.compile(r"A worker died or was killed while executing a task|Task Supervisor\.\w+ failed")


def connect(config: ServeConfig, ray_access: RayAccess, on_stage: Callable[[str], None]) -> LocalRay | None:
    """Be connected to Ray afterwards; returns the keeper when we had to start one."""
    if ray.is_initialized():
        return None
    address, kept = ray_access.address, None
    if address is None:
        # Logical CPUs only admit actors; ours ask for a tenth each, and a Serve application needs room beside them.
        with long_stage(on_stage, "starting Ray on this machine"):
            kept = local_ray.start(num_cpus=max(os.cpu_count() or 1, config.hosts + 8))
        address = kept.address
    else:
        check_address(address)
    # What Ray prints has a thousand characters.
    ray._private.worker.print_to_stdstream = log_shortened
    try:
        with long_stage(on_stage, "joining Ray"):
            _join(address)
    except UnavailableError:
        if kept is not None:
            kept.wait_gone(STOP_MARGIN_S)
        raise
    return kept


def logs_folder() -> str:
    """Where the processes of ours on this node log, while this one is connected to Ray."""
    node = ray._private.worker._global_node
    assert node is not None, "connect to Ray first"
    return str(node.get_logs_dir_path())


def here() -> tuple[str, str]:
    """This node's address in Ray, and `logs_folder`."""
    return ray.util.get_node_ip_address(), logs_folder()


def join(ray_access: RayAccess) -> str:
    """Be connected to the Ray that runs at --ray-address, or on this machine; returns its address."""
    address = ray_access.address or "auto"
    if not ray.is_initialized():
        check_address(address)
        _join(address)
    return address


def find(name: str, ray_access: RayAccess) -> Any:
    """The supervisor of a deployment that runs, at --ray-address or on this machine. UnavailableError without one."""
    address = join(ray_access)
    try:
        return ray.get_actor(SUPERVISOR_PREFIX + name, NAMESPACE)
    except ValueError:
        raise UnavailableError(f"no deployment {name!r} runs on the Ray at {address}") from None


def _join(address: str) -> None:
    try:
        with _own_signals():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnavailableError(f"--ray-address {address}: cannot be joined: {error}") from error


def log_shortened(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Log the first sentence of each of Ray's messages, of which its logs have the whole, but for those of a process
    that ended: ours say which part it was, or the end was asked for."""
    for message in data["lines"]:
        sentence, _, rest = str(message).strip().partition(". ")
        if _SAID_BETTER.match(sentence):
            continue
        logger.warning("Ray: %s%s", sentence[:160], " (more in its logs)" if rest else "")


def check_address(address: str) -> None:
    """Refuse what is no Ray at once; it would take Ray minutes. UserError or UnavailableError."""
    if address == "auto":  # Ray looks for one on this machine, and says quickly when there is none
        address = os.environ.get("RAY_ADDRESS", "")
        if not address:
            return
    if not re.fullmatch(r"[^/]+:\d{1,5}", address):
        raise UserError.of("--ray-address", address, "allowed: HOST:PORT, or auto for the Ray of this machine")
    import grpc

    if not local_ray.gcs_answers(address):
        raise UnavailableError(f"--ray-address {address}: nothing takes connections there; is it Ray's address?")
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(ADDRESS_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise UnavailableError(f"--ray-address {address}: what listens there is not Ray") from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put the caller's SIGTERM handler back: Ray installs one that aborts the process, without any clean-up."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
