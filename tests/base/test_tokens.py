"""Files of bearer tokens, as people's editors save them."""

from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.base.tokens import read_tokens


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_editors_mark_is_no_part_of_a_token(mark: str, tmp_path: Path):
    file = tmp_path / "tokens.txt"
    file.write_text(f"{mark}correct-horse\r\n\n# not one\nbattery\n", encoding="utf-8")
    assert read_tokens(file) == ["correct-horse", "battery"]


def test_a_file_of_an_editors_mark_alone_holds_none(tmp_path: Path):
    file = tmp_path / "tokens.txt"
    file.write_text("\ufeff", encoding="utf-8")
    with pytest.raises(UserError, match="token_file"):
        read_tokens(file)


def test_what_no_header_carries_is_no_token(tmp_path: Path):
    file = tmp_path / "tokens.txt"
    file.write_text("fine\nschlüssel\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"token_file .*: its token 2 holds what no header carries; allowed: printable"):
        read_tokens(file)
