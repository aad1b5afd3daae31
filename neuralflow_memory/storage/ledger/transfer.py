"""What leaves a ledger for another one, and what comes in: see `Ledger.dump` and `Ledger.load`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ...errors import ConflictError, InputError
from ...protocols import (
    Loaded,
    Moved,
    MovedDerivation,
    MovedEntry,
    MovedMargin,
    MovedSession,
    MovedState,
    MovedValue,
    MovedVersion,
    Namespace,
    Record,
)
from ...types import Entry, MemoryType, Scope, microseconds, same_content
from . import archive, entries, extractions, items, log, sessions, states, summaries, usage, vectors, versions
from .schema import OWNER_SHIFT
from .sessions import KNOWLEDGE, Head

_AT_ONCE = 64  # rows whose texts are read from the archive at a time
_LOADING = "loading:"  # in `meta`, before the number of a session that is being made as it was elsewhere


# -- out


def dump(
    db: sqlite3.Connection, *, tenant: str | None, user_id: str | None, model: int | None, unread: list[int]
) -> Iterator[Moved]:
    """All records, or those of a tenant or a user, owner after owner; *db* is in a transaction.

    The numbers of entries that can't be read from the archive are added to *unread*.
    """
    where, given = "1", {"tenant": tenant, "user": user_id}
    if tenant is not None:
        where += " AND tenant = :tenant"
    if user_id is not None:
        where += " AND user_id = :user"
    for owner, key in db.execute(f"SELECT id, key FROM owners WHERE {where} ORDER BY id", given):
        scope = sessions.owner_scope(key)
        yield from _sessions(db, owner, scope)
        yield from _entries(db, owner, scope, model=model, unread=unread)
        yield from _values(db, owner, scope)
        for session_id, turn, known in extractions.links(db, owner):
            yield MovedDerivation(replace(scope, session_id=session_id), turn, known)
    if user_id is None:
        for row in usage.calibration(db, tenant=tenant):
            yield MovedMargin(*row)


def _sessions(db: sqlite3.Connection, owner: int, scope: Scope) -> Iterator[MovedSession | MovedState]:
    rows = db.execute(
        "SELECT id, session_id, created_at, active_at, last_seq, last_position, model FROM sessions WHERE owner = ? "
        "ORDER BY id",
        (owner,),
    )
    for number, session_id, created_at, active_at, last_seq, last_position, model in rows:
        spent = db.execute(
            "SELECT day, calls, input_tokens, output_tokens, cost FROM spending WHERE session = ? ORDER BY day",
            (number,),
        )
        own = replace(scope, session_id=session_id) if session_id != KNOWLEDGE else scope
        yield MovedSession(
            own,
            session_id == KNOWLEDGE,
            created_at,
            active_at,
            last_seq,
            last_position,
            model,
            tuple(spent),
        )
        for record, stands in states.leaving(db, number):
            yield MovedState(own, record, stands)


def _entries(
    db: sqlite3.Connection, owner: int, scope: Scope, *, model: int | None, unread: list[int]
) -> Iterator[MovedEntry | MovedVersion]:
    rows = db.execute(
        f"SELECT {entries.COLUMNS}, s.summary = e.no, t.path, t.key, v.vector, x.found, x.attempts FROM entries e "
        "JOIN sessions s ON s.id = e.session LEFT JOIN item_texts t ON t.no = e.no "
        f"LEFT JOIN vectors v ON v.no = {vectors.place(1, model or 1)} * e.no AND v.model = ? "
        "LEFT JOIN extractions x ON x.no = e.no WHERE e.no >= ? AND e.no < ? ORDER BY e.no",
        (model, owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT),
    )
    while some := rows.fetchmany(_AT_ONCE):
        left = {row[0] for row in some}
        for row in archive.filled(db, some, texts="skip"):
            left.remove(row[0])
            entry, counter = entries.entry_of(row, scope=scope)
            summary, path, key, vector, found, attempts = row[-6:]
            value = None if path is None else items.name(path, key)
            record = Record(replace(entry, tier="warm", archive_label=None), 0, 0, None, b"")
            extraction = None if attempts is None else (found, attempts)
            knowledge = row[entries.SESSION] == KNOWLEDGE
            yield MovedEntry(record, knowledge, counter, bool(summary), value, vector, extraction=extraction)
            if entry.version > 1:
                for before, counted in versions.earlier(db, entry.number, scope=scope):
                    was = replace(before, tier="warm", archive_label=None)
                    yield MovedVersion(was, knowledge, counted)
        unread += sorted(left)


def _values(db: sqlite3.Connection, owner: int, scope: Scope) -> Iterator[MovedValue]:
    for stored, ttl, texts in items.every(db, owner):
        yield MovedValue(scope, stored, ttl, tuple(texts))


# -- in


@dataclass(slots=True)
class _Place:
    """A session that entries are moved into. `whole`: it becomes what it was elsewhere, place by place."""

    head: Head
    whole: bool
    touched: bool = False


class Loading:
    """One batch on its way in, of one owner, in one transaction.

    *key_of* gives the key of an id of that owner, *value_key* what tells that a value was deleted.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        owner: Scope,
        *,
        source: str,
        counter: str,
        key_of: Callable[[Scope, str, bool], str],
        value_key: Callable[[Scope, Namespace, str], bytes],
        tainted: Collection[str],
        model: int | None,
        restore_deleted: bool,
        max_states: int | None,
        now: int,
    ) -> None:
        self._db = db
        self._owner = owner
        self._source = source
        self._counter = counter
        self._key_of = key_of
        self._value_key = value_key
        self._tainted = tainted
        self._model = model
        self._restore_deleted = restore_deleted
        self._max_states = max_states
        self._now = now
        self._places: dict[str, _Place] = {}
        self._taken_in: dict[str, int] = {}
        """Numbers of the entries that are new here, by key."""
        self.done = Loaded()

    def load(self, moved: Sequence[Moved]) -> Loaded:
        """Put *moved* in place."""
        for kind, group in groupby(moved, key=type):
            if kind is MovedEntry:
                self._load_entries([m for m in group if isinstance(m, MovedEntry)])
                continue
            if kind is MovedState:
                self._load_states([m for m in group if isinstance(m, MovedState)])
                continue
            if kind is MovedDerivation:
                self._load_derivations([m for m in group if isinstance(m, MovedDerivation)])
                continue
            for one in group:
                match one:
                    case MovedVersion():
                        self._load_version(one)
                    case MovedSession():
                        self._load_session(one)
                    case MovedValue():
                        self._load_value(one)
                    case MovedMargin():
                        row = (one.tenant, one.model, one.n, one.mean, one.m2)
                        self._db.execute("INSERT OR IGNORE INTO calibration VALUES (?, ?, ?, ?, ?)", row)
        for place in self._places.values():
            self._save(place)
        return self.done

    def _save(self, place: _Place) -> None:
        head = place.head
        self._db.execute("UPDATE owners SET last_n = max(last_n, ?) WHERE id = ?", (head.last_n, head.owner))
        if place.touched:
            self._db.execute(
                "UPDATE sessions SET last_seq = ?, last_position = ?, summary = ?, active_at = ?, version = version + 1 "
                "WHERE id = ?",
                (head.last_seq, head.last_position, head.summary, head.active_at, head.session),
            )

    # -- sessions

    def _load_session(self, one: MovedSession) -> None:
        session_id = KNOWLEDGE if one.knowledge else str(one.scope.session_id)
        if sessions.head(self._db, one.scope, session_id=session_id) is not None:
            return
        head = sessions.open_head(self._db, one.scope, session_id=session_id, now=one.created_at)
        self._db.execute(
            "UPDATE sessions SET active_at = ?, last_seq = ?, last_position = ?, model = ? WHERE id = ?",
            (one.active_at, one.last_seq, one.last_position, one.model, head.session),
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO spending VALUES (?, ?, ?, ?, ?, ?)",
            [(day, head.session, *more) for day, *more in one.spent],
        )
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"{_LOADING}{head.session}", self._source))
        self.done.sessions += not one.knowledge

    def _load_states(self, moved: Sequence[MovedState]) -> None:
        if self._max_states is None:  # they are not kept in the file
            return
        for scope, group in groupby(moved, key=lambda m: m.scope):
            theirs = sorted(group, key=lambda m: m.record.version)
            states.arrive(
                self._db,
                self._place(scope, knowledge=False).head,
                [m.record for m in theirs],
                theirs[-1].stands,
                restore_deleted=self._restore_deleted,
                keep=self._max_states,
            )

    def _place(self, scope: Scope, *, knowledge: bool) -> _Place:
        session_id = KNOWLEDGE if knowledge else str(scope.session_id)
        place = self._places.get(session_id)
        if place is None:
            new = sessions.head(self._db, scope, session_id=session_id) is None
            head = sessions.open_head(self._db, scope, session_id=session_id, now=self._now)
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (f"{_LOADING}{head.session}",)).fetchone()
            place = self._places[session_id] = _Place(head, row is not None and row[0] == self._source)
            self.done.sessions += new and not knowledge
        for other in self._places.values():  # they count the numbers of one owner
            place.head.last_n = max(place.head.last_n, other.head.last_n)
        return place

    # -- entries

    def _load_entries(self, moved: Sequence[MovedEntry]) -> None:
        keys = [m.record.entry.key for m in moved]
        here = {e.key: e for e in self._here(keys)}
        dead = {} if self._restore_deleted else log.tombstones(self._db, keys)
        for one in moved:
            entry = one.record.entry
            known = here.get(entry.key)
            if known is not None:
                self.done.present += 1
                if not same_content(known, entry):
                    self._taint(entry.key)
            elif entry.key in dead or self._is_tainted(entry) or self._is_replaced(one):
                self._leave_out(one)
            else:
                self._take(one)

    def _here(self, keys: Sequence[str]) -> Iterator[Entry]:
        owner = sessions.owner_of(self._db, self._owner)
        return iter(()) if owner is None else log.by_keys(self._db, keys, scope=self._owner, owner=owner)

    def _taint(self, key: str) -> None:
        self.done.tainted.add(key)

    def _is_tainted(self, entry: Entry) -> bool:
        """Whether it was made from something that is not here as it was."""
        if not (self._tainted or self.done.tainted):
            return False
        keys = {self._key_of(entry.scope, i, k) for i in entry.sources for k in (False, True)}
        if entry.scope.session_id is None and entry.provenance == "derived" and entry.source:
            with suppress(InputError):  # it names the session of the turns, if it was found in turns
                said_in = replace(entry.scope, session_id=entry.source)
                keys |= {self._key_of(said_in, i, False) for i in entry.sources}
        return self._any_tainted(keys)

    def _any_tainted(self, keys: set[str]) -> bool:
        return not (keys.isdisjoint(self._tainted) and keys.isdisjoint(self.done.tainted))

    def _is_replaced(self, one: MovedEntry) -> bool:
        """Whether it is of a value that is another one here, or was deleted."""
        return one.value is not None and (self._has_value(*one.value) or self._lost_value(*one.value))

    def _leave_out(self, one: MovedEntry) -> None:
        entry = one.record.entry
        self.done.left_out += 1
        self._taint(entry.key)
        place = self._place(entry.scope, knowledge=one.knowledge)
        if place.whole and entry.metadata.get("kind") == "segment" and _is_summary(one):
            self.done.uncovered.setdefault(place.head.session, []).extend(self._numbers(place, _covered(entry)))

    def _take(self, one: MovedEntry) -> None:
        entry = one.record.entry
        place = self._place(entry.scope, knowledge=one.knowledge)
        head = place.head
        if not place.whole and _is_summary(one) and not self._fits(place, one):
            self._leave_out(one)
            return
        if not place.whole and entry.type is MemoryType.WORKING and not one.knowledge:
            try:
                log.no_twin(self._db, head, entry)
            except ConflictError:  # a task of this name is open here
                self._leave_out(one)
                return
        if place.whole and not self._taken(place, entry.seq):
            head.last_n += 1
            entry = replace(entry, number=(head.owner << OWNER_SHIFT) | head.last_n)
            head.last_seq = max(head.last_seq, entry.seq)
            head.last_position = max(head.last_position, entry.position or 0)
        else:
            entry = self._appended(place, one)
        self._put(place, replace(one, record=replace(one.record, entry=entry)))

    def _appended(self, place: _Place, one: MovedEntry) -> Entry:
        """The entry as one that comes after what its session has; turns in the window, until a segment folds them."""
        head, entry = place.head, one.record.entry
        if entry.seq < 0:
            entry = replace(log.placed_below(self._db, head, entry), version=entry.version)
            first = self._db.execute(
                "SELECT min(seq) FROM entries WHERE session = ? AND type = 0 AND id IN (SELECT value FROM json_each(?))",
                (head.session, json.dumps(_covered(entry))),
            ).fetchone()[0]
            if "first" in entry.metadata and first is not None:
                entry = replace(entry, metadata={**entry.metadata, "first": first})
            return entry
        entry = log.placed(head, entry, version=entry.version)
        if entry.type is MemoryType.SHORT_TERM:
            head.last_position += 1
            entry = replace(entry, position=head.last_position)
        head.active_at = max(head.active_at, microseconds(entry.written_at))
        return entry

    def _put(self, place: _Place, one: MovedEntry) -> None:
        record, head = one.record, place.head
        dead = log.tombstones(self._db, [record.entry.key])
        if dead:  # it is asked for all the same
            version = max(record.entry.version, dead[record.entry.key] + 1)
            record = replace(record, entry=replace(record.entry, version=version))
        entry = record.entry
        place.touched = True
        log.apply(self._db, head, [record], counter=self._counter)
        self.done.entries += 1
        self._taken_in[entry.key] = entry.number
        if one.extraction is not None:
            found, attempts = one.extraction
            extractions.put(self._db, entry.number, found=found, attempts=attempts)
        if one.vector is not None and self._model is not None:
            self.done.vectors += len(
                vectors.put(self._db, self._model, [(entry.number, entry.version, one.hash, one.vector)])
            )
        if not _is_summary(one):
            return
        if not place.whole:
            self._fold(place, entry)
        elif one.summary:
            if head.summary is None:
                head.summary = entry.number
            else:  # others have folded meanwhile: it is made anew of all segments
                self._drop_summary(place)
                summaries.remove(self._db, entry.number, bytes.fromhex(entry.key), owner=head.owner, now=self._now)

    def _load_version(self, one: MovedVersion) -> None:
        """Of what was here already, earlier versions stay as they are here, too."""
        number = self._taken_in.get(one.entry.key)
        if number is not None and not self._is_tainted(one.entry):
            versions.put(self._db, replace(one.entry, number=number), counter=self._counter)

    def _load_derivations(self, moved: Sequence[MovedDerivation]) -> None:
        """Ties between what is here as it was there, and says so itself: here, one may have been cut since."""
        keys = {m: tuple(self._key_of(m.scope, *what) for what in ((m.turn, False), (m.known, True))) for m in moved}
        here = {e.key: e for e in self._here(list({key for pair in keys.values() for key in pair}))}
        for one, (turn, known) in keys.items():
            if (
                turn in here
                and known in here
                and one.turn in here[known].sources
                and not self._any_tainted({turn, known})
            ):
                extractions.link(self._db, [(known, here[turn].number)])

    def _fits(self, place: _Place, one: MovedEntry) -> bool:
        """Whether a segment covers turns of a session that was here, and none that another one covers."""
        entry = one.record.entry
        if entry.metadata.get("kind") != "segment":  # a summary: it is made anew
            return False
        own = set(_covered(entry))
        others = _covered_here(self._db, place.head)
        return own.isdisjoint(others) and len(self._numbers(place, list(own))) == len(own)

    def _fold(self, place: _Place, segment: Entry) -> None:
        self._db.executemany(
            "UPDATE entries SET position = NULL WHERE no = ? AND pinned = 0",
            [(n,) for n in self._numbers(place, _covered(segment))],
        )
        self._drop_summary(place)

    def _drop_summary(self, place: _Place) -> None:
        """It is made anew with the next fold, which is due at once."""
        head = place.head
        if head.summary is not None:
            row = self._db.execute("SELECT key FROM entries WHERE no = ?", (head.summary,)).fetchone()
            summaries.remove(self._db, head.summary, row[0], owner=head.owner, now=self._now)
            head.summary = None

    def _numbers(self, place: _Place, ids: Sequence[str]) -> list[int]:
        rows = self._db.execute(
            "SELECT no FROM entries WHERE session = ? AND type = 0 AND id IN (SELECT value FROM json_each(?))",
            (place.head.session, json.dumps(ids)),
        )
        return [number for (number,) in rows]

    def _taken(self, place: _Place, seq: int) -> bool:
        where = (place.head.session, seq)
        return self._db.execute("SELECT 1 FROM entries WHERE session = ? AND seq = ?", where).fetchone() is not None

    # -- values

    def _has_value(self, namespace: Namespace, key: str) -> bool:
        owner = sessions.owner_of(self._db, self._owner)
        return owner is not None and items.exists(self._db, owner, namespace, key)

    def _lost_value(self, namespace: Namespace, key: str) -> bool:
        dead = "SELECT 1 FROM tombstones WHERE key = ?"
        name = self._value_key(self._owner, namespace, key)
        return not self._restore_deleted and self._db.execute(dead, (name,)).fetchone() is not None

    def _load_value(self, one: MovedValue) -> None:
        stored = one.stored
        if self._has_value(stored.namespace, stored.key):
            self.done.present += 1
        elif self._lost_value(stored.namespace, stored.key) or (
            stored.expires_at is not None and stored.expires_at <= self._now
        ):
            self.done.left_out += 1
        else:
            head = sessions.open_head(self._db, self._owner, session_id=KNOWLEDGE, now=self._now)
            keys = [self._key_of(self._owner, i, True) for i in one.texts]
            items.insert(self._db, head.owner, stored, ttl=one.ttl, texts=[e.number for e in self._here(keys)])
            self.done.values += 1


