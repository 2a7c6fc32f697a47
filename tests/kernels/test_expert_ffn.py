import importlib.util

import pytest
import torch
from transformers.activations import ACT2FN

from pregate.base.errors import UserError
from pregate.kernels import reference
from pregate.kernels.cpu import ffn as cpu_ffn
from pregate.kernels.cpu import packed as cpu_packed
from pregate.kernels.expert_ffn import choose, choose_dtype, compute_dtype, value_bytes, why_not
from tests.int8 import HINDRANCE

CPU = torch.device("cpu")
LARGE = (1024, 352)


def pick(implementation: str, widths=(64, 32), device=CPU):
    return choose(implementation, device, torch.float32, act="silu", widths=widths)


def test_auto_takes_the_fastest_of_this_machine_and_says_why(log, monkeypatch):
    monkeypatch.setattr(cpu_ffn, "has_avx512", lambda: True)
    assert pick("auto", widths=LARGE).name == "packed"
    assert pick("auto").name == "grouped"
    monkeypatch.setattr(cpu_ffn, "has_avx512", lambda: False)
    assert pick("auto", widths=LARGE).name == "grouped"
    assert pick("auto", widths=(64, 43)).name == "loop"
    assert len(log) == 4
    assert "cpu in float32: packed (AVX-512" in log[0]
    assert "grouped (experts this small" in log[1]
    assert "grouped (without AVX-512" in log[2]
    assert "loop (without AVX-512" in log[3] and "rows of 43" in log[3]


def test_auto_packs_what_fp16_holds_on_any_cpu(log, monkeypatch):
    monkeypatch.setattr(cpu_ffn, "has_avx512", lambda: False)
    monkeypatch.setattr(cpu_packed, "why_no_fp16", lambda: "")
    assert choose("auto", CPU, torch.float32, act="silu", widths=LARGE, fits_fp16=lambda: True).name == "packed"
    assert "packed (fp16 holds the weights" in log[0]
    monkeypatch.setattr(cpu_packed, "why_no_fp16", lambda: "no FBGEMM")
    assert choose("auto", CPU, torch.float32, act="silu", widths=LARGE, fits_fp16=lambda: True).name == "grouped"


def test_weights_are_looked_at_only_where_it_matters(monkeypatch):
    """A host reads a unit for it, which on a GPU, or by a name, nobody needs."""
    looked: list[bool] = []
    given = {"act": "silu", "widths": LARGE, "fits_fp16": lambda: bool(looked.append(True))}
    choose("loop", CPU, torch.float32, **given)
    monkeypatch.setattr(cpu_packed, "why_no_fp16", lambda: "no FBGEMM")
    choose("auto", CPU, torch.float32, **given)
    assert looked == []


def num_bytes(name: str, stored: torch.dtype, fits: bool = False) -> tuple[int, int]:
    return value_bytes(name, CPU, torch.float32, "silu", LARGE, stored, lambda: fits)


def test_experts_that_come_and_go_are_not_packed(log):
    given = {"act": "silu", "widths": LARGE, "passing": True}
    assert choose("auto", CPU, torch.float32, fits_fp16=lambda: True, **given).name == "loop"
    assert "loop (experts come and go" in log[0]
    assert choose("packed", CPU, torch.float32, **given).name == "packed", "by name"
    for stored in (torch.bfloat16, torch.float16):
        assert choose("auto", CPU, torch.float32, stored=stored, **given).name == "stored"
        assert num_bytes("auto", stored) == (2, 4)
        assert num_bytes("stored", stored) == (2, 2)
    assert "stored (experts come and go" in log[-1]
    assert choose("auto", CPU, torch.float32, stored=torch.float32, **given).name == "loop"
    assert num_bytes("loop", torch.bfloat16) == (4, 4)
    assert num_bytes("auto", torch.float32) == (4, 4)
    if not cpu_packed.why_no_fp16():
        assert num_bytes("auto", torch.bfloat16, fits=True) == (2, 2)
        assert num_bytes("packed", torch.bfloat16, fits=True) == (4, 2)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"stored": None}, "takes experts that a checkpoint has in bfloat16 or float16, all in one of them"),
        ({"act": "gelu"}, "has no gelu; it has silu, swish"),
        ({"widths": (64, 8)}, "widths below 16"),
    ],
)
def test_experts_that_cannot_lie_as_they_are_stored_are_refused_by_name_and_passed_over(changed, reason):
    given = {"act": "silu", "widths": (64, 32), "stored": torch.bfloat16} | changed
    with pytest.raises(UserError, match=f"expert_ffn stored: not possible here: .*{reason}; allowed: auto"):
        choose("stored", CPU, torch.float32, **given)
    assert choose("auto", CPU, torch.float32, passing=True, **given).name == "loop"


