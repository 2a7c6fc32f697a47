import logging

import pytest
import torch

from pregate.base.errors import UserError
from pregate.kernels import cpu
from pregate.kernels.expert_ffn import choose, choose_dtype

CPU = torch.device("cpu")


def pick(implementation: str, widths=(64, 32), device=CPU):
    return choose(implementation, device, torch.float32, act="silu", widths=widths)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log():
    logger, handler = logging.getLogger("pregate.kernels.expert_ffn"), Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_auto_groups_and_says_why(log):
    assert pick("auto").name == "grouped"
    assert pick("auto", widths=(64, 43)).name == "loop"
    assert len(log) == 2
    assert "cpu in float32: grouped" in log[0]
    assert "loop (rows of 43" in log[1]


def test_a_named_implementation_is_taken_or_refused():
    assert pick("loop").name == "loop"
    assert pick("grouped").name == "grouped"
    with pytest.raises(UserError, match=r"--expert-ffn grouped: .*43.*allowed: auto, loop"):
        pick("grouped", widths=(64, 43))
    with pytest.raises(UserError, match="allowed: auto, loop, grouped"):
        pick("fastest")


def test_no_grouped_mm_in_this_torch_leaves_the_loop(monkeypatch):
    def missing():
        raise AttributeError("no grouped_mm")

    monkeypatch.setattr(cpu, "grouped_mm", missing)
    assert pick("auto").name == "loop"
    with pytest.raises(UserError, match="no grouped_mm"):
        pick("grouped")


def test_a_device_without_implementation_is_refused():
    with pytest.raises(UserError, match="--device meta"):
        pick("auto", device=torch.device("meta"))


def test_dtype_is_float32_on_a_cpu_unless_it_can_do_better(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_dtype("auto", CPU) is torch.float32
    with pytest.raises(UserError, match="--dtype bfloat16: this CPU has no native bfloat16"):
        choose_dtype("bfloat16", CPU)
    with pytest.raises(UserError, match="allowed: auto, float32"):
        choose_dtype("int8", CPU)
