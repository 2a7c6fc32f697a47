"""The backbone's shared experts run through the kernels' entry point, whether hosts are asked or one is at hand."""

import pytest

from pregate.kernels.cpu import LoopFFN
from pregate.model.checkpoint import CheckpointReader
from pregate.model.layers import SharedExpert
from tests.router.serving import engine_in_process, serve


def forbidden(*_):
    raise AssertionError("a shared expert ran on the reference, past the entry point")


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_every_shared_expert_of_every_step_goes_through_the_entry_point(
    tiny_layerwise_checkpoint, num_hosts, monkeypatch
):
    widths, dense = [], LoopFFN.dense

    def noted(self, x_TD, weights):
        """The base of every CPU implementation but for what it counts."""
        widths.append(x_TD.shape)
        return dense(self, x_TD, weights)

    monkeypatch.setattr(LoopFFN, "dense", noted)
    monkeypatch.setattr(SharedExpert, "forward", forbidden)
    cuts = CheckpointReader(tiny_layerwise_checkpoint).config.cuts
    num_layers = sum(cut.num_shared > 0 for cut in cuts)
    assert num_layers
    with engine_in_process(tiny_layerwise_checkpoint, num_hosts) as (engine, _):
        widths.clear()
        served = serve(engine, [[1, 5, 6, 7]], 4, together=True)
    assert len(served.tokens["0"]) == 4
    assert [shape[0] for shape in widths] == [4] * num_layers + [1] * num_layers * 3, "one prompt, three more tokens"
