"""Any number of hosts, any batch mix, both routings: held to the reference model. And the comparison can fail."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pregate.kernels.cpu import ffn as cpu
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine import channel_exchange
from pregate.router.engine.local_exchange import LocalExchange
from pregate.workers.link.protocol import HostPlan
from tests.equality import Tally, reference_text, reference_texts
from tests.router.serving import compare, engine_in_process, engine_over, expert_hosts, hold, serve

NUM_TOKENS = 24


def prompts_for(vocab_size, count=6):
    rng = np.random.default_rng(3)
    return [[1, *rng.integers(3, vocab_size, size=n).tolist()] for n in rng.integers(4, 60, size=count)]


@pytest.fixture(scope="module", params=["layerwise", "path"])
def served(request, tiny_layerwise_checkpoint, tiny_path_checkpoint, tmp_path_factory):
    """A checkpoint, prompts, their reference texts, and three running host processes."""
    path = tiny_path_checkpoint if request.param == "path" else tiny_layerwise_checkpoint
    model = RoutedForCausalLM.from_pretrained(path).eval()
    prompts = prompts_for(model.config.text_config.vocab_size)
    references = reference_texts(model, prompts, NUM_TOKENS)
    with expert_hosts(path, 3, tmp_path_factory.mktemp("ipc")) as addresses:
        yield path, prompts, references, addresses


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts", [0, 1, 2, 3])
def test_every_deployment_equals_the_reference(served, num_hosts):
    path, _, references, addresses = served
    with engine_over(path, addresses[:num_hosts], step_tokens=40) as engine:
        tally = hold(engine, f"{num_hosts} hosts", references)
        print(f"{path.name}, {num_hosts} hosts: {tally}")


def test_messages_of_a_step(served):
    """Exact paths: one plan per host, groups carry rows and identity only. Gates: every group carries an index."""
    path, prompts, _, addresses = served
    with engine_over(path, addresses[:2]) as engine:
        serve(engine, prompts[:3], 6, together=True)
        stats = [c.stats for c in engine.exchange.clients]
        if engine.exact:
            assert sum(s.plans for s in stats) == 2 * engine.info()["num_steps"]
            assert sum(s.indexed_groups for s in stats) == 0
        else:
            assert sum(s.plans for s in stats) == 0
            assert sum(s.indexed_groups for s in stats) == sum(s.groups for s in stats)
        assert sum(s.groups for s in stats) > 0


def break_row_order(monkeypatch):
    original = channel_exchange.make_plan

    def swapped(*args):
        plan = original(*args)
        return replace(plan, slots_LTK=plan.slots_LTK[:, ::-1].copy())

    monkeypatch.setattr(channel_exchange, "make_plan", swapped)


def break_a_weight(monkeypatch):
    from pregate.model.checkpoint import CheckpointReader

    original = CheckpointReader.read_unit

    def damaged(self, layer, expert, out=None):
        gate_up, down = original(self, layer, expert, out)
        return gate_up, torch.roll(down, 1, dims=0) if (layer, expert) == (1, 0) else down

    monkeypatch.setattr(CheckpointReader, "read_unit", damaged)


def break_an_offset(monkeypatch):
    original = HostPlan.layer

    def shifted(self, layer):
        index = original(self, layer)
        return type(index)(index.expert_ids, index.counts, np.roll(index.row_index, 1)) if layer == 1 else index

    monkeypatch.setattr(HostPlan, "layer", shifted)


def break_a_segment(monkeypatch):
    original = cpu.CpuSegments.layer

    def shifted(self, layer):
        one = original(self, layer)
        return one if one.tokens is None else replace(one, tokens=one.tokens.roll(1))

    monkeypatch.setattr(cpu.CpuSegments, "layer", shifted)


@pytest.mark.parametrize(
    ("damage", "num_hosts"),
    [(break_row_order, 2), (break_a_weight, 2), (break_an_offset, 2), (break_a_weight, 1), (break_a_segment, 1)],
)
def test_the_comparison_fails_when_the_served_path_is_broken(damage, num_hosts, tiny_path_checkpoint, monkeypatch):
    """Groups to two hosts, and whole layers where there is one; all in this process."""
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).eval()
    prompts = prompts_for(model.config.text_config.vocab_size, 2)
    references = [reference_text(model, p, 8) for p in prompts]
    damage(monkeypatch)
    tally = Tally()
    with engine_in_process(tiny_path_checkpoint, num_hosts) as engine:
        assert isinstance(engine.exchange, LocalExchange) == (num_hosts == 1)
        compare(tally, damage.__name__, references, serve(engine, prompts, 8, together=True))
    with pytest.raises(AssertionError, match=r"differ|token|reference"):
        tally.check()
