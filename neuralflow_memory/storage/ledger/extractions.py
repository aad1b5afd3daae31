"""Which segments were looked through for knowledge, and which turns knowledge was found in."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ...types import Entry, Scope
from . import archive, entries, summaries, vectors, versions
from .schema import OWNER_SHIFT
from .sessions import Head

_SEGMENT = "e.seq < 0 AND e.type = 3 AND e.no IS NOT s.summary AND substr(e.id, 1, 8) != 'episode-'"
_LEFT = "NOT EXISTS (SELECT 1 FROM extractions x WHERE x.no = e.no AND (x.found IS NOT NULL OR x.attempts >= ?))"
_NO_LIMIT = 1 << 62


def left(db: sqlite3.Connection, head: Head, *, scope: Scope, attempts: int | None) -> list[Entry]:
    """The session's segments that were not looked through, oldest first, without those that failed *attempts* times."""
    given = (head.session, _NO_LIMIT if attempts is None else attempts)
    where = f"e.session = ? AND {_SEGMENT} AND {_LEFT}"
    return [e for e, _ in entries.select(db, where, given, scope=scope, owner=head.owner, tail="ORDER BY e.no")]


def sessions_left(db: sqlite3.Connection, *, attempts: int) -> list[Scope]:
    """The sessions that have such segments."""
    rows = db.execute(
        "SELECT DISTINCT o.key, s.session_id FROM entries e JOIN sessions s ON s.id = e.session "
        f"JOIN owners o ON o.id = s.owner WHERE {_SEGMENT} AND {_LEFT}",
        (attempts,),
    )
    return [Scope(tenant, user, session) for key, session in rows for tenant, user, _ in [json.loads(key)]]


def done(db: sqlite3.Connection, segment: Entry, *, found: int) -> None:
    """Note that the turns of *segment* were looked through, and how much was found, perhaps nothing."""
    db.execute(
        "INSERT INTO extractions (no, found) SELECT no, ? FROM entries WHERE no = ? "
        "ON CONFLICT (no) DO UPDATE SET found = excluded.found",
        (found, segment.number),
    )


def failed(db: sqlite3.Connection, segment: Entry) -> None:
    """Count a failure."""
    db.execute(
        "INSERT INTO extractions (no, attempts) SELECT no, 1 FROM entries WHERE no = ? "
        "ON CONFLICT (no) DO UPDATE SET attempts = attempts + 1",
        (segment.number,),
    )


def put(db: sqlite3.Connection, number: int, *, found: int | None, attempts: int) -> None:
    """Note what is known elsewhere of a segment that is new here."""
    db.execute("INSERT OR IGNORE INTO extractions VALUES (?, ?, ?)", (number, found, attempts))


def links(db: sqlite3.Connection, owner: int) -> Iterator[tuple[str, str, str]]:
    """Session and id of the turns that knowledge of *owner* was found in, and its id, as far as its sources name them."""
    return db.execute(
        "SELECT s.session_id, t.id, k.id FROM derivations d JOIN entries t ON t.no = d.source JOIN entries k ON k.no = d.no "
        "JOIN sessions s ON s.id = t.session WHERE d.source >= ? AND d.source < ? AND t.type = 0 "
        "AND t.id IN (SELECT value FROM json_each(coalesce(k.sources, '[]'))) ORDER BY d.source, d.no",
        (owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT),
    )


def link(db: sqlite3.Connection, made_from: Iterable[tuple[str, int]]) -> None:
    """Note that knowledge, by key, is said by turns, by number."""
    db.executemany(
        "INSERT OR IGNORE INTO derivations (source, no) SELECT ?, no FROM entries WHERE key = ?",
        [(number, bytes.fromhex(key)) for key, number in made_from],
    )


def forget(db: sqlite3.Connection, turns: Mapping[int, str], *, owner: int, now: int) -> None:
    """Delete the knowledge that was found in *turns* (ids by number), which were changed or deleted, and nowhere else.

    What somebody has told as well stays.
    """
    numbers = json.dumps(list(turns))
    rows = db.execute(
        "SELECT DISTINCT d.no FROM derivations d WHERE d.source IN (SELECT value FROM json_each(?))", (numbers,)
    ).fetchall()
    if not rows:
        return
    db.execute("DELETE FROM derivations WHERE source IN (SELECT value FROM json_each(?))", (numbers,))
    for (number,) in rows:
        row = db.execute("SELECT key, sources, provenance FROM entries WHERE no = ?", (number,)).fetchone()
        said = db.execute("SELECT 1 FROM derivations WHERE no = ? LIMIT 1", (number,)).fetchone()
        if row is None:  # retention has deleted it
            if said is None:
                archive.purge_found(db, number)
            continue
        key, sources, provenance = row
        if provenance == "derived" and said is None:
            versions.release(db, number)
            summaries.remove(db, number, key, owner=owner, now=now)
            continue
        gone = frozenset(turns.values())
        _without(db, number, [i for i in json.loads(sources or "[]") if i not in gone])


def _without(db: sqlite3.Connection, number: int, sources: Sequence[str]) -> None:
    row = db.execute(
        "UPDATE entries SET sources = ?, version = version + 1 WHERE no = ? RETURNING no, key, version",
        (json.dumps(sources) if sources else None, number),
    ).fetchone()
    vectors.mark(db, [row])