def test_a_named_implementation_is_taken_or_refused():
    names = ["loop", "grouped", "packed", *([] if HINDRANCE else ["int8"])]
    for name in names:
        assert pick(name).name == name
    allowed = "allowed: auto, packed, loop" + ("$" if HINDRANCE else ", int8$")
    with pytest.raises(UserError, match=rf"expert_ffn grouped: .*43.*{allowed}"):
        pick("grouped", widths=(64, 43))
    with pytest.raises(UserError, match="allowed: auto, packed, grouped, loop, int8, stored"):
        pick("fastest")
    assert "int8 takes float32 rows" in why_not("int8", CPU, torch.bfloat16, "silu", (64,))


def test_int8_is_never_chosen_for_the_user():
    assert {pick("auto", widths=widths).name for widths in (LARGE, (64, 32), (64, 43))} <= {"packed", "grouped", "loop"}


def test_no_packed_product_in_this_torch_leaves_the_others(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operation")

    monkeypatch.setattr(cpu_ffn, "has_avx512", lambda: True)
    monkeypatch.setattr(cpu_packed, "onednn_product", missing)
    assert pick("auto", widths=LARGE).name == "grouped"
    with pytest.raises(UserError, match="no packed linear"):
        pick("packed")
    monkeypatch.setattr(cpu_ffn, "grouped_mm", missing)
    assert pick("auto", widths=LARGE).name == "loop"
    with pytest.raises(UserError, match="no grouped_mm"):
        pick("grouped")


@pytest.mark.parametrize("name", ["triton", "triton-int8", "triton-fp8"])
def test_the_kernels_for_cuda_are_refused_without_a_device(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=rf"expert_ffn {name}: not possible here: .*allowed: auto, packed"):
        pick(name)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_refuse_what_they_would_compute_wrongly(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = [why_not("triton", CPU, dtype, "silu", (64,)) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    assert reasons[0] == ""
    assert "interpreter is wrong" in reasons[1] and "do not compute in torch.float64" in reasons[2]
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "no float8 instructions" in why_not("triton-fp8", cuda, torch.bfloat16, "silu", (64,))
    assert why_not("triton-int8", cuda, torch.bfloat16, "silu", (64,)) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert why_not("triton-fp8", cuda, torch.bfloat16, "silu", (64,)) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(UserError, match="device cuda: torch finds no CUDA device"):
        pick("auto", device=torch.device("cuda"))


def test_a_device_without_implementation_is_refused():
    with pytest.raises(UserError, match="device meta"):
        pick("auto", device=torch.device("meta"))


def test_dtype_is_float32_on_a_cpu_unless_it_can_do_better(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_dtype("auto", CPU) is torch.float32
    with pytest.raises(UserError, match="dtype bfloat16: this CPU has no native bfloat16"):
        choose_dtype("bfloat16", CPU)
    with pytest.raises(UserError, match="allowed: auto, float32"):
        choose_dtype("int8", CPU)
    with pytest.raises(UserError, match="dtype bfloat16: this CPU has no native bfloat16; allowed here"):
        choose("auto", CPU, torch.bfloat16, act="silu", widths=(64, 32))
    assert compute_dtype(torch.bfloat16, CPU) is torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert compute_dtype(torch.bfloat16, CPU) is torch.bfloat16
    assert compute_dtype(torch.float16, torch.device("cuda")) is torch.float16
    assert choose("auto", CPU, torch.bfloat16, act="silu", widths=(64, 32)).name in ("packed", "grouped", "loop")


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new"])
def test_activations_are_transformers_own_to_the_last_bit(name):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(reference.activation(name)(x), ACT2FN[name](x))
