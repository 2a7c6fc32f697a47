"""`pregate serve` from its options to its exit: check, launch, say where it serves, wait, and end with a reason."""

from __future__ import annotations

import os
import signal
import ssl
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from pregate.base import log
from pregate.base.errors import PregateError, UnavailableError
from pregate.base.memory import give_back_heap
from pregate.cluster import preflight
from pregate.cluster.calls import RayLostError
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.cluster.launch import Deployment, launch
from pregate.cluster.stage import stage
from pregate.router.doors.grpc_options import GrpcOptions

#: How often the waiting launcher looks whether the deployment still is.
LOOK_S = 0.5
logger = log.get_logger(__name__)
#: A line of the screen, where lines are text.
SCREEN = "  %(message)s"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(config: ServeConfig, door: GrpcOptions, ray_access: RayAccess) -> None:
    """Serve until a signal comes. Raises UnavailableError, naming it, when a part is lost for good; where lines of the
    log are JSON the error is one of them."""
    try:
        _serve(config, door, ray_access)
    except PregateError as error:
        if config.log_format == "json":
            logger.error("%s", error.for_command_line)
            error.is_said = True
        if isinstance(error, RayLostError):
            if not error.is_said:
                sys.stderr.write(f"pregate: {error}\n")
            sys.stderr.flush()
            os._exit(1)  # Ray's own clean-up at exit would wait for what is gone
        raise


def _serve(config: ServeConfig, door: GrpcOptions, ray_access: RayAccess) -> None:
    log.configure("launcher", config.log_format, text=SCREEN)
    preflight.check_door(door, config.engine_node)
    with stage(_say, "checking the model"):
        # A deployment that is joined has its cache already.
        preflight.check_config(config, fits_here=ray_access.address is None)
    for number in _SIGNALS:  # during the start they interrupt it, and launch cleans up
        signal.signal(number, _interrupt)
    deployment, reason, clean = None, None, True
    try:
        deployment = launch(config, ray_access, _say)
        with stage(_say, "starting the door"):
            host, port = deployment.add_door(door)
        stopping = _stop_on_signal()
        print("\n".join(_describe(deployment, door, host, port)), flush=True)
        give_back_heap()  # from here on it only waits: what reading the model folder took need not be held
        reason = _wait(deployment, stopping)
    finally:
        if deployment is not None:
            if deployment.num_launchers > 1:
                _say("another launcher uses the deployment; it and its Ray go on until that one ends")
            with stage(_say, "draining and stopping"):
                clean = deployment.close()
            if logs := deployment.kept_logs():
                _say(f"the logs are kept in {logs}")
    if reason is not None:
        raise (RayLostError if deployment and deployment.ray_lost else UnavailableError)(reason)
    if not clean:
        raise UnavailableError("stopping took too long; the supervisor goes on with it")


def _say(text: str) -> None:
    """On a terminal that is gone, as after SIGHUP, it is lost: logging sees to that."""
    logger.info("%s", text)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop_on_signal() -> threading.Event:
    """An event that the first signal sets; a second one interrupts (the supervisor then finishes alone)."""
    stopping = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    for number in _SIGNALS:
        signal.signal(number, handle)
    return stopping


def _wait(deployment: Deployment, stopping: threading.Event) -> str | None:
    """Wait for a signal (None) or for the loss of the deployment (why); says what it survives."""
    said = -1
    while not stopping.wait(LOOK_S):
        lost = deployment.look()
        for number, note in deployment.notes:
            if number > said:
                logger.warning("%s", note)  # the levels are the supervisor's
                said = number
        if lost is not None:
            logger.error("%s", lost)  # now: to drain and to clean up takes its time
            return lost
    return deployment.lost


def _describe(deployment: Deployment, door: GrpcOptions, host: str, port: int) -> list[str]:
    config, info = deployment.config, deployment.info
    hosts = f"{config.hosts} expert host{'s' if config.hosts > 1 else ''}"
    where = hosts if config.hosts else "experts in the engine's process"
    experts = "/".join(str(n) for n in sorted(set(info["info"]["num_experts"])))
    return [
        f"serving  {info['model_name']}  from {config.model}",
        f"  {info['info']['num_layers']} layers of {experts} experts, {info['info']['routing']} routing,"
        f" {where}, placement {config.placement}, {config.dtype} on {config.device}",
        f"gRPC     {host}:{port}",
        *_paths(config, info["paths"]),
        *_metrics(door, host),
        f"Ray      {deployment.ray_address}",
        f"join it  {_how_to_join(deployment.ray_address)}",
        f"try      {_how_to_try(door, host, port)}",
        "stop     Ctrl-C",
    ]


def _paths(config: ServeConfig, started: Mapping[str, Any] | None) -> list[str]:
    if started is None:
        return []
    threads = config.paths.threads
    return [f"paths    by process {started['pid']}, {threads} thread{'s' if threads > 1 else ''}"]


def _metrics(door: GrpcOptions, host: str) -> list[str]:
    scheme = "http" if door.access.tls_cert is None else "https"
    return [] if door.metrics_port is None else [f"metrics  {scheme}://{host}:{door.metrics_port}/metrics"]


def _how_to_join(address: str) -> str:
    """Ray does not find out by itself that an address wants the user's token."""
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return f"export {token}RAY_ADDRESS={address}"


def _how_to_try(door: GrpcOptions, host: str, port: int) -> str:
    """A command that works on this machine: a name that the certificate holds, and the files the client needs."""
    access = door.access
    options = ""
    if access.tls_cert is not None:
        names = _certified_names(access.tls_cert)
        host = host if host in names else next(iter(names), "NAME")
        options += f" --ca {access.tls_cert}"
    if access.tls_client_ca is not None:
        options += " --cert CLIENT.pem --key CLIENT.key"
    if access.token_file is not None:
        options += f" --token-file {access.token_file}"
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f'pregate generate --target {host}:{port}{options} --prompt "Once upon a time"'


def _certified_names(certificate: Path) -> list[str]:
    """Names and addresses a PEM certificate is for; those with a wildcard are no address."""
    try:
        decoded = ssl._ssl._test_decode_cert(str(certificate))  # pyright: ignore # the one parser at hand
    except (AttributeError, ssl.SSLError, OSError):
        return []
    return [name for _, name in decoded.get("subjectAltName", ()) if "*" not in name]
