import importlib.util
from functools import partial
from inspect import getclosurevars
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pregate.kernels import reference
from pregate.kernels.cpu.packed import Int8FFN, PackedFFN
from pregate.kernels.weights import (
    PaddedLayout,
    PlainLayout,
    QuantisedLayout,
    TransposedLayout,
    quantise_rows,
    split_shared,
)

D, M = 48, 70
CPU = torch.device("cpu")


def expert(width: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(2 * width, D, generator=generator), torch.randn(D, width, generator=generator)


def run(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return reference.expert_ffn(x.double(), gate_up.double(), down.double(), F.silu)


def test_padding_to_64_is_exact():
    layout = PaddedLayout(torch.float32, CPU)
    weights = layout.stack(*(part[None] for part in expert()))
    assert weights.down_SDM.shape == (1, D, 128) and weights.gate_up_SMD.shape == (1, 256, D)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    h = reference.gated_hidden(x, weights.gate_up_SMD[0], F.silu)
    assert torch.equal(h[:, M:], torch.zeros(5, 128 - M)), "a padded neuron gives nothing"
    padded = run(x, weights.gate_up_SMD[0], weights.down_SDM[0])
    torch.testing.assert_close(padded, run(x, *expert()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.04)])
def test_quantised_rows_keep_their_scale(dtype, largest):
    gate_up, _ = expert()
    gate_up[3] *= 1000
    values, scale = quantise_rows(gate_up, dtype)
    back = values.float() * scale[:, None]
    errors = (back - gate_up).norm(dim=1) / gate_up.norm(dim=1)
    assert 0 < errors.max() < largest, "every row by its own scale"
    layout = QuantisedLayout(dtype, CPU)
    weights = layout.stack(*(part[None] for part in expert()))
    assert weights.slot_bytes == 3 * 128 * D + 4 * (256 + D)
    assert weights.gate_up_scale is not None and torch.isfinite(weights.gate_up_scale).all()


def test_quantise_rows_worked_example():
    values, scale = quantise_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]), torch.int8)
    assert values.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert scale[0].item() == pytest.approx(2 / 127)


def test_a_shared_expert_is_the_sum_of_its_slices():
    gate_up, down = expert(4 * 12)
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    slices = split_shared(gate_up, down, 4)
    assert [part[1].shape for part in slices] == [(D, 12)] * 4
    torch.testing.assert_close(sum(run(x, *part) for part in slices), run(x, gate_up, down))


def outside_any_graph(part: Any) -> bool:
    """True where no gradient's graph reaches from `part` to what it was made of; a product holds a packed matrix, one
    of int8 an object that has a tensor."""
    if callable(part):
        part = part.keywords["packed"] if isinstance(part, partial) else getclosurevars(part).nonlocals["packed"]
    tensor = part if isinstance(part, torch.Tensor) else part.unpack()[0]
    return tensor.grad_fn is None and not tensor.requires_grad


LAYOUTS: dict[str, Any] = {
    "plain": PlainLayout(torch.float32, CPU),
    "plain, another dtype": PlainLayout(torch.bfloat16, CPU),
    "transposed": TransposedLayout(torch.float32, CPU),
    "padded": PaddedLayout(torch.float32, CPU),
    "quantised": QuantisedLayout(torch.int8, CPU),
    "packed": PackedFFN("silu").layout,
    "packed int8": Int8FFN("silu").layout,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stack_of_parameters_is_no_part_of_a_graph(name):
    """One that were would keep the parameters it was made from alive."""
    gate_up_SMD, down_SDM = (nn.Parameter(torch.stack([part, part])) for part in expert())
    parts: list[Any] = []
    for part in vars(LAYOUTS[name].stack(gate_up_SMD, down_SDM)).values():
        parts += part if isinstance(part, list) else [part] if isinstance(part, torch.Tensor) else []
    assert len(parts) >= 2
    assert all(map(outside_any_graph, parts))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_layer_of_parameters_in_one_stack_is_no_part_of_a_graph():
    from pregate.kernels.triton.ffn import TritonFFN

    shared = tuple(map(nn.Parameter, expert(2 * M)))
    routed = (nn.Parameter(torch.stack([part, part])) for part in expert())
    units = TritonFFN("silu", CPU, torch.float32).units((shared[0], shared[1]), 2, *routed)
    assert units.weights.num_slots == 4
    assert all(map(outside_any_graph, (units.weights.gate_up_SMD, units.weights.down_SDM)))
