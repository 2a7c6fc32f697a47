"""When a front door asks for TLS and tokens, and which it takes."""

import logging

import pytest

from pregate.base.errors import UserError
from pregate.base.network import is_loopback
from pregate.router.doors.access import AccessOptions, TokenFile, is_authorized


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
        with pytest.raises(UserError, match=r"host .*: needs tls_cert, tls_key and token_file \(or tls_client_ca\)"):
            AccessOptions(host=host, **options)
    AccessOptions(host=host, tls_cert=pem, tls_key=pem, token_file=pem)
    AccessOptions(host=host, tls_cert=pem, tls_key=pem, tls_client_ca=pem)


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
        AccessOptions(token_file=missing).open_tokens()


def test_tokens_come_one_a_line(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# ours\n\n  alpha \nbeta\n")
    tokens = AccessOptions(token_file=path).open_tokens()
    assert [tokens.accepts(f"Bearer {token}") for token in ("alpha", "beta", "# ours", "")] == [
        True,
        True,
        False,
        False,
    ]
    path.write_text("# none\n\n")
    with pytest.raises(UserError, match="holds no token"):
        AccessOptions(token_file=path).open_tokens()


@pytest.mark.parametrize("how", ["written over", "replaced", "by a link, as Kubernetes does"])
def test_a_file_that_changes_is_read_again(tmp_path, how):
    path, other = tmp_path / "tokens", tmp_path / "other"
    path.write_text("alpha")
    if how.startswith("by a link"):
        path.rename(tmp_path / "first")
        path.symlink_to(tmp_path / "first")
    tokens = TokenFile(path)
    assert tokens.accepts("Bearer alpha")
    if how == "written over":
        path.write_text("gamma")  # as long, and within the same tick of a coarse clock
    elif how == "replaced":
        other.write_text("gamma")
        other.replace(path)
    else:
        other.write_text("gamma")
        (tmp_path / "link").symlink_to(other)
        (tmp_path / "link").replace(path)
    assert [tokens.accepts("Bearer alpha"), tokens.accepts("Bearer gamma")] == [False, True]


def test_a_file_that_is_as_it_was_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "tokens"
    path.write_text("alpha")
    monkeypatch.setattr("pregate.router.doors.access._SETTLED_NS", 0)
    tokens = TokenFile(path)
    monkeypatch.setattr("pregate.router.doors.access.read_tokens", None)
    assert all(tokens.accepts("Bearer alpha") for _ in range(100))


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_file_that_goes_bad_leaves_the_tokens_and_is_logged_once(tmp_path, caplog, monkeypatch, how):
    monkeypatch.setattr(logging.getLogger("pregate"), "propagate", True)
    path = tmp_path / "tokens"
    path.write_text("alpha")
    tokens = TokenFile(path)
    if how == "gone":
        path.unlink()
    else:
        path.write_text("\n")
    assert all(tokens.accepts("Bearer alpha") and not tokens.accepts("Bearer ") for _ in range(5))
    (record,) = {r for r in caplog.records if r.levelno >= logging.ERROR}  # two handlers may see one
    assert record.getMessage().endswith("; the tokens read before stay in force")
    path.write_text("beta")
    assert [tokens.accepts("Bearer alpha"), tokens.accepts("Bearer beta")] == [False, True]


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
