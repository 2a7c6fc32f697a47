"""What a deployment may leave behind, and a `pregate serve` of one's own to leave it."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 240.0


def own_environment(folder):
    """Every process of the run carries TEST_MARK_OF_PREGATE; its temporary files go to `folder`."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PREGATE_CHAOS_")}
    return {
        **mine,  # without what is no setting of ours
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
        "TEST_MARK_OF_PREGATE": str(folder),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def processes_of(folder):
    """Processes of the run, by the mark in their environment (Ray hands it to all it starts) or by their session.

    (Ray's agents overwrite their environment with their name.)
    """
    marked, sessions, own = set(), {}, os.getsid(0)
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                sessions[process] = os.getsid(process.pid)
                if process.environ().get("TEST_MARK_OF_PREGATE") == str(folder):
                    marked.add(process)
        except (psutil.Error, ProcessLookupError):
            continue
    of_run = {sessions[process] for process in marked} - {own}
    return [process for process, session in sessions.items() if process in marked or session in of_run]


def command_of(process):
    """Its command line; "" when it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def files_in(folder):
    """Everything in the folder but torch's compile cache, which is not ours; may run while it is being removed."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith("torchinductor_")]
        found += [os.path.join(path, name) for name in (*folders, *files)]
    return found


def shared_memory():
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(("plasma", "ray", "pregate"))}


def connections_of(process):
    """Its TCP sockets; none when it has just ended."""
    try:
        return process.net_connections("tcp")
    except psutil.Error:
        return []


def listening_ports(processes):
    return {c.laddr[1] for p in processes for c in connections_of(p) if c.status == psutil.CONN_LISTEN}


def still_listening(ports):
    open_now = {c.laddr[1] for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr}
    return open_now & ports


@dataclass
class Running:
    """A `pregate serve` process, the folder of its run, and what it printed."""

    process: subprocess.Popen
    folder: Path
    log: Path

    @property
    def target(self):
        return next(line.split()[1] for line in self.log.read_text().splitlines() if line.startswith("gRPC"))

    @property
    def ray_address(self):
        return next(line.split()[1] for line in self.log.read_text().splitlines() if line.startswith("Ray"))

    @property
    def kept_logs(self):
        line = next(line for line in self.log.read_text().splitlines() if "the logs are kept in" in line)
        return Path(line.split()[-1])

    def children(self, name):
        return [p for p in processes_of(self.folder) if name in command_of(p)]

    def wait_nothing_left(self, timeout_s):
        """Wait until no process and no file of the run is left; returns what remains."""
        give_up_s = time.monotonic() + timeout_s
        while time.monotonic() < give_up_s:
            left = [command for p in processes_of(self.folder) if (command := command_of(p)[:100])]
            left += [path for path in files_in(self.folder) if path != str(self.log)]
            if not left:
                return []
            time.sleep(0.2)
        return left


@contextlib.contextmanager
def launched(*command):
    """Run a Python command in a folder of its own; kills whatever is left at the end."""
    with tempfile.TemporaryDirectory(prefix="pgt-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        log = folder / "serve.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=file,
                stderr=file,
                env=own_environment(folder),
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            yield Running(process, folder, log)
        finally:
            for left in processes_of(folder):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
                    left.kill()
            process.wait(10)


@contextlib.contextmanager
def started(*command, until):
    """`launched`, as soon as the command says `until`."""
    with launched(*command) as running:
        wait_for(running.log, until, running.process)
        yield running


def serving(*arguments, until="stop  "):
    """Run `pregate serve` on a free port until it says `until`, that it serves."""
    return started("-m", "pregate.cli.main", "serve", "--grpc-port", 0, *arguments, until=until)


def wait_for(log, text, process, timeout_s=START_TIMEOUT_S):
    give_up_s = time.monotonic() + timeout_s
    while text not in log.read_text():
        assert process.poll() is None, f"ended early:\n{log.read_text()}"
        assert time.monotonic() < give_up_s, f"not ready within {timeout_s} s:\n{log.read_text()}"
        time.sleep(0.1)
