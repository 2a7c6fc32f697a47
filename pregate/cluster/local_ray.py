"""A Ray of our own on this machine, held by a keeper process that outlives its launcher.

Ray's processes die with the process that called `ray.init`. A `kill -9` of `pregate serve` must not take Ray away
from under the supervisor, which still has to drain and clean up when the lease lapses. So `python -m
pregate.cluster.local_ray` keeps Ray: in a session of its own (Ctrl-C does not reach it), until no supervisor is
alive, Ray is broken, or its launcher died before a supervisor came up. Then it stops Ray and removes its folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from pregate.base.errors import PregateError, UnavailableError, UserError
from pregate.base.network import takes_connections
from pregate.cluster import run_folder
from pregate.cluster.ray_start import end_processes, init_local, stop_ray

NAMESPACE = "pregate"
SUPERVISOR_PREFIX = "pregate:"
#: Of ours only `push` uses the object store, a little at a time; this is Ray's own need.
OBJECT_STORE_BYTES = 200 * 2**20
#: Above Ray's own limit times `ray_start.ATTEMPTS`.
START_TIMEOUT_S = 120.0
#: Room for the clean-up that comes after a deployment's drain.
STOP_MARGIN_S = 30.0
POLL_S = 0.5
#: A GCS that takes no connection for this long, or this often in a row, is gone.
GCS_CONNECT_TIMEOUT_S = 2.0
TOKEN_WAY_OUT = "set HOME to a folder of yours, or RAY_AUTH_TOKEN_PATH to a file"

#: Serve's proxies ask replicas over gRPC, from their one event loop: of the cores a token takes much less than as a Ray
#: call. Replicas listen for it in any case, and ask for Ray's token.
SERVE_ENVIRONMENT = {"RAY_SERVE_PROXY_USE_GRPC": "1", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
_RAY_ENVIRONMENT = SERVE_ENVIRONMENT | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray's ports are open to the network; only who holds the token gets in
    "RAY_enable_metrics_collection": "0",  # these three ports would ask nobody for a token; the port -1 is not opened
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
    "RAY_worker_niceness": "0",  # at Ray's 15 any other program starves hosts, engine and the renewal of leases
    "RAY_prestart_worker_first_driver": "0",  # one idle Python per logical CPU otherwise
    "RAY_enable_worker_prestart": "0",
}


@dataclass(frozen=True)
class LocalRay:
    """A running keeper as its launcher sees it."""

    address: str
    run_dir: Path
    process: subprocess.Popen[str]

    def let_go(self) -> None:
        """Leave Ray to whoever still has a supervisor on it; without one it ends."""
        _close_stdin(self.process)

    def wait_gone(self, timeout_s: float) -> bool:
        """Let go of the keeper and wait until Ray and its folder are gone; False when that took too long."""
        self.let_go()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kept_logs(self) -> str:
        """Where Ray's logs are now; "" while the keeper runs, or when all went well and they went with it."""
        assert self.process.stdout is not None
        return "" if self.process.poll() is None else self.process.stdout.read().strip()


def prepare_environment() -> None:
    """Set what Ray reads from the environment while it is imported; what the user has set stands."""
    _set_defaults(_RAY_ENVIRONMENT)


def prepare_serve() -> None:
    """Of these, set what Serve's processes read where this process starts Ray."""
    _set_defaults(SERVE_ENVIRONMENT)


def _set_defaults(values: Mapping[str, str]) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)


