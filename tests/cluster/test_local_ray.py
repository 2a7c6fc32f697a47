import contextlib
import itertools
import os
import socket
import threading
import time

import psutil
import pytest

from pregate.base.errors import UserError
from pregate.cluster import local_ray
from pregate.cluster.doctor import _token


def session_of(process):
    """Processes of the keeper's session. (Ray's agents overwrite their environment, so no mark in it would do.)"""
    found = []
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_starting_after_ray_has_read_its_environment_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match="RAY_AUTH_MODE unset"):
        local_ray.start(1)


@pytest.fixture
def no_token(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("where", ["HOME", "RAY_AUTH_TOKEN_PATH"])
def test_the_token_is_for_its_owner_only(tmp_path, monkeypatch, no_token, where):
    path = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv(where, str(tmp_path if where == "HOME" else path))
    local_ray.ensure_token()
    token = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert len(token) == 64
    local_ray.ensure_token()
    assert path.read_text() == token


def test_a_home_that_cannot_be_written_is_one_sentence(monkeypatch, no_token):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    with pytest.raises(UserError, match=r"HOME /proc/nowhere: .*cannot be written.*RAY_AUTH_TOKEN_PATH"):
        local_ray.ensure_token()


def test_a_user_without_a_home_is_told_so(monkeypatch, no_token):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # in no /etc/passwd, as in many containers
    with pytest.raises(UserError, match=r"^HOME: not set, and user 54321 has no home .*RAY_AUTH_TOKEN_PATH to a file$"):
        local_ray.ensure_token()
    assert "no home folder" in _token().value


def test_a_port_that_nobody_listens_on_does_not_answer():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert not local_ray.gcs_answers(address)
        taken.listen()
        assert local_ray.gcs_answers(address)


def test_who_finds_the_token_finds_all_of_it(tmp_path, monkeypatch, no_token):
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    found, done = set(), threading.Event()

    def read():
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                found.add(len(path.read_text()))

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 60
    for written in itertools.count():  # on a busy machine the reader may not run at all for the first of them
        if written >= 300 and (found or time.monotonic() > deadline):
            break
        local_ray.ensure_token()
        path.unlink()
    done.set()
    reader.join()
    assert found == {64}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
def test_without_its_control_service_ray_is_ended_at_once():
    """Ray's processes would wait for it for a minute, and its two agents, whose parent died, for longer.

    It dies while the keeper waits for its answer, which would not come for a minute either.
    """
    kept = local_ray.start(1)
    session = session_of(kept.process)
    names = [process.name() for process in session]
    assert [name for name in names if name.startswith("ray::")], names
    gcs = next(process for process in session if process.name() == "gcs_server")
    gcs.suspend()
    time.sleep(3 * local_ray.POLL_S)
    gcs.kill()
    kept.process.wait(15)
    assert session_of(kept.process) == []
    assert not kept.run_dir.exists()
