"""The real parts of a deployment on a real Ray: what is lost, what comes back, what there is no room for."""

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import pytest
import ray

from pregate.base.errors import UnavailableError, UserError
from pregate.base.options import to_dict
from pregate.client.client import Client
from pregate.cluster import children as module
from pregate.cluster import part, pulse, run_folder
from pregate.cluster.children import RayChildren
from pregate.cluster.config import ServeConfig
from pregate.cluster.doors import Doors
from pregate.cluster.ray_start import init_local
from pregate.router.doors.grpc_options import GrpcOptions
from tests.chaos.deployed import processes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def local_ray():
    folder = tempfile.mkdtemp(prefix="pgt-", dir="/tmp")
    init_local(Path(folder) / "ray", 4, namespace="pregate")
    yield folder
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def config(model, **options):
    return ServeConfig.from_dict({"model": str(model), "hosts": 1, "drain_s": 1.0, **options})


def make(folder, config):
    """Parts whose sockets lie in a folder of their own, which goes with Ray's."""
    return RayChildren(config, Path(tempfile.mkdtemp(dir=folder)))


async def check_until(children, wanted):
    """Look as the supervisor does, until `wanted` of what was found so far; returns lost parts and all notes."""
    notes = []
    for _ in range(100):
        health = await children.check()
        notes += health.notes
        if wanted(health.lost, notes):
            return health.lost, notes
        await asyncio.sleep(0.1)
    raise AssertionError(notes)


async def pause_door(children, process, name):
    process.suspend()
    await check_until(children, lambda lost, notes: any(f"{name}: no answer" in note for note in notes))
    process.resume()
    lost, _ = await check_until(children, lambda lost, notes: f"{name}: answers again" in notes)
    assert lost == {}


async def lose_one_after_another(children, path_checkpoint):
    info = await children.start()
    door = await children.add_door("me", to_dict(GrpcOptions(port=0)))
    target = f"127.0.0.1:{door['port']}"
    assert await check_until(children, lambda lost, notes: True) == ({}, [])

    os.kill(door["pid"], signal.SIGKILL)
    _, notes = await check_until(children, lambda lost, notes: notes)
    assert notes[0].startswith(f"door on port {door['port']}: its process died")
    completion = None
    for _ in range(100):  # a new process takes a second or two
        try:
            with Client(target, timeout_s=30, retry_s=0) as client:
                completion = await asyncio.to_thread(client.complete, "to be", max_tokens=2)
            break
        except UnavailableError:
            await children.check()
            await asyncio.sleep(0.2)
    assert completion is not None and len(completion.token_ids) == 2

    (host,) = info["hosts"]
    (door_process,) = processes("DoorActor")  # not one of another run on this machine
    await pause_door(children, door_process, f"door on port {door['port']}")
    os.kill(host["pid"], signal.SIGSTOP)
    await check_until(children, lambda lost, notes: any("host 0: no answer" in note for note in notes))
    os.kill(host["pid"], signal.SIGCONT)
    lost, _ = await check_until(children, lambda lost, notes: "host 0: answers again" in notes)
    assert lost == {}

    # A host alone: test_life_cycle.py.
    await kill_and_be_served_again(children, target, ["the engine"])
    await kill_and_be_served_again(children, target, ["host 0", "the engine", "the path service"])


async def kill_and_be_served_again(children, target, names):
    info = children._info
    pids = {"host 0": info["hosts"][0]["pid"], "the engine": info["pid"], "the path service": info["paths"]["pid"]}
    before = {name: pids[name] for name in names}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    _, notes = await check_until(children, lambda lost, notes: sum("started" in note for note in notes) >= len(before))
    assert sorted(note for note in notes if "started" in note) == [
        f"{name}: its process died (ActorDiedError); a new one is started" for name in sorted(before)
    ]
    with Client(target, timeout_s=120, retry_s=100) as client:
        asked = asyncio.ensure_future(asyncio.to_thread(client.complete, "to be", max_tokens=2))
        while not asked.done():
            assert not (await children.check()).lost
            await asyncio.sleep(0.2)
        assert len(asked.result().token_ids) == 2


def test_whatever_dies_comes_back_and_a_pause_is_told(local_ray, path_checkpoint, monkeypatch):
    monkeypatch.setattr(pulse, "SILENT_AFTER_S", 1.0)
    monkeypatch.setattr(pulse, "LOOK_S", 0.3)

    async def main():
        children = make(local_ray, config(path_checkpoint))
        try:
            await lose_one_after_another(children, path_checkpoint)
        finally:
            await asyncio.gather(children.stop(1.0), children.stop(1.0))
        assert ray.util.list_named_actors() == []

    asyncio.run(main())


def test_a_door_that_stands_still_is_gone_before_the_next_one_listens(local_ray, monkeypatch):
    """One attempt is enough: the others are for what is really wrong."""
    monkeypatch.setattr(part, "FROZEN_S", 1.0)
    monkeypatch.setattr(pulse, "LOOK_S", 0.3)

    @ray.remote(num_cpus=0)
    class Door:
        def __init__(self, port):
            self._socket = socket.create_server(("127.0.0.1", port))

        def start(self):
            return {"host": "127.0.0.1", "port": self._socket.getsockname()[1], "pid": os.getpid()}

        def status(self):
            return {"running": True}

    async def main():
        made = []

        def make(number, options):
            made.append(Door.remote(options.port))
            return made[-1]

        doors = Doors(make, 60.0)
        door = await doors.add("me", GrpcOptions(port=0))
        os.kill(door["pid"], signal.SIGSTOP)
        notes = []
        for _ in range(300):
            await pulse.look(one.pulse for one in doors.parts if one.pulse)
            notes += doors.parts[0].check()
            if f"door on port {door['port']}: runs again" in notes or doors.parts[0].lost:
                break
            await asyncio.sleep(0.2)
        assert doors.parts[0].lost == "" and f"door on port {door['port']}: runs again" in notes
        assert len(made) == 2
        for actor in made:
            ray.kill(actor)

    asyncio.run(main())


