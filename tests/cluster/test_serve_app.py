"""The Serve application: what it takes, its health, and what `serve run` leaves (with `serve`: test_life_cycle.py)."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pregate.base.errors import UnavailableError, UserError
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient, EngineClientOptions
from tests.cluster.leftovers import (
    ROOT,
    listening_ports,
    processes_of,
    shared_memory,
    started,
    still_listening,
)
from tests.router.running import LoopThread, engine_thread, local_engine, socket_folder
from tests.router.running import wait_for as eventually

PROMPT = "to be or not"
SERVE_RUN = ["-m", "ray.serve.scripts", "run", "pregate.cluster.serve_app:build_app"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"hosts": "2"}, "model: missing"),
        ({"model": "TINY", "hosts": "2", "colour": "1"}, "colour 1: unknown option; allowed: model, hosts"),
        ({"model": "TINY", "hosts": "two"}, "hosts two: allowed: 0 or more"),
        ({"model": "TINY", "hosts": "6"}, "hosts 6: allowed: 0 to 5"),
        ({"model": "TINY", "max_queued_requests": "0"}, "max_queued_requests 0: allowed: 1 or more"),
        ({"model": "/no/such"}, "model /no/such: no such folder"),
    ],
)
def test_bad_arguments_are_named(layerwise_checkpoint, args, sentence):
    from pregate.cluster.serve_app import build_app

    with pytest.raises(UserError, match=sentence):
        build_app({k: str(layerwise_checkpoint) if v == "TINY" else v for k, v in args.items()})


def test_on_serves_command_line_a_bad_argument_is_one_sentence(layerwise_checkpoint):
    done = subprocess.run(
        [sys.executable, *SERVE_RUN, "model=/no/such"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: model /no/such: no such folder; allowed: a checkpoint folder"
    assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_serve_run_leaves_nothing_of_a_ray_it_started(path_checkpoint):
    before = shared_memory()
    with started(*SERVE_RUN, f"model={path_checkpoint}", until="is ready at") as app:
        ports = listening_ports(processes_of(app.folder))
        # Once, of many runs, the signal was lost: Serve prints that line a moment before it waits for one, and
        # callbacks of Ray swallow what is raised in them.
        time.sleep(2)
        app.process.send_signal(signal.SIGINT)
        app.process.wait(120)
        assert app.wait_nothing_left(20) == []
        assert still_listening(ports) == set()
        assert shared_memory() <= before


def test_a_replica_is_as_healthy_as_its_engine(tiny_path_checkpoint):
    """The engine's end by a bug leaves the lease as it is; Serve restarts the replica only when its health says so."""
    from pregate.cluster.serve_app import Replica

    loop = LoopThread()
    with local_engine(tiny_path_checkpoint) as engine, socket_folder() as folder:
        client = EngineClient(f"ipc://{folder}/e", options=EngineClientOptions(keep_alive_s=0.05, silence_s=0.5))
        service = DoorService(client, tiny_path_checkpoint, "tiny")
        replica: Any = SimpleNamespace(_deployment=SimpleNamespace(lost=None), _service=service)
        with engine_thread(engine, f"ipc://{folder}/e"):
            loop.call(service.model_info())
            Replica.check_health(replica)
        eventually(lambda: client.unavailable, what="the end of the engine")
        with pytest.raises(UnavailableError, match="the engine"):
            Replica.check_health(replica)
        loop.call(service.close())
    loop.close()
