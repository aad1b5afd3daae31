"""What one process at a time may do in a folder, told by locks on files: the system gives them back however a process ends."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO
from weakref import WeakSet

from ..errors import ClosedError, ConfigError, FolderError, FolderInUse, ForkedError, StorageError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    raise ConfigError(
        "neuralflow-memory needs a POSIX system (Linux, macOS, WSL): it locks its folder with flock"
    ) from None

_MOUNTS = Path("/proc/self/mountinfo")
_OVER_A_NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
    }
    | {"pvfs2", "smb", "smb2", "smb3", "smbfs"}
    | {f"fuse.{name}" for name in ("ceph", "gcsfuse", "glusterfs", "rclone", "s3fs", "sshfs", "blobfuse", "blobfuse2")}
)
_OPENING = 30.0  # seconds to wait for another process that is just opening the folder
_LEAVING = 2.0  # seconds to wait for one that has the index, and is not known to have the folder open

_held: WeakSet[FileLock] = WeakSet()
_parents: set[Path] = set()
"""Folders that a parent had open when this process was forked."""


def _forget_parents_locks() -> None:
    # A forked child shares its parent's locks, and would keep them after the parent has ended.
    for lock in list(_held):
        if lock.held:
            _parents.add(lock.path.parent)
            lock.drop()


os.register_at_fork(after_in_child=_forget_parents_locks)


class FileLock:
    """A lock on a file, which is made where it is not there. Not for several threads.

    *passing*: the file goes with the lock. *signed*: it says which process has the lock for itself.
    """

    def __init__(self, path: Path, *, passing: bool = False, signed: bool = False) -> None:
        self.path = path
        self.passing = passing
        self._signed = signed
        self._file: IO[str] | None = None
        """Open while the lock is held."""

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self, *, shared: bool = False) -> bool:
        """Take the lock unless somebody else has it, without waiting; whether it is held now."""
        if self._file is not None:
            return True
        while True:
            file = self._opened()
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            except OSError as error:
                file.close()
                raise StorageError(f"{self.path} can't be locked: {error.strerror}", path=str(self.path)) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    break
            file.close()  # its holder has just removed it, and the next one has another file
        if self._signed and not shared:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        self._file = file
        _held.add(self)
        return True

    def share(self) -> None:
        """Let others share a lock that was taken for this process alone."""
        assert self._file is not None
        self._file.truncate(0)
        self._signed = False
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def keep_alone(self) -> bool:
        """Have a shared lock for this process alone, unless others share it; whether it is so now."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._file, fcntl.LOCK_SH)  # the system has taken it away
            return False
        return True

    def release(self) -> None:
        """Give the lock back."""
        file, self._file = self._file, None
        if file is not None:
            if self.passing:
                self.path.unlink(missing_ok=True)
            elif self._signed:
                file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone leaves it locked while a forked child holds a copy
            file.close()

    def drop(self) -> None:
        """Close this process's copy of the lock; the process that took it keeps it."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @property
    def pid(self) -> int | None:
        """The process that has it for itself; None if nobody has, or that can't be told."""
        try:
            pid = int(self.path.read_text())
        except (OSError, ValueError):
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:  # it was killed
            return None
        except OSError:  # it is another user's
            pass
        return pid

    def _opened(self) -> IO[str]:
        try:
            return self.path.open("a")
        except OSError as error:
            folder = self.path.parent
            raise StorageError(f"{folder} can't be written to: {error.strerror}", path=str(folder)) from error


