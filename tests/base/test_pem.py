"""PEM files, as people's editors save them."""

from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.base.pem import read_pem

PEM = "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_editors_mark_is_no_part_of_it(mark: str, tmp_path: Path):
    """TLS libraries look for a line that begins with -----BEGIN: a door did not start, a client trusted nobody."""
    (tmp_path / "ca.pem").write_text(mark + PEM, encoding="utf-8")
    assert read_pem("--ca", tmp_path / "ca.pem") == PEM.encode()


def test_what_is_none_is_named(tmp_path: Path):
    (tmp_path / "text").write_text("hello")
    for name, reason in (("none", "cannot be read: No such file"), ("text", "is not a PEM file")):
        with pytest.raises(UserError, match=f"^ca {tmp_path / name}: {reason}"):
            read_pem("--ca", tmp_path / name)
