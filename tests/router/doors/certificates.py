"""Certificates of authorities that are made for one test run."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(folder: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True, timeout=60)


def certify(folder: Path, name: str, days: int = 2, ca: str = "ca") -> tuple[Path, Path]:
    """A certificate NAME.pem of this machine, signed by `ca`, and its key; with `days` -1 it has expired."""
    extensions = folder / "names.ext"
    extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl(folder, f"req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr")
    signer = f"-CA {ca}.pem -CAkey {ca}.key -CAcreateserial"
    openssl(folder, f"x509 -req -in {name}.csr {signer} -days {days} -extfile names.ext -out {name}.pem")
    return folder / f"{name}.pem", folder / f"{name}.key"
