"""Files that are whole or absent, and folders that one process has at a time."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from regla.runtime import files
from regla.runtime.files import alone_in, check_new, new_folder_alone, remove_unfinished, write_json, write_text

HOLD = """
import sys, time
from regla.runtime.files import alone_in
with alone_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"path": tmp_path})
    before = file.read_text()
    assert before == f'{{\n  "path": "{tmp_path}"\n}}\n'

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(files, "write_synced", full)
        write_text(file, "other")
    assert file.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_unfinished_writes_count_for_nothing(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-log.jsonl").touch()
    (tmp_path / ".unfinished-step-000003").mkdir()
    (tmp_path / ".lock").touch()  # of a process that was killed
    check_new(tmp_path)
    with new_folder_alone(tmp_path) as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty; give out a new folder"):
        check_new(tmp_path)
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path),
        pytest.raises(ValueError, match=r"^Another run is at work in .*; wait for it, or give another out\.$"),
        alone_in(tmp_path, "run"),
    ):
        pass
    with alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="Another process is at work"), alone_in(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / ".lock").exists()
    with alone_in(tmp_path):
        pass


def test_of_many_that_want_a_new_folder_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have seen the folder empty before any of them takes it; one comes when the first has gone."""
    barrier, check, turns = threading.Barrier(8), files.check_new, []
    outcomes: list[str] = []

    def meet(folder: Path) -> None:
        check(folder)
        if threading.get_ident() not in turns:
            turns.append(threading.get_ident())
            barrier.wait()

    def take() -> None:
        try:
            with new_folder_alone(tmp_path / "new") as folder:
                (folder / "mine").touch()
            outcomes.append("taken")
        except ValueError as error:
            outcomes.append("busy" if "Another process is at work" in str(error) else str(error))

    monkeypatch.setattr(files, "check_new", meet)
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("taken") == 1
    assert all(outcome in ("taken", "busy") or "is not empty" in outcome for outcome in outcomes)


def test_who_waits_gets_the_folder_next(tmp_path: Path) -> None:
    """Though the file of the lock is removed when it is let go."""
    inside, most, done = [], [], []

    def work() -> None:
        for _ in range(20):
            with alone_in(tmp_path, wait=True):
                inside.append(0)
                most.append(len(inside))
                inside.pop()
        done.append(0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 4 and max(most) == 1 and len(most) == 80


def test_a_place_without_locks_or_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with alone_in(tmp_path):
            pass
    with (
        pytest.raises(ValueError, match=r"absent cannot be written to \(No such file or directory\)"),
        alone_in(tmp_path / "absent"),
    ):
        pass
