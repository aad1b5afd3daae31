"""Summaries of turns that were changed or deleted: they go, and what only they covered returns to the window."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection

from . import vectors

EPISODE = "episode-"
"""What ids of episodes begin with: they stand among segments, and are no part of the summary."""


def remove(
    db: sqlite3.Connection, number: int, key: bytes, *, owner: int, now: int, asked: bool = False
) -> tuple[int, str] | None:
    """Delete an entry for good, leaving a tombstone and a mark; its session and id, None when there was none.

    *asked*: somebody wanted it to go; otherwise it was made from something that has changed, is over, or was replaced.
    """
    row = db.execute("DELETE FROM entries WHERE no = ? RETURNING version, session, id", (number,)).fetchone()
    if row is None:
        return None
    version, session, own_id = row
    db.execute("DELETE FROM features WHERE no = ?", (number,))
    db.execute("DELETE FROM vectors WHERE no IN (?1, -?1)", (number,))
    db.execute("DELETE FROM archived WHERE no = ?", (number,))
    stone = (key, owner, version + 1, now)
    db.execute("INSERT OR REPLACE INTO tombstones (key, owner, version, deleted_at) VALUES (?, ?, ?, ?)", stone)
    if asked:
        db.execute("UPDATE tombstones SET asked = 1 WHERE key = ?", (key,))
    db.execute("UPDATE sessions SET summary = NULL WHERE id = ? AND summary = ?", (session, number))
    vectors.mark(db, [(number, key, version + 1)])
    return session, own_id


def unfold(
    db: sqlite3.Connection,
    *,
    owner: int,
    session: int,
    changed: Collection[str],
    now: int,
    gone: Collection[int] = (),
    asked: bool = False,
    restore: bool = True,
) -> int | None:
    """Delete the segments and episodes of *session* that were made from the entries *changed* (ids), and the summary of those.

    Those *gone* are deleted whatever they were made from, and *asked* says whether somebody wanted them to go.

    The number of the session's summary, None once it is gone: it is made anew from the other segments. The turns that no
    segment covers any more go back into the window; not if *restore* is False, when somebody has just said what the
    window is.
    """
    current: int | None = db.execute("SELECT summary FROM sessions WHERE id = ?", (session,)).fetchone()[0]
    rows = db.execute(
        "SELECT no, key, id, sources FROM entries WHERE session = ? AND seq < 0 AND type = 3 ORDER BY no", (session,)
    ).fetchall()
    tainted, stale = set(changed), {}
    uncovered: list[str] = []
    covered: set[str] = set()
    for number, key, own_id, sources in rows:
        made_from = json.loads(sources or "[]")
        if number in gone or not tainted.isdisjoint(made_from):
            stale[number] = key
            if not own_id.startswith(EPISODE):
                tainted.add(own_id)
                uncovered += made_from
        elif number != current and not own_id.startswith(EPISODE):
            covered.update(made_from)
    summed = any(number in stale and not own_id.startswith(EPISODE) for number, _, own_id, _ in rows)
    for number, key, _, _ in rows:
        if number in stale or (summed and number == current):
            remove(db, number, key, owner=owner, now=now, asked=asked and number in gone)
    if not summed:
        return current
    db.execute("UPDATE sessions SET summary = NULL, version = version + 1 WHERE id = ?", (session,))
    if restore:
        back = db.execute(
            "SELECT no FROM entries WHERE session = ? AND type = 0 AND id IN (SELECT value FROM json_each(?))",
            (session, json.dumps([i for i in uncovered if i not in covered])),
        ).fetchall()
        put_back(db, session, [number for (number,) in back])
    return None


def put_back(db: sqlite3.Connection, session: int, numbers: Collection[int]) -> None:
    """Put turns that had left back into the window, each before the first turn there that was said after it."""
    kept = db.execute(
        "SELECT no, seq, position FROM entries WHERE session = ? AND position IS NOT NULL ORDER BY position", (session,)
    ).fetchall()
    there = {number for number, _, _ in kept}
    back = db.execute(
        "SELECT no, seq FROM entries WHERE no IN (SELECT value FROM json_each(?)) ORDER BY seq",
        (json.dumps([n for n in numbers if n not in there]),),
    ).fetchall()
    if not back:
        return
    front: list[int] = []  # what stands before, or among, what comes back
    rest = kept
    for number, seq in back:
        while rest and rest[0][1] < seq:
            front.append(rest[0][0])
            rest = rest[1:]
        front.append(number)
    last = db.execute("SELECT last_position FROM sessions WHERE id = ?", (session,)).fetchone()[0]
    end = rest[0][2] if rest else last + 1
    db.executemany(
        "UPDATE entries SET position = ? WHERE no = ?", [(end - len(front) + i, n) for i, n in enumerate(front)]
    )