def test_whatever_becomes_of_a_part_is_a_loss_with_a_reason(local_ray, path_checkpoint, monkeypatch):
    """No status to ask for; a door that cannot be made again."""
    monkeypatch.setattr(part, "FIRST_PAUSE_S", 0.1)

    @ray.remote(num_cpus=0)
    class Door:
        def start(self):
            return {"host": "127.0.0.1", "port": 1, "pid": 1 << 22}

        def stop(self, grace_s):
            pass

    async def main():
        made = [Door.remote()]
        children = make(local_ray, config(path_checkpoint))
        children._doors = Doors(lambda number, options: made.pop(), 10.0)
        await children.add_door("me", to_dict(GrpcOptions(port=0)))
        lost, notes = await check_until(children, lambda lost, notes: lost)
        assert "door on port 1: it gave no status (AttributeError" in notes[0]
        assert lost == {"door on port 1": "it did not start again: IndexError: pop from empty list"}
        await children.stop(0)

    asyncio.run(main())


def test_room_that_is_taken_away_while_waited_for_ends_the_start(local_ray, path_checkpoint, monkeypatch):
    monkeypatch.delenv(run_folder.RUN_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(module, "ROOM_EVERY_S", 0.2)

    async def main():
        children = make(local_ray, config(path_checkpoint, gpus_per_host=1))
        start = asyncio.ensure_future(children.start())
        while "waiting" not in children.stage:
            await asyncio.sleep(0.05)
        group = children._group
        assert group is not None
        ray.util.remove_placement_group(group)
        with pytest.raises(UnavailableError, match="the room reserved for 'pregate' was taken away"):
            await asyncio.wait_for(start, 20)
        await children.stop(0)

    asyncio.run(main())


def test_no_room_on_a_ray_of_our_own_is_refused_at_once(local_ray, path_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv(run_folder.RUN_DIR_VARIABLE, str(tmp_path))

    async def main():
        children = make(local_ray, config(path_checkpoint, gpus_per_host=1))
        with pytest.raises(UserError, match=r"gpus_per_host 1: not to be had: 1 hosts of 1 GPUs each"):
            await asyncio.wait_for(children.start(), 10)
        await children.stop(0)

    asyncio.run(main())


def test_a_node_that_is_not_there_is_refused_by_its_address(local_ray, path_checkpoint, monkeypatch):
    """A cluster that grows has its nodes' addresses from nowhere."""
    monkeypatch.delenv(run_folder.RUN_DIR_VARIABLE, raising=False)

    async def main():
        children = make(local_ray, config(path_checkpoint, engine_node="10.9.9.9"))
        with pytest.raises(UserError, match=r"engine_node 10\.9\.9\.9: no such node: 1 hosts"):
            await asyncio.wait_for(children.start(), 60)
        await children.stop(0)

    asyncio.run(main())


def test_the_folder_goes_on_every_node_that_engines_were_on(local_ray, path_checkpoint, monkeypatch):
    """They went from one to another, which a supervisor's process saw that died later."""
    removed, nodes = [], iter(["one", "two", "two", "three"])

    async def remove(folder, node):
        removed.append((folder, node))

    async def main():
        children = make(local_ray, config(path_checkpoint))
        monkeypatch.setattr(module, "node_address", lambda node: f"address of {node}")
        monkeypatch.setattr(children, "_engine_node", lambda: next(nodes))
        children._info["node_ip"] = "address of one"
        assert await children._moved() == []
        assert await children._moved() == ["engines and doors go to node address of two"]
        after = make(local_ray, config(path_checkpoint))
        monkeypatch.setattr(module, "end_strays", lambda *_: None)
        after.adopt({**children.saved(), "engines": [(None, 1)]})
        after._engines.parts.clear()
        monkeypatch.setattr(after, "_engine_node", lambda: "three")
        monkeypatch.setattr(module, "remove_folder", remove)
        await after._stop(0)
        assert sorted(removed) == [(after._folder, node) for node in ("one", "three", "two")]

    asyncio.run(main())


def test_a_cache_larger_than_memory_is_refused_before_anything_is_started(local_ray, path_checkpoint):
    async def main():
        children = make(local_ray, config(path_checkpoint, engine={"kv_cache_memory": "10000 GB"}))
        with pytest.raises(
            UserError, match=r"kv_cache_memory 10TB: allowed: at most [\d.]+[MG]B, the memory that is free"
        ):
            await asyncio.wait_for(children.start(), 60)
        assert children.stage == "starting" and children._group is None
        await children.stop(0)

    asyncio.run(main())


def test_no_room_in_a_cluster_is_waited_for_with_a_word_and_an_end(local_ray, path_checkpoint, monkeypatch):
    monkeypatch.delenv(run_folder.RUN_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(module, "ROOM_EVERY_S", 0.2)

    async def main():
        children = make(local_ray, config(path_checkpoint, gpus_per_host=1, start_timeout_s=2.0))
        start = asyncio.ensure_future(children.start())
        while "waiting" not in children.stage:
            await asyncio.sleep(0.05)
        assert "waiting for the cluster to grow: 1 hosts of 1 GPUs each" in children.stage
        assert "the cluster has 4 CPUs" in children.stage
        with pytest.raises(UnavailableError, match=r"no room for 1 hosts of 1 GPUs each .* within 2 s"):
            await start
        await children.stop(0)

    asyncio.run(main())
