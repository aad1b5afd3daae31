"""Connections to the ledger's file: one writer, as many readers as read at once; SQLite's errors become ours here.

Several processes may have the file open. What a writer changes it notes in the table `changes`, by triggers of its own that
name it, so that the others can ask what was changed by somebody else.
"""

from __future__ import annotations

import ctypes
import os
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal
from weakref import WeakSet

from ..._failpoints import failpoint
from ...errors import ClosedError, FolderError, FolderInUse, MessageError, StorageError, StorageFull
from ...protocols import Archive
from . import schema
from .archive import Connection

_PATIENCE = 30.0  # seconds to wait for others who write; each is done in a fraction of one
_ENTRY = "NEW.no, NEW.session"
_WINDOW = f"NEW.no >> {schema.OWNER_SHIFT} << {schema.OWNER_SHIFT}, NEW.session"
_SAME = "NEW.version = OLD.version AND NEW.expires_at IS OLD.expires_at AND NEW.codec = OLD.codec"
_MOVED = "NEW.summary IS NOT OLD.summary OR NEW.model IS NOT OLD.model"
_CHANGES = (
    # What happened, and the number and session that are noted: see `protocols.Change`.
    ("INSERT ON main.entries", "", _ENTRY),
    ("DELETE ON main.entries", "", "OLD.no, OLD.session"),
    # That a text was analysed is no change: others work out the same.
    ("UPDATE ON main.entries", f"WHEN {_SAME} AND NEW.importance = OLD.importance", _WINDOW),
    ("UPDATE ON main.entries", f"WHEN NOT ({_SAME})", _ENTRY),
    ("INSERT ON main.vectors", "WHEN NEW.model = (SELECT min(id) FROM models)", "abs(NEW.no), NULL"),
    ("UPDATE OF summary, model ON main.sessions", f"WHEN {_MOVED}", f"NEW.owner << {schema.OWNER_SHIFT}, NEW.id"),
    ("UPDATE OF erase_epoch ON main.owners", "", f"NEW.id << {schema.OWNER_SHIFT}, NULL"),
    ("INSERT ON main.calibration", "", "0, NULL"),
)

_FORK_PATIENCE = 2.0  # seconds that a fork waits for those who read and write

_open: WeakSet[Database] = WeakSet()
_held: list[threading.Lock] = []
"""Locks that are held around a fork."""


def _hold_still() -> None:
    # SQLite's own locks are those of the whole process. One that another thread holds while this one forks stays locked in the
    # child, which could then open no database at all. So nobody is to be inside SQLite at that moment.
    end = time.monotonic() + _FORK_PATIENCE
    for database in list(_open):
        both = (database.lock, database._watching)
        _held.extend(lock for lock in both if lock.acquire(timeout=max(0.0, end - time.monotonic())))
        while database._readers_lock.acquire(timeout=max(0.0, end - time.monotonic())):
            if not database._reading or time.monotonic() > end:
                _held.append(database._readers_lock)
                break
            database._readers_lock.release()
            time.sleep(0.0002)


def _go_on() -> None:
    while _held:
        _held.pop().release()


def _abandon_parents() -> None:
    # To close a parent's connection would change files that the parent, or somebody after it, is using: SQLite must not be
    # told. So those that a forked child has inherited are never let go.
    for database in list(_open):
        for db in (database._writer, database._watcher, *database._readers):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))


os.register_at_fork(before=_hold_still, after_in_parent=_go_on, after_in_child=_go_on)
os.register_at_fork(after_in_child=_abandon_parents)


