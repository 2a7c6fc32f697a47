"""The Serve application: what it takes, its health, and what `serve run` leaves (with `serve`: test_life_cycle.py)."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import click
import pytest

from benchmarks.doors import haproxy
from pregate.base.errors import UnavailableError, UserError
from pregate.base.metrics import METRICS
from pregate.cluster.room import NODE_SHARE
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from tests.cluster.leftovers import (
    ROOT,
    launched,
    listening_ports,
    processes_of,
    shared_memory,
    started,
    still_listening,
    wait_for,
)
from tests.router.running import LoopThread, engine_thread, local_engine, socket_folder
from tests.router.running import wait_for as eventually
from tests.sharing_out import only_in_chaos

PROMPT = "to be or not"
SERVE_RUN = ["-m", "ray.serve.scripts", "run", "pregate.cluster.serve_app:build_app"]


#: Deploys an application twice, the second time another one, under load all the while; says what became of it, and
#: what Ray's exporter has.
REDEPLOY = """
import json, os, sys, threading, time
os.environ |= {"RAY_enable_metrics_collection": "1", "RAY_metrics_report_interval_ms": "5000"}
import grpc, httpx, psutil, ray
import pregate
from pregate.base.errors import UserError
from ray import serve
from pregate.cluster.local_ray import prepare_environment
from pregate.cluster.serve_app import build_app
from tests.cluster.leftovers import command_of

prepare_environment()
model, tokens, port, grpc_port = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ray.init(address="local", num_cpus=4, log_to_driver=False, include_dashboard=False, _node_ip_address="127.0.0.1")
grpc_options = {"port": grpc_port, "grpc_servicer_functions": [
    "pregate.client.proto.pregate_pb2_grpc.add_PregateServicer_to_server"]}
serve.start(http_options={"host": "127.0.0.1", "port": port}, grpc_options=grpc_options)
args = {"model": model, "hosts": "2", "token_file": tokens}
key = {"Authorization": "Bearer sk-alpha"}
url = f"http://127.0.0.1:{port}"


def parts():
    lines = {p.pid: command_of(p) for p in psutil.Process().children(recursive=True)}
    mine = sorted(pid for pid, line in lines.items() if "ExpertHostActor" in line or "EngineActor" in line)
    told["haproxy"] = any(line.partition(" ")[0].endswith("/haproxy") for line in lines.values())
    return mine, sorted(pid for pid, line in lines.items() if "ServeReplica" in line)


