"""Authorities that sign certificates, for the doors' tests."""

import shutil

import pytest

from tests.router.doors.certificates import openssl


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """A folder with two authorities, ca.pem and other.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        openssl(folder, f"req -x509 -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.pem")
    return folder
