"""An engine that chooses steps by path gives the texts of one that does not, and says what it measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pregate.router.engine.batching import UnitLayout
from pregate.router.engine.engine import Engine
from pregate.router.engine.step_costs import _in_turn, _Timing
from pregate.router.link.messages import SamplingParams, SubmitRequest, TokensEvent
from tests.random_checkpoints import make_checkpoint
from tests.router.running import local_engine
from tests.router.serving import engine_of, hosts_here, placement_of

PROMPTS = [tuple(range(20 + n, 30 + n * 5)) for n in range(8)]
OPTIONS = {"step_tokens": 16, "max_running": 6, "check_steps": True, "max_batching_delay": 1e-3}


def texts(engine: Engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    todo = list(enumerate(PROMPTS))
    for _ in range(2000):
        if todo:
            name, prompt = todo.pop()
            engine.submit(SubmitRequest(str(name), prompt, SamplingParams(20, ignore_eos=True)))
        for event in engine.step():
            if isinstance(event, TokensEvent):
                found.setdefault(event.request_id, []).extend(event.token_ids)
        if not todo and not engine.has_work:
            engine.scheduler.allocator.check([])
            return found
    raise AssertionError("the engine did not come to an end")


@pytest.fixture(scope="module", params=["path", "predicted", "layerwise"])
def checkpoint(request, tmp_path_factory) -> Path:
    routing = "path" if request.param == "path" else "layerwise"
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    return make_checkpoint(folder, routing, predicted=request.param == "predicted")


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_the_texts_are_those_of_first_come_first_served(checkpoint, num_hosts):
    has_paths = checkpoint.parent.name.startswith(("path", "predicted"))
    with engine_of(checkpoint, hosts_here(checkpoint, num_hosts), **OPTIONS) as engine:
        expected = texts(engine)
        assert (engine.info()["batching"], engine.info()["step_costs"]) == ("fifo", None)
    assert len({tuple(text) for text in expected.values()}) > len(PROMPTS) // 2
    with engine_of(checkpoint, hosts_here(checkpoint, num_hosts), batching="path", **OPTIONS) as engine:
        assert texts(engine) == expected
        info = engine.info()
    assert info["batching"] == ("path" if has_paths else "fifo")
    assert info["num_step_tokens"] >= sum(map(len, PROMPTS)) + 19 * len(PROMPTS)
    if has_paths:
        assert engine.scheduler.choice is not None
        assert engine.scheduler.batcher is not None
        assert engine.scheduler.batcher.fit.factors_4.tolist() != [1, 1, 1, 1], "steps teach"
        costs = info["step_costs"]
        per_host = [costs[name] for name in ("row_s", "resident_byte_s", "missing_byte_s")]
        assert all(len(values) == num_hosts and min(values) > 0 for values in per_host)
        assert all(math.isfinite(costs[name]) and costs[name] >= 0 for name in ("dispatch_s", "step_s", "token_s"))


def test_what_a_unit_takes_is_measured_where_a_token_visits_all_of_a_host(path_checkpoint):
    """Hosts of as few units a layer as a token visits: else nothing would tell their bytes apart."""
    with engine_of(path_checkpoint, hosts_here(path_checkpoint, 3), **OPTIONS) as engine:
        layout = UnitLayout(placement_of(path_checkpoint, 3), [1000] * len(engine.config.cuts), 3)
        timing = _Timing(engine.runner.backbone, layout, 16)
        for host in range(3):
            one, whole = timing.tokens_of(host, 1), timing.units_of(host)
            assert timing.counts(one)[1] < timing.counts(whole)[1]
            assert timing.counts(one)[0] == len(engine.config.cuts)


@pytest.mark.parametrize("share", [0.25, 0.6, None])
def test_what_a_host_holds_is_timed_without_loads_and_what_is_missing_with(path_checkpoint, share):
    hosts = hosts_here(path_checkpoint, 2, resident_experts=share)
    with engine_of(path_checkpoint, hosts, batching="path", **OPTIONS) as engine:
        batcher = engine.scheduler.batcher
        assert batcher is not None
        timing = _Timing(engine.runner.backbone, batcher.layout, 16)
        for host, client in enumerate(hosts):
            held_LR, num_all = timing.held_by(host), int((batcher.layout.host_U == host).sum())
            held, whole = timing.units_of(host, held_LR), timing.units_of(host)
            assert (held_LR is None) == (share is None)
            num_held = int((batcher.layout.rows(held) > 0).sum())
            assert num_held == (num_all if held_LR is None else client.cache.num_units)
            timing.layers_s(held)
            before = client.cache.units_read
            for ids_TLK in (timing.tokens_of(host, 1, held_LR), timing.tokens_of(host, 9, held_LR), held):
                timing.layers_s(ids_TLK)
            assert client.cache.units_read == before
            timing.layers_s(whole)
            assert (client.cache.units_read > before) == (num_held < num_all)


def test_slots_are_shared_out_to_layers_in_turn():
    assert _in_turn([3, 1, 3], 6) == [3, 1, 2]
    assert _in_turn([3, 1, 3], 2) == [1, 1, 0]
    assert _in_turn([3, 0, 3], 99) == [3, 0, 3]


@pytest.mark.parametrize("step_tokens", [1, 2])
def test_costs_are_measured_in_steps_no_larger_than_agreed(path_checkpoint, step_tokens):
    options = OPTIONS | {"step_tokens": step_tokens}
    with engine_of(path_checkpoint, hosts_here(path_checkpoint, 2), **options) as engine:
        expected = texts(engine)
    with local_engine(path_checkpoint, 2, batching="path", **options) as engine:  # hosts that hold it to the bound
        assert texts(engine) == expected
        assert min(engine.info()["step_costs"]["row_s"]) > 0


@pytest.mark.parametrize("batching", ["decode-first", "prefill-first"])
def test_other_policies_give_the_same_texts(path_checkpoint, batching):
    with engine_of(path_checkpoint, hosts_here(path_checkpoint, 1), **OPTIONS) as engine:
        expected = texts(engine)
    with engine_of(path_checkpoint, hosts_here(path_checkpoint, 1), batching=batching, **OPTIONS) as engine:
        assert texts(engine) == expected
        assert engine.info()["batching"] == batching
