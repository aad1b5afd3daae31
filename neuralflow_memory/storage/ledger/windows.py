"""The window of a session: which turns stand in the prompt word for word, in which order, and what was folded."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from ...protocols import Record, StoredWindow, Texts
from ...types import Entry, Scope
from . import entries, log, summaries
from .sessions import Head


def load(db: sqlite3.Connection, head: Head, *, scope: Scope, counter: str, texts: Texts) -> StoredWindow:
    """Window and summary. Tokens that another counter than *counter* counted read -1.

    A cold turn may have come back into the window; with *texts* "skip" it is left out if it can't be read.
    """

    def found(where: str, parameter: int) -> list[Entry]:
        tail = "ORDER BY e.position"
        rows = entries.select(db, where, (parameter,), scope=scope, owner=head.owner, tail=tail, texts=texts)
        return [entry if name == counter else replace(entry, tokens=-1) for entry, name in rows]

    kept = found("e.session = ? AND e.position IS NOT NULL", head.session)
    summary = found("e.no = ?", head.summary) if head.summary is not None else []
    tasks = found("e.session = ? AND e.type = 1", head.session)
    derived = "SELECT max(substr(id, 1, 8) != ?), count(*) FROM entries WHERE session = ? AND seq < 0 AND type = 3"
    segments, made = (0, 0) if summary else db.execute(derived, (summaries.EPISODE, head.session)).fetchone()
    return StoredWindow(
        kept,
        summary[0] if summary else None,
        head.session,
        head.erase_epoch,
        tasks,
        unsummed=bool(segments),
        episodes=bool(made),
        model=head.model,
    )


def arrange(db: sqlite3.Connection, head: Head, kept: Sequence[Entry | Record]) -> list[Record]:
    """Give *kept* the positions of a new window; the records among them, ready to be applied."""
    db.execute("UPDATE entries SET position = NULL WHERE session = ? AND position IS NOT NULL", (head.session,))
    dead = log.tombstones(db, [k.entry.key for k in kept if isinstance(k, Record) and not k.entry.number])
    written: list[Record] = []
    for item in kept:
        if isinstance(item, Entry):
            head.last_position += 1
            db.execute("UPDATE entries SET position = ? WHERE no = ?", (head.last_position, item.number))
            continue
        entry = item.entry
        if entry.number:
            head.last_position += 1
            entry = replace(entry, position=head.last_position, version=entry.version + 1)
        else:
            entry = log.placed(head, entry, version=dead.get(entry.key, 0) + 1)
        written.append(replace(item, entry=entry))
    return written


def unchanged(
    db: sqlite3.Connection,
    head: Head,
    *,
    folded: Sequence[Entry],
    before: StoredWindow,
    read: Sequence[Entry],
) -> bool:
    """Whether what a summary was made from still stands: epoch, earlier summary, segments, the turns in their places."""
    if head.erase_epoch != before.erase_epoch or head.summary != (before.summary.number if before.summary else None):
        return False
    for entry in (*([before.summary] if before.summary else []), *read):
        row = db.execute("SELECT version FROM entries WHERE no = ?", (entry.number,)).fetchone()
        if row is None or row[0] != entry.version:
            return False
    for entry in folded:
        row = db.execute("SELECT version, position, pinned FROM entries WHERE no = ?", (entry.number,)).fetchone()
        if row is None or row[0] != entry.version or row[1] != entry.position or row[2]:
            return False  # a window that was arranged anew has other turns around it
    return True


def numbered(db: sqlite3.Connection, head: Head, record: Record) -> Record:
    """A segment or summary as it is to be stored: a new one placed, a rewritten one as its next version."""
    entry = record.entry
    new = replace(entry, version=entry.version + 1) if entry.number else log.placed_below(db, head, entry)
    return replace(record, entry=new)


def leave(db: sqlite3.Connection, folded: Sequence[Entry]) -> None:
    """Take turns out of the window; they stay in the transcript."""
    db.executemany("UPDATE entries SET position = NULL WHERE no = ?", [(e.number,) for e in folded])
