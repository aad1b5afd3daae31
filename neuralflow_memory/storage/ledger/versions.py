"""What entries were before they were changed; and knowledge that says the same, or that stands for other knowledge."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from ...protocols import Record
from ...types import Entry, MemoryType, Scope
from . import archive, entries, vectors
from .sessions import Head

MOST = 100
"""Versions kept of an entry, beside the one that it is; the oldest go first."""
_KEEP = (
    f"INSERT OR IGNORE INTO versions (no, {entries.KEPT}) SELECT no, {entries.KEPT} FROM entries WHERE no = ? "
    f"AND codec != {archive.COLD}"
)
# SQLite would take the range of the numbers instead, and put the text into substr() if it were compared without the plus.
_KNOWN = (
    "e.no IN (SELECT no FROM entries INDEXED BY entries_known WHERE session = ? AND type = 2 "
    "AND substr(content, 1, 64) = substr(?, 1, 64) AND +content = ? AND agent_id IS ? AND valid_to IS NULL "
    "UNION ALL SELECT a.no FROM archived a INDEXED BY archived_known CROSS JOIN entries x ON x.no = a.no "
    "WHERE a.said = ? AND x.session = ? AND x.agent_id IS ? AND x.valid_to IS NULL) "
    "AND e.no NOT IN (SELECT no FROM item_texts WHERE no = e.no)"
)


def keep(db: sqlite3.Connection, records: Sequence[Record]) -> None:
    """Keep what is stored of the entries that *records* are new versions of."""
    for entry in (r.entry for r in records if r.entry.version > 1):
        _keep(db, entry.number)
        db.execute("DELETE FROM versions WHERE no = ? AND version < ?", (entry.number, entry.version - MOST))


def _keep(db: sqlite3.Connection, number: int) -> None:
    if not db.execute(_KEEP, (number,)).rowcount and archive.thaw(db, [number], skip=False):
        db.execute(_KEEP, (number,))


def put(db: sqlite3.Connection, before: Entry, *, counter: str) -> None:
    """Keep what the entry with the number of *before* was elsewhere, unless that version is kept already."""
    row = entries.kept_row(before, counter=counter)
    db.execute(
        f"INSERT OR IGNORE INTO versions (no, {entries.KEPT}) SELECT {', '.join('?' * len(row))} "
        "WHERE EXISTS (SELECT 1 FROM entries WHERE no = ? AND version > ?)",
        (*row, before.number, before.version),
    )


def earlier(db: sqlite3.Connection, number: int, *, scope: Scope) -> Iterator[tuple[Entry, str]]:
    """What an entry was, oldest version first, with the counter of its tokens."""
    rows = db.execute(f"{entries.SELECT_VERSIONS} WHERE v.no = ? ORDER BY v.version", (number,)).fetchall()
    stored = db.execute(f"{entries.SELECT} WHERE e.no = ? AND e.codec = {archive.COLD}", (number,)).fetchone()
    if stored is not None:
        rows = [entries.row_before(stored, values) for values in archive.earlier(db, number)]
    for row in rows:
        yield entries.entry_of(row, scope=scope)


def history(db: sqlite3.Connection, number: int, *, scope: Scope, owner: int) -> list[Entry]:
    """What an entry of *owner* was and is, oldest version first."""
    before = [entry for entry, _ in earlier(db, number, scope=scope)]
    return [*before, *(entry for entry, _ in entries.select(db, "e.no = ?", (number,), scope=scope, owner=owner))]


def known(db: sqlite3.Connection, head: Head, texts: Sequence[str], *, scope: Scope) -> dict[str, Entry]:
    """Knowledge of the scope's agent that says one of *texts* and was not superseded, by text; values' texts are none."""
    found: dict[str, Entry] = {}
    for text in texts:
        given = (head.session, text, text, scope.agent_id, archive.said(text), head.session, scope.agent_id)
        # What is cold and can't be read is not known: it is written again.
        for entry, _ in entries.select(db, _KNOWN, given, scope=scope, owner=head.owner, texts="skip"):
            if entry.content == text:
                found[text] = entry
                break
    return found


def release(db: sqlite3.Connection, number: int) -> bool:
    """Let hold again what the entry with *number*, which is about to be deleted, stands for; whether there was any."""
    row = db.execute("SELECT session, id FROM entries WHERE no = ? AND supersedes IS NOT NULL", (number,)).fetchone()
    if row is None:
        return False
    freed = db.execute("SELECT no FROM entries WHERE session = ? AND superseded_by = ?", row).fetchall()
    for (other,) in freed:
        _keep(db, other)
        key, version = db.execute(
            "UPDATE entries SET valid_to = NULL, superseded_by = NULL, version = version + 1 WHERE no = ? "
            "RETURNING key, version",
            (other,),
        ).fetchone()
        db.execute("UPDATE features SET valid_to = NULL WHERE no = ?", (other,))
        vectors.mark(db, [(other, key, version)])
    return bool(freed)


def said_already(db: sqlite3.Connection, head: Head, added: Sequence[Record], *, scope: Scope) -> Entry | None:
    """Knowledge that says what one of *added* does."""
    texts = [r.entry.content for r in added if r.entry.type is MemoryType.LONG_TERM]
    return next(iter(known(db, head, texts, scope=scope).values()), None)
