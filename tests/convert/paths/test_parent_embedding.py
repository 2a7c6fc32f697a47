"""An embedding tied to the parent's while it is trained is a table of the router's own afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.paths.parent_embedding import EMBEDDING_STD, ParentEmbedding, start_from
from pregate.model import RoutedForCausalLM
from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.path_router import PathRouter


def parent_table() -> torch.Tensor:
    return torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(8, 0, -1)


@torch.no_grad()
@pytest.mark.parametrize("dim", [4, 12])
def test_the_embedding_starts_from_the_parents_principal_components(dim: int):
    parent = parent_table()
    router = PathRouter(PathRouterConfig(dim=dim), 50, [LayerCut(2, 0, 1, 1)])
    start_from(router, parent)
    weight, kept = router.embedding.weight.double(), min(dim, 8)
    assert weight[:, :kept].std().item() == pytest.approx(EMBEDDING_STD, rel=0.02)
    centred = (parent - parent.mean(dim=0)).double()
    variances = torch.linalg.svdvals(centred)[:kept] ** 2
    ours = weight[:, :kept].T @ weight[:, :kept]
    factor = (ours.diagonal() / variances).mean()
    torch.testing.assert_close(ours, torch.diag(variances) * factor, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_tied_embedding_starts_alike_and_folds_into_the_same():
    router = PathRouter(PathRouterConfig(dim=4), 50, [LayerCut(2, 0, 1, 1)])
    start_from(router, parent_table())
    tied = ParentEmbedding(parent_table(), 4)
    ids = torch.arange(50)
    torch.testing.assert_close(tied(ids), router.embedding.weight, rtol=1e-4, atol=1e-5)
    tied.project.weight.add_(torch.randn(4, 8))
    folded = tied.fold()
    torch.testing.assert_close(folded(ids), tied(ids), rtol=1e-4, atol=1e-4)
    assert folded.weight.requires_grad and [n for n, _ in tied.named_parameters()] == ["project.weight"]


def embedding_of(model: RoutedForCausalLM) -> torch.Tensor:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, torch.Tensor)
    return embedding.weight


def test_no_reload_reaches_the_parents_embedding(tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    """Read-ME's router embedding is a view of the base's, and loading a trained one overwrites that."""
    options = DecoupleOptions(
        tiny_layerwise_checkpoint, tmp_path / "out", (tiny_text,), steps=5, dim=16, embedding="parent"
    )
    decouple(options)
    before = embedding_of(RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint))
    loaded = RoutedForCausalLM.from_pretrained(options.out)
    loaded.save_pretrained(tmp_path / "again")
    again = RoutedForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.path_router is not None and again.path_router is not None
    for model in (loaded, again):
        assert torch.equal(embedding_of(model), before)
    ours = again.path_router.embedding.weight
    assert torch.equal(ours, loaded.path_router.embedding.weight)
    assert ours.untyped_storage().data_ptr() != embedding_of(again).untyped_storage().data_ptr()
    # What training could reach is the projection alone: the table lies in as many directions as that has.
    assert torch.linalg.matrix_rank(ours.double(), rtol=1e-4) <= 16
    other = decouple(replace(options, out=tmp_path / "own", embedding="own"))
    assert other.options["decouple"]["embedding"] == "own"