class Database:
    """The SQLite file. Reads never wait for writes (WAL); writes are one transaction at a time, of all processes.

    Raises `FolderInUse` where others have the file open (*alone* is False) and its tables would have to be changed.
    """

    def __init__(
        self,
        path: Path,
        *,
        durability: Literal["process", "power"] = "process",
        alone: bool = True,
        archive: Archive | None = None,
    ) -> None:
        self.path = path
        self._archive = archive
        self.origin = secrets.randbits(62)
        """Names this process's changes among those of others."""
        # NORMAL survives a killed process; FULL syncs the log at each commit and survives a power cut.
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._readers: list[sqlite3.Connection] = []
        """Those not in use: as many as were ever needed at once, however many threads come and go."""
        self._readers_lock = threading.Lock()
        self._reading = 0
        """How many are in use."""
        self.lock = threading.Lock()
        """Held by whoever writes."""
        self._closed = threading.Event()
        with _Translated(path):
            if path.exists():
                self._check()
            self._writer = self._connect()
            try:
                if not alone and schema.version(self._writer) < len(schema.MIGRATIONS):
                    raise FolderInUse(
                        f"{path} is open in another process of an older version of this package; close it there first, so that "
                        "it can be brought up to date",
                        path=str(path),
                        pid=None,
                    )
                schema.migrate(self._writer)
                for n, (what, when, noted) in enumerate(_CHANGES):
                    self._writer.execute(
                        f"CREATE TEMP TRIGGER noted_{n} AFTER {what} {when} BEGIN "
                        f"INSERT INTO changes (no, session, origin) VALUES ({noted}, {self.origin}); END"
                    )
                self._writer.execute("PRAGMA busy_timeout = 0")  # `Write` has a patience of its own
                self._watcher = self._connect()
            except BaseException:
                self._writer.close()
                raise
        self._watching = threading.Lock()
        _open.add(self)
        failpoint("open.migrated")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path,
            timeout=10,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            factory=Connection,
        )
        db.archive = self._archive
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA secure_delete = ON")
        return db

    def _check(self) -> None:
        """Raise `FolderError` unless the file is ours, or has nothing in it; a stranger's is left as it was."""
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        try:
            ours = db.execute("PRAGMA application_id").fetchone()[0] == schema.APPLICATION_ID
            # A first open that was cut short leaves a file without tables.
            empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            version = schema.version(db)
        finally:
            db.close()
        if not ours and not (empty and version == 0):
            raise FolderError(
                f"{self.path} is not a memory of this package; choose another folder, or move that file away",
                path=str(self.path),
            )
        if version > len(schema.MIGRATIONS):
            raise FolderError(
                f"{self.path} was written by a newer version of neuralflow-memory; upgrade the package to open it",
                path=str(self.path),
            )

    def write(self, *, patience: float = _PATIENCE, power: bool = False) -> Write:
        """One transaction, to be held inside `lock`: all of it is durable when the block is left, or none of it happened.

        Raises `FolderInUse` when another process is writing for longer than *patience* (seconds). With *power*, it and all
        before it survive a power cut.

        `with self.lock, self.write() as db:` — the lock's own `with`, because that of a Python object may be cut short by an
        interrupt, and would leave it locked.
        """
        return Write(self, patience, "FULL" if power else self._synchronous)

    def vacuum(self) -> None:
        """Give the room that was freed back to the disk. Nobody can write meanwhile."""
        with self.lock, _Translated(self.path):
            if self._closed.is_set():
                raise ClosedError("the memory was closed; open it again with open_memory(...)")
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            self._writer.execute("VACUUM")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def data_version(self) -> int:
        """A number that is another one once anybody has written. Asking costs some microseconds."""
        with _Translated(self.path), self._watching:
            if self._closed.is_set():
                raise ClosedError("the memory was closed; open it again with open_memory(...)")
            row = self._watcher.execute("PRAGMA data_version").fetchone()
        return int(row[0])

    def changes(self, after: int) -> list[tuple[int, int, int | None, int]]:
        """What anybody has changed since *after*: id, number, session and origin, in order."""
        with _Translated(self.path), self._watching:
            if self._closed.is_set():
                raise ClosedError("the memory was closed; open it again with open_memory(...)")
            query = "SELECT id, no, session, origin FROM changes WHERE id > ? ORDER BY id"
            rows = self._watcher.execute(query, (after,)).fetchall()
        return rows  # noqa: RET504 - an interrupt between a call and the return would leave the lock taken

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A read connection of one's own; sees everything committed."""
        with _Translated(self.path):
            with self._readers_lock:
                if self._closed.is_set():
                    raise ClosedError("the memory was closed; open it again with open_memory(...)")
                db = self._readers.pop() if self._readers else None
                self._reading += 1
            try:
                if db is None:
                    db = self._connect()
                    db.execute("PRAGMA query_only = ON")
                elif db.in_transaction:  # which an interrupt has left
                    db.execute("ROLLBACK")
                yield db
            finally:
                with self._readers_lock:
                    self._reading -= 1
                    if db is not None and self._closed.is_set():
                        db.close()
                    elif db is not None:
                        self._readers.append(db)

    @contextmanager
    def attached(self, other: Path, name: str) -> Iterator[sqlite3.Connection]:
        """A connection that notes no changes, in a transaction, which it leaves to be committed; *other* is there as *name*."""
        assert self.lock.locked()
        with _Translated(self.path):
            db = self._connect()
            try:
                db.execute(f"PRAGMA busy_timeout = {int(_PATIENCE * 1000)}")
                db.execute(f"ATTACH ? AS {name}", (str(other),))
                db.execute("BEGIN IMMEDIATE")
                yield db
            finally:
                db.close()  # which rolls back what was not committed

    def close(self) -> None:
        """Close every connection; the last one folds the write-ahead log into the file."""
        with self.lock:
            with self._readers_lock:
                self._closed.set()
                for db in self._readers:
                    db.close()
                self._readers.clear()
            with self._watching:
                self._watcher.close()
            self._writer.close()