def load(stream):
    with httpx.Client(base_url=url, headers=key, timeout=120) as client:
        while not done.is_set():
            body = {"prompt": "to be", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": stream}
            try:
                answer = client.post("/v1/completions", json=body)
                ok = answer.status_code == 200 and ("[DONE]" in answer.text) == stream and "error" not in answer.text
                results.append("" if ok else f"{answer.status_code} {answer.text[-300:]}")
            except httpx.HTTPError as error:
                results.append(repr(error))


def exported():
    (node,) = ray.nodes()
    url, give_up_s, seen = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", time.monotonic() + 30, 0
    while time.monotonic() < give_up_s:
        text = httpx.get(url, timeout=10).text
        found = [line for line in text.splitlines() if line.startswith("ray_pregate_")]
        if len(found) == seen and "ray_pregate_steps_total{" in text:
            return found
        seen = len(found)
        time.sleep(6)  # longer than engine and reporter wait
    return found


def over_grpc():
    body = {"prompt": "to be", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=key, timeout=60).json()
    found = {"text": answer["choices"][0]["text"]}
    with pregate.Client(f"127.0.0.1:{grpc_port}", token="sk-alpha", timeout_s=60, retry_s=0) as client:
        found["chunks"] = [chunk.text for chunk in client.generate("to be", max_tokens=5, ignore_eos=True)]
        found["model"] = client.model_info().model
        found["path"] = len(client.route("to be").paths)
        try:
            client.complete("to be", max_tokens=0)
        except UserError as error:
            found["bad"] = str(error)
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as wire:
        for token in ("", "Bearer wrong"):
            call = wire.unary_unary("/pregate.v1.Pregate/GetServerInfo")
            try:
                call(b"", metadata=(("authorization", token),), timeout=20)
            except grpc.RpcError as error:
                found.setdefault("codes", []).append(error.code().name)
    return found


done, results, told = threading.Event(), [], {}
serve.run(build_app(args))
told["unauthorized"] = httpx.post(f"{url}/v1/completions", json={}).status_code
told |= {path: httpx.get(url + path, timeout=30).status_code for path in ("/health", "/ready", "/version")}
told["before"], told["replica"] = parts()
threads = [threading.Thread(target=load, args=(stream,)) for stream in (True, False)]
[thread.start() for thread in threads]
time.sleep(2)
told["num_before"] = len(results)
serve.run(build_app(args | {"num_replicas": 2, "max_ongoing_requests": 64}))
told["num_during"] = len(results) - told["num_before"]
time.sleep(2)
done.set()
[thread.join() for thread in threads]
told["num"], told["failed"] = len(results), [r for r in results if r]
told["after"], told["replicas"] = parts()
told["exported"] = exported()
told["grpc"] = over_grpc()
print("told " + json.dumps(told), flush=True)
serve.shutdown()
ray.shutdown()
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"hosts": "2"}, "model: missing"),
        ({"model": "TINY", "hosts": "2", "colour": "1"}, "colour 1: unknown option; allowed: model, hosts"),
        ({"model": "TINY", "hosts": "two"}, "hosts two: allowed: a whole number, 0 or more"),
        ({"model": "TINY", "hosts": "6"}, "hosts 6: allowed: 0 to 5"),
        ({"model": "TINY", "max_queued_requests": "0"}, "max_queued_requests 0: allowed: 1 or more"),
        ({"model": "/no/such"}, "model /no/such: no such folder"),
        (
            {"model": "TINY", "max_queued_request": "9"},
            "max_queued_request 9: unknown option; nearest: max_queued_requests; allowed: ",
        ),
        ({"model": "TINY", "min_replicas": "2"}, "min_replicas 2: needs max_replicas"),
        ({"model": "TINY", "max_replicas": "2", "num_replicas": "2"}, "num_replicas 2: give it or max_replicas"),
        ({"model": "TINY", "max_replicas": "2", "min_replicas": "3"}, "min_replicas 3: with max_replicas 2 too large"),
        ({"model": "TINY", "token_file": "/no/such"}, "token_file /no/such: cannot be read"),
        ({"model": "TINY", "request_timeout_s": "0"}, "request_timeout_s 0: allowed: above 0"),
        ({"model": "TINY", "engine_node": "any"}, "engine_node any: allowed with Serve: a node's address"),
    ],
)
def test_bad_arguments_are_named(layerwise_checkpoint, args, sentence):
    from pregate.cluster.serve_app import build_app

    with pytest.raises(UserError, match=sentence):
        build_app({k: str(layerwise_checkpoint) if v == "TINY" else v for k, v in args.items()})


def test_what_is_asked_reaches_serve_in_its_words(layerwise_checkpoint):
    from pregate.cluster.serve_app import build_app

    model = {"model": str(layerwise_checkpoint)}
    config = build_app(model)._bound_deployment._deployment_config
    assert (config.num_replicas, config.max_ongoing_requests, config.max_queued_requests) == (1, 256, 256)
    assert config.backpressure_config.status_code == 429
    assert config.max_surge_percent == 100
    there = build_app(model | {"engine_node": "10.0.0.7"})._bound_deployment.ray_actor_options
    assert there["resources"] == {"node:10.0.0.7": NODE_SHARE}
    scaled = build_app(model | {"min_replicas": 2, "max_replicas": "4", "target_ongoing_requests": "32"})
    scaling = scaled._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 4, 32)


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
    with started(*SERVE_RUN, f"model={path_checkpoint}", "hosts=0", until="is ready at") as app:
        ports = listening_ports(processes_of(app.folder))
        # Serve prints that line a moment before it waits for a signal; who sits before it presses Ctrl-C again.
        time.sleep(2)
        for _ in range(3):
            app.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                app.process.wait(40)
                break
        assert app.process.poll() is not None, "it ends on Ctrl-C"
        assert app.wait_nothing_left(20) == []
        assert still_listening(ports) == set()
        assert shared_memory() <= before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("proxy", ["Serve's own", pytest.param("HAProxy", marks=only_in_chaos)])
