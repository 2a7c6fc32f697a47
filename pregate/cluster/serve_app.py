"""The HTTP front door as a Ray Serve application.

    serve run pregate.cluster.serve_app:build_app model=DIR hosts=2

Each replica holds a lease of the deployment `pregate serve` would start under the same name, and so shares the hosts
and the engine with it. Replicas hold no weights; they run on the engine's node.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import click
import ray
import ray._private.worker
from pydantic import Field
from ray import serve

from pregate.base import log
from pregate.base.errors import PregateError, UnavailableError
from pregate.base.options import of_keys, options
from pregate.cluster import preflight
from pregate.cluster.config import ServeConfig
from pregate.cluster.launch import Deployment, launch
from pregate.cluster.ray_start import stop_ray
from pregate.router.doors import openai_app
from pregate.router.doors.service import connect_service
from pregate.router.link.endpoint import ipc_file

logger = log.get_logger(__name__)


_Limit = Annotated[int, Field(ge=1)]


@options()
class AppOptions:
    """What `key=value` arguments may say: the deployment as for `pregate serve`, and Serve's own limits.

    Serve's defaults (5 ongoing, an unbounded queue) do not suit a language model.
    """

    deployment: ServeConfig
    num_replicas: _Limit = 1
    max_ongoing_requests: _Limit = 256
    max_queued_requests: _Limit = 256


class _Refusal(click.ClickException):
    """A UserError as Serve's command line prints it."""

    exit_code = 2


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """Build the application from `serve run`'s arguments (text) or a config file's `args`.

    Raises UserError for an unknown key, a bad value, or a model that cannot be served; on Serve's command line that
    ends in one sentence and exit code 2.
    """
    on_command_line = click.get_current_context(silent=True) is not None
    try:
        asked = of_keys(AppOptions, args)
        config = asked.deployment
        preflight.check_config(config)
    except PregateError as error:
        if not on_command_line:
            raise
        raise _Refusal(str(error)) from error
    if on_command_line and not ray.is_initialized():
        _leave_nothing_behind()
    deployment = serve.deployment(
        _replica_class(),
        name="pregate",
        num_replicas=asked.num_replicas,
        max_ongoing_requests=asked.max_ongoing_requests,
        max_queued_requests=asked.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_s + 10,
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment.bind(config.to_dict())


def _leave_nothing_behind() -> None:
    """Should `serve run` start Ray in this process: at exit remove its session folder, and what its dashboard leaves.

    (Of the dashboard's subprocesses an empty folder stays in the temporary folder, which here is one of our own.)
    """
    os.environ.setdefault("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))  # the session is where others look for it
    folder = tempfile.mkdtemp(prefix="pregate-serve-")
    os.environ["TMPDIR"] = folder
    atexit.register(_clean_up, folder)


def _clean_up(folder: str) -> None:
    node = ray._private.worker._global_node
    if node is not None and node.is_head():  # else it is another's Ray, or none
        session = Path(node.get_session_dir_path())
        stop_ray()
        shutil.rmtree(session, ignore_errors=True)
        latest = session.with_name("session_latest")
        if latest.is_symlink() and not latest.exists():
            latest.unlink()
        if not any(session.parent.glob("session_*")):  # no other Ray is, or was, here
            (session.parent / "prom_metrics_service_discovery.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                session.parent.rmdir()
    shutil.rmtree(folder, ignore_errors=True)


class Replica:
    """Joins or launches the deployment and answers HTTP from it."""

    app: Any = None

    async def __init__(self, config_values: Mapping[str, Any], mount: Callable[[Any], None]) -> None:
        log.configure("http door")
        config = ServeConfig.from_dict(config_values)
        self._deployment: Deployment = await asyncio.to_thread(launch, config, None, logger.info)
        endpoint = self._deployment.info["endpoint"]
        file = ipc_file(endpoint)
        if file is not None and not file.exists():
            self._deployment.release()
            raise UnavailableError(f"a replica must run on the engine's node, {self._deployment.info['node_ip']}")
        paths = self._deployment.info["paths"]
        self._service = connect_service(endpoint, paths and paths["endpoint"], config.text_path, config.model_name)
        await self._service.model_info()  # the engine answers before Serve calls this replica ready
        mount(openai_app.build_app(self._service))

    def check_health(self) -> None:
        """Serve restarts a replica whose deployment or engine is gone; a new one joins or launches it again."""
        reason = self._deployment.lost or self._service.unavailable
        if reason is not None:
            raise UnavailableError(reason)

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            await self._service.close()
            await asyncio.to_thread(self._deployment.release)


class _Mount:
    """An ASGI application that is filled in when the replica has launched its deployment."""

    def __init__(self) -> None:
        self.app: Any = None

    def set(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def _replica_class() -> type:
    """Replica as Serve wants it. Serve builds the ASGI application after the constructor, from a function."""
    mount = _Mount()

    def asgi() -> _Mount:
        return mount

    class PregateReplica(Replica):
        async def __init__(self, config_values: Mapping[str, Any]) -> None:
            await super().__init__(config_values, mount.set)

    return serve.ingress(asgi)(PregateReplica)
