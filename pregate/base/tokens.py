"""The file of bearer tokens, as servers and clients read it."""

from __future__ import annotations

from pathlib import Path

from pregate.base.errors import UserError


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of `path`, one a line; blank lines and lines that start with `#` are skipped.

    UserError names `--token-file` when it cannot be read, holds none, or one that no client could show.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", "replace")
    except OSError as error:
        raise UserError.of("--token-file", path, f"cannot be read: {error.strerror}") from error
    tokens = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise UserError.of("--token-file", path, "holds no token; expected one a line")
    if wrong := next((number for number, token in enumerate(tokens, 1) if not is_token(token)), 0):
        sentence = f"its token {wrong} holds what no header carries; allowed: printable ASCII characters"
        raise UserError.of("--token-file", path, sentence)
    return tokens


def is_token(text: str) -> bool:
    """Whether a header, of HTTP as of gRPC, can carry it: a client could never show another one."""
    return bool(text) and all(" " <= character <= "~" for character in text)
