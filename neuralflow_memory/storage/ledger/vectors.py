"""Tables of vectors (the embedding caches), and the dirty set (what the vector index has not seen yet).

The model with the least number is in use. While another is being taken up, that has the next number, and its vectors lie
beside those in use: rows of a model of an even number have negative numbers. So to switch is to drop a row of `models`, however
many vectors there are.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

from ...protocols import Dirty
from .schema import OWNER_SHIFT

QUESTIONS = 256
"""Questions whose vectors are kept of an owner; with 384 numbers each, 400 kB."""


def mark(db: sqlite3.Connection, rows: Iterable[tuple[int, bytes, int]]) -> None:
    """Mark entries (number, key, version or what stands for it) as changed; an older mark, its failures included, is replaced."""
    db.executemany("INSERT OR REPLACE INTO dirty (no, key, version) VALUES (?, ?, ?)", rows)


def mark_all(db: sqlite3.Connection, *, again: bool = True) -> None:
    """Mark every entry that belongs into the vector index. Those that are marked are tried again, unless *again* is False.

    They stay as old as they are: who waits for them goes by that.
    """
    if again:
        db.execute("UPDATE dirty SET attempts = 0, retry_at = 0, error = NULL")
    db.execute("INSERT OR IGNORE INTO dirty (no, key, version) SELECT no, key, version FROM entries WHERE codec = 0")


_GONE = "NOT EXISTS (SELECT 1 FROM entries e WHERE e.no = dirty.no AND e.codec = 0)"
"""Of an entry that was deleted, or is cold: it leaves the vector index."""


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


def place(number: int, model: int) -> int:
    """The number of the row that holds an entry's vector by a model."""
    return number if model % 2 else -number


def in_use(db: sqlite3.Connection) -> tuple[int, str, int] | None:
    """Number, name and dimensions of the model in use, None before the first vector."""
    row: tuple[int, str, int] | None = db.execute(
        "SELECT id, name, dimensions FROM models ORDER BY id LIMIT 1"
    ).fetchone()
    return row


def next_model(db: sqlite3.Connection) -> tuple[int, str, int] | None:
    """The same, of the model that is being taken up."""
    row: tuple[int, str, int] | None = db.execute(
        "SELECT id, name, dimensions FROM models ORDER BY id LIMIT 1 OFFSET 1"
    ).fetchone()
    return row


def missing(db: sqlite3.Connection, model: int, *, after: int, limit: int) -> list[int]:
    """Numbers above *after* of entries with words that have no vector by *model*, in order."""
    rows = db.execute(
        f"SELECT f.no FROM features f WHERE f.no > ? AND f.words != 0 AND f.cold = 0 "
        f"AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.no = {place(1, model)} * f.no) ORDER BY f.no LIMIT ?",
        (after, limit),
    )
    return [number for (number,) in rows]


def counted(db: sqlite3.Connection, model: int) -> tuple[int, int]:
    """How many entries have a vector by *model*, and how many are to have one."""
    done, total = db.execute(
        "SELECT count(v.no), count(*) FROM features f "
        f"LEFT JOIN vectors v ON v.no = {place(1, model)} * f.no WHERE f.words != 0 AND f.cold = 0"
    ).fetchone()
    return done, total


def clear_unused(db: sqlite3.Connection, *, keep: str | None, limit: int) -> bool:
    """Delete up to *limit* vectors that are neither of the model in use nor of *keep*; whether none is left."""
    used, coming = in_use(db), next_model(db)
    if used is None or (coming is not None and coming[1] == keep):
        return True
    unused = "<" if place(1, used[0]) > 0 else ">"
    gone = db.execute(f"DELETE FROM vectors WHERE no IN (SELECT no FROM vectors WHERE no {unused} 0 LIMIT ?)", (limit,))
    if gone.rowcount == limit:
        return False
    db.execute("DELETE FROM models WHERE id > ?", (used[0],))
    return True


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
    """Keep vectors (number, version, hash, vector), each only if its entry still is at that version, and the model known."""
    statement = (
        f"INSERT OR REPLACE INTO vectors (no, model, hash, vector) SELECT {place(1, model)} * no, ?, ?, ? FROM entries "
        "WHERE no = ? AND version = ? AND codec = 0 AND EXISTS (SELECT 1 FROM models WHERE id = ?)"
    )
    kept = []
    for number, version, digest, vector in rows:
        if db.execute(statement, (model, digest, vector, number, version, model)).rowcount == 1:
            kept.append(number)
    return kept


def load(
    db: sqlite3.Connection, owner: int, model: int, numbers: Sequence[int] | None = None
) -> list[tuple[int, bytes]]:
    """The vectors of *owner* by *model*, or those that have *numbers*: (number, float32 bytes), in the order of numbers."""
    first, last = sorted(place(number, model) for number in (owner << OWNER_SHIFT, ((owner + 1) << OWNER_SHIFT) - 1))
    chosen: str = ""
    given: tuple[str, ...] = ()
    if numbers is not None:
        chosen = "no IN (SELECT value FROM json_each(?)) AND"
        given = (json.dumps([place(number, model) for number in numbers]),)
    order = "no" if model % 2 else "no DESC"
    query = f"SELECT abs(no), vector FROM vectors WHERE {chosen} no BETWEEN ? AND ? AND model = ? ORDER BY {order}"
    return db.execute(query, (*given, first, last, model)).fetchall()


def keep_question(db: sqlite3.Connection, owner: int, digest: bytes, *, model: str, vector: bytes) -> None:
    """Keep the vector of a question, unless it is none of the model's."""
    known = db.execute("SELECT 1 FROM models WHERE name = ? AND dimensions * 4 = ?", (model, len(vector))).fetchone()
    if known is None:
        return
    db.execute("INSERT OR IGNORE INTO questions (owner, hash, vector) VALUES (?, ?, ?)", (owner, digest, vector))


def trim_questions(db: sqlite3.Connection, owners: Iterable[int]) -> None:
    """Leave each of *owners* the newest of their questions."""
    db.executemany(
        "DELETE FROM questions WHERE owner = ?1 AND id <= "
        f"(SELECT id FROM questions WHERE owner = ?1 ORDER BY id DESC LIMIT 1 OFFSET {QUESTIONS})",
        [(owner,) for owner in owners],
    )


def forget_questions(db: sqlite3.Connection, owner: int) -> None:
    """Drop what is kept of the owner's questions, which may have been the words of turns."""
    db.execute("DELETE FROM questions WHERE owner = ?", (owner,))
    db.execute("UPDATE owners SET forgotten = forgotten + 1 WHERE id = ?", (owner,))
