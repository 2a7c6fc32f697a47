"""What several tests of reports start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pregate.convert.report.figures import Figures
from tests.convert.report.pages import CUT, DENSE_CUT, make_report, random_checkpoint


@pytest.fixture(scope="session")
def uneven(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer between two of 6 and 3 routed experts, a fixed number of each active."""
    folder = tmp_path_factory.mktemp("checkpoints") / "uneven"
    other = {"num_routed": 3, "num_shared": 5, "num_active": 1, "expert_width": 16}
    return random_checkpoint(folder, tiny_dense, [CUT, DENSE_CUT, other])


@pytest.fixture(scope="session")
def exact(
    tiny_path_checkpoint: Path, tiny_layerwise_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path_factory
) -> tuple[Figures, str]:
    compare = (tiny_layerwise_checkpoint, tiny_dense)
    return make_report(tiny_path_checkpoint, tiny_text, tmp_path_factory.mktemp("report"), compare=compare)
