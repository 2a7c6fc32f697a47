"""A layer at a time gives what the whole model at once gives, and holds no more than it says."""

from __future__ import annotations

import gc
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pregate.base.errors import UserError
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.layer_cut import cut_one
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.device import pick_device
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.agreement import AgreementMeter
from pregate.convert.measure.evaluate import score_rows
from pregate.convert.text.calibration import read_calibration
from pregate.model.config import RoutedConfig
from pregate.model.folder import read_folder
from pregate.model.gated_mlp import GatedMLP, find_gated_mlps
from pregate.model.layers import RoutedMLP


@pytest.fixture
def options(tiny_dense: Path, tiny_text: Path, tmp_path: Path) -> ConvertOptions:
    return ConvertOptions(tiny_dense, tmp_path / "out", 8, 2, 2, (tiny_text,), samples=8, sequence_length=64)


class _CutWhenCalled(nn.Module):
    """In an FFN's place: cuts it on the inputs of the one pass there is, and goes on with what it became."""

    def __init__(self, mlp: GatedMLP, config: RoutedConfig, options: ConvertOptions) -> None:
        super().__init__()
        self._mlp, self._config, self._options = mlp, config, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routed = cut_one(self._mlp, x.reshape(-1, x.shape[-1]), self._config, self._options)
        self._mlp.replace(routed)
        return routed(x)


@torch.no_grad()
def test_it_is_the_conversion_of_the_whole_model_at_once(options: ConvertOptions):
    convert(options)
    dense: Any = AutoModelForCausalLM.from_pretrained(options.model).eval()
    mlps = find_gated_mlps(dense)
    cuts = [asdict(options.cuts(mlp.width)[0]) for mlp in mlps]
    config = RoutedConfig(
        text_config=deepcopy(dense.config), layer_cuts=cuts, selection=options.selection, token_power=0.5
    )
    for mlp in mlps:
        mlp.replace(_CutWhenCalled(mlp, config, options))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = read_calibration(options.calibration, tokenizer, options.samples, options.sequence_length, options.seed)
    dense.base_model(input_ids=text.windows, use_cache=False)
    written = {n: t for path in options.out.glob("*.safetensors") for n, t in load_file(path).items()}
    assert {f"parent.{name}" for name in dense.state_dict()} == set(written)
    for name, tensor in dense.state_dict().items():
        if name.endswith("neuron_index"):
            assert torch.equal(written[f"parent.{name}"], tensor), name
        else:
            torch.testing.assert_close(written[f"parent.{name}"], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures_are_those_of_the_checkpoint_as_stored(options: ConvertOptions, dtype: str):
    figures = convert(replace(options, dtype=dtype)).figures
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = read_calibration(options.calibration, tokenizer, options.samples, options.sequence_length, options.seed)
    meter = AgreementMeter()
    routed = score_rows(load_any(read_folder(options.out)), text.held_back, meter)
    assert figures["routed_perplexity"] == pytest.approx(routed.perplexity, rel=1e-4)
    assert figures["agreement"] == meter.figures()
    dense = score_rows(load_any(read_folder(options.model)), text.held_back)  # as it was given, not as rounded
    assert figures["dense_perplexity"] == pytest.approx(dense.perplexity, rel=1e-4)


def test_text_too_short_to_hold_any_back_is_refused(options: ConvertOptions, tmp_path: Path):
    text = tmp_path / "short.txt"
    text.write_text("The harbour lay quiet before the storm. Three boats had come in at noon.")
    with pytest.raises(UserError, match=r"^calibration .*short\.txt: its text gives no window of 64 tokens; 4 are the"):
        convert(replace(options, calibration=(text,)))


class _Memory:
    """The most that was alive whenever an attention or a routed FFN was about to run: parameters, and all tensors."""

    def __init__(self) -> None:
        self.max_parameters = self.max_bytes = self.num_looks = 0

    def look(self, module: nn.Module, _args: Any) -> None:
        if not isinstance(module, RoutedMLP) and type(module).__name__ != "LlamaAttention":
            return
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not o.is_meta]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        parameters = {t.untyped_storage().data_ptr(): t.numel() for t in tensors if isinstance(t, nn.Parameter)}
        self.max_bytes = max(self.max_bytes, sum(storages.values()))
        self.max_parameters = max(self.max_parameters, sum(parameters.values()))
        self.num_looks += 1


def _measured(options: ConvertOptions, num_layers: int, tmp_path: Path, tokenizer_of: Path) -> _Memory:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    source = tmp_path / f"dense-{num_layers}"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(source)
    memory = _Memory()
    hook = register_module_forward_pre_hook(memory.look)
    gc.collect()
    gc.freeze()  # what other tests keep alive is not looked at
    try:
        convert(replace(options, model=source, out=tmp_path / f"out-{num_layers}"))
    finally:
        gc.unfreeze()
        hook.remove()
    return memory


def test_memory_is_two_layers_and_one_layers_activations_whatever_the_depth(
    options: ConvertOptions, tiny_dense: Path, tmp_path: Path
):
    options = replace(options, samples=4, sequence_length=32)
    shallow, deep = (_measured(options, n, tmp_path, tiny_dense) for n in (2, 6))
    layer = 4 * 64 * 64 + 3 * 64 * 256
    assert deep.num_looks > 2 * shallow.num_looks
    assert layer < deep.max_parameters <= 2 * layer + 3 * 64
    assert deep.max_bytes <= 1.01 * shallow.max_bytes


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tpu", "device tpu: allowed: auto, cpu, cuda or cuda:N"),
        ("cuda:", "device cuda:: allowed"),
        ("cpu:1", "device cpu:1: allowed"),
        ("cuda:99", r"device cuda:99: this machine has \d+ CUDA devices"),
    ],
)
def test_devices_that_are_not_there(options: ConvertOptions, name: str, sentence: str):
    with pytest.raises(UserError, match=sentence):
        convert(replace(options, device=name))
    assert list(options.out.parent.iterdir()) == []


@pytest.mark.parametrize(("there_is_one", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_where_there_is_one(there_is_one: bool, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
    assert pick_device("auto") == torch.device(device)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_perplexity(options: ConvertOptions, tmp_path: Path):
    cpu = convert(replace(options, device="cpu")).figures
    cuda = convert(replace(options, device="cuda", out=tmp_path / "cuda")).figures
    assert cuda["dense_perplexity"] == pytest.approx(cpu["dense_perplexity"], rel=1e-3)
    assert cuda["routed_perplexity"] == pytest.approx(cpu["routed_perplexity"], rel=1e-3)
