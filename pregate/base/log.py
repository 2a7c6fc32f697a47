"""Logging: one format for every process, with the id of the request a line is about."""

from __future__ import annotations

import contextvars
import logging
import sys

#: The request the current task or thread is working for; "-" outside any.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("pregate_request_id", default="-")


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)


def configure(role: str) -> None:
    """Send this process's pregate log lines to stderr, marked with its `role` (engine, host 1, ...)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestIdFilter())
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {role} [%(request_id)s] %(message)s"))
    logger = logging.getLogger("pregate")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
