"""What several tests of exports, and of Read-ME, start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.exporting import convert_stock
from tests.convert.read_me_cases import write_domains


@pytest.fixture(scope="session")
def stock_checkpoint(tiny_dense: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_stock(tiny_dense, tmp_path_factory.mktemp("stock") / "routed", tiny_text)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Files of text, a domain each."""
    return write_domains(tmp_path_factory.mktemp("domains"))
