"""Read-ME's training: its two stages in rounds, interrupted and not, and rows that experts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.convert.domains.domains import read_domains
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.run import read_me
from pregate.convert.files.partial import partial_folder
from pregate.convert.progress import Progress
from pregate.convert.text.calibration import encode
from pregate.convert.tune.run import tune
from pregate.model import CheckpointReader
from pregate.model.path_router import PathRouter, RouterBlock
from pregate.model.read_check import Hashes
from tests.convert.domains.read_me_cases import load, neurons_of, small
from tests.convert.tune.tuning import tiny_options


@pytest.fixture(scope="module")
def tuned(tiny_dense: Path, domains: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("read-me") / "tuned"
    read_me(small(tiny_dense, out, domains, rounds=2, learning_rate=5e-3))
    return out


@pytest.fixture
def options(tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path) -> ReadMeOptions:
    return small(tiny_dense, tmp_path / "out", domains)


def test_shared_rows_stay_one_weight_through_training(tuned: Path, cut: Path, options: ReadMeOptions):
    untied = read_me(replace(options, tie_overlap=False, learning_rate=5e-3))
    assert untied.figures["swap"]["saved_share"] == 0
    assert CheckpointReader(tuned).manifest.figures["swap"]["saved_share"] > 0
    ties = {"tuned": _equal_copies(tuned), "untied": _equal_copies(options.out)}
    assert ties["tuned"][0] == ties["tuned"][1] > 50
    assert ties["untied"][0] < ties["untied"][1]
    before, after = load(cut).state_dict(), load(tuned).state_dict()
    moved = {n for n, t in before.items() if t.is_floating_point() and (t - after[n]).abs().max() > 1e-4}
    for part in ("experts.gate_up_proj", "experts.down_proj", "q_proj.weight", "embed_tokens.weight"):
        assert any(name.endswith(part) for name in moved), part
    assert not {name for name in moved if "gate." in name}


def _equal_copies(path: Path) -> tuple[int, int]:
    """Rows that experts have in common: how many are equal bit for bit, and how many there are."""
    equal = pairs = 0
    for mlp in load(path).routed_mlps:
        assert mlp.experts is not None
        rows: dict[int, list[torch.Tensor]] = {}
        gate, up = mlp.experts.gate_up_proj.detach().chunk(2, dim=1)
        for expert, neurons in enumerate(neurons_of(mlp).tolist()):
            for row, neuron in enumerate(neurons):
                weights = (gate[expert, row], up[expert, row], mlp.experts.down_proj.detach()[expert, :, row])
                rows.setdefault(neuron, []).append(torch.cat(weights))
        for copies in rows.values():
            pairs += len(copies) - 1
            equal += sum(torch.equal(copy, copies[0]) for copy in copies[1:])
    return equal, pairs


def test_tuning_unties_rows_and_the_manifest_says_so(
    cut: Path, tiny_dense: Path, domains: tuple[Path, ...], tmp_path: Path
):
    before = CheckpointReader(cut).manifest.figures
    for name, rate in (("moved", 3e-3), ("still", 3.0)):  # with a rate that breaks the model the best is where it began
        options = tiny_options(cut, domains[0], tmp_path / name, teacher=tiny_dense, steps=2, learning_rate=rate)
        figures = tune(options).figures
        equal, pairs = _equal_copies(tmp_path / name)
        assert (figures["tune"]["best_step"] == 0) == (equal == pairs) == (name == "still")
        if name == "still":
            assert figures["swap"] == before["swap"]
            continue
        full = before["swap"]["full_bytes"]
        assert (figures["swap"]["full_bytes"], figures["swap"]["mean_differing_bytes"]) == (full, full)
        assert figures["swap"]["differing_bytes"] == [[0, full, full], [full, 0, full], [full, full, 0]]
        assert figures["swap"]["saved_share"] == 0 < before["swap"]["saved_share"]
        assert figures["swap"]["saved_share_by_layer"] == [0.0, 0.0, 0.0]
        assert figures["coverage"] == before["coverage"]  # which neurons the rows are of is as it was


@torch.no_grad()
@pytest.mark.parametrize(("target", "loss"), [("overlap", "paper"), ("contribution", "mass")])
def test_the_router_learns_which_expert_holds_a_tokens_channels(options: ReadMeOptions, target: str, loss: str):
    options = replace(options, steps=0, router_steps=100, router_learning_rate=5e-3, target=target, loss=loss)
    figures = read_me(options).figures
    assert figures["rounds"][0]["loss_last"] < figures["rounds"][0]["loss_first"]
    for own, row in enumerate(figures["by_domain"]):
        assert max(range(3), key=row["expert_share"].__getitem__) == own


def test_both_stages_hold_no_more_than_batch_tokens_at_a_time(options: ReadMeOptions):
    """Of steps of 128 tokens 64, or one document; scoring has a bound of its own, 2,048."""
    seen: list[int] = []
    kinds: set[type] = set()

    def watch(module: Any, args: tuple[Any, ...]) -> None:
        if isinstance(module, PathRouter | RouterBlock):
            seen.append(args[0].shape[:2].numel() if torch.is_grad_enabled() else 0)
            kinds.add(type(module))

    handle = register_module_forward_pre_hook(watch)
    try:
        read_me(options)
    finally:
        handle.remove()
    assert max(seen) == 64
    assert kinds == {PathRouter, RouterBlock}  # the router's stage runs its blocks, that of the experts the whole


class _StopsAfterStages(Progress):
    """Ctrl-C when stage `number`, counted from 0, is about to begin."""

    def __init__(self, number: int) -> None:
        self._left, self.notes = number, []

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator:
        if name.startswith(("training the path router", "tuning")):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
        yield lambda _steps: None

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def test_interrupted_it_goes_on_and_gives_the_same_checkpoint(tuned: Path, options: ReadMeOptions):
    """Two rounds of two stages, stopped in the second and again in the fourth."""
    options = replace(options, rounds=2, learning_rate=5e-3)
    progress = _StopsAfterStages(1)
    with pytest.raises(KeyboardInterrupt):
        read_me(options, progress)
    with pytest.raises(UserError, match="steps 2 there, 3 here"):
        read_me(replace(options, steps=3))
    progress = _StopsAfterStages(2)
    with pytest.raises(KeyboardInterrupt):
        read_me(options, progress)
    assert progress.notes[-1] == "going on after stage 1 of 4, where the last run was interrupted"
    manifest = read_me(options)
    whole = CheckpointReader(tuned, hashes=Hashes.FIRST).manifest
    assert manifest.files["model.safetensors"] == whole.files["model.safetensors"]
    assert manifest.figures == whole.figures
    assert [(r["round"], r["stage"]) for r in whole.figures["rounds"]] == [
        (1, "router"), (1, "experts"), (2, "router"), (2, "experts"),
    ]  # fmt: skip
    assert not partial_folder(options.out).exists()


def test_tuning_lowers_the_perplexity(options: ReadMeOptions):
    figures = read_me(replace(options, steps=16, learning_rate=6e-3)).figures
    router, experts = figures["rounds"]
    assert experts["perplexity"] < 0.7 * router["perplexity"]
    assert figures["routed_perplexity"] == experts["perplexity"]


def test_with_kl_the_parent_teaches(options: ReadMeOptions):
    """Experts of all channels are the parent, which there is nothing to learn from."""
    half = replace(options, kl_share=1.0, steps=1, router_steps=1)
    whole = replace(half, out=options.out.with_name("whole"), active_share=1.0)
    losses = [read_me(one).figures["rounds"][1]["loss_first"] for one in (half, whole)]
    assert losses[0] > 0.1
    assert abs(losses[1]) < 1e-4


def test_held_back_text_is_not_trained_on(tiny_dense: Path, domains: tuple[Path, ...]):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    for text, path in zip(read_domains(domains, tokenizer, 4, 32, 100_000, 0), domains, strict=True):
        documents = path.read_text().split("\n\n")
        assert len(text.rows) + len(text.held_back) == len(documents)
        rows = {tuple(row) for row in text.rows}
        assert {tuple(encode(tokenizer, d, 32)) for d in documents} >= rows
        assert text.windows_SN.shape == (4, 32)
