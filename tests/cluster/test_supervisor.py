"""The supervisor's own logic, with parts that only remember what they were asked (real ones: test_children.py)."""

import asyncio

import pytest
import ray

from pregate.base.errors import CheckpointError, UserError
from pregate.cluster import run_folder, supervisor
from pregate.cluster.owned import Health
from pregate.cluster.supervisor import Supervisor

CONFIG = {"model": "/m", "hosts": 2, "drain_s": 3.0}


class Children:
    """Parts that come up at once. `health` is what the next look finds."""

    def __init__(self) -> None:
        self.stage = "loading"
        self.health = Health()
        self.fault: Exception | None = None
        self.refuse_start: Exception | None = None
        self.stopped_with: list[float] = []
        self.dropped: list[str] = []
        self.adopted = False
        self.killed: list[str] = []
        self.release = asyncio.Event()
        self.release.set()

    async def start(self):
        if self.refuse_start is not None:
            raise self.refuse_start
        return {"endpoint": "ipc://e"}

    def saved(self):
        return {"endpoint": "ipc://e"}

    def adopt(self, saved):
        self.adopted = True
        return saved

    async def add_door(self, owner, options):
        return {"host": "127.0.0.1", "port": 1}

    async def drop_doors(self, owner, grace_s):
        self.dropped.append(owner)

    async def scale(self, hosts):
        if hosts > 6:
            raise UserError.of("--hosts", hosts, "allowed: 0 to 6")
        return {"hosts": hosts}

    async def check(self):
        if self.fault is not None:
            raise self.fault
        return self.health

    async def stop(self, grace_s):
        self.stopped_with.append(grace_s)
        await self.release.wait()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a scenario against a supervisor `one`; returns what it returns, and whether the actor ended itself."""
    monkeypatch.setenv(run_folder.RUN_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(supervisor, "CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(supervisor, "LAST_WORD_S", 0.0)
    killed = []
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("Context", (), {"current_actor": "me"}))

    def run(scenario):
        async def main():
            children = Children()
            children.killed = killed
            return await asyncio.wait_for(scenario(Supervisor("one", lambda *_: children, "key"), children), 10)

        return asyncio.run(main()), killed

    return run


def marks(folder):
    return [path.name for path in folder.glob("supervisor-*")]


async def status_when(one, wanted):
    while True:
        status = await one.status()
        if wanted(status):
            return status
        await asyncio.sleep(0.005)


async def start(one, launcher="serve"):
    await one.launch(launcher, CONFIG)
    return await status_when(one, lambda status: status["state"] != "starting")


def test_the_last_release_stops_all_and_all_went_well(run, tmp_path):
    async def scenario(one, children):
        await start(one)
        await start(one, "app")
        await one.release("serve")
        await one.release("serve")
        assert await one.holds("app")
        assert marks(tmp_path) == ["supervisor-one"]
        await one.release("app")
        while marks(tmp_path):
            await asyncio.sleep(0.005)
        assert await one.holds("serve")  # until it is gone itself
        return children.dropped, children.stopped_with

    (dropped, stopped_with), killed = run(scenario)
    assert (dropped, stopped_with, killed) == (["serve"], [3.0], ["me"])


def test_a_part_lost_for_good_fails_the_deployment_and_is_named(run, tmp_path):
    async def scenario(one, children):
        await start(one)
        children.release.clear()
        children.health = Health({"host 1": "its process died (ActorDiedError)"})
        status = await status_when(one, lambda status: status["state"] == "failed")
        assert (await one.launch("late", CONFIG))["state"] == "refused"
        await one.release("serve")
        await asyncio.sleep(0.05)
        return status["failure"], list(children.stopped_with), list(children.killed)

    (failure, stopped_with, killed), _ = run(scenario)
    assert failure == {"code": "UNAVAILABLE", "message": "host 1 is lost: its process died (ActorDiedError)"}
    assert stopped_with == [3.0, 3.0]  # the second waits for the first, which `RayChildren.stop` sees to
    assert killed == []  # not before what is left has stopped
    assert marks(tmp_path) == ["supervisor-one"]  # the logs are to be kept


def test_a_look_that_fails_is_told_and_the_logs_stay(run, tmp_path):
    async def scenario(one, children):
        await start(one)
        children.fault = KeyError("host-1")
        status = await status_when(one, lambda status: status["state"] != "ready")
        await asyncio.sleep(0.05)
        assert (await one.renew("serve"))["leased"]
        assert children.killed == []  # launchers are to hear of it
        await one.release("serve")
        while not children.killed:
            await asyncio.sleep(0.005)
        return status["state"], status["failure"]

    (state, failure), _ = run(scenario)
    assert (state, failure) == ("failed", {"code": "INTERNAL", "message": "KeyError: 'host-1'"})
    assert marks(tmp_path) == ["supervisor-one"]


def test_what_the_deployment_survives_is_told_once(run):
    async def scenario(one, children):
        await start(one)
        children.health = Health(notes=["door on port 1: it died; a new one is started"])
        await status_when(one, lambda status: status["notes"])
        children.health = Health()
        await asyncio.sleep(0.03)
        notes = (await one.status())["notes"]
        return notes, (await one.renew("serve"))["leased"]

    (notes, leased), _ = run(scenario)
    assert dict(notes).keys() == set(range(len(notes)))
    assert {note for _, note in notes} == {"door on port 1: it died; a new one is started"}
    assert leased


def test_a_start_that_fails_says_why_in_its_own_words(run, tmp_path):
    async def scenario(one, children):
        children.refuse_start = CheckpointError("config.json: damaged")
        return await start(one), list(children.stopped_with)

    (status, stopped_with), _ = run(scenario)
    assert status["failure"] == {"code": "INVALID_ARGUMENT", "message": "config.json: damaged"}
    assert stopped_with == [0]
    assert marks(tmp_path)


def test_a_deployment_is_scaled_while_it_serves_and_a_refusal_crosses_ray(run):
    async def scenario(one, children):
        before = await one.scale(2)
        await start(one)
        return before, await one.scale(2), await one.scale(7)

    (before, reached, refused), _ = run(scenario)
    assert before["failure"] == {"code": "UNAVAILABLE", "message": "deployment 'one' is new"}
    assert reached == {"hosts": 2}
    assert refused["failure"] == {"code": "INVALID_ARGUMENT", "message": "--hosts 7: allowed: 0 to 6"}


def test_a_lapsed_lease_stops_what_nobody_else_wants(run):
    async def scenario(one, children):
        await start(one)
        one._leases._expiry_s["serve"] = 0.0
        while not children.stopped_with:
            await asyncio.sleep(0.005)

    _, killed = run(scenario)
    assert killed in ([], ["me"])


def test_the_next_process_goes_on_with_what_runs_and_leases_go_on(run, tmp_path):
    async def scenario(one, children):
        await start(one)
        await start(one, "app")
        children.health = Health(notes=["door on port 1: it died; a new one is started"])
        before = await status_when(one, lambda status: status["notes"])
        after = Supervisor("one", lambda *_: children, "key")
        status = await after.status()
        assert children.adopted and children.stopped_with == []
        assert {name: status[name] for name in ("state", "launchers", "info")} == {
            name: before[name] for name in ("state", "launchers", "info")
        }
        assert (await after.renew("serve"))["leased"] and not (await after.renew("nobody"))["leased"]
        assert status["notes"][-1][1] == "the supervisor's process died; another one goes on"
        assert status["notes"][-1][0] > before["notes"][-1][0]
        await after.release("serve")
        await after.release("app")
        while not children.killed:
            await asyncio.sleep(0.005)
        return list(tmp_path.glob("pregate-ipc-*"))

    left, _ = run(scenario)
    assert left == []


def test_a_start_that_the_supervisor_did_not_survive_fails(run):
    async def scenario(one, children):
        waiting = asyncio.Event()
        children.start = waiting.wait
        await one.launch("serve", CONFIG)
        after = Supervisor("one", lambda *_: children, "key")
        status = await after.status()
        await after.release("serve")
        while not children.killed:
            await asyncio.sleep(0.005)
        return status, children.adopted

    (status, adopted), _ = run(scenario)
    assert not adopted and status["state"] == "failed"
    assert status["failure"] == {"code": "UNAVAILABLE", "message": "the supervisor died during the start"}


def test_a_supervisor_that_died_while_it_stopped_ends(run, tmp_path):
    async def scenario(one, children):
        await start(one)
        children.release.clear()
        await one.release("serve")
        others = Children()
        Supervisor("one", lambda *_: others, "key")
        while not children.killed:
            await asyncio.sleep(0.005)
        assert not others.adopted and others.stopped_with == [3.0] and not list(tmp_path.glob("pregate-ipc-*"))

    run(scenario)


def test_another_deployment_is_not_joined(run):
    async def scenario(one, children):
        await start(one)
        return await one.launch("app", {**CONFIG, "hosts": 3})

    reply, _ = run(scenario)
    assert reply["state"] == "refused"
    assert reply["failure"]["message"].startswith("--hosts 3: deployment 'pregate' is running with 2")
