"""The features table: what search reads of an entry, its term ids in order among it.

There is no postings table: an owner's inverted index is built in RAM from these rows (`rules.lexical.Postings`), which
are one range scan. Figures for the choice: docs/architecture.md.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

from ...protocols import Feature
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
    return db.execute(query, (*given, low, high)).fetchall()
