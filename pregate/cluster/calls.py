"""Calls to a deployment's supervisor, each of which ends in time and in an error that says what has become of it."""

from __future__ import annotations

from typing import Any

import ray
import ray.exceptions

from pregate.base.errors import BY_CODE, PregateError, UnavailableError

#: The supervisor answers from an event loop that never blocks; this is for a machine that is short of time.
CALL_TIMEOUT_S = 30.0


class SilentError(UnavailableError):
    """The supervisor did not answer; it may be alive, and may have done what it was asked."""


class RayLostError(UnavailableError):
    """Ray is gone: no call to it returns any more, nor its own clean-up at the end of the process."""


def call(supervisor: Any, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """Call the supervisor. UnavailableError when it is gone, SilentError when that is not known."""
    return get(getattr(supervisor, method).remote(*arguments), timeout_s)


def get(reference: Any, timeout_s: float) -> Any:
    """The answer to a call that was made; errors as of `call`."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.ActorDiedError as error:
        raise UnavailableError("the supervisor of the deployment is gone") from error
    except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError) as error:
        raise SilentError(f"the supervisor did not answer: {error}") from error
    except ray.exceptions.RayError as error:
        raise UnavailableError(f"the supervisor failed: {type(error).__name__}") from error


def error_of(failure: dict[str, str]) -> PregateError:
    """The error that a supervisor's answer is about."""
    return BY_CODE.get(failure["code"], PregateError)(failure["message"])
