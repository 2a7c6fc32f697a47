"""Shared and routed experts of a served model run through the kernels' entry point, however many hosts there are."""

import pytest

from pregate.kernels import reference
from pregate.kernels.cpu.ffn import LoopFFN
from pregate.model.checkpoint import CheckpointReader
from pregate.model.layers import SharedExpert
from tests.router.serving import engine_in_process, serve


def forbidden(*_):
    raise AssertionError("an expert ran on the reference, past the entry point")


def noted(monkeypatch, name: str) -> list[int]:
    """The rows of every call of an entry point of `LoopFFN`, the base of every CPU implementation; it runs as ever."""
    found, real = [], getattr(LoopFFN, name)

    def call(self, x, *args, **kwargs):
        found.append(len(x))
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(LoopFFN, name, call)
    return found


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_every_expert_of_every_step_goes_through_the_entry_point(tiny_layerwise_checkpoint, num_hosts, monkeypatch):
    rows = {name: noted(monkeypatch, name) for name in ("dense", "pairs", "layer")}
    cuts = CheckpointReader(tiny_layerwise_checkpoint).config.cuts
    num_layers = sum(cut.num_shared > 0 for cut in cuts)
    assert num_layers == len(cuts) and all(cut.num_active for cut in cuts)
    with engine_in_process(tiny_layerwise_checkpoint, num_hosts) as engine:
        monkeypatch.setattr(SharedExpert, "forward", forbidden)
        monkeypatch.setattr(reference, "add_routed", forbidden)
        for found in rows.values():
            found.clear()
        served = serve(engine, [[1, 5, 6, 7]], 4, together=True)
    assert len(served.tokens["0"]) == 4
    prompt, tokens = [4] * num_layers, [1] * num_layers * 3
    assert rows["dense"] == prompt + tokens, "one prompt, three more tokens"
    routed = rows["pairs"] + rows["layer"]
    assert num_layers * 4 <= len(routed) <= num_layers * 4 * num_hosts, "each layer of each step, by one host or more"
