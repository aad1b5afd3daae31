"""The features table: what search reads of an entry, its term ids in order among it.

There is no postings table: an owner's inverted index is built in RAM from these rows (`rules.postings.Postings`), which
are one range scan. Figures for the choice: docs/architecture.md.

A turn's row has no terms until its text is analysed (`rules.analysis`); until then, they are worked out for whoever asks.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import cast

from ...protocols import WORDS, Feature, Record
from ...rules.analysis import recorded
from ...types import Entry, Scope
from . import entries
from .schema import OWNER_SHIFT

_COLUMNS = (
    "no, session, seq, type, speaker, agent_id, created_at, expires_at, valid_from, valid_to, importance, words, traits, "
    "called, cold, terms"
)
_PUT = (
    f"INSERT INTO features ({_COLUMNS}) VALUES ({', '.join('?' * 16)}) ON CONFLICT (no) DO UPDATE SET "
    "speaker = excluded.speaker, agent_id = excluded.agent_id, created_at = excluded.created_at, "
    "expires_at = excluded.expires_at, valid_from = excluded.valid_from, valid_to = excluded.valid_to, "
    "importance = excluded.importance, words = excluded.words, "
    "traits = excluded.traits, called = excluded.called, cold = excluded.cold, terms = excluded.terms"
)


def put(db: sqlite3.Connection, features: Iterable[Feature]) -> None:
    db.executemany(_PUT, features)


def load(db: sqlite3.Connection, owner: int, numbers: Sequence[int] | None = None) -> list[Feature]:
    """The features of *owner*, or those of them that have *numbers*, in the order of their numbers."""
    low, high = owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT
    chosen, given = (
        ("", ()) if numbers is None else ("no IN (SELECT value FROM json_each(?)) AND", (json.dumps(numbers),))
    )
    query = f"SELECT {_COLUMNS} FROM features WHERE {chosen} no >= ? AND no < ? ORDER BY no"
    found: list[Feature] = db.execute(query, (*given, low, high)).fetchall()
    left = [feature[0] for feature in found if feature[WORDS] < 0]
    if left:
        whole = {entry.number: recorded(entry) for entry in _read(db, left)}
        found = [_completed(f, whole[f[0]]) if f[0] in whole else f for f in found]
    return found


def _completed(feature: Feature, record: Record) -> Feature:
    *own, _, _, _, _, cold, _ = feature
    found = (record.entry.importance, record.words, record.traits, record.called, cold, record.terms)
    return cast("Feature", (*own, *found))


def left(db: sqlite3.Connection, *, limit: int) -> list[Entry]:
    """Entries of any owner, up to *limit*, whose texts were not analysed yet."""
    numbers = [n for (n,) in db.execute("SELECT no FROM features WHERE words < 0 ORDER BY no LIMIT ?", (limit,))]
    return _read(db, numbers) if numbers else []


def complete(db: sqlite3.Connection, records: Iterable[Record]) -> None:
    """Put what was found in the texts of entries, unless they were changed meanwhile."""
    rows = [
        (r.words, r.traits, r.called, r.terms, r.entry.importance, r.entry.number, r.entry.version) for r in records
    ]
    same = "no = ?6 AND EXISTS (SELECT 1 FROM entries e WHERE e.no = ?6 AND e.version = ?7)"
    found = "words = ?1, traits = ?2, called = ?3, terms = ?4, importance = ?5"
    db.executemany(f"UPDATE features SET {found} WHERE words < 0 AND {same}", rows)
    judged = [row[4:] for row in rows]
    db.executemany("UPDATE entries SET importance = ? WHERE no = ? AND version = ? AND importance < 0", judged)


def _read(db: sqlite3.Connection, numbers: Sequence[int]) -> list[Entry]:
    anyone = Scope(session_id="-")  # what a text says is the same for all
    query = f"{entries.SELECT} WHERE e.no IN (SELECT value FROM json_each(?))"
    return [entries.entry_of(row, scope=anyone)[0] for row in db.execute(query, (json.dumps(numbers),))]
