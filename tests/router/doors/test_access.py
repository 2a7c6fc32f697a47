"""When a front door asks for TLS and tokens, and which it takes."""

import pytest

from pregate.base.errors import UserError
from pregate.base.network import is_loopback
from pregate.router.doors.access import AccessOptions, is_authorized


@pytest.fixture
def pem(tmp_path):
    path = tmp_path / "cert.pem"
    path.write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    return path


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing(host):
    assert is_loopback(host)
    AccessOptions(host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""])
def test_other_interfaces_need_tls_and_tokens(host, pem):
    assert not is_loopback(host)
    for options in ({}, {"tls_cert": pem, "tls_key": pem}, {"token_file": pem}):
        with pytest.raises(UserError, match=r"host .*: needs tls_cert, tls_key and token_file"):
            AccessOptions(host=host, **options)
    AccessOptions(host=host, tls_cert=pem, tls_key=pem, token_file=pem)


def test_half_a_tls_pair_is_refused(pem):
    with pytest.raises(UserError, match=r"tls_cert .*: needs tls_key beside it"):
        AccessOptions(tls_cert=pem)
    with pytest.raises(UserError, match=r"tls_key .*: needs tls_cert beside it"):
        AccessOptions(tls_key=pem)


def test_bad_files_are_named(tmp_path, pem):
    missing, text = tmp_path / "none.pem", tmp_path / "text"
    text.write_text("hello")
    with pytest.raises(UserError, match=r"tls_cert .*none.pem: cannot be read: No such file"):
        AccessOptions(tls_cert=missing, tls_key=pem).read_tls()
    with pytest.raises(UserError, match=r"tls_key .*text: is not a PEM file"):
        AccessOptions(tls_cert=pem, tls_key=text).read_tls()
    with pytest.raises(UserError, match=r"token_file .*none.pem: cannot be read"):
        AccessOptions(token_file=missing).read_tokens()


def test_tokens_come_one_a_line(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# ours\n\n  alpha \nbeta\n")
    assert AccessOptions(token_file=path).read_tokens() == {"alpha", "beta"}
    path.write_text("# none\n\n")
    with pytest.raises(UserError, match="holds no token"):
        AccessOptions(token_file=path).read_tokens()


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("Bearer alpha", True),
        ("bearer beta", True),
        ("Bearer alph", False),
        ("Bearer alphabeta", False),
        ("Basic alpha", False),
        ("alpha", False),
        ("Bearer ", False),
        ("Bearer ünicode", False),
        ("", False),
        (None, False),
    ],
)
def test_only_a_known_bearer_token_is_accepted(header, accepted):
    assert is_authorized(header, {"alpha", "beta"}) is accepted
