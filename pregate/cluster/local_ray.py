"""A Ray of our own on this machine, held by a keeper process that outlives its launcher.

Ray's processes die with the process that called `ray.init`. A `kill -9` of `pregate serve` must not take Ray away
from under the supervisor, which still has to drain and clean up when the lease lapses. So `python -m
pregate.cluster.local_ray` keeps Ray: in a session of its own (Ctrl-C does not reach it), until no supervisor is
alive, or its launcher died before one came up. Then it stops Ray and removes its folder.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pregate.base.errors import PregateError, UnavailableError, UserError
from pregate.cluster.ray_start import init_local, stop_ray

NAMESPACE = "pregate"
SUPERVISOR_PREFIX = "pregate:"
#: Set for every process of a kept Ray: the folder that the keeper removes at the end.
RUN_DIR_VARIABLE = "PREGATE_RUN_DIR"
#: Nothing of ours travels through the object store; this is Ray's own need.
OBJECT_STORE_BYTES = 200 * 2**20
#: Above Ray's own limit times `ray_start.ATTEMPTS`.
START_TIMEOUT_S = 120.0
#: Ray's sockets lie in the folder and a Unix socket path holds at most 107 bytes; Ray appends about 75.
MAX_FOLDER_BYTES = 30
POLL_S = 0.5
_FOLDER_PREFIX = "pregate-"

_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray's ports are open to the network; only who holds the token gets in
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


def prepare_environment() -> None:
    """Set what Ray reads from the environment while it is imported; what the user has set stands."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start(num_cpus: int, timeout_s: float = START_TIMEOUT_S) -> LocalRay:
    """Start Ray in a keeper process with `num_cpus` logical CPUs. UnavailableError when it does not come up."""
    if "RAY_AUTH_MODE" not in os.environ:
        raise UserError.of("RAY_AUTH_MODE", "unset", "call prepare_environment() before Ray is imported, or set it")
    if os.environ["RAY_AUTH_MODE"] == "token":
        _ensure_token()
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


def _ensure_token() -> None:
    """Make the user's Ray token where every Ray process of the user looks for it, this one included.

    Ray would make it too, but readable for others.
    """
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))


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
    """Start Ray, tell the launcher where, and hold it until nobody needs it. Runs in the keeper process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_sigterm)
    sweep_abandoned()
    run_dir = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=_short_folder()))
    lock = _lock(run_dir)
    try:
        _keep_ray(num_cpus, run_dir)
    except _StopError:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop_ray()
        shutil.rmtree(run_dir, ignore_errors=True)
        lock.close()


def _keep_ray(num_cpus: int, run_dir: Path) -> None:
    os.environ[RUN_DIR_VARIABLE] = str(run_dir)
    context = init_local(
        run_dir / "ray",
        num_cpus,
        namespace=NAMESPACE,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )
    signal.signal(signal.SIGTERM, _on_sigterm)  # ray.init puts its own in place
    sys.stdout.write(json.dumps({"address": context.address_info["gcs_address"], "run_dir": str(run_dir)}) + "\n")
    sys.stdout.flush()
    seen = False
    while True:
        alive = _supervisor_alive()
        if not alive and (seen or _launcher_gone()):
            return
        seen = seen or alive
        time.sleep(POLL_S)


def _supervisor_alive() -> bool:
    import ray.util

    named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return any(a["namespace"] == NAMESPACE and a["name"].startswith(SUPERVISOR_PREFIX) for a in named)


def _launcher_gone() -> bool:
    """Whether the launcher closed our standard input, by letting go or by dying."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready)


# ---- folders ----


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= MAX_FOLDER_BYTES else "/tmp"


def _lock(run_dir: Path) -> IO[str]:
    """Mark the folder as in use for as long as this process lives."""
    waiting = run_dir / "lock.new"
    file = waiting.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    waiting.rename(run_dir / "lock")  # a lock file without a lock is never to be seen: see sweep_abandoned
    return file


def sweep_abandoned() -> None:
    """Remove folders of keepers that were killed before they could do so themselves."""
    for lock_path in Path(_short_folder()).glob(f"{_FOLDER_PREFIX}*/lock"):
        try:
            _remove_if_abandoned(lock_path)
        except (BlockingIOError, FileNotFoundError):
            continue  # in use; or another keeper was quicker


def _remove_if_abandoned(lock_path: Path) -> None:
    if lock_path.stat().st_uid != os.getuid():
        return
    with lock_path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock_path.parent, ignore_errors=True)


if __name__ == "__main__":
    keep(int(sys.argv[1]))
