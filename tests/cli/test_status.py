"""`pregate status` and `top` against a server: as it is, with lost hosts, without its engine."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from rich.console import Console

from pregate.cli.main import main
from pregate.cli.status import _print_status, table
from pregate.client.answers import Loads, read
from pregate.client.proto import pregate_pb2 as pb
from pregate.router.link.endpoint import starting_file
from pregate.router.link.engine_health import EngineClientOptions
from tests.router.running import door, engine_thread, local_engine, served, socket_folder, wait_for

HASTY = EngineClientOptions(keep_alive_s=0.05, silence_s=0.3)


@pytest.fixture(scope="module")
def server(tiny_path_checkpoint):
    with served(tiny_path_checkpoint) as (engine, front):
        yield engine, front


def test_status_and_top_say_what_the_server_is_at(server, capsys):
    _, front = server
    assert main(["status", "--target", front.target]) == 0
    printed = capsys.readouterr().out
    assert "takes requests" in printed
    assert re.search(r"up 0:\d\d:\d\d", printed)
    assert main(["status", "--target", front.target, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"server", "model", "loads", "error"}
    assert found["loads"]["kv_blocks"] == found["loads"]["kv_blocks_free"] > 0
    assert main(["top", "--target", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == "pregate: nothing listens at 127.0.0.1:1 (--target)\n"
    assert main(["top", "--target", f"127.0.0.1:1,{front.target}"]) == 0
    assert "0 running, 0 queued" in capsys.readouterr().out
    assert main(["top", "--target", "nowhere"]) == 2


def test_a_reason_in_brackets_is_no_markup(server, capsys):
    loads = replace(server[1].client.loads(), unavailable="the engine at [/tmp/e] is lost")
    Console(width=160).print(table(loads))
    assert "the engine at [/tmp/e] is lost" in capsys.readouterr().out


def test_every_engine_of_several_is_shown_and_where_they_log(server, capsys):
    client = server[1].client
    assert not client.loads().engines and "engine 0" not in capsys.readouterr().out
    several = [
        pb.EngineStatus(number=0, num_running=3, num_queued=1, num_steps=40),
        pb.EngineStatus(number=1, unavailable="engine 1 has been silent for 3 s"),
    ]
    loads = read(Loads, pb.GetLoadsResponse(kv_blocks=8, engines=several))
    _print_status(replace(client.server_info(), logs="/tmp/ray/s/logs"), client.model_info(), loads)
    printed = capsys.readouterr().out
    assert "engine 0: 3 running, 1 queued, 40 steps\n" in printed
    assert "engine 1: engine 1 has been silent for 3 s\n" in printed
    assert "logs: /tmp/ray/s/logs/worker-*.err on its machine\n" in printed


@pytest.mark.parametrize(
    ("options", "num_hosts", "said"),
    [({"hosts": "0"}, 1, "experts in the engine's process"), ({"hosts": "1"}, 1, "1 host,"), ({}, 2, "2 hosts,")],
)
def test_it_says_where_the_experts_are(server, capsys, options, num_hosts, said):
    client = server[1].client
    _print_status(
        replace(client.server_info(), options=options), replace(client.model_info(), num_hosts=num_hosts), None
    )
    assert f" routing, {said}" in capsys.readouterr().out


def test_the_path_service_has_a_line(server, capsys):
    client = server[1].client
    assert client.loads().path_service is None, "the engine computes paths itself"
    busy = pb.PathServiceStatus(num_queued=3, num_turns=40, busy_with="the paths of 2 prompts", busy_s=0.1)
    lost = pb.PathServiceStatus(unavailable="the path service has been silent for 3 s")
    for status, line in ((busy, "the paths of 2 prompts, 3 queued, 40 turns"), (lost, lost.unavailable)):
        loads = read(Loads, pb.GetLoadsResponse(kv_blocks=8, path_service=status))
        _print_status(client.server_info(), client.model_info(), loads)
        assert f"path service: {line}\n" in capsys.readouterr().out


def test_every_lost_host_is_named_with_its_age_now(server, capsys, monkeypatch):
    engine, front = server
    monkeypatch.setattr(engine.exchange, "lost", {0: "it closed its connection"})
    monkeypatch.setattr(engine.exchange, "lost_at_s", {0: time.monotonic() - 100})
    ages = []
    for _ in range(2):
        assert main(["status", "--target", front.target, "--json"]) == 0
        (host,) = json.loads(capsys.readouterr().out)["loads"]["hosts"]
        assert host["lost"] == "it closed its connection"
        ages.append(host["lost_s"])
        time.sleep(0.05)
    assert 100 < ages[0] < ages[1]
    assert main(["status", "--target", front.target]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"host 0 is lost for 0:01:\d\d: it closed its connection", printed)
    assert re.search(r"0 +. lost 0:01:\d\d", printed), "in the table, too"


def test_without_its_engine_the_server_is_described_and_the_reason_said(tiny_path_checkpoint, capsys):
    """Silent at first; then another engine's process is there, and loads."""
    with (
        socket_folder() as folder,
        door(f"ipc://{folder}/engine", tiny_path_checkpoint, client_options=HASTY) as front,
    ):
        wait_for(lambda: front.service.lost, what="the silence")
        assert main(["status", "--target", front.target]) == 1
        printed = capsys.readouterr()
        assert "tiny: door up 0:00:" in printed.out and "torch" in printed.out
        assert re.fullmatch(r"pregate: the engine has been silent for \d+ s\n", printed.err)
        starting_file(f"ipc://{folder}/engine").touch()
        wait_for(lambda: "starts again" in (front.service.lost or ""), what="the start")
        assert main(["status", "--target", front.target, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert re.fullmatch(r"the engine starts again, for \d+ s already", found["error"])
        assert (found["model"], found["server"]["model"]) == (None, "tiny")


def test_generate_waits_for_a_server_that_starts_again_as_long_as_it_is_told_to(tiny_path_checkpoint, capsys):
    with (
        local_engine(tiny_path_checkpoint) as engine,
        socket_folder() as folder,
        door(f"ipc://{folder}/engine", tiny_path_checkpoint, client_options=HASTY) as front,
    ):
        wait_for(lambda: front.service.lost, what="the silence")
        asked = ["generate", "--target", front.target, "--prompt", "O wind", "--max-tokens", "2"]
        assert main([*asked, "--retry-s", "0"]) == 1
        assert "the engine" in capsys.readouterr().err
        start = threading.Timer(1.0, lambda: stack.enter_context(engine_thread(engine, f"ipc://{folder}/engine")))
        with ExitStack() as stack:
            start.start()
            try:
                assert main(asked) == 0
            finally:
                start.join()
        assert len(capsys.readouterr().out) > 1
