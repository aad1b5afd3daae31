"""Connections to the ledger's file: one writer, as many readers as read at once; SQLite's errors become ours here."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from ..._failpoints import failpoint
from ...errors import ClosedError, FolderError, FolderInUse, MessageError, StorageError, StorageFull
from . import schema


class Database:
    """The SQLite file. Reads never wait for writes (WAL); writes are one transaction at a time."""

    def __init__(self, path: Path, *, durability: Literal["process", "power"] = "process") -> None:
        self.path = path
        # NORMAL survives a killed process; FULL syncs the log at each commit and survives a power cut.
        self._synchronous = "FULL" if durability == "power" else "NORMAL"
        self._readers: list[sqlite3.Connection] = []
        """Those not in use: as many as were ever needed at once, however many threads come and go."""
        self._readers_lock = threading.Lock()
        self.lock = threading.Lock()
        """Held by whoever writes."""
        self._closed = threading.Event()
        with translated(path):
            if path.exists():
                self._check()
            self._writer = self._connect()
            try:
                schema.migrate(self._writer)
            except BaseException:
                self._writer.close()
                raise
        failpoint("open.migrated")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=10, isolation_level=None, check_same_thread=False, cached_statements=256
        )
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

    def write(self) -> Write:
        """One transaction, to be held inside `lock`: all of it is durable when the block is left, or none of it happened.

        `with self.lock, self.write() as db:` — the lock's own `with`, because that of a Python object may be cut short by an
        interrupt, and would leave it locked.
        """
        return Write(self)

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A read connection of one's own; sees everything committed."""
        with translated(self.path):
            with self._readers_lock:
                if self._closed.is_set():
                    raise ClosedError("the memory was closed; open it again with open_memory(...)")
                db = self._readers.pop() if self._readers else None
            if db is None:
                db = self._connect()
                db.execute("PRAGMA query_only = ON")
            try:
                yield db
            finally:
                with self._readers_lock:
                    if self._closed.is_set():
                        db.close()
                    else:
                        self._readers.append(db)

    def close(self) -> None:
        """Close every connection; the last one folds the write-ahead log into the file."""
        with self.lock:
            with self._readers_lock:
                self._closed.set()
                for db in self._readers:
                    db.close()
                self._readers.clear()
            self._writer.close()


class Write:
    """The writer's transaction. What an interrupt keeps it from ending is rolled back before the next one begins."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> sqlite3.Connection:
        assert self._database.lock.locked()
        writer = self._database._writer
        with translated(self._database.path):
            if self._database._closed.is_set():
                raise ClosedError("the memory was closed; open it again with open_memory(...)")
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            writer.execute("BEGIN IMMEDIATE")
        return writer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writer = self._database._writer
        with translated(self._database.path):
            try:
                if error is None:
                    writer.execute("COMMIT")
            finally:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error | UnicodeEncodeError):
                raise error  # to be translated


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into this package's."""
    try:
        yield
    except UnicodeEncodeError:
        raise MessageError(
            "a text (a name, an id, a tag, metadata) holds half of a surrogate pair, which no encoding can carry; decode it "
            "with errors='replace' first"
        ) from None
    except sqlite3.Error as error:
        text, where = str(error), str(path)
        name = getattr(error, "sqlite_errorname", "")
        if "FULL" in name or "full" in text:
            raise StorageFull(
                f"no space left for {where}; nothing was written: free some space and try again", path=where
            ) from error
        if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT") or "not a database" in text or "malformed" in text:
            raise FolderError(
                f"{where} is not a readable ledger ({text}); restore it from a backup, or choose another folder",
                path=where,
            ) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise FolderInUse(f"{where} is locked by another process; try again", path=where, pid=None) from error
        raise StorageError(f"the ledger {where} failed: {text}", path=where) from error
