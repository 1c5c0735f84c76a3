"""Folders and files that commands write: whole or absent, and each folder by one process at a time.

A file or folder is written under the name `.unfinished-NAME` beside its place, synced, and renamed. What a killed
process leaves under such a name counts for nothing and is removed by the next run.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regla.runtime.errors import OptionError

UNFINISHED = ".unfinished-"
LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all; also after a loss of power."""
    path = Path(path)
    unfinished = unfinished_name(path)
    try:
        write_synced(unfinished, content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """As indented JSON; what JSON has no form for, such as a path, as its text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and sync it to the disk, in place: for files of a folder that is not in its place yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; only POSIX systems can open one for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def unfinished_name(path: Path) -> Path:
    """Where a file or folder is until it is whole."""
    return path.with_name(f"{UNFINISHED}{path.name}")


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed writes left in `folder`."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def content_of(folder: Path) -> list[Path]:
    """What is in `folder`, but unfinished writes, the lock, and folders that hold nothing else."""
    return [path for path in folder.iterdir() if not _counts_for_nothing(path)]


def _counts_for_nothing(path: Path) -> bool:
    if path.name.startswith(UNFINISHED) or path.name == LOCK:
        return True
    return path.is_dir() and not path.is_symlink() and not content_of(path)


def check_new(folder: str | Path) -> None:
    """Raise ValueError unless `folder` can become a new folder: it does not exist or is empty."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OptionError("{folder} is a file; give {out} a folder that does not exist yet.", folder=folder)
    if folder.is_dir() and content_of(folder):
        raise OptionError("{folder} is not empty; give {out} a new folder, or empty this one first.", folder=folder)


def new_folder(folder: str | Path) -> Path:
    """Create `folder`, which must not exist or be empty, so that nothing is ever overwritten."""
    check_new(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            "{folder} cannot be created ({reason}); give {out} a place that you may write to.",
            folder=folder,
            reason=error.strerror,
        ) from error
    return Path(folder)


@contextmanager
def new_folder_alone(folder: str | Path, who: str = "process") -> Iterator[Path]:
    """`new_folder`, held by this process while the context is open: of two that want it, one gets it.

    Raises ValueError where the folder is not empty, cannot be created, or is held by another process.
    """
    with alone_in(new_folder(folder), who) as path:
        check_new(path)  # another may have come, written and gone
        remove_unfinished(path)
        yield path


@contextmanager
def alone_in(folder: str | Path, who: str = "process", *, wait: bool = False) -> Iterator[Path]:
    """Hold an existing folder while the context is open; the system lets go of it when the process ends in any way.

    who: what else may hold it, for the message. wait: until that lets go; else raises ValueError where one holds it.
    Where the file system has no locks, nothing is held.
    """
    folder = Path(folder)
    try:
        descriptor = _locked(folder / LOCK, wait)
    except BlockingIOError as error:
        raise OptionError(
            "Another {who} is at work in {folder}; wait for it, or give another {out}.", who=who, folder=folder
        ) from error
    except OSError as error:
        raise OptionError(
            "{folder} cannot be written to ({reason}); give {out} another place.", folder=folder, reason=error.strerror
        ) from error
    try:
        yield folder
    finally:
        if descriptor is not None:
            (folder / LOCK).unlink(missing_ok=True)  # a process that waits for this one sees it gone and makes another
            os.close(descriptor)


def _locked(file: Path, wait: bool) -> int | None:
    """The descriptor of a lock on `file`, which is made; None where there are no locks."""
    if os.name != "posix":
        return None
    import fcntl

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(descriptor)
            if error.errno in _WITHOUT_LOCKS:
                file.unlink(missing_ok=True)
                return None
            raise
        except BaseException:
            os.close(descriptor)
            raise
        try:
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the lock of one who has just gone and taken the file with him


def check_writable(file: str | Path) -> None:
    """Raise ValueError unless a file can be written there, so that a result is not lost at the end."""
    file = Path(file)
    if not file.parent.is_dir():
        raise ValueError(f"There is no folder for {file}; give a file in a folder that exists.")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give the name of a file in it.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written; give a file in a folder that you may write to.")


def check_new_file(file: str | Path) -> None:
    """Raise ValueError unless a new file can be written there: nothing is overwritten."""
    check_writable(file)
    if Path(file).exists():
        raise ValueError(f"{file} exists already; give the name of a new file, or remove this one first.")


def brief(error: Exception) -> str:
    """The kind of an error and the first sentence of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}" if lines else type(error).__name__
