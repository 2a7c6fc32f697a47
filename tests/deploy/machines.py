"""Several machines on this one: namespaces of their own (processes, network, mounts, host name), joined by a bridge.

Each has an address, an ssh server, an empty home, an empty /tmp and an empty /dev/shm; the rest of the disk is shared.
So `ray up`, `ray stop` and whatever else finds processes and ports sees one machine's, as it would on real ones.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_TOOLS = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
#: Mounted empty on every machine, what is kept of them beneath. (`~` is what the password database says.)
_OWN = ("/tmp", "/dev/shm", "/run", str(Path(os.path.expanduser("~root"))))
_SSHD = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
AcceptEnv *
"""
_BOOT = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
n=0; for p in {kept}; do n=$((n + 1)); if [ -d $p ]; then mkdir /mnt/$n; else touch /mnt/$n; fi
  mount --bind $p /mnt/$n; done
for p in {own}; do mount -t tmpfs -o mode=1777 tmpfs $p; done
n=0; for p in {kept}; do n=$((n + 1)); if [ -d /mnt/$n ]; then mkdir -p $p; else mkdir -p $(dirname $p); touch $p; fi
  mount --bind /mnt/$n $p; done
hostname {name}; mkdir -p /run/sshd; chmod 700 {home}
while ! ip link show {link} >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up; ip addr add {address}/24 dev {link}; ip link set {link} up
ip route add default via {gateway}
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""


@dataclass(frozen=True)
class Machine:
    """One of them; `pid` is that of its first process as this machine knows it."""

    name: str
    address: str
    pid: int
    folder: Path

    def run(self, command: str, timeout_s: float = 300, check: bool = True, **environment: str):
        """Run a bash command there and return what it printed, both streams together."""
        done = subprocess.run(
            self.command(command), capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT,
            env=self.environment(**environment),
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.name}: {command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def start(self, command: str) -> "Started":
        """Start a bash command there; it ends with the machine."""
        log = self.folder / f"{self.name}-{time.monotonic_ns()}.out"
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command(command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT,
                env=self.environment(),
            )  # fmt: skip
        return Started(process, log)

    def command(self, command: str) -> list[str]:
        return ["nsenter", "--all", "--target", str(self.pid), "--", "bash", "-c", f"cd {ROOT}; {command}"]

    def environment(self, **more: str) -> dict[str, str]:
        dropped = ("RAY_", "PYTEST", "TMPDIR", "XDG_", "PREGATE_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        home = os.path.expanduser("~root")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept["RAY_AUTH_MODE"] = "token"
        return kept | {"HOME": home, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


@dataclass(frozen=True)
class Started:
    """A command that runs on a machine."""

    process: subprocess.Popen
    log: Path

    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text()


def need_machines() -> None:
    """Skip where this machine cannot play several: not root, no namespaces, no ssh server, no rsync."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "ip", "link"], capture_output=True, check=False)
    if tried.returncode or os.geteuid():
        pytest.skip("no namespaces of processes and networks to be had")


@contextmanager
def machines(*names: str, network: int = 0):
    """Yield a Machine for each name; with the end of the block every process on them ends."""
    link = f"pg{os.getpid() % 10**6}"
    subnet = f"10.{200 + network}.{os.getpid() % 250}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgm-", dir="/var/tmp")))
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
        _run("ip", "link", "add", link, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", link)
        _run("ip", "addr", "add", f"{subnet}.254/24", "dev", link)
        _run("ip", "link", "set", link, "up")
        started = [
            stack.enter_context(_machine(name, f"{subnet}.{number}", f"{link}n{number}", link, folder))
            for number, name in enumerate(names, 1)
        ]
        yield started


@contextmanager
def _machine(name, address, inner, bridge, folder):
    own = _OWN
    paths = {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    kept = " ".join(sorted(str(p) for p in paths if str(p).startswith(own)))
    script = _BOOT.format(
        kept=kept,
        own=" ".join(own),
        name=name,
        home=own[-1],
        link=inner,
        address=address,
        folder=folder,
        gateway=address.rpartition(".")[0] + ".254",
    )
    log = (folder / f"{name}.log").open("w")
    process = subprocess.Popen(
        ["unshare", "--pid", "--mount", "--net", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child=SIGKILL",
         "bash", "-c", script], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        pid = _wait(lambda: _child_of(process.pid), f"the first process of {name}")
        _run("ip", "link", "add", inner, "type", "veth", "peer", "name", f"{inner}o")
        _run("ip", "link", "set", f"{inner}o", "master", bridge, "up")
        _run("ip", "link", "set", inner, "netns", pid)
        _wait(lambda: "Server listening" in (folder / f"{name}.log").read_text(), f"the ssh server of {name}")
        yield Machine(name, address, pid, folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        log.close()


def _child_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(text[0]) if text else 0


def _wait(question, what: str):
    give_up_s = time.monotonic() + 20
    while not (answer := question()):
        assert time.monotonic() < give_up_s, f"{what} did not come"
        time.sleep(0.05)
    return answer


def _run(*command) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
