"""Whole parts of a deployment lost while 16 clients ask, on a real Ray: no request fails, and every text is the
reference's. `make chaos`; tests/cluster/test_life_cycle.py kills a supervisor once."""

import os
import signal

import pytest
import ray

from pregate.cli.main import main
from pregate.cluster.local_ray import NAMESPACE, SUPERVISOR_PREFIX
from tests.chaos.deployed import Once, ask_all, deployed, processes
from tests.chaos.hosts import random_references
from tests.router.running import wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif("PREGATE_CHAOS_KILLS" not in os.environ, reason="make chaos"),
]
ROUNDS = 5
NUM_PROMPTS, NUM_TOKENS = 16, 60
IN_THE_MIDST = NUM_PROMPTS * NUM_TOKENS // 3
PARTS = ("EngineActor", "PathActor", "DoorActor", "ExpertHostActor")


@pytest.fixture(scope="module")
def references(tiny_path_checkpoint):
    return random_references(tiny_path_checkpoint, 17, NUM_PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def deployment(tiny_path_checkpoint):
    with deployed(tiny_path_checkpoint, hosts=2) as made:
        yield made
        print(made[0].lost, *(note for _, note in made[0].notes), sep="\n")


def pids():
    return {part: [process.pid for process in processes(part)] for part in PARTS}


def said(made, what):
    """How often that is among what the launcher was told."""
    return sum(what in note for _, note in made.notes)


def scale(hosts):
    return main(["scale", "--hosts", str(hosts), "--ray-address", "auto"])


def test_the_supervisor_killed_and_what_it_owned_adopted(deployment, references, capsys):
    """Nobody notices; what ran goes on running, the lease too, and the next supervisor can do what the first could."""
    made, target = deployment
    for _ in range(ROUNDS):
        before, deaths = pids(), said(made, "another one goes on")
        once = Once(IN_THE_MIDST, lambda: os.kill(processes("Supervisor")[0].pid, signal.SIGKILL))
        ask_all(target, references, once)
        once.wait()
        wait_for(lambda: said(made, "another one goes on") > deaths, 60, "another supervisor")  # noqa: B023
        assert pids() == before and made.lost is None
    assert main(["status", "--target", target]) == 0
    assert scale(3) == 0
    assert "3 hosts serve" in capsys.readouterr().out
    hosts = processes("ExpertHostActor")
    assert len(hosts) == 3
    hosts[0].kill()  # it looks after all it found
    wait_for(lambda: said(made, "runs again"), 60, "another host")
    ask_all(target, references)
    assert scale(2) == 0
    wait_for(lambda: len(processes("ExpertHostActor")) == 2, 60, "the end of the third host")


def test_the_supervisor_killed_while_hosts_come_and_go(deployment, references):
    """Whoever asked for them is answered by the next supervisor, and no host is left over."""
    made, target = deployment
    for number in range(ROUNDS):
        for hosts in (4, 2):
            deaths, at = said(made, "another one goes on"), IN_THE_MIDST // (number + 1)
            scaling = Once(at // 2, lambda: scale(hosts))  # noqa: B023
            killing = Once(at, lambda: os.kill(processes("Supervisor")[0].pid, signal.SIGKILL))

            def both(num_tokens):
                scaling(num_tokens)  # noqa: B023
                killing(num_tokens)  # noqa: B023

            ask_all(target, references, both)
            scaling.wait()
            wait_for(lambda: said(made, "another one goes on") > deaths, 60, "another supervisor")  # noqa: B023
            wait_for(lambda: len(processes("ExpertHostActor")) == hosts, 60, f"{hosts} hosts")  # noqa: B023
            ask_all(target, references)


@pytest.mark.parametrize("part", ["EngineActor", "DoorActor"])
def test_a_part_stopped_is_found_and_goes_on_when_it_wakes(deployment, references, part):
    """Its requests wait, and none fails."""
    made, target = deployment
    (process,) = processes(part)
    silent, awake = said(made, "no answer for"), said(made, "answers again")

    def pause():
        process.suspend()
        try:
            found_s = wait_for(lambda: said(made, "no answer for") > silent, 60, "a note")
            print(f"{part} that was stopped: found after {found_s:.1f} s")
        finally:
            process.resume()

    once = Once(IN_THE_MIDST, pause)
    ask_all(target, references, once)
    once.wait()
    wait_for(lambda: said(made, "answers again") > awake, 60, "its answer")
    assert processes(part) == [process]
    ask_all(target, references)


@pytest.mark.parametrize("part", ["EngineActor", "DoorActor"])
def test_a_part_stopped_for_long_is_replaced(deployment, references, part):
    """Clients that try again have the same texts; the one that was stopped is dead, and says nothing more."""
    made, target = deployment
    (process,), back = processes(part), said(made, "runs again")
    ask_all(target, references, Once(IN_THE_MIDST, process.suspend), retry_s=120)
    wait_for(lambda: said(made, "runs again") > back, 60, "another one")
    assert not process.is_running() and len(processes(part)) == 1
    ask_all(target, references)


def test_the_end_of_the_supervisors_actor_takes_all_it_owns(deployment):
    """In a cluster that goes on, too, nothing is left behind."""
    made, _ = deployment
    ray.kill(ray.get_actor(f"{SUPERVISOR_PREFIX}pregate", NAMESPACE))
    wait_for(lambda: not any(pids().values()), 60, "the end of all parts")
    wait_for(lambda: made.lost == "the supervisor of the deployment is gone", 60, "the launcher's loss")
    assert ray.util.list_named_actors(all_namespaces=True) == []
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}
