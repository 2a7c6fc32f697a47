"""Logging: one form for every process, with the id of the request a line is about."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import uuid
from datetime import datetime, timezone
from typing import Literal

Form = Literal["text", "json"]
#: The request the current task or thread is working for; "" outside any.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("pregate_request_id", default="")
#: What a caller may call a request.
REQUEST_ID = re.compile(r"[\w.:@/-]{1,128}", re.ASCII)


class _RequestIdFilter(logging.Filter):
    """Names the request of a line, where its `extra` does not."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = getattr(record, "request_id", "") or request_id.get()
        return True


class _Text(logging.Formatter):
    """One line a message, whatever a client has put into it; only a traceback has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.request_id = getattr(record, "request_id", "") or "-"
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


class _Json(logging.Formatter):
    """One object a line; what is not ASCII is escaped, so that any text can be written anywhere."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "role": self._role, "logger": record.name}
        line["message"] = record.getMessage()
        if named := getattr(record, "request_id", ""):
            line["request_id"] = named
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)


def configure(role: str, form: Form = "text", text: str | None = None) -> None:
    """Send this process's pregate log lines to stderr, marked with its `role` (engine, host 1, ...).

    `form` json: an object a line of time, level, role, logger, message, and where there is one request_id and error.
    `text`: logging's format where `form` is text.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestIdFilter())
    text = text or f"%(asctime)s %(levelname).1s {role} [%(request_id)s] %(message)s"
    handler.setFormatter(_Json(role) if form == "json" else _Text(text))
    logger = logging.getLogger("pregate")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def name_request(given: str | None = None) -> str:
    """Let the lines of the current task name this request, by the caller's id where it is one, else by one made here;
    returns it."""
    name = given if given and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    request_id.set(name)
    return name
