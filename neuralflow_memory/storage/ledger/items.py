"""The items table: keyed values, and their tie to the entries that they are found by."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ...protocols import Namespace, StoredValue, ValueRecord, ValuesWritten
from ...types import Entry, Scope, microseconds, moment
from . import entries, log, sessions, summaries, vectors
from .sessions import Head

_END = b"\0"  # of each label in a path; no label holds it, so that a prefix is a range of whole labels
_LATEST = microseconds(datetime.max.replace(tzinfo=UTC))
_EXPIRED_AT_ONCE = 100  # expired values that a write deletes, so that it never takes long

_SHOWN = "path, key, created_at, updated_at, expires_at, texts"
_NAMED = "owner = ? AND path = ? AND key = ?"
_LIVE = "(expires_at IS NULL OR expires_at > ?)"


def get(
    db: sqlite3.Connection, owner: int, names: Iterable[tuple[Namespace, str]], *, now: int
) -> dict[tuple[Namespace, str], StoredValue]:
    """Values by namespace and key; those that are not there, or have expired, are left out."""
    found = {}
    for namespace, key in names:
        query = f"SELECT {_SHOWN}, value FROM items WHERE {_NAMED} AND {_LIVE}"
        row = db.execute(query, (owner, _path(namespace), key, now)).fetchone()
        if row is not None:
            found[namespace, key] = _stored(row)
    return found


def below(
    db: sqlite3.Connection, owner: int, prefix: Namespace, *, now: int, limit: int | None = None
) -> list[StoredValue]:
    """Values without their JSON whose namespace begins with *prefix*, latest change first."""
    rows = db.execute(
        f"SELECT {_SHOWN} FROM items WHERE owner = ? AND path >= ? AND path < ? AND {_LIVE} "
        "ORDER BY updated_at DESC, path, key LIMIT ?",
        (owner, *_range(prefix), now, -1 if limit is None else limit),
    )
    return [_stored(row) for row in rows]


def texts(db: sqlite3.Connection, owner: int, prefix: Namespace) -> list[int]:
    """Numbers of the entries that values below *prefix* are found by; some may have been deleted."""
    rows = db.execute("SELECT no FROM item_texts WHERE owner = ? AND path >= ? AND path < ?", (owner, *_range(prefix)))
    return [number for (number,) in rows]


def found_by(db: sqlite3.Connection, owner: int, numbers: Sequence[int]) -> dict[int, tuple[Namespace, str]]:
    """Namespace and key of the values that are found by entries, by the numbers of those."""
    rows = db.execute(
        "SELECT no, path, key FROM item_texts WHERE no IN (SELECT value FROM json_each(?)) AND owner = ?",
        (json.dumps(numbers), owner),
    )
    return {number: (_namespace(path), key) for number, path, key in rows}


def namespaces(db: sqlite3.Connection, owner: int, prefix: Namespace, *, now: int) -> Iterator[Namespace]:
    """The namespaces that begin with *prefix* and hold a value: one step in the table each, however many they hold."""
    low, high = _range(prefix)
    query = f"SELECT path FROM items WHERE owner = ? AND path >= ? AND path < ? AND {_LIVE} ORDER BY path LIMIT 1"
    while (row := db.execute(query, (owner, low, high, now)).fetchone()) is not None:
        yield _namespace(row[0])
        low = row[0] + _END  # the least that is more


def every(db: sqlite3.Connection, owner: int) -> Iterator[tuple[StoredValue, int | None, list[str]]]:
    """All values of *owner*, also those that have expired, with their time to live and the ids of what they are found by."""
    for path, key, created, updated, expires, count, value, ttl in db.execute(
        f"SELECT {_SHOWN}, value, ttl FROM items WHERE owner = ? ORDER BY path, key", (owner,)
    ):
        stored = StoredValue(_namespace(path), key, created, updated, expires, count, value)
        found_by = db.execute(
            "SELECT e.id FROM item_texts t JOIN entries e ON e.no = t.no WHERE t.owner = ? AND t.path = ? AND t.key = ? "
            "ORDER BY e.no",
            (owner, path, key),
        )
        yield stored, ttl, [own_id for (own_id,) in found_by]


def name(path: bytes, key: str) -> tuple[Namespace, str]:
    """Namespace and key of what is stored under *path*."""
    return _namespace(path), key


def exists(db: sqlite3.Connection, owner: int, namespace: Namespace, key: str) -> bool:
    """Whether there is such a value, expired or not."""
    row = db.execute(f"SELECT 1 FROM items WHERE {_NAMED}", (owner, _path(namespace), key)).fetchone()
    return row is not None


def delete(db: sqlite3.Connection, owner: int, path: bytes, key: str, *, now: int) -> None:
    """Delete a value, and the entries that it is found by."""
    _remove(db, owner, path, key, now=now, done=ValuesWritten(), asked=True)


def insert(db: sqlite3.Connection, owner: int, stored: StoredValue, *, ttl: int | None, texts: Sequence[int]) -> None:
    """Keep a value that is not there, as it was elsewhere, found by entries that are there."""
    named = (owner, _path(stored.namespace), stored.key)
    db.executemany("INSERT INTO item_texts (owner, path, key, no) VALUES (?, ?, ?, ?)", [(*named, n) for n in texts])
    db.execute(
        "INSERT INTO items (owner, path, key, created_at, updated_at, ttl, expires_at, texts, value) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*named, stored.created_at, stored.updated_at, ttl, stored.expires_at, len(texts), stored.value),
    )


def write(
    db: sqlite3.Connection,
    head: Head,
    records: Sequence[ValueRecord],
    *,
    scope: Scope,
    read: Sequence[tuple[Namespace, str]],
    now: int,
    counter: str,
) -> ValuesWritten:
    """Let the values *read* live anew, write *records*, and delete some of the owner's values that have expired."""
    done = ValuesWritten(head.session)
    for namespace, key in read:
        row = db.execute(
            f"UPDATE items SET expires_at = min(? + ttl, {_LATEST}) WHERE {_NAMED} AND ttl IS NOT NULL AND {_LIVE} "
            "RETURNING expires_at",
            (now, head.owner, path := _path(namespace), key, now),
        ).fetchone()
        if row is not None:
            _move(db, _numbers(db, head.owner, path, key), expires_at=row[0], done=done)
    for record in records:
        if record.value is None:
            _remove(db, head.owner, _path(record.namespace), record.key, now=now, done=done, asked=True)
        else:
            _put(db, head, record, scope=scope, now=now, counter=counter, done=done)
    over = db.execute(
        "SELECT path, key FROM items WHERE owner = ? AND expires_at <= ? LIMIT ?", (head.owner, now, _EXPIRED_AT_ONCE)
    ).fetchall()
    for path, key in over:
        _remove(db, head.owner, path, key, now=now, done=done)
    if done.written:
        head.active_at = now
        sessions.save_head(db, head)
    return replace(done, expired=len(over))


