"""`pregate push`: a checkpoint on every node of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from pregate.base.errors import PregateError, UserError
from pregate.base.options import Adapter, ModelOrAdapter, Needs, Word, check_adapter, follow_adapter, options
from pregate.cli.flags import command
from pregate.cluster.config import RayAccess


@options()
class PushOptions:
    """What is copied, and where to."""

    model: ModelOrAdapter
    to: Annotated[
        Path | None,
        Field(description="Folder on the nodes to put it in, under its own name; '~/...' is below each node's home."),
        Word("the path it has here", written=False),
    ] = None
    adapter: Adapter = None
    parent: Annotated[
        Path | None, Field(description="The dense model of --adapter, which is copied too."), Needs("model")
    ] = None

    follow = staticmethod(follow_adapter)

    def __post_init__(self) -> None:
        check_adapter(self.model, self.adapter, self.parent)
        if self.parent is not None and self.adapter is None:
            raise UserError.of("--parent", self.parent, "needs --adapter")

    @property
    def folders(self) -> list[Path]:
        """What is copied, by the paths that `pregate serve` has for it."""
        return [path.expanduser().resolve() for path in (self.model, self.parent) if path is not None]

    @property
    def target(self) -> Path | None:
        """`to`, where it is no node's home as on this one."""
        return self.to if self.to is None or self.to.parts[:1] == ("~",) else self.to.absolute()


@command(PushOptions, RayAccess)
def push(options: PushOptions, ray_access: RayAccess) -> None:
    """Copy a checkpoint to all nodes of a Ray cluster and check each file's sha256 there; who has it is left alone."""
    from pregate.cluster import joining, local_ray
    from pregate.cluster.push import push as run

    local_ray.prepare_environment()
    joining.join(ray_access)
    nodes = run(options.folders, options.target, lambda what: typer.echo(what, err=True))
    for node in nodes:
        typer.echo(node)
    if failed := [node for node in nodes if node.failure]:
        reasons = "; ".join(f"{node.name}: {node.failure}" for node in failed)
        raise PregateError(f"{len(failed)} of {len(nodes)} nodes have no whole copy: {reasons}")
