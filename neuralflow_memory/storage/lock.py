"""One process at a time: an exclusive lock on the folder, given back by the system however the process ends."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError, FolderInUse

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    raise ConfigError(
        "neuralflow-memory needs a POSIX system (Linux, macOS, WSL): it locks its folder with flock"
    ) from None


class FolderLock:
    """Holds the folder. Raises `FolderInUse` when another process has it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        self._file = path.open("a+")
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

    def release(self) -> None:
        self._file.close()


__all__ = ["FolderLock"]
