"""One process at a time: an exclusive lock on the folder, given back by the system however the process ends."""

from __future__ import annotations

import os
from pathlib import Path
from weakref import WeakSet

from ..errors import ConfigError, FolderInUse, StorageError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    raise ConfigError(
        "neuralflow-memory needs a POSIX system (Linux, macOS, WSL): it locks its folder with flock"
    ) from None


_held: WeakSet[FolderLock] = WeakSet()


def _forget_parents_locks() -> None:
    # A forked child shares the parent's lock, and would keep the folder locked after the parent has ended.
    for lock in list(_held):
        lock.drop()


os.register_at_fork(after_in_child=_forget_parents_locks)


class FolderLock:
    """Holds the folder. Raises `FolderInUse` when another process has it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise StorageError(f"{folder} can't be written to: {error.strerror}", path=str(folder)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise FolderInUse(
                f"{folder} is open in another process (pid {holder or 'unknown'}); close it there first, or use another folder",
                path=str(folder),
                pid=int(holder) if holder.isdigit() else None,
            ) from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(str(os.getpid()))
        self._file.flush()
        _held.add(self)

    def release(self) -> None:
        """Give the folder back."""
        fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone leaves it locked while a forked child holds a copy
        self._file.close()

    def drop(self) -> None:
        """Close this process's copy of the lock; the process that took it keeps the folder."""
        self._file.close()


__all__ = ["FolderLock"]
