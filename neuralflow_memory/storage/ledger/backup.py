"""Whole copies of the ledger: out, as of one moment, and back in, in one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from ...protocols import Became, Namespace
from ...types import Scope
from . import archive, extractions, items, sessions, summaries, vectors
from .schema import OWNER_SHIFT

_PAGES = 2000  # copied between two reports of progress
_OF_THE_FOLDER = frozenset({"changes", "dirty"})
"""Tables that say what this folder's processes and index have seen."""
TO_BE_MADE_ANEW = "to be made anew"
"""The collection that the marks are about, when there is to be a new one."""


def tables(db: sqlite3.Connection, schema: str = "main") -> list[str]:
    """The names of all tables."""
    query = f"SELECT name FROM {schema}.sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    return sorted(name for (name,) in db.execute(query))


def counted(db: sqlite3.Connection) -> dict[str, int]:
    """How many rows each table has."""
    return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables(db)}


def copied(
    db: sqlite3.Connection, target: Path, *, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, int], list[str]]:
    """Copy the file to *target*, as of one moment, and see that the copy is sound; the rows of each table, and the blocks.

    A read transaction lasts from the first page to the last: so writers go on, and the copy need not begin anew.
    """
    told = None if progress is None else lambda _, left, total: progress(total - left, total)
    copy = sqlite3.connect(target, isolation_level=None)
    try:
        db.execute("BEGIN")
        try:
            counts = counted(db)
            db.backup(copy, pages=_PAGES, progress=told)
        finally:
            db.execute("COMMIT")
        copy.execute("PRAGMA journal_mode = DELETE")  # one file
        sound = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if sound != "ok" or counted(copy) != counts:
            raise sqlite3.DatabaseError(f"the copy is not what was copied ({sound}); malformed")
        return counts, archive.block_names(copy)
    finally:
        copy.close()


def become(
    db: sqlite3.Connection,
    *,
    own_id: str,
    value_key: Callable[[Scope, Namespace, str], bytes],
    restore_deleted: bool,
    forget_vectors: bool,
    origin: int,
    now: int,
) -> Became:
    """Make all tables what they are in the attached database `saved`, but for what was deleted since; in a transaction."""
    gone = set() if restore_deleted else _gone(db, value_key)
    newest = db.execute("SELECT coalesce(max(id), 0) FROM changes").fetchone()[0]
    for name in ("owners", "tombstones"):
        db.execute(f"CREATE TEMP TABLE before_{name} AS SELECT * FROM main.{name}")
    for name in tables(db, "saved"):  # before anything is put in: what goes may take along what belongs to it
        db.execute(f"DELETE FROM main.{name}")
    for name in tables(db, "saved"):
        if name not in _OF_THE_FOLDER:
            columns = ", ".join(column for _, column, *_ in db.execute(f"PRAGMA saved.table_info({name})"))
            db.execute(f"INSERT INTO main.{name} ({columns}) SELECT {columns} FROM saved.{name}")
    _keep_numbers(db)
    db.execute("INSERT OR REPLACE INTO main.tombstones SELECT * FROM temp.before_tombstones")
    for name in ("owners", "tombstones"):
        db.execute(f"DROP TABLE temp.before_{name}")
    db.execute("DELETE FROM main.questions")  # they may have been the words of what was deleted since
    if forget_vectors:
        for name in ("vectors", "models"):
            db.execute(f"DELETE FROM main.{name}")
    count = _delete(db, gone, value_key, now=now)
    # The index is filled anew; and with a gap in their numbers, the changes say that anything may have changed.
    db.executemany("INSERT OR REPLACE INTO main.meta VALUES (?, ?)", [("id", own_id), ("collection", TO_BE_MADE_ANEW)])
    vectors.mark_all(db)
    db.execute("INSERT INTO main.changes (id, no, session, origin) VALUES (?, 0, NULL, 0)", (newest + 2,))
    # Nothing that was cached before was made from this, of whatever owner.
    db.execute("UPDATE main.owners SET head = ?", (f"{newest + 2}.{origin}",))
    entries = db.execute("SELECT count(*) FROM main.entries").fetchone()[0]
    found = db.execute("SELECT count(*) FROM main.sessions WHERE session_id != ''").fetchone()[0]
    return Became(entries, found, count)


def _keep_numbers(db: sqlite3.Connection) -> None:
    """Never hand out a number twice, and let no writer commit that began before."""
    db.execute(
        "INSERT OR IGNORE INTO main.owners (id, key, tenant, user_id, last_n, erase_epoch, forgotten) "
        "SELECT id, key, tenant, user_id, last_n, erase_epoch, forgotten FROM temp.before_owners"
    )
    db.execute(
        "UPDATE main.owners SET last_n = max(last_n, coalesce((SELECT b.last_n FROM temp.before_owners b "
        "WHERE b.key = owners.key), 0)), erase_epoch = 1 + max(erase_epoch, coalesce((SELECT b.erase_epoch "
        "FROM temp.before_owners b WHERE b.key = owners.key), 0)), forgotten = max(forgotten, coalesce((SELECT b.forgotten "
        "FROM temp.before_owners b WHERE b.key = owners.key), 0))"
    )


def _gone(db: sqlite3.Connection, value_key: Callable[[Scope, Namespace, str], bytes]) -> set[bytes]:
    """Keys of what somebody has deleted here and nobody put back."""
    query = "SELECT key FROM main.tombstones t WHERE asked AND NOT EXISTS (SELECT 1 FROM main.entries e WHERE e.key = t.key)"
    found = {key for (key,) in db.execute(query)}
    if found:
        found -= {value_key(scope, *name) for _, _, scope, name in _values(db)}
    return found


def _delete(
    db: sqlite3.Connection, gone: set[bytes], value_key: Callable[[Scope, Namespace, str], bytes], *, now: int
) -> int:
    """Delete what is *gone*, with the summaries that speak of it; how much it was."""
    if not gone:
        return 0
    db.executemany("DELETE FROM main.trash WHERE key = ?", [(key,) for key in gone])
    values = [(owner, path, name) for owner, path, scope, name in _values(db) if value_key(scope, *name) in gone]
    for owner, path, name in values:
        items.delete(db, owner, path, name[1], now=now)
    query = "SELECT session, no, key, id FROM main.entries WHERE key = ?"
    doomed = sorted(row for key in gone for row in db.execute(query, (key,)))
    for session, group in groupby(doomed, key=lambda row: row[0]):
        theirs = list(group)
        owner = theirs[0][1] >> OWNER_SHIFT
        ids, numbers = [row[3] for row in theirs], [row[1] for row in theirs]
        extractions.forget(db, dict(zip(numbers, ids, strict=True)), owner=owner, now=now)
        summaries.unfold(db, owner=owner, session=session, changed=ids, gone=numbers, asked=True, now=now)
        for _, number, key, _ in theirs:
            summaries.remove(db, number, key, owner=owner, now=now, asked=True)
    return len(values) + len(doomed)


def _values(db: sqlite3.Connection) -> Iterator[tuple[int, bytes, Scope, tuple[Namespace, str]]]:
    """Owner, path, owner's scope and name of each value."""
    rows: Iterable[tuple[int, bytes, str, str]] = db.execute(
        "SELECT i.owner, i.path, i.key, o.key FROM main.items i JOIN main.owners o ON o.id = i.owner"
    ).fetchall()
    for owner, path, key, whose in rows:
        yield owner, path, sessions.owner_scope(whose), items.name(path, key)


__all__ = ["TO_BE_MADE_ANEW", "become", "copied", "counted", "tables"]