def start(num_cpus: int, timeout_s: float = START_TIMEOUT_S) -> LocalRay:
    """Start Ray in a keeper process with `num_cpus` logical CPUs. UnavailableError when it does not come up."""
    if "RAY_AUTH_MODE" not in os.environ:
        raise UserError.of("RAY_AUTH_MODE", "unset", "call prepare_environment() before Ray is imported, or set it")
    if os.environ["RAY_AUTH_MODE"] == "token":
        ensure_token()
    command = [sys.executable, "-m", "pregate.cluster.local_ray", str(num_cpus)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_RAY_ENVIRONMENT | os.environ,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            line = _read_line(process.stdout, timeout_s)
        except BaseException:  # Ctrl-C too: the keeper sees its launcher let go and cleans up
            _close_stdin(process)
            raise
        if not line:
            _close_stdin(process)
            errors.seek(0)
            said = errors.read().strip().splitlines()
            reason = said[-1] if said and process.poll() is not None else f"no answer within {timeout_s:.0f} s"
            raise UnavailableError(f"Ray did not start: {reason}")
    started = json.loads(line)
    return LocalRay(started["address"], Path(started["run_dir"]), process)


def token_path() -> Path | None:
    """The file of the user's Ray token; None where the environment holds the token itself.

    UserError for a user without a home folder, as a container's may be.
    """
    if "RAY_AUTH_TOKEN" in os.environ:
        return None
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(given) if given else Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        raise UserError(f"HOME: not set, and user {os.getuid()} has no home folder; {TOKEN_WAY_OUT}") from None


def ensure_token() -> None:
    """Make the user's Ray token where every Ray process of the user looks for it, this one included.

    Ray would make it too, but readable for others. UserError where it cannot be written.
    """
    path = token_path()
    if path is None or path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name) as file:  # mode 0600
            file.write(secrets.token_hex(32))
            file.flush()
            with contextlib.suppress(FileExistsError):  # another process was first; its token stands
                os.link(file.name, path)  # whole at once: who finds the file finds the token in it
    except OSError as error:
        home = os.environ.get("HOME", "")
        raise UserError.of("HOME", home, f"{path} cannot be written ({error.strerror}); {TOKEN_WAY_OUT}") from error


def gcs_answers(address: str) -> bool:
    """Whether Ray's control service (GCS) at HOST:PORT still takes connections."""
    host, _, port = address.rpartition(":")
    return takes_connections(host, int(port), GCS_CONNECT_TIMEOUT_S)


def our_actors() -> list[str]:
    """Names of the actors in our namespace that are not dead."""
    import ray.util

    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if one["namespace"] == NAMESPACE]


def _read_line(stream: IO[str], timeout_s: float) -> str:
    """One line, or "" at the end of the stream or after `timeout_s`."""
    ready, _, _ = select.select([stream], [], [], timeout_s)
    return stream.readline() if ready else ""


def _close_stdin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()


# ---- the keeper process ----


class _StopError(PregateError):
    """The keeper was asked to end (SIGTERM)."""


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise _StopError("SIGTERM")


def keep(num_cpus: int) -> None:
    """Start Ray, tell the launcher where, and hold it until nobody needs it. Runs in the keeper process.

    Prints at the end where the logs are kept, if they are.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_sigterm)
    run_dir, lock = run_folder.make()
    address = ""
    try:
        address = _start_ray(num_cpus, run_dir)
        _keep_ray(address)
    except _StopError:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        broken = bool(address) and not gcs_answers(address)
        if not broken:
            stop_ray()
        end_processes(_session(), grace_s=0)
        kept = run_folder.remove(run_dir)
        lock.close()
        if kept is not None:
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.write(f"{kept}\n")
                sys.stdout.flush()
        if broken:
            os._exit(1)  # at its end Ray would wait for the service that is gone


def _start_ray(num_cpus: int, run_dir: Path) -> str:
    """Start Ray and tell the launcher; returns the address of its control service (GCS)."""
    os.environ[run_folder.RUN_DIR_VARIABLE] = str(run_dir)
    context = init_local(
        run_dir / "ray",
        num_cpus,
        namespace=NAMESPACE,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )
    signal.signal(signal.SIGTERM, _on_sigterm)  # ray.init puts its own in place
    address = context.address_info["gcs_address"]
    sys.stdout.write(json.dumps({"address": address, "run_dir": str(run_dir)}) + "\n")
    sys.stdout.flush()
    return address


def _keep_ray(address: str) -> None:
    """Return when nobody needs Ray any more, or its GCS is gone, which may be while it is asked: Ray waits then."""
    seen, asking = False, ThreadPoolExecutor(1)
    while True:
        alive = asking.submit(_supervisor_alive)
        while not alive.done():
            if not gcs_answers(address):
                return
            wait([alive], POLL_S)
        if not alive.result() and (seen or _launcher_gone()):
            return
        seen = seen or alive.result()
        time.sleep(POLL_S)


def _session() -> list[psutil.Process]:
    """Every process of this session but this one: all of Ray, those whose parent died included."""
    assert os.getsid(0) == os.getpid()  # see `start`
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == os.getpid() != process.pid:
                found.append(process)
    return found


def _supervisor_alive() -> bool:
    return any(name.startswith(SUPERVISOR_PREFIX) for name in our_actors())


def _launcher_gone() -> bool:
    """Whether the launcher closed our standard input, by letting go or by dying."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready)


if __name__ == "__main__":
    keep(int(sys.argv[1]))
