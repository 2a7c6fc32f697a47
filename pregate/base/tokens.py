"""The file of bearer tokens, as servers and clients read it."""

from __future__ import annotations

from pathlib import Path

from pregate.base.errors import UserError


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of `path`, one a line; blank lines and lines that start with `#` are skipped.

    UserError names `--token-file` when it cannot be read or holds none.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", "replace")
    except OSError as error:
        raise UserError.of("--token-file", path, f"cannot be read: {error.strerror}") from error
    tokens = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise UserError.of("--token-file", path, "holds no token; expected one a line")
    return tokens
