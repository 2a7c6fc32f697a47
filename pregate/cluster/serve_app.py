"""The HTTP front door as a Ray Serve application.

    serve run pregate.cluster.serve_app:build_app model=DIR hosts=2

Each replica holds a lease of the deployment `pregate serve` would start under the same name, and so shares the hosts
and the engine with it. Replicas hold no weights; they run on the engine's node.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
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
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from pregate.base import log
from pregate.base.errors import PregateError, QueueFullError, UnavailableError, UserError
from pregate.base.network import is_loopback
from pregate.base.options import of_keys, options, shown
from pregate.base.telemetry import flush
from pregate.cluster import local_ray, preflight, ray_metrics, room
from pregate.cluster.config import ServeConfig
from pregate.cluster.joining import here
from pregate.cluster.launch import Deployment, launch
from pregate.cluster.ray_start import stop_ray
from pregate.cluster.serve_grpc import GrpcMethods
from pregate.router.doors import openai_app
from pregate.router.doors.access import TokenFile
from pregate.router.doors.connect import connect_service
from pregate.router.doors.grpc_calls import Calls
from pregate.router.link.endpoint import ipc_file

logger = log.get_logger(__name__)


_Limit = Annotated[int, Field(ge=1)]
_OptionalLimit = Annotated[int | None, Field(ge=1)]
#: Requests that a replica has in flight before Serve adds another, where it may.
_TARGET_ONGOING = 64
#: Requests are answered in the replica's own event loop: a token more would go from thread to thread, and nothing of
#: ours holds a loop up.
_ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}


@options()
class AppOptions:
    """What `key=value` arguments may say: the deployment as for `pregate serve`, and Serve's own limits.

    Serve's defaults (5 ongoing, an unbounded queue, no deadline) do not suit a language model. With `max_replicas`
    Serve chooses how many replicas there are, by `target_ongoing_requests` for each. `token_file`: as for `pregate
    serve`, read by every replica; without one Serve must listen on loopback. Replicas run on the engine's node, so that
    Serve must know which: `engine_node` is an address.
    """

    deployment: ServeConfig
    num_replicas: _Limit = 1
    min_replicas: _OptionalLimit = None
    max_replicas: _OptionalLimit = None
    target_ongoing_requests: Annotated[float | None, Field(gt=0)] = None
    max_ongoing_requests: _Limit = 256
    max_queued_requests: _Limit = 256
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    token_file: Path | None = None

    def __post_init__(self) -> None:
        engine_node = self.deployment.engine_node
        if engine_node is not None and not room.is_address(engine_node):
            raise UserError.of("engine_node", engine_node, "allowed with Serve: a node's address")
        if self.max_replicas is None:
            for name in ("min_replicas", "target_ongoing_requests"):
                if getattr(self, name) is not None:
                    raise UserError.of(name, getattr(self, name), "needs max_replicas beside it")
        elif self.num_replicas != 1:
            raise UserError.of("num_replicas", self.num_replicas, "give it or max_replicas, not both")
        elif (self.min_replicas or 1) > self.max_replicas:
            raise UserError.of("min_replicas", self.min_replicas, f"with max_replicas {self.max_replicas} too large")

    @property
    def scale(self) -> dict[str, Any]:
        """How many replicas there are, in Serve's words."""
        if self.max_replicas is None:
            return {"num_replicas": self.num_replicas}
        target = self.target_ongoing_requests or _TARGET_ONGOING
        scaling = {"min_replicas": self.min_replicas or 1, "max_replicas": self.max_replicas}
        return {"autoscaling_config": {**scaling, "target_ongoing_requests": target}}


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
        door = {
            "token_file": asked.token_file and str(asked.token_file.resolve()),
            "timeout_s": asked.request_timeout_s,
        }
        _open_tokens(door["token_file"])
    except PregateError as error:
        if not on_command_line:
            raise
        raise _Refusal(str(error)) from error
    if on_command_line:
        click.echo(_how_to_try(asked.token_file), err=True)
        if not ray.is_initialized():
            local_ray.prepare_serve()
            _leave_nothing_behind()
    # With a replica more before one less a changed configuration drops no lease of the deployment, and no request.
    wished = {
        "max_surge_percent": 100,
        "backpressure_config": {"status_code": 429, "retry_after_s": QueueFullError.retry_after_s},
    }
    beside = {} if config.engine_node is None else room.pin_of(config.engine_node)
    known = inspect.signature(serve.deployment).parameters  # older Serves have not both
    deployment = serve.deployment(
        _replica_class(),
        name="pregate",
        max_ongoing_requests=asked.max_ongoing_requests,
        max_queued_requests=asked.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_s + 10,
        ray_actor_options={"num_cpus": 0.1, "resources": beside, "runtime_env": {"env_vars": _ONE_LOOP}},
        **asked.scale,
        **{name: value for name, value in wished.items() if name in known},
    )
    return deployment.bind(config.to_dict(), door)


