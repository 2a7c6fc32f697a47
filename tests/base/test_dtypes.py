from __future__ import annotations

import torch

from pregate.base.dtypes import dtype_name


def test_a_type_and_its_name_have_one_name():
    assert dtype_name(torch.bfloat16) == dtype_name("bfloat16") == dtype_name("torch.bfloat16") == "bfloat16"
