"""What may be skipped in a benchmark or while tuning, and nothing else."""

import importlib.util

import pytest
import torch

from pregate.kernels.tools.bench import is_capture_error


def test_only_a_refused_capture_is_timed_as_plain_calls():
    refused = "CUDA error: operation not permitted when stream is capturing"
    followed = "CUDA error: operation failed due to a previous error during capture"
    copied = "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned"
    assert is_capture_error(RuntimeError(copied))
    other = "CUDA error: an illegal memory access was encountered"
    assert [is_capture_error(torch.AcceleratorError(text)) for text in (refused, followed, other)] == [
        True,
        True,
        False,
    ]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_only_blocks_that_do_not_fit_are_skipped_while_tuning(monkeypatch):
    import triton.testing
    from triton.runtime.errors import OutOfResources, PTXASError

    from pregate.kernels.tools.tune_block_sizes import time_on_device

    def raises(error: Exception):
        def call() -> None:
            raise error

        return call

    # Without a device there is nothing to time; what the call raises passes through as it does there.
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **_: call())
    assert time_on_device(raises(OutOfResources(300_000, 232_448, "shared memory"))) == float("inf")
    for error in (PTXASError("bad"), RuntimeError("illegal memory access"), torch.AcceleratorError("launch failed")):
        with pytest.raises(type(error)):
            time_on_device(raises(error))
