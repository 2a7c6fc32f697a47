"""Captured decode steps: what becomes of a step's inputs, what is not captured, and what follows where a capture fails.

Equality of replayed steps is held in test_triton_serving.py, on a tape; on a device by the last test here.
"""

import pytest
import torch

from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine import decode_graphs
from pregate.router.engine.local_exchange import LocalExchange
from tests.equality import reference_text
from tests.router.serving import engine_of, hold, hosts_here


def references(path, num_tokens):
    model = RoutedForCausalLM.from_pretrained(path).eval()
    return [reference_text(model, [1, *range(40, 40 + n)], num_tokens) for n in (20, 11, 3)]


def test_a_step_fills_its_bucket_with_its_first_sequence_and_block_0():
    step = {"ids": torch.tensor([5, 6, 7]), "blocks": torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]])}
    filled = decode_graphs._to_bucket(step, 4, 4)
    assert filled["ids"].tolist() == [5, 6, 7, 5]
    assert filled["blocks"].tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [6, 0, 0, 0], [1, 2, 3, 0]]
    assert [decode_graphs._bucket(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_rope_types_of_a_model_and_of_each_kind_of_layer():
    assert decode_graphs.rope_types(None) == set()
    assert decode_graphs.rope_types({"rope_type": "longrope", "factor": 2.0}) == {"longrope"}
    nested = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    assert decode_graphs.rope_types(nested) == {"dynamic", "default"}


def test_on_a_cpu_nothing_is_captured(tiny_path_checkpoint):
    with engine_of(tiny_path_checkpoint, hosts_here(tiny_path_checkpoint, 1)) as engine:
        assert engine.runner.graphs is None


def test_what_cannot_be_captured_runs_uncaptured_and_is_tried_once(tiny_path_checkpoint, monkeypatch, caplog):
    """A capture that finds no memory must not fail the requests of its step, nor those of every step after it."""
    tried = []

    def fails(step, *_):
        tried.append(step())  # a capture may have run a part of the step
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(decode_graphs, "capture", fails)
    path = tiny_path_checkpoint
    with engine_of(path, hosts_here(path, 1, expert_ffn="grouped"), check_steps=True) as engine:
        runner, exchange = engine.runner, engine.exchange
        assert isinstance(exchange, LocalExchange)
        runner.graphs = decode_graphs.DecodeGraphs(runner.backbone, exchange, runner.kv)
        hold(engine, "not captured", references(path, 8))
        sizes = runner.graphs._captured
    assert len(tried) == len(sizes) > 1
    assert set(sizes.values()) == {None}
    assert "are not captured: CUDA out of memory" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_steps_are_captured_and_equal(tiny_path_checkpoint):
    path = tiny_path_checkpoint
    with engine_of(path, hosts_here(path, 1, device="cuda", dtype="float32"), device="cuda") as engine:
        hold(engine, "captured", references(path, 24))
        assert engine.runner.graphs is not None
        assert None not in engine.runner.graphs._captured.values()
