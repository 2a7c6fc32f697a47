"""PEM files, as people's editors save them."""

import shutil
from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.base.pem import read_key, read_pem
from tests.router.doors.certificates import openssl

PEM = "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_editors_mark_is_no_part_of_it(mark: str, tmp_path: Path):
    """TLS libraries look for a line that begins with -----BEGIN: a door did not start, a client trusted nobody."""
    (tmp_path / "ca.pem").write_text(mark + PEM, encoding="utf-8")
    assert read_pem("--ca", tmp_path / "ca.pem") == PEM.encode()


def test_what_is_none_is_named(tmp_path: Path):
    (tmp_path / "text").write_text("hello")
    for name, reason in (("none", "cannot be read: No such file"), ("text", "is not a PEM file")):
        with pytest.raises(UserError, match=f"^ca {tmp_path / name}: {reason}"):
            read_pem("--ca", tmp_path / name)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize(("kind", "refused"), [
    ("ed25519", "an Ed25519 key"), ("ec -pkeyopt ec_paramgen_curve:secp521r1", "a P-521 key"),
    ("ec -pkeyopt ec_paramgen_curve:prime256v1", ""), ("rsa:2048", ""),
])  # fmt: skip
def test_a_key_that_grpc_cannot_use_is_named(kind: str, refused: str, tmp_path: Path):
    """gRPC takes it without a word, and then no handshake ends well."""
    openssl(tmp_path, f"req -x509 -newkey {kind} -nodes -subj /CN=x -keyout key.pem -out cert.pem")
    path = tmp_path / "key.pem"
    if refused:
        with pytest.raises(UserError, match=f"^tls_key .*: is {refused}, which gRPC cannot use; allowed: RSA"):
            read_key("--tls-key", path)
    else:
        assert read_key("--tls-key", path) == path.read_bytes()


def test_a_key_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "key").write_text("-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n")
    with pytest.raises(UserError, match="is not a PEM file"):
        read_key("--tls-key", tmp_path / "key")
