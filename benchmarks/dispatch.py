"""What one trip to the expert hosts costs: echo of 16 rows x 2048 fp32 to 1, 2 and 4 hosts, beside Ray actor calls.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --grpc-target 127.0.0.1:50051 --grpc-clients 32 --out benchmarks/results/dispatch.json

The hosts are real Ray actors, `ExpertHostActor` without experts. Columns: the channel (checksums, identities,
heartbeats and all), a Ray actor call with the same array in and out, and a bare socket echo of the same bytes (the
bound a channel over these sockets is near). All are interleaved in one run. With `--grpc-target` the run alternates
between an idle phase and one in which that many clients stream from a running `pregate serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
import zmq

from benchmarks.echo import EchoActor
from benchmarks.surroundings import command_of
from pregate.cluster.ray_start import init_local
from pregate.convert.report.conditions import processor
from pregate.workers.client.channel import ChannelClient
from pregate.workers.host.actor import ActorOptions
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import GroupKey

ANSWER_TIMEOUT_S = 30.0
WARM_UP_CALLS = 30
Trip = Callable[[], None]


class RayEcho:
    """An actor that returns the array it is called with."""

    def echo(self, rows: np.ndarray) -> np.ndarray:
        return rows


class BareEcho:
    """A ROUTER socket that returns what it gets: no checks, no second thread."""

    def start(self, endpoint: str) -> None:
        threading.Thread(target=self._run, args=(endpoint,), daemon=True).start()

    def _run(self, endpoint: str) -> None:
        socket = zmq.Context().socket(zmq.ROUTER)
        socket.bind(endpoint)
        while True:
            socket.send_multipart(socket.recv_multipart())


class Stage:
    """The actors and the clients of all measurements."""

    def __init__(self, folder: str, num_hosts: int, rows_ND: torch.Tensor) -> None:
        self._rows_ND = rows_ND
        self._engine = uuid.uuid4().hex
        self._step = 0
        actor: Any = ray.remote(num_cpus=0.01)(EchoActor)
        options = [ActorOptions("", host=HostOptions(host_id=n), ipc_folder=f"{folder}/h") for n in range(num_hosts)]
        hosts = [actor.remote(one) for one in options]
        addresses: Any = ray.get([host.start.remote() for host in hosts], timeout=300)
        context = zmq.Context()
        self._clients = [ChannelClient(address, context=context) for address in addresses]
        for client in self._clients:
            client.hello(
                engine=self._engine,
                fingerprint="echo",
                dtype=rows_ND.dtype,
                width=rows_ND.shape[1],
                max_rows=rows_ND.shape[0],
            )
        echo: Any = ray.remote(num_cpus=0.01)(RayEcho)
        self._echoes = [echo.remote() for _ in range(num_hosts)]
        bare: Any = ray.remote(num_cpus=0.01)(BareEcho)
        self._bare = bare.remote()
        ray.get(self._bare.start.remote(f"ipc://{folder}/bare.sock"), timeout=60)
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(f"ipc://{folder}/bare.sock")
        self._keep = hosts

    def channel(self, num_hosts: int) -> None:
        """Send to `num_hosts` hosts, then wait for all."""
        self._step += 1
        key = GroupKey(self._engine, self._step, 0, 0)
        clients = self._clients[:num_hosts]
        for client in clients:
            client.send_group(key, self._rows_ND)
        for client in clients:
            client.receive(key, ANSWER_TIMEOUT_S)

    def ray_call(self, num_hosts: int) -> None:
        rows = self._rows_ND.numpy()
        ray.get([actor.echo.remote(rows) for actor in self._echoes[:num_hosts]], timeout=ANSWER_TIMEOUT_S)

    def bare(self) -> None:
        self._socket.send_multipart([b"header", self._rows_ND.numpy().data])
        self._socket.recv_multipart(copy=False)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._socket.close(0)


class Streams:
    """The load: `benchmarks/streams.py` in a process of its own."""

    def __init__(self, target: str, num_clients: int) -> None:
        script = Path(__file__).with_name("streams.py")
        command = [sys.executable, str(script), "--target", target, "--clients", str(num_clients)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._line()
        if self.ready["ready"] < num_clients:
            raise SystemExit(f"only {self.ready['ready']} of {num_clients} clients stream: {self.stop()['errors']}")

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the streaming clients ended with code {self._process.wait(10)}")
        return json.loads(line)

    def stop(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        result = self._line()
        self._process.wait(60)
        return result


def time_calls(trip: Trip, num_calls: int) -> list[float]:
    """Seconds of each of `num_calls` trips."""
    taken_s = []
    for _ in range(num_calls):
        started_s = time.perf_counter()
        trip()
        taken_s.append(time.perf_counter() - started_s)
    return taken_s


def measure_phase(stage: Stage, arguments: argparse.Namespace, samples: dict[tuple[str, int], list[float]]) -> None:
    """Add one phase's rounds to `samples`, all kinds of trip in turn."""
    for _ in range(arguments.rounds):
        samples["bare", 1] += time_calls(stage.bare, arguments.calls)
        for num_hosts in arguments.hosts:
            samples["channel", num_hosts] += time_calls(lambda n=num_hosts: stage.channel(n), arguments.calls)
            samples["ray", num_hosts] += time_calls(lambda n=num_hosts: stage.ray_call(n), arguments.ray_calls)


