"""The states of sessions: the newest version of each, and those before it that are kept.

`own` is the connection that has these tables: the ledger's own, or one to a database in RAM.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...protocols import StateRecord, StoredState
from ...rules.states import overtaken
from ...types import Life
from .sessions import Head

TABLES = (
    # `life` is what was recorded last, when the session's last write was at `life_at`, and its last place was `position`.
    """CREATE TABLE IF NOT EXISTS states (
        session INTEGER PRIMARY KEY, version INTEGER NOT NULL, oldest INTEGER NOT NULL, life TEXT NOT NULL,
        life_at INTEGER NOT NULL, position INTEGER NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS state_versions (
        session INTEGER NOT NULL, version INTEGER NOT NULL, fields TEXT, codec INTEGER NOT NULL DEFAULT 0,
        life TEXT NOT NULL, at INTEGER NOT NULL, act TEXT NOT NULL, principal TEXT, agent_id TEXT, why TEXT, turn TEXT,
        PRIMARY KEY (session, version)) WITHOUT ROWID""",
)
_COLUMNS = "version, fields, life, at, act, principal, agent_id, why, turn"
_AGED = (
    "(st.life = 'active' AND s.active_at <= ?) OR (st.life = 'idle' AND s.active_at <= ?) OR "
    "(st.life IN ('idle', 'expired') AND (s.active_at > st.life_at OR s.last_position != st.position))"
)


def in_ram() -> sqlite3.Connection:
    """A database in RAM that has the tables. Each read of it is one statement, each write is done under the ledger's lock."""
    own = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for statement in TABLES:
        own.execute(statement)
    return own


def current(own: sqlite3.Connection, head: Head) -> StoredState:
    """The session's state and how it stands."""
    columns = ", ".join(f"v.{c}" for c in _COLUMNS.split(", "))
    row = own.execute(
        f"SELECT {columns}, st.life, st.life_at, st.position FROM states st JOIN state_versions v "
        "ON v.session = st.session AND v.version = st.version WHERE st.session = ?",
        (head.session,),
    ).fetchone()
    if row is None:
        return StoredState(None, "active", resumed=False, active_at=head.active_at)
    *record, life, life_at, position = row
    resumed = head.active_at > life_at or head.last_position != position
    return StoredState(StateRecord(*record), life, resumed, head.active_at)


def versions(own: sqlite3.Connection, session: int, *, last: int | None, version: int | None) -> list[StateRecord]:
    """Versions that are kept, oldest first."""
    where, given = "session = ?", [session]
    if version is not None:
        where, given = f"{where} AND version = ?", [session, version]
    query = f"SELECT {_COLUMNS} FROM state_versions WHERE {where} ORDER BY version DESC LIMIT ?"
    return [StateRecord(*row) for row in own.execute(query, (*given, -1 if last is None else last))][::-1]


def check(own: sqlite3.Connection, head: Head, record: StateRecord, *, name: str) -> None:
    """Raise `ConflictError` unless *record* follows the version that the session is at."""
    row = own.execute("SELECT version FROM states WHERE session = ?", (head.session,)).fetchone()
    found, expected = 0 if row is None else int(row[0]), record.version - 1
    if found != expected:
        raise overtaken(name, expected=expected, found=found)


def came_with(own: sqlite3.Connection, session: int, turn: str) -> bool:
    """Whether a state was written with the turn of this id."""
    query = "SELECT 1 FROM state_versions WHERE session = ? AND turn = ?"
    return own.execute(query, (session, turn)).fetchone() is not None


def leaving(own: sqlite3.Connection, session: int) -> list[tuple[StateRecord, tuple[Life, int, int] | None]]:
    """Versions that are kept, oldest first; the newest with what was recorded last: life, as of when, and last place."""
    stands = own.execute("SELECT life, life_at, position FROM states WHERE session = ?", (session,)).fetchone()
    found = versions(own, session, last=None, version=None) if stands is not None else []
    return [(record, stands if record is found[-1] else None) for record in found]


def arrive(
    own: sqlite3.Connection,
    head: Head,
    records: Sequence[StateRecord],
    stands: tuple[Life, int, int] | None,
    *,
    restore_deleted: bool,
    keep: int,
) -> None:
    """Take in what a state was elsewhere, *records* from the oldest on, unless there is one here, or was one.

    With *restore_deleted*, one that was cleared here comes back as the next version, with those before.
    """
    there = current(own, head).record
    last = records[-1]
    if there is not None:
        if not restore_deleted or there.act != "clear" or last.act == "clear":
            return
        last = replace(last, version=max(there.version + 1, last.version))
    for record in records[:-1]:
        if record.version > last.version - keep and (there is None or record.version != there.version):
            _insert(own, head.session, record)
    put(own, head, last, keep=keep)
    own.execute(
        "UPDATE states SET oldest = (SELECT min(version) FROM state_versions v WHERE v.session = states.session) "
        "WHERE session = ?",
        (head.session,),
    )
    if stands is not None:
        own.execute("UPDATE states SET life = ?, life_at = ?, position = ? WHERE session = ?", (*stands, head.session))


def _insert(own: sqlite3.Connection, session: int, record: StateRecord) -> None:
    own.execute(
        f"INSERT OR REPLACE INTO state_versions (session, {_COLUMNS}) VALUES ({', '.join('?' * 10)})",
        (
            session,
            record.version,
            record.fields,
            record.life,
            record.at,
            record.act,
            record.principal,
            record.agent_id,
            record.why,
            record.turn,
        ),
    )


def put(own: sqlite3.Connection, head: Head, record: StateRecord, *, keep: int) -> None:
    """Make *record* the newest version; those beyond *keep* go."""
    _insert(own, head.session, record)
    oldest = max(1, record.version - keep + 1)
    own.execute(
        "INSERT INTO states VALUES (:session, :version, :version, :life, :at, :position) ON CONFLICT (session) DO UPDATE SET "
        "version = :version, oldest = max(oldest, :oldest), life = :life, life_at = :at, position = :position",
        {
            "session": head.session,
            "version": record.version,
            "oldest": oldest,
            "life": record.life,
            "at": max(record.at, head.active_at),
            "position": head.last_position,
        },
    )
    if oldest > 1:
        own.execute("DELETE FROM state_versions WHERE session = ? AND version < ?", (head.session, oldest))


def clear(own: sqlite3.Connection, head: Head, record: StateRecord) -> None:
    """Delete all versions; *record* stands in their place, so that numbers go on. Nothing, if there was no state."""
    row = own.execute("SELECT version FROM states WHERE session = ?", (head.session,)).fetchone()
    if row is not None:
        put(own, head, replace(record, version=row[0] + 1), keep=1)


def aged(db: sqlite3.Connection, own: sqlite3.Connection, *, idle: int, expired: int) -> Iterator[int]:
    """Numbers of the sessions with a state whose recorded life is not what it is by now."""
    if own is db:
        query = f"SELECT s.id FROM states st JOIN sessions s ON s.id = st.session WHERE {_AGED}"
        yield from (number for (number,) in db.execute(query, (idle, expired)).fetchall())
        return
    query = (
        f"SELECT s.id FROM (SELECT ? AS life, ? AS life_at, ? AS position) st JOIN sessions s ON s.id = ? WHERE {_AGED}"
    )
    for life, life_at, position, session in own.execute(
        "SELECT life, life_at, position, session FROM states"
    ).fetchall():
        yield from (number for (number,) in db.execute(query, (life, life_at, position, session, idle, expired)))


def record_life(own: sqlite3.Connection, head: Head, stored: StoredState, life: Life) -> bool:
    """Note *life* unless the state or the session has moved on since *stored* was read."""
    if stored.record is None or head.active_at != stored.active_at:
        return False
    changed = own.execute(
        "UPDATE states SET life = ?, life_at = ?, position = ? WHERE session = ? AND version = ? AND life = ?",
        (life, head.active_at, head.last_position, head.session, stored.record.version, stored.life),
    )
    return changed.rowcount == 1


def trim(own: sqlite3.Connection, *, keep: int) -> None:
    """Drop the versions beyond *keep*, where it was more before."""
    rows = own.execute(
        "SELECT session, version - ? + 1 FROM states WHERE version - oldest >= ?", (keep, keep)
    ).fetchall()
    for session, oldest in rows:
        own.execute("DELETE FROM state_versions WHERE session = ? AND version < ?", (session, oldest))
        own.execute("UPDATE states SET oldest = ? WHERE session = ?", (oldest, session))


def forget_expired(own: sqlite3.Connection) -> None:
    """Drop the states of sessions that have expired."""
    own.execute("DELETE FROM state_versions WHERE session IN (SELECT session FROM states WHERE life = 'expired')")
    own.execute("DELETE FROM states WHERE life = 'expired'")
