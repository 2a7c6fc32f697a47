"""What several tests of exports, and of Read-ME, start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pregate.convert.domains.run import read_me
from tests.convert.domains.read_me_cases import small, write_domains
from tests.convert.export.exporting import convert_stock


@pytest.fixture(scope="session")
def stock_checkpoint(tiny_dense: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_stock(tiny_dense, tmp_path_factory.mktemp("stock") / "routed", tiny_text)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Files of text, a domain each."""
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def cut(tiny_dense: Path, domains: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-ME's cut, not tuned: the experts' rows are the parent's."""
    out = tmp_path_factory.mktemp("read-me") / "cut"
    read_me(small(tiny_dense, out, domains, steps=0))
    return out
