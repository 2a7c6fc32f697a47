"""`pregate serve` and `pregate doctor`."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pregate.cluster.config import ServeConfig
    from pregate.cluster.launch import Deployment
    from pregate.router.grpc_server import GrpcOptions

#: How often the waiting launcher looks at what the lease thread has heard.
_LOOK_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.", show_default=False)],
    hosts: Annotated[int, typer.Option(help="Expert hosts; 0 keeps the experts in the engine's process.")] = 0,
    grpc_port: Annotated[int, typer.Option(help="Port of the gRPC server; 0 picks a free one.")] = 50051,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray (auto: the running one) instead.")] = None,
    placement: Annotated[str, typer.Option(help="linear or round_robin.")] = "linear",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    expert_ffn: Annotated[str, typer.Option(help="How hosts run experts: auto, or one by name.")] = "auto",
    gpus_per_host: Annotated[float, typer.Option(help="GPUs each host asks Ray for.")] = 0.0,
    router_gpus: Annotated[float, typer.Option(help="GPUs the engine asks Ray for.")] = 0.0,
    name: Annotated[str, typer.Option(help="Name of the deployment; launchers of one name share it.")] = "pregate",
    served_model_name: Annotated[str, typer.Option(help="Name clients know it by; the folder's if empty.")] = "",
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Bearer tokens, one a line.")] = None,
) -> None:
    """Serve a checkpoint over gRPC from expert hosts that are Ray actors, until Ctrl-C."""
    from pregate.cluster import local_ray

    if ray_address is None:
        local_ray.prepare_environment()
    from pregate.cluster import preflight
    from pregate.cluster.config import ServeConfig
    from pregate.router.access import AccessOptions
    from pregate.router.grpc_server import GrpcOptions

    config = ServeConfig.from_dict(
        {
            "model": str(model),
            "hosts": hosts,
            "name": name,
            "placement": placement,
            "device": device,
            "dtype": dtype,
            "gpus_per_host": gpus_per_host,
            "router_gpus": router_gpus,
            "engine": {"model": "", "name": served_model_name},
            "host": {"expert_ffn": expert_ffn},
        }
    )
    door = GrpcOptions(port=grpc_port, access=AccessOptions(host, tls_cert, tls_key, token_file))
    preflight.check_config(config)
    preflight.check_door(door)
    _serve(config, door, ray_address)


def _serve(config: ServeConfig, door: GrpcOptions, ray_address: str | None) -> None:
    from pregate.cluster.launch import RayAccess, launch

    for number in _SIGNALS:  # during the start they interrupt it, and launch cleans up
        signal.signal(number, _interrupt)
    deployment = launch(config, RayAccess(ray_address), lambda stage: typer.echo(f"  {stage}", err=True))
    try:
        host, port = deployment.add_door(door)
        stopping = _stop_on_signal()
        _print_served(deployment, host, port)
        reason = _wait(deployment, stopping)
    finally:
        typer.echo("  draining and stopping", err=True)
        if deployment.num_launchers > 1:
            typer.echo("  another launcher uses the deployment; it and its Ray go on until that one ends", err=True)
        clean = deployment.close()
    if reason is not None:
        _end(f"the deployment is gone: {reason}")
    if not clean:
        _end("stopping took too long; the supervisor goes on with it")


def _end(sentence: str) -> None:
    from pregate.base.errors import UnavailableError

    raise UnavailableError(sentence)


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
    """Wait for a signal (None) or for the loss of the deployment (why). Tells of parts that die."""
    told: set[str] = set()
    while not stopping.wait(_LOOK_S):
        for who, reason in deployment.dead.items():
            if who not in told:
                typer.echo(f"  {who} is lost: {reason}", err=True)
                told.add(who)
        if deployment.lost is not None:
            return deployment.lost
    return None


def _print_served(deployment: Deployment, host: str, port: int) -> None:
    config, info = deployment.config, deployment.info
    where = f"{config.hosts} expert hosts" if config.hosts else "experts in the engine's process"
    experts = "/".join(str(n) for n in sorted(set(info["info"]["num_experts"])))
    lines = [
        f"serving  {info['model_name']}  from {config.model}",
        f"  {info['info']['num_layers']} layers of {experts} experts, {info['info']['routing']} routing,"
        f" {where}, placement {config.placement}, {config.dtype} on {config.device}",
        f"gRPC     {host}:{port}",
        f"Ray      {deployment.ray_address}",
        f"join it  {_how_to_join(deployment.ray_address)}",
        f'try      pregate generate --target {host}:{port} --prompt "Once upon a time"',
        "stop     Ctrl-C",
    ]
    typer.echo("\n".join(lines))


def _how_to_join(address: str) -> str:
    """Ray does not find out by itself that an address wants the user's token."""
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return f"export {token}RAY_ADDRESS={address}"


def doctor(
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder: does it fit this machine?")] = None,
    hosts: Annotated[int, typer.Option(help="Expert hosts it is to be served on.")] = 0,
) -> None:
    """Check this machine: versions, devices, ports, memory; what would fail and how to mend it."""
    from pregate.cluster import doctor as checks

    findings = [*checks.examine_machine()]
    if model is not None:
        findings += checks.examine_model(model, hosts)
    checks.print_findings(findings)
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)