def test_another_configuration_drops_no_request_and_reloads_no_host(path_checkpoint, tmp_path, monkeypatch, proxy):
    """And Ray's exporter has the numbers that the plain endpoint would have, under the same names; and Serve's own gRPC
    proxy answers. Both through HAProxy in Serve's place, too."""
    (tmp_path / "keys").write_text("sk-alpha\n")
    port, grpc_port, metrics_port, stats_port = free_ports(4)
    with socket_folder() as folder:
        if proxy == "HAProxy":
            beside = {"HAPROXY_METRICS_PORT": metrics_port, "HAPROXY_STATS_PORT": stats_port}
            beside["DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = 5
            settings = haproxy(folder) | {f"RAY_SERVE_{name}": str(value) for name, value in beside.items()}
            for name, value in settings.items():
                monkeypatch.setenv(name, value)
        with launched("-c", REDEPLOY, path_checkpoint, tmp_path / "keys", port, grpc_port) as running:
            wait_for(running.log, "told ", running.process)
            running.process.wait(120)
            (line,) = [x for x in running.log.read_text().splitlines() if x.startswith("told ")]
    told = json.loads(line.removeprefix("told "))
    assert told["haproxy"] == (proxy == "HAProxy")
    assert told["unauthorized"] == 401
    assert [told[path] for path in ("/health", "/ready", "/version")] == [200, 200, 200]
    assert told["num_before"] > 0 and told["num_during"] > 0
    assert told["failed"] == []
    assert len(told["before"]) == 3 and told["after"] == told["before"], "an engine and two hosts, as they were"
    assert len(set(told["replicas"]) - set(told["replica"])) == 2, "and other replicas"
    values = defaultdict(float)
    for line in told["exported"]:
        values[line.partition("{")[0].removeprefix("ray_")] += float(line.rpartition(" ")[2])
    never = {"request_failures_total", "admission_rejections_total"}  # counters that nothing was added to
    expected = {name for m in METRICS if m.stem not in never and m.kind != "counter" for name in m.series}
    assert expected <= values.keys()
    assert values.keys() <= {name for m in METRICS for name in m.series}
    assert values["pregate_request_success_total"] >= told["num"]
    assert values["pregate_generation_tokens_total"] >= 40 * told["num"]
    assert values["pregate_steps_total"] > 40 and values["pregate_num_expert_hosts"] == 2
    calls = told["grpc"]
    assert "".join(calls["chunks"]) == calls["text"] and len(calls["chunks"]) > 1
    assert calls["path"] > 0 and calls["model"] == path_checkpoint.name
    assert calls["bad"].startswith("max_tokens 0")
    assert calls["codes"] == ["UNAUTHENTICATED", "UNAUTHENTICATED"]
    assert all('model_name="' in line for line in told["exported"])


@pytest.mark.parametrize(("host", "refused"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False)])
def test_an_open_port_asks_for_tokens(layerwise_checkpoint, tmp_path, monkeypatch, host, refused):
    from pregate.cluster import serve_app

    (tmp_path / "keys").write_text("sk-alpha\n")
    serving = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr(serve_app, "_get_global_client", lambda **_: serving)
    monkeypatch.setattr(serve_app.ray, "is_initialized", lambda: True)
    args = {"model": str(layerwise_checkpoint)}
    if refused:
        with pytest.raises(UserError, match=f"token_file: missing; Serve's HTTP host is {host}"):
            serve_app.build_app(args)
    else:
        serve_app.build_app(args)
    serve_app.build_app(args | {"token_file": str(tmp_path / "keys")})


def test_serve_run_says_where_it_will_answer_and_how_to_ask(layerwise_checkpoint, tmp_path, capsys, monkeypatch):
    from pregate.cluster import serve_app

    monkeypatch.setattr(serve_app, "_leave_nothing_behind", lambda: None)
    (tmp_path / "keys").write_text("# mine\nsk-alpha\n")
    args = {"model": str(layerwise_checkpoint)}
    with click.Context(click.Command("run")):
        serve_app.build_app(args)
        assert "try  curl http://127.0.0.1:8000/v1/completions -H 'Content" in capsys.readouterr().err
        serve_app.build_app(args | {"token_file": str(tmp_path / "keys")})
    said = capsys.readouterr().err
    assert "answers at http://127.0.0.1:8000/" in said and "sk-alpha" not in said
    command = said.partition("try  ")[2].replace("curl", "printf '%s\\n'")
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=10).stdout
    assert "Authorization: Bearer sk-alpha" in shown.splitlines()


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