class Write:
    """The writer's transaction. What an interrupt keeps it from ending is rolled back before the next one begins."""

    def __init__(self, database: Database, patience: float, synchronous: str) -> None:
        self._database = database
        self._patience = patience
        self._synchronous = synchronous

    def __enter__(self) -> sqlite3.Connection:
        assert self._database.lock.locked()
        writer = self._database._writer
        with _Translated(self._database.path):
            if self._database._closed.is_set():
                raise ClosedError("the memory was closed; open it again with open_memory(...)")
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            if self._synchronous != self._database._synchronous:
                writer.execute(f"PRAGMA synchronous = {self._synchronous}")
            self._begin(writer)
        return writer

    def _begin(self, writer: sqlite3.Connection) -> None:
        # SQLite itself would ask ever more seldom, so that one of many writers may wait for seconds.
        end = time.monotonic() + self._patience
        while True:
            try:
                writer.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > end:
                    raise
            else:
                return
            time.sleep(random.uniform(0.00005, 0.0005))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writer = self._database._writer
        with _Translated(self._database.path):
            try:
                if error is None:
                    writer.execute("COMMIT")
            finally:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                if self._synchronous != self._database._synchronous:
                    writer.execute(f"PRAGMA synchronous = {self._database._synchronous}")
            if isinstance(error, sqlite3.Error | UnicodeEncodeError):
                raise error  # to be translated


class _Translated:
    """Turns SQLite's errors into this package's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UnicodeEncodeError):
            raise MessageError(
                "a text (a name, an id, a tag, metadata) holds half of a surrogate pair, which no encoding can carry; decode "
                "it with errors='replace' first"
            ) from None
        if isinstance(error, sqlite3.Error):
            raise _ours(error, str(self._path)) from error


def _ours(error: sqlite3.Error, where: str) -> StorageError:
    text, name = str(error), getattr(error, "sqlite_errorname", "")
    if "FULL" in name or "full" in text:
        return StorageFull(f"no space left for {where}; nothing was written: free some space and try again", path=where)
    if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT") or "not a database" in text or "malformed" in text:
        return FolderError(
            f"{where} is not a readable ledger ({text}); restore it from a backup, or choose another folder", path=where
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return FolderInUse(f"{where} is locked by another process; try again", path=where, pid=None)
    return StorageError(f"the ledger {where} failed: {text}", path=where)
