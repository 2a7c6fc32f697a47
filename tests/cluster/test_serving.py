"""What `pregate serve` says and ends with; the whole of it runs in test_life_cycle.py."""

import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray._private.worker

from pregate.base import log
from pregate.base.errors import UnavailableError, UserError
from pregate.cluster import joining, launch, serving
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.cluster.launch import Deployment
from pregate.router.doors.access import AccessOptions
from pregate.router.doors.grpc_options import GrpcOptions

NOBODY = "127.0.0.1:1"


def test_a_terminal_that_is_gone_does_not_end_the_clean_up(monkeypatch):
    """As after SIGHUP: what cannot be said is not said."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        log.configure("launcher", text=serving.SCREEN)
        serving._say("draining and stopping")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            gone.close()


def test_launcher_and_supervisor_load_no_torch(tiny_path_checkpoint, tmp_path):
    """What `pregate serve` does before it launches, the check of a damaged model included, and all it launches with."""
    code = f"""
import sys
from pregate.base.errors import UserError
from pregate.cluster import children, preflight, serving, supervisor
from pregate.cluster.config import ServeConfig
config = ServeConfig.from_dict({{"model": {str(tiny_path_checkpoint)!r}, "hosts": 99}})
try:
    preflight.check_config(config)
except UserError as error:
    print(error)
heavy = {{"torch", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hosts 99: allowed: 0 to 6")


@pytest.fixture
def deployment():
    """One whose Ray is gone: nothing listens on port 1."""
    return Deployment(ServeConfig.from_dict({"model": "/m", "hosts": 1}), None, "me", NOBODY, None)


def test_the_loss_of_ray_is_seen_without_asking_ray(deployment, monkeypatch):
    monkeypatch.setattr(launch, "GCS_PATIENCE_S", 0.1)
    monkeypatch.setattr(serving, "LOOK_S", 0.02)
    reason = serving._wait(deployment, threading.Event())
    assert reason == f"Ray is lost: its control service at {NOBODY} takes no connection"
    assert deployment.ray_lost
    assert deployment.close()  # at once: no call to Ray would return


def test_what_happens_is_said_once_and_a_loss_at_once_before_anything_is_drained(deployment, monkeypatch, capsys):
    log.configure("launcher", text=serving.SCREEN)
    monkeypatch.setattr(launch.local_ray, "gcs_answers", lambda address: True)
    monkeypatch.setattr(serving, "LOOK_S", 0.01)
    deployment.notes = [(0, "door on port 1: it died; a new one is started"), (1, "host 0: no answer for 11 s")]
    timer = threading.Timer(0.2, lambda: setattr(deployment, "lost", "host 1 is lost: its process died"))
    timer.start()
    assert serving._wait(deployment, threading.Event()) == "host 1 is lost: its process died"
    said = [note for _, note in deployment.notes] + ["host 1 is lost: its process died"]
    assert capsys.readouterr().err == "".join(f"  {line}\n" for line in said)


def test_levels_are_the_supervisors(deployment, monkeypatch, capsys, own_log):
    log.configure("launcher", "json")
    monkeypatch.setattr(launch.local_ray, "gcs_answers", lambda address: True)
    deployment.notes, deployment.lost = [(0, "host 0: runs again")], "host 1 is lost: its process died"
    serving._wait(deployment, threading.Event())
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["message"]) for line in said] == [
        ("warning", "host 0: runs again"),
        ("error", "host 1 is lost: its process died"),
    ]


def test_where_lines_are_json_the_error_it_ends_with_is_one(tiny_path_checkpoint, capsys, own_log):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        door = GrpcOptions(port=taken.getsockname()[1])
        for log_format in ("json", "text"):
            config = ServeConfig(model=str(tiny_path_checkpoint), log_format=log_format)
            with pytest.raises(UserError, match="cannot be listened on") as raised:
                serving.serve(config, door, RayAccess())
            assert raised.value.is_said == (log_format == "json")
    (line,) = capsys.readouterr().err.splitlines()
    line = json.loads(line)
    assert (line["level"], line["role"], line["message"]) == ("error", "launcher", raised.value.for_command_line)


