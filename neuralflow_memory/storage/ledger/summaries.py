"""Summaries of turns that were changed or deleted: they go, and what only they covered returns to the window."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable

from . import vectors


def remove(db: sqlite3.Connection, number: int, key: bytes, *, owner: int, now: int) -> tuple[int, str] | None:
    """Delete an entry for good, leaving a tombstone and a mark; its session and id, None when there was none."""
    row = db.execute("DELETE FROM entries WHERE no = ? RETURNING version, session, id", (number,)).fetchone()
    if row is None:
        return None
    version, session, own_id = row
    db.execute("DELETE FROM features WHERE no = ?", (number,))
    db.execute("DELETE FROM vectors WHERE no = ?", (number,))
    db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?, ?)", (key, owner, version + 1, now))
    db.execute("UPDATE sessions SET summary = NULL WHERE id = ? AND summary = ?", (session, number))
    vectors.mark(db, [(number, key, version + 1)])
    return session, own_id


def unfold(
    db: sqlite3.Connection,
    *,
    owner: int,
    session: int,
    changed: Iterable[str],
    now: int,
    gone: Collection[int] = (),
    restore: bool = True,
) -> int | None:
    """Delete the summaries of *session* that were made from the entries *changed* (ids); the number of its summary now.

    The newest summary that knows nothing of them is the session's again. The turns that the others covered go back into
    the window, before what is there; not if *restore* is False, when somebody has just said what the window is.
    """
    current: int | None = db.execute("SELECT summary FROM sessions WHERE id = ?", (session,)).fetchone()[0]
    # Summaries stand before the turns in seq, and each was made after those that it continues.
    rows = db.execute(
        "SELECT no, key, id, sources FROM entries WHERE session = ? AND seq < 0 ORDER BY no", (session,)
    ).fetchall()
    tainted, stale = set(changed), {}
    for number, key, own_id, sources in rows:
        if number in gone or not tainted.isdisjoint(json.loads(sources or "[]")):
            tainted.add(own_id)
            stale[number] = key
    if not stale:
        return current
    named = {own_id: number for number, _, own_id, _ in rows}
    made_from = {number: json.loads(sources or "[]") for number, _, _, sources in rows}
    uncovered: list[str] = []
    while current in stale:
        sources = made_from[current]
        uncovered += [s for s in sources if s not in named]
        current = next((named[s] for s in sources if s in named), None)
    for number, key in stale.items():
        remove(db, number, key, owner=owner, now=now)
    db.execute("UPDATE sessions SET summary = ?, version = version + 1 WHERE id = ?", (current, session))
    if restore:
        _return(db, session, uncovered)
    return current


def _return(db: sqlite3.Connection, session: int, ids: list[str]) -> None:
    """Put turns back into the window, in their order, before what is there."""
    first = db.execute(
        "SELECT coalesce(min(e.position), s.last_position + 1) FROM sessions s LEFT JOIN entries e "
        "ON e.session = s.id AND e.position IS NOT NULL WHERE s.id = ?",
        (session,),
    ).fetchone()[0]
    numbers = db.execute(
        "SELECT no FROM entries WHERE session = ? AND type = 0 AND position IS NULL "
        "AND id IN (SELECT value FROM json_each(?)) ORDER BY seq",
        (session, json.dumps(ids)),
    ).fetchall()
    db.executemany(
        "UPDATE entries SET position = ? WHERE no = ?",
        [(first - len(numbers) + place, no) for place, (no,) in enumerate(numbers)],
    )
