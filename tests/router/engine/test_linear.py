"""Norms of a lean decoder compute what the family's own do, in the dtype it is served in."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pregate.router.engine.linear import Norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norm_computes_what_its_module_does_in_every_dtype(family, dtype):
    generator = torch.Generator().manual_seed(0)
    module = family(16, eps=1e-5)
    torch.nn.init.normal_(module.weight, generator=generator)
    module = module.to(dtype)
    x_TD, more_TD = (torch.randn(3, 16, generator=generator).to(dtype) for _ in range(2))
    norm = Norm.of(module)
    found_TD = norm(x_TD)
    assert found_TD.dtype == dtype
    torch.testing.assert_close(found_TD, module(x_TD))
    torch.testing.assert_close(norm.after(x_TD.clone(), more_TD)[1], module(x_TD + more_TD))
