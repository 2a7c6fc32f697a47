import fcntl
import tempfile

import pytest

from pregate.base.errors import UserError
from pregate.cluster import local_ray


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ray, "_short_folder", lambda: str(tmp_path))
    return tmp_path


def test_only_folders_of_dead_keepers_are_swept(folder):
    for name in ("pregate-dead", "pregate-alive", "pregate-starting", "other"):
        (folder / name / "ray").mkdir(parents=True)
    for name in ("pregate-dead", "pregate-alive", "other"):
        (folder / name / "lock").touch()
    with (folder / "pregate-alive" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        local_ray.sweep_abandoned()
    assert sorted(p.name for p in folder.iterdir()) == ["other", "pregate-alive", "pregate-starting"]


def test_a_folder_in_use_is_locked_from_the_moment_its_lock_is_seen(folder):
    run_dir = folder / "pregate-new"
    run_dir.mkdir()
    lock = local_ray._lock(run_dir)
    local_ray.sweep_abandoned()
    assert (run_dir / "lock").exists()
    lock.close()
    local_ray.sweep_abandoned()
    assert not run_dir.exists()


def test_sockets_fit_into_their_folder(monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/a/very/long/folder/of/a/batch/system/job-12345")
    assert local_ray._short_folder() == "/tmp"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch/me")
    assert local_ray._short_folder() == "/scratch/me"


def test_starting_after_ray_has_read_its_environment_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match="RAY_AUTH_MODE unset"):
        local_ray.start(1)


def test_the_token_is_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    local_ray._ensure_token()
    path = tmp_path / ".ray" / "auth_token"
    token = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert len(token) == 64
    local_ray._ensure_token()
    assert path.read_text() == token
