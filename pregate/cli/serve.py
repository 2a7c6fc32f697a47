"""`pregate serve` and `pregate doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    from pregate.cluster import serving
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
    serving.serve(config, door, ray_address)


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
