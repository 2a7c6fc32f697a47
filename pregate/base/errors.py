"""Typed errors. What a user can cause is a `UserError`; its message names the option, the value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType


def option_name(field: str) -> str:
    """The command line's name of an option's field. Example: batch_tokens is --batch-tokens."""
    return "--" + field.replace("_", "-")


def in_one_line(error: Exception) -> str:
    """What an error of a library says, its lines joined; only the first where more is advice."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [repr(error)]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


#: To look for what each was meant to be takes time, and a client chooses how many there are.
_MOST_NAMED = 8
#: An option in a message, or a command, which stays as it is.
_FLAG = re.compile(r"`[^`]*`|(?<![\w/-])--[a-z][a-z0-9-]*")
#: A sentence of the house begins with the name of the field that is wrong.
_FIELD = re.compile(r"([a-z_]+(?:\.\w+)*)(?::| [^:]*: )")


def field_of(message: str) -> str | None:
    """The field that a sentence about bad input is about; None where it begins with none."""
    found = _FIELD.match(message)
    return found[1] if found else None


def logged(code: str, message: str) -> str:
    """What a log may hold of an error. A sentence about bad input quotes what was sent: of that the field alone."""
    return f"{code}: {field_of(message) or 'the request' if code in ('INVALID_ARGUMENT', 'NOT_FOUND') else message}"


class PregateError(Exception):
    """Root of every error pregate raises on purpose. `code` is the gRPC status name a front door answers with.

    Messages are written with options as the command line has them, --max-tokens; `str` gives them as the fields and
    keys of Python, HTTP and Serve, max_tokens.
    """

    code = "INTERNAL"
    #: Whether it was written to stderr already, as a line of the log.
    is_said = False

    @property
    def for_command_line(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return _FLAG.sub(lambda found: _field_name(found[0]), self.for_command_line)


def _field_name(found: str) -> str:
    return found if found.startswith("`") else found[2:].replace("-", "_")


class UserError(PregateError, ValueError):
    """Bad input: exit code 2 on the command line, INVALID_ARGUMENT over gRPC."""

    code = "INVALID_ARGUMENT"

    @classmethod
    def of(cls, option: str, value: object, allowed: str) -> UserError:
        """Build the house sentence, e.g. `--active 6: with --shared 3 it exceeds --experts 8; allowed: 0 to 5`."""
        return cls(f"{option} {value}: {allowed}")

    @classmethod
    def of_unknown(cls, given: Mapping[str, object], allowed: Iterable[str]) -> UserError:
        """The error of names that are no options: each with the one it was probably meant to be, then all there are."""
        names, parts = list(allowed), []
        for name, value in list(given.items())[:_MOST_NAMED]:
            near = difflib.get_close_matches(name.rpartition(" ")[2].lstrip("-").replace("-", "_"), names, 1)
            parts.append(f"{name} {value}: unknown option" + (f"; nearest: {near[0]}" if near else ""))
        more = f"; {len(given) - _MOST_NAMED} more" if len(given) > _MOST_NAMED else ""
        return cls(f"{'; '.join(parts)}{more}; allowed: {', '.join(names)}")


class CheckpointError(UserError):
    """A folder that is not a checkpoint, or a damaged one. The message names the file and the reason."""


class NotFoundError(UserError):
    """An unknown model or request."""

    code = "NOT_FOUND"


class QueueFullError(PregateError):
    """The bounded queue holds as many requests as it may; try again after `retry_after_s`.

    That is the shortest time HTTP can say: a place is free when any request ends, which nobody can foretell.
    """

    code = "RESOURCE_EXHAUSTED"
    retry_after_s = 1


class UnavailableError(PregateError):
    """Starting, draining, or an expert host is lost; the request may be sent again."""

    code = "UNAVAILABLE"


class HostLostError(UnavailableError):
    """An expert host stopped answering. `host_id` says which."""

    def __init__(self, host_id: int, reason: str) -> None:
        super().__init__(f"expert host {host_id} is lost: {reason}")
        self.host_id = host_id
        self.reason = reason

    def __reduce__(self) -> tuple[type[HostLostError], tuple[int, str]]:
        """Let it cross process boundaries inside Ray, which rebuilds errors from their arguments."""
        return HostLostError, (self.host_id, self.reason)


class ProtocolError(PregateError):
    """A message between processes is malformed, of another version, too large, or fails its checksum."""


class DataLossError(PregateError):
    """What a running server computes with cannot be read any more: a file is damaged, or was changed meanwhile."""

    code = "DATA_LOSS"


class DeadlineError(PregateError):
    """The caller's deadline passed before the answer was complete."""

    code = "DEADLINE_EXCEEDED"


#: Status name -> error class, to rebuild on this side of a process boundary what was raised on the other.
BY_CODE: Mapping[str, type[PregateError]] = MappingProxyType(
    {
        c.code: c
        for c in (
            PregateError,
            UserError,
            NotFoundError,
            QueueFullError,
            UnavailableError,
            DataLossError,
            DeadlineError,
        )
    }
)
