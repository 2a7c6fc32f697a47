import fcntl
import os
import stat
import tempfile

import pytest

from pregate.cluster import run_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_short_folder", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """A run's folder with Ray's logs in it, as a process of that run sees it."""
    run_dir, lock = run_folder.make()
    monkeypatch.setenv(run_folder.RUN_DIR_VARIABLE, str(run_dir))
    logs = run_dir / "ray" / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker.err").write_text("why")
    (run_dir / "ray" / "session_latest").symlink_to(logs.parent)
    yield run_dir
    lock.close()


def test_only_folders_of_dead_keepers_are_swept(folder):
    for name in ("pregate-dead", "pregate-alive", "pregate-starting", "other"):
        (folder / name / "ray").mkdir(parents=True)
    for name in ("pregate-dead", "pregate-alive", "other"):
        (folder / name / "lock").touch()
    with (folder / "pregate-alive" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run_folder.sweep_abandoned()
    assert sorted(p.name for p in folder.iterdir()) == ["other", "pregate-alive", "pregate-starting"]


def test_a_folder_in_use_is_locked_from_the_moment_its_lock_is_seen(folder):
    run_dir, lock = run_folder.make()
    run_folder.sweep_abandoned()
    assert (run_dir / "lock").exists()
    lock.close()
    run_folder.sweep_abandoned()
    assert not run_dir.exists()


def test_sockets_fit_into_their_folder(monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/a/very/long/folder/of/a/batch/system/job-12345")
    assert run_folder._short_folder() == "/tmp"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch/me")
    assert run_folder._short_folder() == "/scratch/me"


def test_logs_go_with_a_run_that_went_well(run, folder):
    run_folder.mark("a/b")
    run_folder.unmark("a/b")
    assert run_folder.remove(run) is None
    assert list(folder.iterdir()) == []


def test_logs_stay_where_a_supervisor_did_not_end_well(run, folder):
    run_folder.mark("well")
    run_folder.mark("failed")
    run_folder.unmark("well")
    kept = run_folder.remove(run)
    assert kept is not None
    assert (kept / "worker.err").read_text() == "why"
    assert not run.exists()
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_only_the_newest_logs_are_kept(run, folder):
    kept_folder = folder / f"pregate-logs-{os.getuid()}"
    for number in range(run_folder.MAX_KEPT_LOGS):
        (kept_folder / f"20000101-00000{number}-1").mkdir(parents=True)
    run_folder.mark("failed")
    kept = run_folder.remove(run)
    left = sorted(path.name for path in kept_folder.iterdir())
    assert len(left) == run_folder.MAX_KEPT_LOGS
    assert left[0] == "20000101-000001-1"
    assert left[-1] == kept.name


def test_outside_a_run_there_is_nothing_to_mark(monkeypatch):
    monkeypatch.delenv(run_folder.RUN_DIR_VARIABLE, raising=False)
    run_folder.mark("x")
    run_folder.unmark("x")
    assert run_folder.own() is None
