"""Errors keep class and sentence across process boundaries inside Ray."""

import pickle

import pytest

from pregate.base import errors

ALL = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.PregateError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda c: c.__name__)
def test_every_error_survives_pickling(kind):
    error = kind(3, "silent for 4 s") if kind is errors.HostLostError else kind("hosts 9: allowed: 0 to 5")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.code == error.code


def test_a_lost_host_is_named():
    again = pickle.loads(pickle.dumps(errors.HostLostError(3, "silent")))
    assert (again.host_id, str(again)) == (3, "expert host 3 is lost: silent")


def test_codes_lead_back_to_their_class():
    assert errors.BY_CODE["UNAVAILABLE"] is errors.UnavailableError
    assert errors.BY_CODE["INVALID_ARGUMENT"] is errors.UserError


def test_the_house_sentence():
    assert str(errors.UserError.of("--hosts", 9, "allowed: 0 to 5")) == "hosts 9: allowed: 0 to 5"