class FolderLocks:
    """The locks of one process on a folder.

    `open` is shared by all processes that have the folder open, and held by one alone while it opens the folder as the first.
    `index` is of the process that indexes for all; `wanted` is shared by those who would do so, and could embed. Others are
    taken by name, for as long as something lasts.
    """

    def __init__(self, folder: Path) -> None:
        """Enter the folder.

        Raises:
            FolderError: Locks can't be trusted there.
            FolderInUse: A process that knows nothing of others has it, or one does not come to the end of opening it.
            ForkedError: It was open in this process's parent when this one was forked.
        """
        if folder in _parents:
            # SQLite and Chroma would go on with the parent's files and locks, and ruin them.
            raise ForkedError(
                f"{folder} was open when this process was forked from process {os.getppid()}, and can't be opened here; open it "
                "after the fork only (in gunicorn's post_fork, Celery's worker_process_init), close it before the fork, or start "
                "processes with 'spawn'"
            )
        kind = network_file_system(folder)
        if kind is not None:
            raise FolderError(
                f"{folder} is on a network file system ({kind}), where locks between processes can't be relied on; choose a "
                "folder on a disk of this machine",
                path=str(folder),
            )
        self.folder = folder
        self.index = FileLock(folder / "lock", signed=True)
        self.wanted = FileLock(folder / "lock-wanted")
        self._open = FileLock(folder / "open", signed=True)
        self.alone = self._entered()
        """Whether no other process has the folder open; `settled` ends it."""

    def _entered(self) -> bool:
        """Take a part in the folder, as soon as nobody is just opening it; whether there is no other."""
        start = time.monotonic()
        while True:
            if self._open.take():
                if self.index.take():
                    return True
                self._open.release()
                last, patience = self.index, _LEAVING
                why = "of an older version of this package, which shares it with nobody; close it there first"
            elif self._open.take(shared=True):
                return False
            else:
                last, patience = self._open, _OPENING
                why = "which does not come to the end of opening it; try again, or end it"
            if time.monotonic() > start + patience:
                pid, path = last.pid, str(self.folder)
                raise FolderInUse(
                    f"{path} is open in another process (pid {pid or 'unknown'}), {why}", path=path, pid=pid
                )
            time.sleep(0.01)

    def settled(self) -> None:
        """Let other processes in: what only one alone may do is done."""
        if self.alone:
            self.alone = False
            self._open.share()

    @contextmanager
    def sole(self) -> Iterator[bool]:
        """A block that no other process can open the folder in; whether none had it open before."""
        alone = self._open.keep_alone()
        try:
            yield alone
        finally:
            if alone:
                self._open.share()

    def release(self) -> None:
        """Give all of them back."""
        self.index.release()
        self.wanted.release()
        self._open.passing = self.alone  # it was not opened after all
        self._open.release()

    def hold(self, name: str, *, given_up: Callable[[], bool]) -> Hold:
        """A block that only one process at a time is in, of those that hold *name*.

        To enter it, others are waited for; `ClosedError` once *given_up* says that nobody wants to wait any longer.
        """
        return Hold(FileLock(self.folder / f"lock-{name}", passing=True), given_up)


class Hold:
    """See `FolderLocks.hold`. An interrupt anywhere leaves nothing locked: with the last reference the file is closed."""

    def __init__(self, lock: FileLock, given_up: Callable[[], bool]) -> None:
        self._lock = lock
        self._given_up = given_up

    def __enter__(self) -> None:
        # Not by a call that waits in the system, which nothing could end when the memory is closed.
        while not self._lock.take():
            if self._given_up():
                raise ClosedError("the memory was closed; open it again with open_memory(...)")
            time.sleep(random.uniform(0.002, 0.01))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def network_file_system(folder: Path, mounts: str | None = None) -> str | None:
    """The type of the network file system that *folder* is on, None for one of this machine.

    *mounts*: the text of `/proc/self/mountinfo`; by default that of the system, and nothing is found where it has none.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text(errors="surrogateescape")
        except OSError:
            return None
    found, depth = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split(" ")[4]))
        if folder.is_relative_to(point) and len(point.parts) >= depth:  # of two at one place the later one counts
            found, depth = after.split(" ")[0], len(point.parts)
    return found if found in _OVER_A_NETWORK else None


__all__ = ["FileLock", "FolderLocks", "network_file_system"]
