"""The vectors table (the embedding cache) and the dirty set (what the vector index has not seen yet)."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from ...protocols import Dirty
from .schema import OWNER_SHIFT


def mark(db: sqlite3.Connection, rows: Iterable[tuple[int, bytes, int]]) -> None:
    """Mark entries (number, key, version) as changed; an older mark, its failures included, is replaced."""
    db.executemany("INSERT OR REPLACE INTO dirty (no, key, version) VALUES (?, ?, ?)", rows)


_GONE = "NOT EXISTS (SELECT 1 FROM entries e WHERE e.no = dirty.no)"


def claim(db: sqlite3.Connection, *, now: int, limit: int, gone: bool = False) -> list[Dirty]:
    """Up to *limit* marks that are due; with *gone* only those of deleted entries."""
    rows = db.execute(
        f"SELECT no, key, version, attempts FROM dirty WHERE retry_at <= ?{' AND ' + _GONE if gone else ''} "
        "ORDER BY no LIMIT ?",
        (now, limit),
    )
    return [Dirty(no, key.hex(), version, attempts) for no, key, version, attempts in rows]


def next_retry(db: sqlite3.Connection, *, gone: bool = False) -> int | None:
    """When the earliest mark is due, None when nothing is marked; with *gone* only deleted entries' count."""
    found: int | None = db.execute(f"SELECT min(retry_at) FROM dirty{' WHERE ' + _GONE if gone else ''}").fetchone()[0]
    return found


def clear(db: sqlite3.Connection, marks: Iterable[tuple[int, int]]) -> None:
    """Clear marks (number, version) unless the entry has changed since."""
    db.executemany("DELETE FROM dirty WHERE no = ? AND version = ?", marks)


def postpone(db: sqlite3.Connection, *, number: int, version: int, retry_at: int, error: str) -> None:
    """Count a failure of a mark and let it wait until *retry_at*."""
    db.execute(
        "UPDATE dirty SET attempts = attempts + 1, retry_at = ?, error = ? WHERE no = ? AND version = ?",
        (retry_at, error[:500], number, version),
    )


def model(db: sqlite3.Connection, name: str) -> tuple[int, int] | None:
    """Number and dimensions of an embedding model, or None."""
    row = db.execute("SELECT id, dimensions FROM models WHERE name = ?", (name,)).fetchone()
    return None if row is None else (row[0], row[1])


def cached(db: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
    """Vectors already known, by content hash (which is bound to owner and model)."""
    found: dict[bytes, bytes] = {}
    for start in range(0, len(hashes), 500):
        part = hashes[start : start + 500]
        rows = db.execute(f"SELECT hash, vector FROM vectors WHERE hash IN ({','.join('?' * len(part))})", part)
        found.update(rows)
    return found


def put(db: sqlite3.Connection, model: int, rows: Iterable[tuple[int, int, bytes, bytes]]) -> list[int]:
    """Keep vectors (number, version, hash, vector), each only if its entry still is at that version."""
    statement = (
        "INSERT OR REPLACE INTO vectors (no, model, hash, vector) "
        "SELECT no, ?, ?, ? FROM entries WHERE no = ? AND version = ?"
    )
    kept = []
    for number, version, digest, vector in rows:
        if db.execute(statement, (model, digest, vector, number, version)).rowcount == 1:
            kept.append(number)
    return kept


def load(db: sqlite3.Connection, owner: int, model: int) -> list[tuple[int, bytes]]:
    """All vectors of *owner* by *model*: (number, float32 bytes), in the order of their numbers."""
    return db.execute(
        "SELECT no, vector FROM vectors WHERE no >= ? AND no < ? AND model = ? ORDER BY no",
        (owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT, model),
    ).fetchall()