def _put(
    db: sqlite3.Connection,
    head: Head,
    record: ValueRecord,
    *,
    scope: Scope,
    now: int,
    counter: str,
    done: ValuesWritten,
) -> None:
    path = _path(record.namespace)
    named = (head.owner, path, record.key)
    before = db.execute(f"SELECT created_at FROM items WHERE {_NAMED} AND {_LIVE}", (*named, now)).fetchone()
    created = now if before is None else before[0]  # after now, if another put was faster
    expires = None if record.ttl is None else min(now + record.ttl, _LATEST)
    had = _entries(db, _numbers(db, *named), scope=scope, owner=head.owner)
    by_content = {e.content: e for e in had}
    kept = [by_content[r.entry.content] for r in record.texts if r.entry.content in by_content]
    new = []
    for text in record.texts:
        if text.entry.content not in by_content:
            entry = log.placed(head, text.entry, version=1)
            new.append(replace(text, entry=replace(entry, expires_at=None if expires is None else moment(expires))))
    _move(db, [e.number for e in kept if _expiry(e) != expires], expires_at=expires, done=done)
    log.apply(db, head, new, counter=counter)
    done.written.extend(new)
    numbers = {*(e.number for e in kept), *(r.entry.number for r in new)}
    _drop(db, [e for e in had if e.number not in numbers], owner=head.owner, now=now, done=done)
    db.execute(f"DELETE FROM item_texts WHERE {_NAMED}", named)
    db.executemany("INSERT INTO item_texts (owner, path, key, no) VALUES (?, ?, ?, ?)", [(*named, n) for n in numbers])
    db.execute(
        "INSERT OR REPLACE INTO items (owner, path, key, created_at, updated_at, ttl, expires_at, texts, value) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*named, created, max(now, created), record.ttl, expires, len(numbers), record.value),
    )


def _remove(
    db: sqlite3.Connection, owner: int, path: bytes, key: str, *, now: int, done: ValuesWritten, asked: bool = False
) -> None:
    anyone = Scope()  # what is deleted needs no scope to be shown in
    gone = _entries(db, _numbers(db, owner, path, key), scope=anyone, owner=owner)
    _drop(db, gone, owner=owner, now=now, done=done, asked=asked)
    for table in ("items", "item_texts"):
        db.execute(f"DELETE FROM {table} WHERE {_NAMED}", (owner, path, key))


def _drop(
    db: sqlite3.Connection, gone: Sequence[Entry], *, owner: int, now: int, done: ValuesWritten, asked: bool = False
) -> None:
    for entry in gone:
        summaries.remove(db, entry.number, bytes.fromhex(entry.key), owner=owner, now=now, asked=asked)
        done.gone.append(entry.number)
    if gone:
        vectors.forget_questions(db, owner)


def _move(db: sqlite3.Connection, numbers: Sequence[int], *, expires_at: int | None, done: ValuesWritten) -> None:
    """Give entries another time to expire. No new version: what the vector index knows of them is the same."""
    for table in ("entries", "features"):
        db.executemany(f"UPDATE {table} SET expires_at = ? WHERE no = ?", [(expires_at, n) for n in numbers])
    done.moved.update(dict.fromkeys(numbers, expires_at))


def _entries(db: sqlite3.Connection, numbers: Sequence[int], *, scope: Scope, owner: int) -> list[Entry]:
    where = "e.no IN (SELECT value FROM json_each(?))"
    found = entries.select(db, where, [json.dumps(numbers)], scope=scope, owner=owner) if numbers else ()
    return [entry for entry, _ in found]


def _expiry(entry: Entry) -> int | None:
    return None if entry.expires_at is None else microseconds(entry.expires_at)


def _numbers(db: sqlite3.Connection, owner: int, path: bytes, key: str) -> list[int]:
    """Of the entries that a value is found by; some may have been deleted."""
    return [number for (number,) in db.execute(f"SELECT no FROM item_texts WHERE {_NAMED}", (owner, path, key))]


def _path(namespace: Namespace) -> bytes:
    return b"".join(label.encode() + _END for label in namespace)


def _namespace(path: bytes) -> Namespace:
    return tuple(path.decode().split("\0")[:-1])


def _range(prefix: Namespace) -> tuple[bytes, bytes]:
    """The paths that begin with the labels of *prefix*: from the first, to before the second."""
    low = _path(prefix)
    return low, low + b"\xff"  # no byte of UTF-8


def _stored(row: Sequence[Any]) -> StoredValue:
    path, key, *more = row
    return StoredValue(_namespace(path), key, *more)
