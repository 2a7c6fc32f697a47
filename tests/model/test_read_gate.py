"""Gate "read": what later layers take is of the batch and thread that the layer it reads ran for, or it is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from pregate.base.errors import UserError
from pregate.model.config import LayerCut, ReadNetworkConfig, RoutedConfig
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.read_gate import ReadGate, ReadNetwork

CUTS = (LayerCut(5, 0, 2, 1), LayerCut(6, 0, 2, 1), LayerCut(0, 1, 0, 4), LayerCut(4, 0, 1, 1))


@pytest.fixture
def network() -> ReadNetwork:
    torch.manual_seed(0)
    return ReadNetwork(ReadNetworkConfig(layer=1, dim=8), 12, CUTS, "threshold")


def test_layers_take_their_part_of_what_was_read_once(network: ReadNetwork):
    x_TD, later_TD = torch.randn(2, 7, 12)
    first, last = ReadGate(network, 1), ReadGate(network, 3)
    whole_TS = network(x_TD)
    assert torch.equal(first(x_TD), whole_TS[:, :6])
    assert torch.equal(last(later_TD), whole_TS[:, 6:]), "it reads nothing of its own layer"
    network.put_thresholds(whole_TS, (2.0, 0.0, 1.0))
    assert (first.choose(x_TD).ids >= 0).sum() == 14
    assert (last.choose(later_TD).ids >= 0).sum() == 7
    margins_T = (whole_TS[:, 6:] - network.thresholds[2]).abs().amin(dim=-1)
    assert torch.equal(last.margin(later_TD), margins_T)


def test_another_batch_thread_or_order_is_refused(network: ReadNetwork):
    x_TD = torch.randn(7, 12)
    first, last = ReadGate(network, 1), ReadGate(network, 3)
    with pytest.raises(RuntimeError, match="gate of layer 3: layer 1 was not read just before"):
        last(x_TD)
    first(x_TD)
    with pytest.raises(RuntimeError, match="was not read just before"):
        last(x_TD[:6])
    with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="was not read just before"):
        other.submit(last, x_TD).result()
    with ThreadPoolExecutor(1) as other:
        other.submit(first, x_TD).result()
    with pytest.raises(RuntimeError, match="was not read just before"):
        last(x_TD)


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch_mates_nor_on_how_it_comes(tiny_read_checkpoint: Path):
    model = RoutedForCausalLM.from_pretrained(tiny_read_checkpoint, dtype=torch.float32).eval()
    rows = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(1))
    together = model(rows).logits
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(model(row[None]).logits[0], logits, rtol=1e-3, atol=1e-3)
    cache, parts = None, []
    for ids in rows.split([10, 1, 13], dim=1):
        output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), together, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_fast_path_and_a_copy_choose_alike(tiny_read_checkpoint: Path):
    model = RoutedForCausalLM.from_pretrained(tiny_read_checkpoint, dtype=torch.float32).eval()
    ids = torch.randint(3, 512, (2, 30), generator=torch.Generator().manual_seed(2))
    expected = model(ids).logits
    copied = deepcopy(model)
    assert copied.routed_mlps[2].read_gate is not None
    assert copied.routed_mlps[2].read_gate.network is copied.read_network is not model.read_network
    assert torch.equal(copied(ids).logits, expected)
    model.set_experts_implementation("fast")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_it_stays_float32(tiny_read_checkpoint: Path):
    model = RoutedForCausalLM.from_pretrained(tiny_read_checkpoint, dtype=torch.bfloat16)
    assert model.read_network is not None
    assert {tensor.dtype for tensor in model.read_network.state_dict().values()} == {torch.float32}
    assert model(torch.tensor([[1, 5, 9]])).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"gate": "read"}, "gate read: config needs a read_network"),
        ({"read_network": {"layer": 1, "dim": 8}}, "gate read: config needs a read_network, and no other gate has one"),
        ({"gate": "read", "read_network": {"layer": 0, "dim": 8}}, "read_layers 0: allowed: 1 to 3, of 4 layers"),
        ({"gate": "read", "read_network": {"layer": 4, "dim": 8}}, "read_layers 4: allowed: 1 to 3, of 4 layers"),
        ({"gate": "read", "read_network": {"layer": 1, "dim": 0}}, "dim 0: allowed: 1 or more"),
    ],
)
def test_configs_that_say_no_network(fields: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        RoutedConfig(layer_cuts=[vars(cut) for cut in CUTS], **fields)
