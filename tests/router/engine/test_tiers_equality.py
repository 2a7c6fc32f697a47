"""Hosts with room for fewer experts than they serve, slow and failing loads: every text is the reference model's."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pregate.base.errors import UserError
from pregate.convert.paths.decouple import decouple
from pregate.convert.paths.options import DecoupleOptions
from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.local_exchange import LocalExchange
from pregate.router.link.messages import FailedEvent, SamplingParams, SubmitRequest
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.next_use import FAR
from pregate.workers.host.options import HostOptions
from tests.equality import reference_texts
from tests.router.serving import engine_of, engine_over, expert_hosts, hold, placement_of, units_of
from tests.workers.unsteady import UnsteadyReader

SHIPPED = Path(__file__).resolve().parents[3] / "examples" / "quartet-paths"
PROMPTS = [[1, *range(30, 30 + n)] for n in (3, 40)] + [[7, *range(90, 150, 2)]]


@pytest.fixture(scope="module", params=["layerwise", "path"])
def checkpoint(request, tiny_layerwise_checkpoint, tiny_path_checkpoint):
    return tiny_path_checkpoint if request.param == "path" else tiny_layerwise_checkpoint


@pytest.fixture(scope="module")
def references(checkpoint):
    return reference_texts(RoutedForCausalLM.from_pretrained(checkpoint).eval(), PROMPTS, 8)


@contextmanager
def tiered(path, num_hosts: int, share: float, trouble: dict | None = None, engine: dict | None = None, **options):
    """An engine over hosts that keep `share` of their experts; yields it, the readers and the hosts."""
    hosts_of = placement_of(path, num_hosts)
    readers: list[Any] = [UnsteadyReader(CheckpointReader(path), seed=n, **(trouble or {})) for n in range(num_hosts)]
    resident = None if share == 1 else share
    hosts = [
        ExpertHost(reader, units_of(hosts_of, n), HostOptions(host_id=n, resident_experts=resident, **options))
        for n, reader in enumerate(readers)
    ]
    with engine_of(path, [InProcessClient(host) for host in hosts], **{"step_tokens": 24, **(engine or {})}) as made:
        for reader in readers:
            reader.begin()
        yield made, readers, hosts
        for host in hosts:
            for pool in (room.pool for room in host._store.rooms):
                pool.check()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 1])
@pytest.mark.parametrize("num_hosts", [1, 2])
def test_texts_are_the_references_with_slow_and_failing_loads(checkpoint, references, num_hosts, share):
    trouble = {"delay_s": 0.0004, "fails_every": 7}
    with tiered(checkpoint, num_hosts, share, trouble) as (engine, readers, hosts):
        hold(engine, f"{num_hosts} hosts, {share} resident", references, together=(True,))
        stats = [host.status() for host in hosts]
    if share == 1:
        assert sum(reader.num_reads for reader in readers) == 0
        return
    assert sum(reader.num_failed for reader in readers) > 0
    for host in stats:
        assert host["num_units"] <= max(2, share * 18)
        assert host["hits"] + host["misses"] > 0
        assert host["stall_s"] > 0


@pytest.mark.parametrize("options", [{"lookahead": False}, {"host_memory": 1 << 17}, {"expert_ffn": "loop"}])
def test_texts_are_the_references_on_demand_with_host_memory_and_in_groups(checkpoint, references, options):
    with tiered(checkpoint, 1, 0.4, **options) as (engine, _, hosts):
        hold(engine, str(options), references, together=(True,))
        assert (hosts[0].status()["prefetched_bytes"] == 0) == (not options.get("lookahead", engine.exact))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("num_hosts", [1, 2])
def test_experts_stored_in_16_bits_lie_in_them_in_their_slots(num_hosts, share):
    references = reference_texts(RoutedForCausalLM.from_pretrained(SHIPPED).float().eval(), PROMPTS, 8)
    with tiered(SHIPPED, num_hosts, share, {"delay_s": 0.0004, "fails_every": 7}) as (engine, _, hosts):
        hold(engine, f"16 bits, {num_hosts} hosts, {share} resident", references, together=(True,))
        for status in (host.status() for host in hosts):
            assert status["expert_ffn"] == "stored"
            assert status["held_bytes"] == status["num_units"] * hosts[0]._reader.unit_bytes(0)


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_prompts_of_more_rows_than_16_bits_are_read_for_as_they_lie(num_hosts):
    """An expert gets more than `stored.MOST_ROWS`: in whole layers of one host, in groups of two."""
    prompts = [[1, *range(30, 230)], [7, *range(400, 240, -1)]]
    references = reference_texts(RoutedForCausalLM.from_pretrained(SHIPPED).float().eval(), prompts, 4)
    with tiered(SHIPPED, num_hosts, 0.75, engine={"step_tokens": 256}) as (engine, _, _):
        hold(engine, f"16 bits, many rows, {num_hosts} hosts", references, together=(True,))


def test_whole_layers_run_where_there_is_room_for_two(checkpoint, references):
    """Three layers of six units: 13 slots hold two layers, nine do not."""
    with tiered(checkpoint, 1, 0.75) as (engine, _, hosts):
        assert isinstance(engine.exchange, LocalExchange)
        hold(engine, "whole layers", references)
        assert hosts[0].status()["evictions"] > 0
    with tiered(checkpoint, 1, 0.5) as (engine, _, _):
        assert not isinstance(engine.exchange, LocalExchange)


def test_a_unit_that_cannot_be_read_ends_its_requests_with_a_reason_and_the_host_lives(checkpoint, references):
    with tiered(checkpoint, 1, 0.3, engine={"prefix_sharing": False}) as (engine, readers, _):
        readers[0].broken = {(layer, expert) for layer in range(3) for expert in range(8)}
        for n in range(2):
            engine.submit(SubmitRequest(str(n), tuple(PROMPTS[1]), SamplingParams(4, ignore_eos=True)))
        events = [event for _ in range(3) for event in engine.step()]
        assert {event.request_id for event in events if isinstance(event, FailedEvent)} == {"0", "1"}
        assert all(
            "cannot be loaded: the disk did not answer" in e.message for e in events if isinstance(e, FailedEvent)
        )
        readers[0].broken = set()
        hold(engine, "after the failure", references, together=(True,))


def test_predicted_paths_fetch_ahead_and_gates_correct_them(tiny_layerwise_checkpoint, tiny_text, tmp_path):
    path = tmp_path / "predicted"
    decouple(DecoupleOptions(tiny_layerwise_checkpoint, path, (tiny_text,), steps=30, dim=32, predict=True))
    model = RoutedForCausalLM.from_pretrained(path).eval()
    with tiered(path, 2, 0.5) as (engine, _, hosts):
        assert not engine.exact
        hold(engine, "predicted", reference_texts(model, PROMPTS, 8))
        assert all(host.status()["prefetched_bytes"] > 0 and host.status()["misses"] > 0 for host in hosts)


@pytest.mark.parametrize("num_hosts", [1, 2])
@pytest.mark.parametrize("ends", ["cancelled", "failed"])
def test_hosts_mean_to_fetch_nothing_for_requests_that_ended_early(tiny_path_checkpoint, num_hosts, ends):
    with tiered(tiny_path_checkpoint, num_hosts, 0.3, engine={"prefix_sharing": False}) as (engine, readers, hosts):
        engine.submit(SubmitRequest("a", tuple(PROMPTS[1]), SamplingParams(4, ignore_eos=True)))
        if ends == "failed":
            readers[0].broken = {(layer, expert) for layer in range(3) for expert in range(8)}
        engine.step()
        engine.cancel("a")
        engine.idle()
        for host in hosts:
            host.close()  # what is begun comes before slots are looked at
            assert not (host._store.uses.look().known_LR < FAR // 2).any()


@pytest.mark.slow
def test_texts_are_the_references_with_hosts_in_processes_of_their_own(tiny_path_checkpoint, tmp_path):
    path, model = tiny_path_checkpoint, RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).eval()
    with (
        expert_hosts(path, 2, tmp_path, resident_experts=0.4) as addresses,
        engine_over(path, addresses, step_tokens=24) as engine,
    ):
        assert engine.exchange.wants_lookahead
        hold(engine, "two processes", reference_texts(model, PROMPTS, 8), together=(True,))


def test_room_for_less_than_two_experts_is_refused(tiny_path_checkpoint):
    units = units_of(placement_of(tiny_path_checkpoint, 1), 0)
    for value in (1.0, 100.0):
        with pytest.raises(UserError, match=rf"resident_experts {value:g}: allowed: (2|\d+ bytes) or more"):
            ExpertHost(CheckpointReader(tiny_path_checkpoint), units, HostOptions(resident_experts=value))
    num_bytes = CheckpointReader(tiny_path_checkpoint).unit_bytes(0) * 5
    host = ExpertHost(CheckpointReader(tiny_path_checkpoint), units, HostOptions(resident_experts=float(num_bytes)))
    assert host.status()["num_units"] == 5
    host.close()