def _open_tokens(token_file: str | None) -> TokenFile | None:
    """The tokens to ask for. UserError for a bad file, and for none where Serve, if it runs, listens to others."""
    if token_file is not None:
        return TokenFile(Path(token_file))
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    host = client.http_config.host if client is not None else None
    if host and not is_loopback(host):
        raise UserError(f"token_file: missing; Serve's HTTP host is {host}; without a file allowed: 127.0.0.1")
    return None


def _how_to_try(token_file: Path | None) -> str:
    """Where it will answer, and a command that asks it, with a token where it wants one."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    http = HTTPOptions() if client is None else client.http_config
    asks = "" if token_file is None else f" -H \"Authorization: Bearer $(grep -m1 '^[^#]' {token_file})\""
    url, body = f"http://{http.host}:{http.port}", '{"prompt": "Once upon a time", "max_tokens": 32}'
    json = "-H 'Content-Type: application/json'"
    return f"  answers at {url}/ when the model is loaded\n  try  curl {url}/v1/completions{asks} {json} -d '{body}'"


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


class Replica(GrpcMethods):
    """Joins or launches the deployment and answers HTTP from it, and what Serve's gRPC proxy passes on."""

    app: Any = None

    async def __init__(
        self, config_values: Mapping[str, Any], door: Mapping[str, Any], mount: Callable[[Any], None]
    ) -> None:
        config = ServeConfig.from_dict(config_values)
        config.telemetry.begin("http door")
        tokens = await asyncio.to_thread(_open_tokens, door["token_file"])
        self._deployment: Deployment = await asyncio.to_thread(launch, config, None, logger.info)
        endpoints = self._deployment.info["endpoints"]
        file = ipc_file(endpoints[0])
        if file is not None and not file.exists():
            self._deployment.release()
            raise UnavailableError(f"a replica must run on the engine's node, {self._deployment.info['node_ip']}")
        paths = self._deployment.info["paths"]
        self._service = connect_service(endpoints, paths and paths["endpoint"], config.text_path, config.model_name)
        if await asyncio.to_thread(ray_metrics.exports):
            self._service.metrics.recorders.append(ray_metrics.RayRecorder(config.model_name))
        await self._service.model_info()  # the engine answers before Serve calls this replica ready
        node, logs = here()
        self.serve_grpc(Calls(self._service, shown(config), logs, node), tokens, door["timeout_s"])
        mount(openai_app.build_app(self._service, tokens=tokens, timeout_s=door["timeout_s"]))

    def check_health(self) -> None:
        """Serve restarts a replica whose deployment or engine is gone; a new one joins or launches it again."""
        reason = self._deployment.lost or self._service.unavailable
        if reason is not None:
            raise UnavailableError(reason)

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            await self._service.close()
            await asyncio.to_thread(self._deployment.release)
            await asyncio.to_thread(flush)


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
        async def __init__(self, config_values: Mapping[str, Any], door: Mapping[str, Any]) -> None:
            await super().__init__(config_values, door, mount.set)

    return serve.ingress(asgi)(PregateReplica)
