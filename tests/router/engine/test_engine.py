"""Overload and isolation in one engine: what one request does, or a host fails at, ends no other."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from pregate.base.errors import HostLostError, PregateError, ProtocolError, QueueFullError, UserError
from pregate.model.packed_paths import PackedPaths
from pregate.model.paths import Paths
from pregate.router.engine.engine import Engine
from pregate.router.engine.options import EngineOptions
from pregate.router.link.messages import FailedEvent, PackedState, SamplingParams, SubmitRequest, TokensEvent
from tests.router.serving import engine_of, hosts_here

#: Of a checkpoint of tests/random_checkpoints.py: 3 layers, keys and values of 2 heads of 16 floats.
TOKEN_BYTES = 3 * 2 * 2 * 16 * 4
PROMPTS = {name: (1, *range(20 + n, 40 + n * 9, 3)) for n, name in enumerate("abcd")}


def submit(engine: Engine, name: str, max_tokens: int = 8, **more) -> None:
    sampling = SamplingParams(max_tokens, ignore_eos=True, **more.pop("sampling", {}))
    engine.submit(SubmitRequest(name, PROMPTS[name[0]], sampling, **more))


def run(engine: Engine, before_step=lambda: None) -> dict[str, list[int] | str]:
    """Step until nothing is left; per request its tokens, or why it failed."""
    texts: dict = {}
    for _ in range(1000):
        if not engine.has_work:
            engine.scheduler.allocator.check([])
            return texts
        before_step()
        for event in engine.step():
            if isinstance(event, TokensEvent):
                texts.setdefault(event.request_id, []).extend(event.token_ids)
            elif isinstance(event, FailedEvent):
                texts[event.request_id] = event.message
            elif event.reason in ("deadline", "cancelled"):
                texts[event.request_id] = event.reason
    raise AssertionError("the engine did not come to an end")


@pytest.fixture(scope="module", params=["layerwise", "path"])
def path(request, layerwise_checkpoint, path_checkpoint):
    return layerwise_checkpoint if request.param == "layerwise" else path_checkpoint


@pytest.fixture(scope="module")
def engine(path):
    """Two hosts in this process; two sequences may run, two wait, and 96 tokens are room for."""
    limits: Any = {"max_running": 2, "max_queued": 2, "kv_cache_memory": 96 * TOKEN_BYTES, "step_tokens": 16}
    with engine_of(path, hosts_here(path, 2), **limits) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_left(engine):
    """A test that fails leaves nothing to the next."""
    yield
    engine.fail_all(PregateError("the test is over"))


@pytest.fixture(scope="module")
def alone(engine) -> dict[str, list[int]]:
    """The texts of all prompts, each by itself."""
    texts = {}
    for name in PROMPTS:
        submit(engine, name)
        texts |= run(engine)
    assert len({tuple(t) for t in texts.values()}) == len(texts)
    return texts


def test_a_full_queue_refuses_and_those_before_are_served(engine, alone):
    for name in ("a", "b", "c", "d"):
        submit(engine, name)
    for _ in range(2):
        with pytest.raises(QueueFullError, match="holds 2 requests, its bound"):
            submit(engine, "a2")
        engine.step()  # the two that may run begin to: nobody who waits is any less
    assert run(engine)["d"] == alone["d"]


def test_requests_that_outgrow_the_cache_make_room_for_each_other(engine, alone):
    """Two of 60 tokens begin side by side in 96; the younger gives way, is computed again, and nobody notices."""
    preempted = engine.scheduler.num_preempted
    for name in "ab":
        submit(engine, name, 60 - len(PROMPTS[name]))
    texts = run(engine)
    assert engine.scheduler.num_preempted > preempted
    assert all(texts[name][:8] == alone[name] and len(texts[name]) == 60 - len(PROMPTS[name]) for name in "ab")
    for name in "ab":
        submit(engine, name, 60 - len(PROMPTS[name]))
        assert run(engine)[name] == texts[name], "the text it gives alone"
    with pytest.raises(UserError, match="exceeds the KV cache of 96 tokens"):
        submit(engine, "c", 300)


def test_what_is_computed_of_a_prompt_is_shared_with_equal_ones_of_the_same_salt(engine, alone):
    matched = engine.scheduler.num_matched_tokens
    ids = tuple(PROMPTS["d"] * 2)
    texts = {}
    for name, salt, found in (("x", "one", 0), ("y", "one", (len(ids) - 1) // 16 * 16), ("z", "other", 0)):
        engine.submit(SubmitRequest(name, ids, SamplingParams(8, ignore_eos=True), cache_salt=salt))
        texts |= run(engine)
        assert engine.scheduler.num_matched_tokens - matched == found
        matched += found
    assert texts["x"] == texts["y"] == texts["z"]


def test_neighbours_that_leave_change_nothing(engine, alone):
    """One is cancelled while it runs, one while it waits, one is past its deadline."""
    submit(engine, "a")
    submit(engine, "b", 50)
    engine.step()
    submit(engine, "c", deadline_s=0.0)
    submit(engine, "d")
    engine.cancel("d")
    engine.cancel("nobody")
    engine.step()
    engine.cancel("b")
    texts = run(engine)
    assert texts["a"][-4:] == alone["a"][-4:]
    submit(engine, "b")
    assert run(engine) == {"b": alone["b"]}


def test_a_bad_request_beside_good_ones(engine, alone):
    submit(engine, "a")
    for bad, complaint in (
        (SubmitRequest("x", (), SamplingParams(3)), "of 0 tokens"),
        (SubmitRequest("x", (1, 999), SamplingParams(3)), "token id 999"),
        (SubmitRequest("x", (1,), SamplingParams(3, top_p=0.0)), "must be above 0"),
        (SubmitRequest("a", (1,), SamplingParams(3)), "is running already"),
    ):
        with pytest.raises(UserError, match=complaint):
            engine.submit(bad)
    assert run(engine) == {"a": alone["a"]}


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_what_others_left_in_the_cache_poisons_nobody(engine, alone, poison):
    """Slot 0 and all that is free hold no numbers, as after an overflow in half precision."""
    size = engine.options.block_size

    @torch.inference_mode()
    def spoil() -> None:
        owned = {b for s in engine.scheduler.running for b in s.table}
        free = [b for b in range(engine.scheduler.allocator.num_blocks) if b not in owned]
        slots = torch.tensor([b * size + i for b in free for i in range(size)])
        for layer, parts in enumerate(zip(engine.runner.kv.keys, engine.runner.kv.values, strict=True)):
            engine.runner.kv.write(layer, slots, *(torch.full_like(part[slots], poison) for part in parts))

    submit(engine, "b", 3)  # takes block 0, and leaves it
    submit(engine, "c")
    engine.step()
    submit(engine, "a")
    submit(engine, "d")
    texts = run(engine, spoil)
    assert (texts["a"], texts["d"]) == (alone["a"], alone["d"])


def test_a_host_without_memory_fails_the_step_and_no_more(engine, alone, monkeypatch):
    host = engine.exchange.clients[1]._host
    compute = host.compute

    def hungry(*group):
        monkeypatch.undo()  # the next group finds memory again
        return torch.empty(1 << 50)

    submit(engine, "a")
    submit(engine, "b")
    engine.step()
    monkeypatch.setattr(host, "compute", hungry)
    submit(engine, "c")
    texts = run(engine)
    assert "memory" in str(texts["a"]) or "memory" in str(texts["b"])
    assert texts["c"] == alone["c"]
    assert host.compute == compute
    submit(engine, "a")
    assert run(engine) == {"a": alone["a"]}


def test_an_engine_without_memory_fails_the_step_and_no_more(engine, alone, monkeypatch):
    def hungry(*step):
        monkeypatch.undo()
        return torch.empty(1 << 50)

    submit(engine, "a")
    monkeypatch.setattr(engine.runner.backbone, "forward", hungry)
    submit(engine, "b")
    failed = run(engine)
    assert "memory" in str(failed["a"])
    submit(engine, "a")
    assert run(engine) == {"a": alone["a"]}


@pytest.mark.parametrize("where", ["sampling", "paths"])
def test_an_engine_without_memory_after_the_forward_pass_fails_the_step_and_no_more(engine, alone, monkeypatch, where):
    if where == "paths" and not engine.exact:
        pytest.skip("gates need no paths")

    def hungry(*_):
        monkeypatch.undo()
        return torch.empty(1 << 50)

    submit(engine, "a")
    if where == "sampling":
        monkeypatch.setattr("pregate.router.engine.runner.sample", hungry)
    else:
        monkeypatch.setattr(engine.paths._slots, "extend", hungry)
    assert "memory" in str(run(engine)["a"])
    submit(engine, "a")
    assert run(engine) == {"a": alone["a"]}


def test_a_prompt_whose_paths_find_no_memory_is_refused_and_leaves_nothing(engine, alone, monkeypatch):
    if not engine.exact:
        pytest.skip("gates need no paths")
    monkeypatch.setattr(engine.computer, "extend", lambda *_: torch.empty(1 << 50))
    with pytest.raises(PregateError, match="out of memory"):
        submit(engine, "a")
    with pytest.raises(PregateError, match="out of memory"):
        engine.route([1, 2, 3])
    monkeypatch.undo()
    assert not engine.has_work
    submit(engine, "a")
    assert run(engine) == {"a": alone["a"]}


def test_a_step_without_hosts_raises_and_is_run_again_when_they_are_back(engine, alone, monkeypatch):
    """The requests wait; those whose deadline comes first end with the reason."""

    def lost(*_):
        raise HostLostError(0, "silent for 3.1 s")

    submit(engine, "a")
    with monkeypatch.context() as patch:
        for client in engine.exchange.clients:
            patch.setattr(client, "receive", lost)
            patch.setattr(client, "poll", lost)
            patch.setattr(client, "returned", lambda: False)
        for _ in range(2):
            with pytest.raises(HostLostError) as caught:
                engine.step()
        with pytest.raises(HostLostError):
            engine.idle()
        submit(engine, "b", deadline_s=0.01)
        time.sleep(0.05)
        assert [(e.request_id, e.code) for e in engine.expire(caught.value)] == [("b", "UNAVAILABLE")]
    time.sleep(0.3)
    engine.idle()
    assert run(engine) == {"a": alone["a"]}


def test_seeded_texts_are_the_same_whatever_the_batch(engine):
    sampling = [{"temperature": 1.0, "top_p": p, "seed": n} for n, p in enumerate((1.0, 0.8))]
    together = {}
    for name, how in zip("ab", sampling, strict=True):
        submit(engine, name, sampling=how)
    together = run(engine)
    for name, how in zip("ab", sampling, strict=True):
        submit(engine, name, sampling=how)
        assert run(engine) == {name: together[name]}


def test_gates_make_no_plan_for_hosts(layerwise_checkpoint, monkeypatch):
    """A group of a gated layer carries its own index: nothing is sent up front."""
    from pregate.router.engine import planning

    made = []
    original = planning.HostPlan
    monkeypatch.setattr(planning, "HostPlan", lambda **fields: (made.append(1), original(**fields))[1])
    with engine_of(layerwise_checkpoint, hosts_here(layerwise_checkpoint, 2)) as engine:
        submit(engine, "a", 3)
        run(engine)
    assert not made


def test_paths_that_come_with_a_request_are_those_it_runs_by(engine, alone):
    """As a path service sends them; of another length or model they are refused, and nothing is left."""
    if not engine.exact:
        pytest.skip("gates need no paths")
    ids = PROMPTS["b"]
    (paths,), (state,) = engine.computer.extend([engine.computer.new_state()], [list(ids)])
    packed, sampling = PackedPaths.of(paths), SamplingParams(8, ignore_eos=True)
    kept = state.kept.numpy()
    given = PackedState(kept.astype("<f8").tobytes(), kept.shape)
    with pytest.raises(ProtocolError, match="the prompt has"):
        engine.submit(SubmitRequest("b", ids[1:], sampling, paths=packed, path_state=given))
    other = PackedState(kept[:, :, :1].astype("<f8").tobytes(), (*kept.shape[:2], 1))
    with pytest.raises(ProtocolError, match="path state"):
        engine.submit(SubmitRequest("b", ids, sampling, paths=packed, path_state=other))
    assert engine.paths.num_sequences == 0 and not engine.has_work
    engine.submit(SubmitRequest("b", ids, sampling, paths=packed, path_state=given))
    assert run(engine) == {"b": alone["b"]}


@pytest.mark.parametrize("fault", ["columns", "weights", "ids of a byte", "a short state", "a state of no number"])
def test_paths_that_later_tokens_would_not_fit_are_refused_and_end_nothing(engine, alone, monkeypatch, fault):
    """They would be found out by an assertion of the compute thread, which ends the deployment, or never."""
    if not engine.exact:
        pytest.skip("gates need no paths")
    ids = PROMPTS["b"]
    (paths,), (state,) = engine.computer.extend([engine.computer.new_state()], [list(ids)])
    kept, max_id = state.kept.numpy().copy(), None
    if fault == "columns":
        paths = Paths(np.pad(paths.ids, ((0, 0), (0, 0), (0, 1)), constant_values=-1), paths.weights)
    elif fault == "weights":
        paths = Paths(paths.ids, np.ones(paths.ids.shape, np.float32) if paths.weights is None else None)
    elif fault == "ids of a byte":
        max_id = 255
        monkeypatch.setattr(engine.paths, "_max_id", 300)
    elif fault == "a short state":
        kept = kept[1:]
    else:
        kept[0, 0, 0] = np.nan
    given = PackedState(kept.astype("<f8").tobytes(), kept.shape)
    sampling = SamplingParams(8, ignore_eos=True)
    with pytest.raises(ProtocolError, match="path"):
        engine.submit(SubmitRequest("b", ids, sampling, paths=PackedPaths.of(paths, max_id), path_state=given))
    assert engine.paths.num_sequences == 0 and not engine.has_work
    submit(engine, "a")
    assert run(engine) == {"a": alone["a"]}


def test_the_end_of_a_request_does_not_walk_the_whole_cache(engine, alone, monkeypatch):
    """On 65,536 blocks that took 0.37 s, before the last event went out."""
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.allocator, "check", lambda _: pytest.fail("the whole cache was checked"))
        submit(engine, "a")
        while engine.has_work:
            engine.step()


def test_steps_are_checked_with_their_plans_where_that_is_asked_for(path, monkeypatch):
    checked = []
    monkeypatch.setattr("pregate.router.engine.channel_exchange.check_plan", lambda *args: checked.append(args))
    for check_steps in (False, True):
        with engine_of(path, hosts_here(path, 2), check_steps=check_steps) as engine:
            submit(engine, "a", 3)
            run(engine)
        assert bool(checked) == check_steps


def test_a_stop_list_is_bounded_by_the_vocabulary_and_costs_a_step_nothing(engine, alone):
    """Each token is looked up in it, on the thread that steps for everyone."""
    with pytest.raises(UserError, match=r"stop_token_ids of 257 ids: allowed: at most 256"):
        submit(engine, "a", sampling={"stop_token_ids": (3,) * 257})
    submit(engine, "a", sampling={"stop_token_ids": (alone["a"][4],) * 256})
    assert run(engine)["a"] == alone["a"][: alone["a"].index(alone["a"][4])]


def test_a_stop_list_that_leaves_nothing_for_min_tokens_is_refused(engine):
    """Nothing could be picked, and a text of none came."""
    with pytest.raises(UserError, match="min_tokens 2: with stop_token_ids of the whole vocabulary leaves no token"):
        submit(engine, "a", sampling={"stop_token_ids": tuple(range(256)), "min_tokens": 2})


def test_a_cache_larger_than_memory_is_refused_before_it_is_made():
    options = EngineOptions("m", kv_cache_memory=1e13)
    with pytest.raises(UserError, match="kv_cache_memory 10TB: allowed: at most 4000, the memory that is free"):
        options.kv_blocks(512, 64, lambda: 4000)
    assert EngineOptions("m", kv_cache_memory=0.5).kv_blocks(512, 64, lambda: 4096) == 2


def test_a_block_larger_than_the_context_is_refused_by_name():
    """It was 50 s until the system refused the memory, and named nothing."""
    for size in (513, 10**9):
        with pytest.raises(UserError, match=f"block_size {size}: is more than the context; allowed: 1 to 512"):
            EngineOptions("m", block_size=size).kv_blocks(512, 64, lambda: 1 << 40)
    assert EngineOptions("m").kv_blocks(8, 64, lambda: 1 << 40) == 32, "the default is for every context"


@pytest.mark.parametrize("context", [512, 8192, 131_072])
def test_large_blocks_leave_room_for_all_who_may_run(context):
    sizes = [2**n for n in range(4, 18) if 2**n <= context]
    for max_running in (1, 64, 10**12):
        few = min(EngineOptions("m", block_size=n, max_running=max_running).kv_blocks(context, 64, int) for n in sizes)
        assert few >= min(max_running, 2048)
