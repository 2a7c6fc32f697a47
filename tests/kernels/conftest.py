"""What the kernels log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines that the kernels log, whether or not another test has cut pregate's loggers off the root."""
    logger, handler = logging.getLogger("pregate.kernels"), _Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)
