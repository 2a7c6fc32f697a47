"""The router's embedding and the parent's: started from it, or tied to it while the router is trained.

Shape letters: V vocabulary, D the parent's hidden width, C router width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from pregate.model.factors import projected
from pregate.model.path_router import PathRouter

#: Standard deviation the embedding starts with: small, so that the first steps already move it.
EMBEDDING_STD = 0.3


@torch.no_grad()
def start_from(router: PathRouter, parent_VD: torch.Tensor) -> None:
    """Start the router's embedding from the principal components of the parent's, so that rare tokens have a place.

    Columns beyond the parent's width keep their random start, on the same scale (docs/measurements.md).
    """
    table_VD, projection_DC = _principal(parent_VD, router.embedding.weight.shape[1])
    weight_VC = router.embedding.weight
    weight_VC.mul_(EMBEDDING_STD)
    weight_VC[:, : projection_DC.shape[1]] = table_VD @ projection_DC


def _principal(parent_VD: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The parent's table, centred [V, D], and what takes it to its first components, of the start's size [D, C]."""
    centred_VD = parent_VD.double() - parent_VD.double().mean(dim=0)
    _, components_DD = torch.linalg.eigh(centred_VD.T @ centred_VD)  # ascending eigenvalues
    kept_DC = components_DD.flip(1)[:, : min(width, parent_VD.shape[1])]
    return centred_VD, kept_DC * (EMBEDDING_STD / (centred_VD @ kept_DC).std())


class ParentEmbedding(nn.Module):
    """Stands in for a router's embedding in training: the parent's table, frozen, times a learned projection D -> C.

    `fold` puts the product in a table of the router's own. So what is saved and loaded is the same module as ever, and
    no reload can write into the parent's embedding (Read-ME's code does; the notes on it, section 6). `factors`: what
    its table can be made of again, bit for bit (`model/factors.py`).
    """

    table: torch.Tensor
    parent: torch.Tensor

    def __init__(self, parent_VD: torch.Tensor, width: int) -> None:
        super().__init__()
        parent_VD = parent_VD.detach()
        table_VD, projection_DC = _principal(parent_VD, width)
        self._mean_D, self._scale = parent_VD.double().mean(dim=0), 1 / table_VD.std()
        table_VD = table_VD * self._scale
        self.register_buffer("table", table_VD.float())
        self.register_buffer("parent", parent_VD, persistent=False)
        self.project = nn.Linear(parent_VD.shape[1], width, bias=False)
        with torch.no_grad():
            start_VC = table_VD @ projection_DC
            self.project.weight[: projection_DC.shape[1]] = (projection_DC * EMBEDDING_STD / start_VC.std()).T.float()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.project(F.embedding(ids, self.table))

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        projection_DC = self.project.weight.detach().T.contiguous()
        return {"projection": projection_DC, "mean": self._mean_D, "scale": self._scale}

    @torch.no_grad()
    def fold(self) -> nn.Embedding:
        """An embedding that gives the same, but for the rounding that makes its table the same on every machine."""
        return nn.Embedding.from_pretrained(projected(self.parent, **self.factors), freeze=False)
