"""The two halves of writing: `sequence` hands out numbers, seq and versions; `apply` puts finished records in place.

Here both happen in one transaction; with a shared log, other hosts would only `apply`, which may be repeated.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...errors import ConflictError, NotFound
from ...protocols import OnConflict, Record, Texts
from ...types import Entry, MemoryType, Scope, changed, microseconds, same_content
from . import archive, entries, extractions, fulltext, sessions, summaries, vectors
from .schema import OWNER_SHIFT
from .sessions import Head

_CHUNK = 500  # parameters of one statement


def sequence(
    db: sqlite3.Connection, head: Head, records: Sequence[Record], *, scope: Scope, on_conflict: OnConflict
) -> tuple[list[str], list[Record]]:
    """The ids of *records*, and those that are new or changed, with number, seq, position and version.

    Ids that are there already are settled by *on_conflict*; an equal id and content is no conflict.
    """
    named = [r.entry.key for r in records if not r.fresh]
    stored = {e.key: e for e in by_keys(db, named, scope=scope, owner=head.owner)}
    dead = tombstones(db, named)
    ids: list[str] = []
    written: dict[str, Record] = {}
    for record in records:
        entry = record.entry
        ids.append(entry.id)
        before = written[entry.key].entry if entry.key in written else stored.get(entry.key)
        if before is None:
            entry = placed(head, entry, version=dead.get(entry.key, 0) + 1)
        elif same_content(before, entry) or on_conflict == "ignore":
            continue
        elif on_conflict == "raise" or before.type is not entry.type:  # a summary's id is never a turn's
            raise ConflictError(
                f"the id {entry.id!r} is taken by other content in this session; give the new one its own id, "
                "or pass on_conflict='replace' or 'ignore'",
                id=entry.id,
            )
        else:
            entry = replace(
                entry,
                number=before.number,
                seq=before.seq,
                position=before.position,
                pinned=before.pinned,
                version=before.version + 1,
                created_at=before.created_at,
                written_at=before.written_at,
            )
        written[entry.key] = replace(record, entry=entry)
    return ids, list(written.values())


def placed(head: Head, entry: Entry, *, version: int) -> Entry:
    """*entry* with the next number and seq of its session; a turn has the next place in its window, too."""
    head.last_n += 1
    head.last_seq += 1
    position = None
    if entry.type is MemoryType.SHORT_TERM:
        position = head.last_position = head.last_position + 1
    number = (head.owner << OWNER_SHIFT) | head.last_n
    return changed(entry, number=number, seq=head.last_seq, version=version, position=position)


def placed_below(db: sqlite3.Connection, head: Head, entry: Entry) -> Entry:
    """*entry*, which is no turn, with the next number of its owner, and a seq before all that its session has.

    Summaries and tasks count seq downwards from -1, so that turns have no gaps in theirs.
    """
    lowest = db.execute("SELECT min(seq) FROM entries WHERE session = ?", (head.session,)).fetchone()[0] or 0
    head.last_n += 1
    return replace(entry, number=(head.owner << OWNER_SHIFT) | head.last_n, seq=min(lowest, 0) - 1, version=1)


def place(db: sqlite3.Connection, entry: Entry, *, scope: Scope) -> Head:
    """Where *entry* stands; `NotFound` when it is gone or not of *scope*, `ConflictError` when it has changed."""
    owner = sessions.owner_of(db, scope)
    row = db.execute("SELECT session, version FROM entries WHERE no = ?", (entry.number,)).fetchone()
    if row is None or owner is None or entry.number >> OWNER_SHIFT != owner:
        raise NotFound(f"no entry {entry.id!r} in this scope; it may have been deleted", id=entry.id)
    if row[1] != entry.version:
        raise ConflictError(f"entry {entry.id!r} has changed since it was read; read it again", id=entry.id)
    return sessions.head_of(db, int(row[0]))


def unchanged(db: sqlite3.Connection, entry: Entry, *, scope: Scope) -> None:
    """Raise unless *entry* can be written: as a new version of what was read, or as a new entry."""
    if entry.number:
        place(db, entry, scope=scope)
    elif db.execute("SELECT 1 FROM entries WHERE key = ?", (bytes.fromhex(entry.key),)).fetchone() is not None:
        raise ConflictError(f"an entry {entry.id!r} was written meanwhile; read it, and try again", id=entry.id)


def all_unchanged(db: sqlite3.Connection, read: Sequence[Entry], *, scope: Scope) -> None:
    """Raise unless all of *read* are as they were read: `NotFound` or `ConflictError`."""
    numbers = json.dumps([e.number for e in read])
    now = dict(db.execute("SELECT no, version FROM entries WHERE no IN (SELECT value FROM json_each(?))", (numbers,)))
    for entry in read:
        if now.get(entry.number) != entry.version:
            place(db, entry, scope=scope)


def no_twin(db: sqlite3.Connection, head: Head, entry: Entry) -> None:
    """Raise `ConflictError` if the session has an open task of the name that *entry*, a new one, has."""
    for own_id, metadata in db.execute(
        "SELECT id, metadata FROM entries WHERE session = ? AND type = 1", (head.session,)
    ):
        about = json.loads(metadata or "{}")
        if about.get("status") == "open" and about.get("name") == entry.metadata.get("name"):
            raise ConflictError(
                f"a task of this name was begun meanwhile ({own_id}); read it, and try again", id=own_id
            )


def apply(
    db: sqlite3.Connection,
    head: Head,
    records: Sequence[Record],
    *,
    counter: str,
    restore: bool = True,
    edited: bool = False,
) -> None:
    """Put finished records in place: entry, features and dirty mark. Repeating it changes nothing.

    Summaries of turns that change go, and what only they covered returns to the window, unless *restore* is False.
    *edited*: somebody has changed a text, so that what was made from a segment goes as well.
    """
    changed = [r.entry for r in records if r.entry.version > 1 and _reads_otherwise(db, r.entry, counter=counter)]
    # Neither its vector nor a summary may speak for a text that is gone; what is unchanged keeps both.
    db.executemany("DELETE FROM vectors WHERE no IN (?1, -?1)", [(e.number,) for e in changed])
    entries.put(db, [entries.row_of(r.entry, session=head.session, counter=counter) for r in records])
    fulltext.put(db, [r.feature(session=head.session) for r in records])
    vectors.mark(db, [(r.entry.number, bytes.fromhex(r.entry.key), r.entry.version) for r in records])
    sources = [e for e in changed if edited or e.type is MemoryType.SHORT_TERM]
    if sources:
        now = microseconds(max(e.updated_at for e in sources))
        ids = [e.id for e in sources]
        extractions.forget(db, {e.number: e.id for e in sources}, owner=head.owner, now=now)
        head.summary = summaries.unfold(
            db, owner=head.owner, session=head.session, changed=ids, now=now, restore=restore
        )


def _reads_otherwise(db: sqlite3.Connection, entry: Entry, *, counter: str) -> bool:
    """Whether *entry* says something else than what is stored of it: another text, name, call or part."""
    query = "SELECT role, name, content, body, codec FROM entries WHERE no = ?"
    said = db.execute(query, (entry.number,)).fetchone()
    if said is not None and said[-1] == archive.COLD:  # a change makes it warm
        archive.thaw(db, [entry.number], skip=False)
        said = db.execute(query, (entry.number,)).fetchone()
    row = entries.row_of(entry, session=0, counter=counter)
    return said is not None and said[:-1] != (row[7], row[8], row[10], row[11])


def by_keys(
    db: sqlite3.Connection, keys: Sequence[str], *, scope: Scope, owner: int, texts: Texts = "read"
) -> Iterator[Entry]:
    """Entries of *owner* by key; unknown keys, and other owners', are left out."""
    for start in range(0, len(keys), _CHUNK):
        part = [bytes.fromhex(k) for k in keys[start : start + _CHUNK]]
        where = f"e.key IN ({','.join('?' * len(part))})"
        for entry, _ in entries.select(db, where, part, scope=scope, owner=owner, texts=texts):
            yield entry


def tombstones(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, int]:
    """Versions at which entries were deleted, by key."""
    found: dict[str, int] = {}
    for start in range(0, len(keys), _CHUNK):
        part = [bytes.fromhex(k) for k in keys[start : start + _CHUNK]]
        rows = db.execute(f"SELECT key, version FROM tombstones WHERE key IN ({','.join('?' * len(part))})", part)
        found.update((key.hex(), version) for key, version in rows)
    return found