def test_a_signal_after_a_loss_is_no_success(deployment):
    deployment.lost = "the engine is lost"
    stopping = threading.Event()
    stopping.set()
    assert serving._wait(deployment, stopping) == "the engine is lost"


@pytest.mark.parametrize(
    ("address", "error", "sentence"),
    [
        (NOBODY, UnavailableError, "ray_address 127.0.0.1:1: nothing takes connections there"),
        ("ray://head:10001", UserError, "ray_address ray://head:10001: allowed: HOST:PORT, or auto"),
        ("nowhere", UserError, "ray_address nowhere: allowed: HOST:PORT, or auto"),
    ],
)
def test_a_ray_address_that_is_none_is_refused_at_once(address, error, sentence):
    with pytest.raises(error, match=sentence):
        joining.check_address(address)


def test_what_listens_but_is_no_ray_is_refused(monkeypatch):
    monkeypatch.setattr(joining, "ADDRESS_TIMEOUT_S", 0.3)
    mute = socket.create_server(("127.0.0.1", 0))
    with mute, pytest.raises(UnavailableError, match="what listens there is not Ray"):
        joining.check_address(f"127.0.0.1:{mute.getsockname()[1]}")


def test_the_files_of_a_door_are_found_from_any_folder(tmp_path, monkeypatch):
    """A door on another node is in the folder that Ray was started in there."""
    monkeypatch.chdir(tmp_path)
    given = GrpcOptions(
        port=0, access=AccessOptions(token_file=Path("tokens"), tls_cert=Path("a.pem"), tls_key=Path("/keys/a.key"))
    )
    sent = launch._with_absolute_paths(given)
    assert (sent.port, sent.access.host, sent.access.tls_client_ca) == (0, "127.0.0.1", None)
    files = (sent.access.token_file, sent.access.tls_cert, sent.access.tls_key)
    assert files == (tmp_path / "tokens", tmp_path / "a.pem", Path("/keys/a.key"))


@pytest.fixture
def certificate(tmp_path):
    path = tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x"]
    command += ["-keyout", tmp_path / "key.pem", "-out", path]
    command += ["-addext", "subjectAltName=DNS:*.example.com,DNS:models.example.com,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path


def test_the_command_to_try_is_one_that_works(certificate, tmp_path):
    def command(host, **access):
        return serving._how_to_try(GrpcOptions(access=AccessOptions(host, **access)), host, 50051)

    assert command("127.0.0.1") == 'pregate generate --target 127.0.0.1:50051 --prompt "Once upon a time"'
    assert command("::1").startswith("pregate generate --target [::1]:50051 ")
    secured = {"tls_cert": certificate, "tls_key": tmp_path / "key.pem", "token_file": tmp_path / "tokens"}
    files = f"--ca {certificate} --token-file {tmp_path / 'tokens'}"
    assert command("0.0.0.0", **secured).startswith(f"pregate generate --target models.example.com:50051 {files} ")
    assert command("127.0.0.1", **secured).startswith(f"pregate generate --target 127.0.0.1:50051 {files} ")


def test_the_screen_says_who_computes_paths(tmp_path):
    one, two = (ServeConfig.from_dict({"model": str(tmp_path), "paths": {"threads": n}}) for n in (1, 2))
    started = {"endpoint": "ipc:///tmp/paths", "pid": 123}
    assert serving._paths(one, None) == [], "gates, or the engine"
    assert serving._paths(one, started) == ["paths    by process 123, 1 thread"]
    assert serving._paths(two, started) == ["paths    by process 123, 2 threads"]


def test_what_ray_says_is_one_short_line_and_of_a_death_none(capsys):
    """Ray's own printer is the one it looks up by this name."""
    assert "print_to_stdstream(" in inspect.getsource(ray._private.worker.listen_error_messages)
    log.configure("launcher", text=serving.SCREEN)
    death = "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the "
    ended = "Task Supervisor.holds failed. There are infinite retries remaining, so the task will be retried. Error: "
    memory = "2 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed due to other reasons"
    said = [
        death + "problem, check the logs. " * 40,
        ended + "The actor died.",
        memory + " at node (ID: a). " * 9,
        "short",
    ]
    joining.log_shortened({"lines": said, "pid": "raylet"}, False)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"  Ray: {memory} at node (ID: a) (more in its logs)", "  Ray: short"]
