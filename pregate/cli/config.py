"""`pregate config`: what `pregate serve` would serve with, and where each value comes from."""

from __future__ import annotations

import yaml

from pregate.base.options import to_dict, user_options
from pregate.cli.flags import command
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.router.doors.grpc_options import GrpcOptions


@command(ServeConfig, GrpcOptions, RayAccess, settings=True)
def config(deployment: ServeConfig, door: GrpcOptions, ray_access: RayAccess, sources: dict[str, str]) -> None:
    """Print the options of `pregate serve` as a file for --config, each with where its value comes from.

    Flags come first, then variables PREGATE_..., then the file, then defaults. Secrets are files; only paths are shown.
    """
    for given in (deployment, door, ray_access):
        values = to_dict(given)
        for key, option in user_options(type(given)).items():
            value = values
            for name in option.path:
                value = value[name]
            line = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10_000).strip()
            print(f"{line}  # {sources.get(key, 'default')}")
