"""An adapter served with its dense parent, in place: held to the reference model of the checkpoint it was made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pregate.convert.export.run import ExportOptions, export
from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.paths.load import load_router
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from tests.equality import reference_texts
from tests.router.serving import engine_over, expert_hosts, hold


@pytest.fixture(scope="module", params=["layerwise", "path"])
def made(request, tiny_layerwise_checkpoint, tiny_path_checkpoint, tiny_dense, tmp_path_factory):
    """A checkpoint, and the adapter made of it."""
    path = tiny_path_checkpoint if request.param == "path" else tiny_layerwise_checkpoint
    adapter = tmp_path_factory.mktemp("adapter") / request.param
    export(ExportOptions(path, adapter, "adapter", parent=tiny_dense))
    return path, adapter


def test_in_process_and_on_two_hosts(made, tiny_dense, tmp_path):
    path, adapter = made
    model = RoutedForCausalLM.from_pretrained(path).eval()
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(3, 512, size=n).tolist()] for n in rng.integers(4, 60, size=4)]
    references = reference_texts(model, prompts, 16)
    with expert_hosts(adapter, 2, tmp_path / "ipc", tiny_dense) as addresses:
        for hosts in ([], addresses):
            with engine_over(adapter, hosts, tiny_dense, step_tokens=40) as engine:
                print(f"{path.name}, {len(hosts)} hosts: {hold(engine, path.name, references)}")


@pytest.mark.parametrize("of_adapter", [True, False])
def test_whose_experts_come_and_go_is_told_what_is_read_for_each(made, tiny_dense, caplog, of_adapter):
    path, adapter = made
    reader = CheckpointReader(adapter, tiny_dense) if of_adapter else CheckpointReader(path)
    units = [(layer, expert) for layer, cut in enumerate(reader.config.cuts) for expert in range(cut.num_routed)]
    for resident, said in ((None, False), (0.5, of_adapter)):
        caplog.clear()
        ExpertHost(reader, units, HostOptions(resident_experts=resident)).close()
        assert ("pregate apply" in caplog.text) == said


def test_the_path_service_reads_the_same_router(tiny_path_checkpoint, tiny_dense, tmp_path):
    export(ExportOptions(tiny_path_checkpoint, tmp_path / "adapter", "adapter", parent=tiny_dense))
    ours = load_router(CheckpointReader(tmp_path / "adapter", tiny_dense)).state_dict()
    theirs = load_router(CheckpointReader(tiny_path_checkpoint)).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
