"""Get a deployment and hold it: the one composition behind `pregate serve` and the Serve application."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pregate.base.errors import UnavailableError
from pregate.base.log import get_logger
from pregate.base.network import is_loopback
from pregate.base.options import to_dict
from pregate.cluster import local_ray
from pregate.cluster.calls import CALL_TIMEOUT_S, RayLostError, SilentError, call, error_of, get
from pregate.cluster.children import RayChildren
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.cluster.doors import address_of
from pregate.cluster.joining import connect, logs_folder
from pregate.cluster.leases import RENEW_EVERY_S
from pregate.cluster.local_ray import NAMESPACE, STOP_MARGIN_S, SUPERVISOR_PREFIX, LocalRay
from pregate.cluster.stage import SAY_EVERY_S
from pregate.cluster.stage import stage as long_stage
from pregate.cluster.supervisor import Supervisor
from pregate.router.doors.grpc_options import GrpcOptions

POLL_S = 0.2
#: Ray's control service (GCS) may take no connection for this long before Ray is given up: on one machine nothing
#: starts it again, in a cluster something may, and Ray itself waits for 60 s.
GCS_PATIENCE_S, CLUSTER_GCS_PATIENCE_S = 3.0, 45.0

logger = get_logger(__name__)


class Deployment:
    """A deployment this process holds a lease of. `info` is what `Children.start` returned."""

    def __init__(
        self, config: ServeConfig, supervisor: Any, launcher_id: str, ray_address: str, kept: LocalRay | None
    ) -> None:
        self.config = config
        self.ray_address = ray_address
        self.info: dict[str, Any] = {}
        self.lost: str | None = None  # why the deployment is no more
        self.ray_lost = False  # no call to Ray returns any more
        self.notes: list[tuple[int, str]] = []  # numbered sentences of what happened lately
        self.num_launchers = 1  # who holds leases, this process included
        self._supervisor = supervisor
        self._launcher_id = launcher_id
        self._kept = kept
        self._closing = threading.Event()
        self._closed = False
        self._gcs_silent_since_s: float | None = None
        self._renewal = threading.Thread(target=self._renew, name="pregate-lease", daemon=True)

    def wait_ready(self, on_stage: Callable[[str], None]) -> None:
        """Wait for the start to end, telling its stages. Raises what it failed with, or UnavailableError in time.

        RayLostError as soon as Ray is lost.
        """
        self._renewal.start()
        started_s = time.monotonic()
        stage, told_s = "", started_s
        while time.monotonic() < started_s + self.config.start_timeout_s:
            status, now_s = self._status(), time.monotonic()
            if status["stage"] != stage:
                stage, told_s = status["stage"], now_s
                on_stage(stage)
            elif now_s - told_s > SAY_EVERY_S:
                told_s = now_s
                on_stage(f"{stage} (after {now_s - started_s:.0f} s)")
            if status["failure"] is not None:
                raise error_of(status["failure"])
            if status["state"] == "ready":
                self.info = status["info"]
                return
            time.sleep(POLL_S)
        raise UnavailableError(f"not ready within {self.config.start_timeout_s:.0f} s; it was at: {stage}")

    def _status(self) -> dict[str, Any]:
        """Of the supervisor. The wait for it ends with Ray's loss, of which Ray itself says nothing for a minute."""
        give_up_s, reference = time.monotonic() + CALL_TIMEOUT_S, self._supervisor.status.remote()
        while True:
            try:
                return get(reference, POLL_S)
            except SilentError as error:
                if self.look() is not None and self.ray_lost:
                    raise RayLostError(self.lost) from None
                if time.monotonic() > give_up_s:
                    raise
                if not isinstance(
                    error.__cause__, ray.exceptions.GetTimeoutError
                ):  # answered, but not by the supervisor
                    time.sleep(POLL_S)
                    reference = self._supervisor.status.remote()

    def look(self) -> str | None:
        """Why the deployment is no more, or None. Returns at once, whatever has become of Ray."""
        now_s = time.monotonic()
        if local_ray.gcs_answers(self.ray_address):
            self._gcs_silent_since_s = None
            return self.lost
        since_s = self._gcs_silent_since_s = self._gcs_silent_since_s or now_s
        alone = is_loopback(self.ray_address.rpartition(":")[0]) or self._kept is not None
        if now_s - since_s > (GCS_PATIENCE_S if alone else CLUSTER_GCS_PATIENCE_S):
            self.ray_lost = True
            self.lost = f"Ray is lost: its control service at {self.ray_address} takes no connection"
        return self.lost

    def add_door(self, options: GrpcOptions) -> tuple[str, int]:
        """Start a gRPC front door that lives as long as this lease; returns its interface and port: of one that is
        elsewhere, on all interfaces, its node's address."""
        arguments = (self._launcher_id, to_dict(_with_absolute_paths(options)))
        reply = call(self._supervisor, "add_door", *arguments, timeout_s=self.config.start_timeout_s)
        elsewhere = self.config.engine_node is not None
        if failure := reply.get("failure"):
            where = f" (on node {self.info['node_ip']})" if elsewhere else ""
            raise error_of({**failure, "message": failure["message"] + where})
        return address_of(reply) if elsewhere else reply["host"], reply["port"]

    def release(self) -> None:
        """Give the lease back, without waiting for what follows from it. Repeating it is harmless."""
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            self._call("release", self._launcher_id)
        except UnavailableError as error:
            logger.info("nothing to release: %s", error)

    def close(self) -> bool:
        """Give the lease back and wait for what hangs on it to end; with the last lease that is everything.

        Returns False when the clean-up was not seen to end in time. Repeating it is harmless.
        """
        if self._closed:
            return True
        self._closed = True
        if self.ray_lost:  # the keeper saw it too, and ends what is left
            return self._kept is None or self._kept.wait_gone(STOP_MARGIN_S)
        give_up_s = time.monotonic() + self.config.drain_s + STOP_MARGIN_S
        self.release()
        gone = self._wait_let_go(give_up_s)
        if self._renewal.is_alive():
            self._renewal.join(CALL_TIMEOUT_S)
        if self._kept is None:
            return gone is not None
        ray.shutdown()
        if gone is False:  # another launcher goes on with the deployment, and so the keeper with Ray
            self._kept.let_go()
            return True
        return self._kept.wait_gone(max(1.0, give_up_s - time.monotonic())) and gone is not None

    def kept_logs(self) -> str:
        """After `close`: the folder in which Ray's logs are kept, or "" where they are not, or not ours to keep."""
        return "" if self._kept is None else self._kept.kept_logs()

    def _wait_let_go(self, give_up_s: float) -> bool | None:
        """True: the supervisor is gone. False: it goes on, without anything of ours. None: not seen in time."""
        try:
            while time.monotonic() < give_up_s:
                if not self._call("holds", self._launcher_id):
                    return False
                time.sleep(POLL_S)
        except SilentError:
            return None
        except UnavailableError:
            return True
        return None

    def _renew(self) -> None:
        while not self._closing.wait(RENEW_EVERY_S):
            try:
                status = self._call("renew", self._launcher_id)
            except SilentError as error:
                logger.warning("%s; trying again", error)
                continue
            except UnavailableError as error:
                self.lost = self.lost or str(error)
                return
            self.notes, self.num_launchers = status["notes"], len(status["launchers"])
            if status["failure"] is not None:
                self.lost = status["failure"]["message"]
            if not status["leased"]:
                self.lost = self.lost or "the lease lapsed: this process was stopped or starved for too long"
                return

    def _call(self, method: str, *arguments: Any) -> Any:
        return call(self._supervisor, method, *arguments)