def summarise(samples: dict[tuple[str, int], list[float]], phase: str) -> list[dict[str, Any]]:
    rows = []
    for (kind, num_hosts), taken_s in sorted(samples.items()):
        p50, p99 = np.percentile(np.array(taken_s) * 1e3, [50, 99])
        row = {"kind": kind, "hosts": num_hosts, "phase": phase, "p50_ms": round(float(p50), 3)}
        rows.append(row | {"p99_ms": round(float(p99), 3), "calls": len(taken_s)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as text, idle and loaded side by side."""
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    cells = {(r["kind"], r["hosts"], r["phase"]): f"{r['p50_ms']:8.3f} {r['p99_ms']:8.3f}" for r in rows}
    names = {"bare": "bare socket", "channel": "pregate channel", "ray": "Ray actor call"}
    lines = [f"{'ms':16} {'hosts':>5}" + "".join(f"   {p + ' p50':>8} {'p99':>8}" for p in phases)]
    for kind, num_hosts in sorted({(r["kind"], r["hosts"]) for r in rows}):
        values = "".join(f"   {cells[kind, num_hosts, p]:>{len(p) + 13}}" for p in phases)
        lines.append(f"{names[kind]:16} {num_hosts:5d}{values}")
    return "\n".join(lines)


def conditions(arguments: argparse.Namespace, load_before: float) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    packages = ("ray", "pyzmq", "torch", "numpy", "grpcio")
    return {
        "command": command_of("dispatch"),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_before": load_before,
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "payload": f"{arguments.rows} x {arguments.width} fp32, {arguments.rows * arguments.width * 4} bytes each way",
    }


def measure(stage: Stage, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run all phases; returns result rows and what was streamed meanwhile."""
    samples: dict[str, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    streamed = []
    for num_hosts in arguments.hosts:
        time_calls(lambda n=num_hosts: stage.channel(n), WARM_UP_CALLS)
        time_calls(lambda n=num_hosts: stage.ray_call(n), WARM_UP_CALLS)
    for _ in range(arguments.phases):
        measure_phase(stage, arguments, samples["idle"])
        if arguments.grpc_target:
            streams = Streams(arguments.grpc_target, arguments.grpc_clients)
            measure_phase(stage, arguments, samples["loaded"])
            streamed.append({**streams.ready, **streams.stop()})
    return [row for phase, found in samples.items() for row in summarise(found, phase)], streamed


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--phases", type=int, default=2, help="idle (and loaded) phases, in turn")
    parser.add_argument("--rounds", type=int, default=20, help="rounds per phase")
    parser.add_argument("--calls", type=int, default=50, help="channel trips per round and number of hosts")
    parser.add_argument("--ray-calls", type=int, default=10)
    parser.add_argument("--grpc-target", help="HOST:PORT of a running `pregate serve`: adds the loaded phases")
    parser.add_argument("--grpc-clients", type=int, default=32)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    folder = tempfile.mkdtemp(prefix="pgb-")
    init_local(Path(folder) / "ray", 4)
    try:
        stage = Stage(folder, max(arguments.hosts), torch.randn(arguments.rows, arguments.width))
        rows, streamed = measure(stage, arguments)
        stage.close()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    result = {**conditions(arguments, load_before), "results": rows, "streamed": streamed}
    print(json.dumps({k: v for k, v in result.items() if k != "results"}, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
