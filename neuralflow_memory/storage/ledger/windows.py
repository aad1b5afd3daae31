"""The window of a session: which turns stand in the prompt word for word, in which order, and what was folded."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from ...protocols import Record, StoredWindow
from ...types import Entry, Scope
from . import entries, log
from .schema import OWNER_SHIFT
from .sessions import Head


def load(db: sqlite3.Connection, head: Head, *, scope: Scope, counter: str) -> StoredWindow:
    """Window and summary. Tokens that another counter than *counter* counted read -1."""

    def found(where: str, parameter: int) -> list[Entry]:
        rows = entries.select(db, where, (parameter,), scope=scope, owner=head.owner, tail="ORDER BY e.position")
        return [entry if name == counter else replace(entry, tokens=-1) for entry, name in rows]

    kept = found("e.session = ? AND e.position IS NOT NULL", head.session)
    summary = found("e.no = ?", head.summary) if head.summary is not None else []
    return StoredWindow(kept, summary[0] if summary else None, head.session, head.erase_epoch)


def arrange(db: sqlite3.Connection, head: Head, kept: Sequence[Entry | Record]) -> list[Record]:
    """Give *kept* the positions of a new window; the records among them, ready to be applied."""
    db.execute("UPDATE entries SET position = NULL WHERE session = ? AND position IS NOT NULL", (head.session,))
    dead = log.tombstones(db, [k.entry.key for k in kept if isinstance(k, Record) and not k.entry.number])
    written: list[Record] = []
    for item in kept:
        head.last_position += 1
        if isinstance(item, Entry):
            db.execute("UPDATE entries SET position = ? WHERE no = ?", (head.last_position, item.number))
            continue
        entry = replace(item.entry, position=head.last_position)
        if entry.number:
            entry = replace(entry, version=entry.version + 1)
        else:
            entry = log.placed(head, entry, version=dead.get(entry.key, 0) + 1)
        written.append(replace(item, entry=entry))
    return written


def unchanged(db: sqlite3.Connection, head: Head, *, folded: Sequence[Entry], before: StoredWindow) -> bool:
    """Whether what a summary was made from still stands: epoch, earlier summary, and the turns in the window."""
    if head.erase_epoch != before.erase_epoch or head.summary != (before.summary.number if before.summary else None):
        return False
    if before.summary is not None:
        row = db.execute("SELECT version FROM entries WHERE no = ?", (before.summary.number,)).fetchone()
        if row is None or row[0] != before.summary.version:
            return False
    for entry in folded:
        row = db.execute("SELECT version, position FROM entries WHERE no = ?", (entry.number,)).fetchone()
        if row is None or row[0] != entry.version or row[1] is None:
            return False
    return True


def summarized(db: sqlite3.Connection, head: Head, summary: Record) -> Record:
    """*summary* with its number. Summaries count seq downwards from -1, so that turns have no gaps in theirs."""
    lowest = db.execute("SELECT min(seq) FROM entries WHERE session = ?", (head.session,)).fetchone()[0] or 0
    head.last_n += 1
    number = (head.owner << OWNER_SHIFT) | head.last_n
    return replace(summary, entry=replace(summary.entry, number=number, seq=min(lowest, 0) - 1, version=1))


def leave(db: sqlite3.Connection, folded: Sequence[Entry]) -> None:
    """Take turns out of the window; they stay in the transcript."""
    db.executemany("UPDATE entries SET position = NULL WHERE no = ?", [(e.number,) for e in folded])
