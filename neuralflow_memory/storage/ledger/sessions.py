"""Owners and sessions: who may be read together, and where each conversation stands."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from functools import lru_cache

from ...types import Scope, SessionInfo, moment

KNOWLEDGE = ""  # the session of an owner that holds what belongs to no conversation


@dataclass(slots=True)
class Head:
    """Where a session stands: what the next append needs, in one row."""

    owner: int
    last_n: int
    erase_epoch: int
    session: int
    last_seq: int
    last_position: int
    summary: int | None
    version: int
    active_at: int
    model: str | None


_HEAD = """SELECT o.id, o.last_n, o.erase_epoch, s.id, s.last_seq, s.last_position, s.summary, s.version,
    s.active_at, s.model FROM owners o JOIN sessions s ON s.owner = o.id WHERE """


@lru_cache(maxsize=1024)
def owner_key(scope: Scope) -> str:
    """The owner of *scope* as one unambiguous text."""
    return json.dumps(scope.owner, ensure_ascii=False)


def owner_scope(key: str) -> Scope:
    """The inverse of `owner_key`."""
    return Scope(*json.loads(key))


def owner_of(db: sqlite3.Connection, scope: Scope) -> int | None:
    """The owner's number, or None when nothing was ever stored for it."""
    row = db.execute("SELECT id FROM owners WHERE key = ?", (owner_key(scope),)).fetchone()
    return None if row is None else int(row[0])


def head(db: sqlite3.Connection, scope: Scope, *, session_id: str) -> Head | None:
    """Where a session stands, or None when it has no row yet."""
    row = db.execute(f"{_HEAD} o.key = ? AND s.session_id = ?", (owner_key(scope), session_id)).fetchone()
    return None if row is None else Head(*row)


def head_of(db: sqlite3.Connection, session: int) -> Head:
    """Where the session with this number stands."""
    return Head(*db.execute(f"{_HEAD} s.id = ?", (session,)).fetchone())


def open_head(db: sqlite3.Connection, scope: Scope, *, session_id: str, now: int) -> Head:
    """Where a session stands; owner and session are made when they are new."""
    found = head(db, scope, session_id=session_id)
    if found is None:
        db.execute(
            "INSERT OR IGNORE INTO owners (key, tenant, user_id) VALUES (?, ?, ?)",
            (owner_key(scope), scope.tenant, scope.user_id),
        )
        db.execute(
            "INSERT INTO sessions (owner, session_id, created_at, active_at) SELECT id, ?, ?, ? FROM owners WHERE key = ?",
            (session_id, now, now, owner_key(scope)),
        )
        found = head(db, scope, session_id=session_id)
        assert found is not None
    return found


def save_head(db: sqlite3.Connection, head: Head) -> None:
    """Write the head back, one version on."""
    db.execute("UPDATE owners SET last_n = ? WHERE id = ?", (head.last_n, head.owner))
    db.execute(
        "UPDATE sessions SET last_seq = ?, last_position = ?, summary = ?, active_at = ?, "
        "version = version + 1 WHERE id = ?",
        (head.last_seq, head.last_position, head.summary, head.active_at, head.session),
    )


def listing(db: sqlite3.Connection, *, tenant: str, user_id: str | None) -> list[SessionInfo]:
    """Sessions of a user, or of the userless ones, latest first."""
    where, parameter = "o.tenant = ? AND o.user_id IS NULL", tenant
    if user_id is not None:  # one owner, found by its key
        where, parameter = "o.key = ?", owner_key(Scope(tenant, user_id))
    rows = db.execute(
        "SELECT s.session_id, o.user_id, o.tenant, (SELECT count(*) FROM entries e WHERE e.session = s.id AND e.type = 0), "
        "s.created_at, s.active_at, (SELECT coalesce(sum(input_tokens + output_tokens), 0) FROM spending WHERE session = s.id), "
        "(SELECT coalesce(sum(cost), 0.0) FROM spending WHERE session = s.id) FROM sessions s JOIN owners o ON o.id = s.owner "
        f"WHERE {where} AND s.session_id != ? ORDER BY s.active_at DESC, s.id DESC",
        (parameter, KNOWLEDGE),
    )
    return [
        SessionInfo(session_id, user, ten, messages, moment(created), moment(active), model_tokens, cost)
        for session_id, user, ten, messages, created, active, model_tokens, cost in rows
    ]


def twins(db: sqlite3.Connection) -> list[str]:
    """Session ids that stand both for a chat of a user and for a chat of nobody, in one tenant."""
    rows = db.execute(
        "SELECT s.session_id FROM sessions s JOIN owners o ON o.id = s.owner WHERE s.session_id != ? "
        "GROUP BY o.tenant, s.session_id HAVING count(o.user_id) BETWEEN 1 AND count(*) - 1 ORDER BY s.session_id",
        (KNOWLEDGE,),
    )
    return [row[0] for row in rows]