def _is_summary(one: MovedEntry) -> bool:
    entry = one.record.entry
    return entry.type is MemoryType.EPISODIC and entry.seq < 0 and not one.knowledge


def _covered(segment: Entry) -> tuple[str, ...]:
    """Ids of the turns that a segment stands for; it may have been made from some more, which are another one's."""
    return _last(segment.sources, segment.metadata)


def _last(sources: Sequence[str], metadata: Mapping[str, Any]) -> tuple[str, ...]:
    covered = metadata.get("covered")
    return tuple(sources[-covered:] if isinstance(covered, int) and covered > 0 else sources)


def _covered_here(db: sqlite3.Connection, head: Head) -> set[str]:
    """Ids of the turns that the segments of a session stand for."""
    rows = db.execute(
        "SELECT sources, metadata FROM entries WHERE session = ? AND seq < 0 AND type = 3 AND no IS NOT ?",
        (head.session, head.summary),
    )
    return {i for sources, about in rows for i in _last(json.loads(sources or "[]"), json.loads(about or "{}"))}


def finish(db: sqlite3.Connection, source: str, *, uncovered: Mapping[int, Sequence[int]]) -> None:
    """All of *source* is in place. Turns of sessions that nothing covers go back into the window."""
    for session, numbers in uncovered.items():
        here = db.execute(
            "SELECT no, id FROM entries WHERE no IN (SELECT value FROM json_each(?))", (json.dumps(numbers),)
        ).fetchall()
        covered = _covered_here(db, sessions.head_of(db, session))
        summaries.put_back(db, session, [number for number, own_id in here if own_id not in covered])
    db.execute("DELETE FROM meta WHERE name GLOB ? AND value = ?", (f"{_LOADING}*", source))


__all__ = ["Loading", "dump", "finish"]