def launch(
    config: ServeConfig,
    ray_access: RayAccess | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Deployment:
    """Start the deployment `config` describes, or join the one that runs under its name, and wait until it is ready.

    `on_stage` hears readable progress. A launch that fails leaves nothing behind. Raises UserError (a join with other
    options, a model that cannot be served) and UnavailableError (Ray, or a part, does not come up).
    """
    kept = connect(config, ray_access or RayAccess(), on_stage)
    where = "" if config.engine_node is None else " on their nodes"
    on_stage(f"engine, hosts and doors log to {logs_folder()}/worker-*.err{where}")
    try:
        with long_stage(on_stage, "starting the supervisor"):
            deployment = _join(config, kept)
    except BaseException:
        if kept is not None:
            ray.shutdown()
            kept.wait_gone(STOP_MARGIN_S)
        raise
    try:
        deployment.wait_ready(on_stage)
    except BaseException:  # Ctrl-C too
        deployment.close()
        if logs := deployment.kept_logs():
            on_stage(f"the logs are kept in {logs}")
        raise
    return deployment


def _with_absolute_paths(options: GrpcOptions) -> GrpcOptions:
    """A door's files by paths that lead to them from the folder its process is in, too."""
    files = {
        name: path.expanduser().absolute() for name, path in vars(options.access).items() if isinstance(path, Path)
    }
    return replace(options, access=replace(options.access, **files))


def _join(config: ServeConfig, kept: LocalRay | None) -> Deployment:
    """Get or create the supervisor and take a lease; waits for one that is stopping to be gone."""
    launcher_id = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    give_up_s = time.monotonic() + config.drain_s + STOP_MARGIN_S
    while True:
        supervisor = _get_or_create(config.name)
        try:
            arguments = (launcher_id, config.to_dict())
            reply = call(supervisor, "launch", *arguments, timeout_s=config.start_timeout_s)
            if reply["state"] != "refused":
                return Deployment(config, supervisor, launcher_id, ray.get_runtime_context().gcs_address, kept)
            error = error_of(reply["failure"])
        except UnavailableError as gone:
            error = gone
        except BaseException:  # Ctrl-C: the call may have been heard
            supervisor.release.remote(launcher_id)
            raise
        if not isinstance(error, UnavailableError) or time.monotonic() > give_up_s:
            raise error
        time.sleep(POLL_S)


def _get_or_create(name: str) -> Any:
    """The supervisor actor, on this node: what it knows is kept in a folder here, and so, unless `engine_node` says
    otherwise, are the sockets of engines and doors beside it.

    Ray makes it anew when its process dies, and repeats the calls that it had not answered: each bears that.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Supervisor).options(
        name=SUPERVISOR_PREFIX + name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    )
    return actor.remote(name, RayChildren, uuid.uuid4().hex[:12])
