"""What several export tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.exporting import convert_stock


@pytest.fixture(scope="session")
def stock_checkpoint(tiny_dense: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_stock(tiny_dense, tmp_path_factory.mktemp("stock") / "routed", tiny_text)
