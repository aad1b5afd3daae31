"""`SqliteLedger`: the ordered record and the source of truth. Each method is one transaction or one read.

Writing has two halves. Sequencing hands out numbers, `seq` and versions; `apply` then puts finished records in place and
may be repeated. Here both happen in one transaction; with a shared log, other hosts would only `apply`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..._failpoints import failpoint
from ...errors import ArchiveError, BackupError, ConflictError, EmbeddingError, FolderError, FolderInUse, ModelMismatch
from ...protocols import (
    Appended,
    Archive,
    Asked,
    Became,
    Block,
    Change,
    Dirty,
    Feature,
    Loaded,
    Moved,
    Namespace,
    Noted,
    OnConflict,
    Record,
    Restored,
    Standing,
    StateRecord,
    StoredState,
    StoredValue,
    StoredWindow,
    Texts,
    ValueRecord,
    ValuesWritten,
)
from ...types import TYPE_NUMBER, Entry, Life, MemoryType, Scope, SessionInfo, Summary, microseconds
from . import archive as cold
from . import (
    backup,
    entries,
    extractions,
    fulltext,
    items,
    log,
    sessions,
    states,
    summaries,
    transfer,
    usage,
    vectors,
    versions,
    windows,
)
from .database import Database
from .schema import OWNER_SHIFT
from .sessions import KNOWLEDGE, Head

T = TypeVar("T")
_CHUNK = 500
_json = json.JSONEncoder(ensure_ascii=False).encode
_HELD = 1 << 61  # the `retry_at` of a mark on hold


class SqliteLedger:
    """The ledger in one SQLite file. Thread-safe; a counter's name tells whether stored token counts still hold.

    *alone*: no other process has it open. What would change more than others could bear raises `FolderInUse` otherwise.
    Of a session's state *max_states* versions are kept, and unless *keep_states*, in RAM only.
    """

    def __init__(
        self,
        path: Path,
        *,
        counter: str,
        durability: Literal["process", "power"] = "process",
        alone: bool = True,
        max_states: int = 100,
        keep_states: bool = True,
        archive: Archive | None = None,
    ) -> None:
        self._db = Database(path, durability=durability, alone=alone, archive=archive)
        self._archive = archive
        self._alone = alone
        self._counter = counter
        self._max_states = max_states
        self._ram = None if keep_states else states.in_ram()
        """Where states are, if not in the file."""
        with self._db.read() as db:
            self._secret: bytes = db.execute("SELECT value FROM meta WHERE name = 'secret'").fetchone()[0]

    def close(self) -> None:
        self._db.close()

    # -- identity

    @property
    def id(self) -> str:
        """Names this ledger among others, and copies of its file; says nothing about what is in it."""
        with self._db.read() as db:
            row = db.execute("SELECT value FROM meta WHERE name = 'id'").fetchone()
        return self.lineage if row is None else str(row[0])

    @property
    def lineage(self) -> str:
        """The same for all ledgers that were made of one by backup and restore: keys of theirs are the same, too."""
        return hashlib.blake2b(b"ledger", digest_size=16, key=self._secret).hexdigest()

    @property
    def collection(self) -> str | None:
        """The collection that the dirty marks are about, None before the first."""
        with self._db.read() as db:
            row = db.execute("SELECT value FROM meta WHERE name = 'collection'").fetchone()
        return None if row is None else str(row[0])

    @collection.setter
    def collection(self, id: str) -> None:
        with self._db.lock, self._db.write() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('collection', ?)", (id,))

    def settled(self) -> None:
        """From now on, other processes may have it open."""
        self._alone = False

    # -- what others do

    def data_version(self) -> int:
        """A number that is another one once anybody has written, also in another process."""
        return self._db.data_version()

    def changes(self, after: int | None) -> tuple[list[Change] | None, list[Noted], int]:
        """What other processes have changed since *after*, everything that was noted since then, and the newest number.

        None: that was so long ago that anything may have changed. With *after* None only the newest number.
        """
        if after is None:
            with self._db.read() as db:
                return [], [], db.execute("SELECT coalesce(max(id), 0) FROM changes").fetchone()[0]
        rows = self._db.changes(after)
        if not rows:
            return [], [], after
        newest = rows[-1][0]
        if len(rows) < newest - after:  # some were pruned, or left out on purpose
            return None, [], newest
        found = []
        for _, number, session, origin in rows:
            if origin != self._db.origin:
                owner = self._owner_named(number >> OWNER_SHIFT) if number else None
                if number and owner is None:  # it is gone
                    return None, [], newest
                found.append(Change(owner, 0 if number % (1 << OWNER_SHIFT) == 0 else number, session))
        return found, list(starmap(Noted, rows)), newest

    def head(self, owner: int, *, seen: int) -> tuple[int, int] | None:
        """The last change of an owner, of those up to *seen*: its id and origin. None where it can't be told."""
        low, high = owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT
        last = "SELECT id || '.' || origin FROM changes WHERE id <= ? AND no >= ? AND no < ? ORDER BY id DESC LIMIT 1"
        with self._db.read() as db:
            row = db.execute(
                f"SELECT coalesce(({last}), (SELECT head FROM owners WHERE id = ?), '0.0')", (seen, low, high, owner)
            ).fetchone()
        id_, origin = map(int, row[0].split("."))
        return (id_, origin) if id_ <= seen else None

    def _owner_named(self, number: int) -> tuple[str, str | None, str | None] | None:
        with self._db.read() as db:
            row = db.execute("SELECT key FROM owners WHERE id = ?", (number,)).fetchone()
        if row is None:
            return None
        tenant, user, session = json.loads(row[0])
        return tenant, user, session

    def key(self, scope: Scope, *, id: str, knowledge: bool = False) -> str:
        """The key of an entry: opaque, bound to its scope, the same wherever it is computed in this folder."""
        session = KNOWLEDGE if knowledge else scope.session_id
        text = f"{sessions.owner_key(scope)[:-1]}, {_json(session)}, {_json(id)}]"  # a list, as JSON
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=self._secret).hexdigest()

    def partition(self, scope: Scope) -> str:
        """The owner of *scope* as an opaque text, for the vector index."""
        return self.content_hash(scope, text="", model_id="").hex()

    def content_hash(self, scope: Scope, *, text: str, model_id: str) -> bytes:
        """What a vector is cached under: owner, model and text."""
        what = "\0".join((sessions.owner_key(scope), model_id, text))
        return hashlib.blake2b(what.encode("utf-8", "surrogatepass"), digest_size=16, key=self._secret).digest()

    def owner(self, scope: Scope) -> int | None:
        """The number of the owner of *scope*, None when nothing was ever stored for it."""
        with self._db.read() as db:
            return sessions.owner_of(db, scope)

    def owner_scope(self, number: int) -> Scope | None:
        """The widest scope of the owner of an entry's number (a userless one: its session), None when it is gone."""
        with self._db.read() as db:
            row = db.execute("SELECT key FROM owners WHERE id = ?", (number >> OWNER_SHIFT,)).fetchone()
        return None if row is None else Scope(*json.loads(row[0]))

    # -- writing

    def append(
        self,
        scope: Scope,
        records: Sequence[Record],
        *,
        on_conflict: OnConflict,
        now: int,
        knowledge: bool = False,
        state: StateRecord | None = None,
    ) -> Appended:
        """Write *records* (numbers, seq and versions still open) at the end of a session, and *state* with them, all or none.

        A state that was written with these turns before is left as it is.

        Raises `ConflictError` when an id stands for other content and *on_conflict* is "raise", or the state is at another
        version than the one before that of *state*.
        """
        with self._db.lock:
            with self._db.write() as db:
                failpoint("append.begun")
                head = sessions.open_head(db, scope, session_id=_session_id(scope, knowledge=knowledge), now=now)
                ids, written = log.sequence(db, head, records, scope=scope, on_conflict=on_conflict)
                if state is not None and not written and states.came_with(self._ram or db, head.session, ids[-1]):
                    state = None
                if written or state is not None:
                    head.active_at = now
                    versions.keep(db, written)
                    log.apply(db, head, written, counter=self._counter)
                    sessions.save_head(db, head)
                if any(record.entry.version > 1 for record in written):
                    vectors.forget_questions(db, head.owner)
                if state is not None:
                    state = replace(state, turn=ids[-1])
                    states.check(self._ram or db, head, state, name=_session_id(scope))
                    if self._ram is None:
                        states.put(db, head, state, keep=self._max_states)
                failpoint("append.applied")
            self._put_in_ram(head, state)
        failpoint("append.committed")
        return Appended(ids, written, head.session, head.erase_epoch, stated=state is not None)

    def revise(
        self,
        scope: Scope,
        *,
        changed: Sequence[Record] = (),
        added: Sequence[Record] = (),
        read: Sequence[Entry] = (),
        knowledge: bool = True,
        extracted: Entry | None = None,
        made_from: Sequence[tuple[str, int]] = (),
    ) -> list[tuple[Record, int]]:
        """Write new versions of *changed* and then *added*, all or none; each with the number of its session.

        *added* is knowledge, or was made from the session's turns (*knowledge* is False). *read*: what all this was made from.
        *extracted*: the segment whose turns were looked through for it. *made_from*: ids of knowledge with numbers of turns that
        say it, which it goes with when the last of them does, unless it was told as well.
        Raises `ConflictError` when one of *changed* or *read* is not as it was read, or somebody else has added the same
        knowledge; `NotFound` when one is gone.
        """
        done: list[tuple[Record, int]] = []
        with self._db.lock, self._db.write() as db:
            log.all_unchanged(db, read, scope=scope)
            for record in changed:
                head = log.place(db, record.entry, scope=scope)
                entry = replace(record.entry, version=record.entry.version + 1, tier="warm", archive_label=None)
                new = replace(record, entry=entry)
                versions.keep(db, [new])
                log.apply(db, head, [new], counter=self._counter, edited=True)
                done.append((new, head.session))
            if done:
                vectors.forget_questions(db, head.owner)
            if added:
                now = max(microseconds(r.entry.written_at) for r in added)
                head = sessions.open_head(db, scope, session_id=_session_id(scope, knowledge=knowledge), now=now)
                twin = versions.said_already(db, head, added, scope=scope) if knowledge else None
                if twin is not None:
                    raise ConflictError(f"knowledge {twin.id!r} says the same, and was written meanwhile", id=twin.id)
                for record in added:
                    entry = (
                        log.placed(head, record.entry, version=1)
                        if knowledge
                        else log.placed_below(db, head, record.entry)
                    )
                    done.append((replace(record, entry=entry), head.session))
                    log.apply(db, head, [done[-1][0]], counter=self._counter)
                if knowledge:
                    head.active_at = now
                sessions.save_head(db, head)
            extractions.link(db, [(self.key(scope, id=i, knowledge=True), number) for i, number in made_from])
            if extracted is not None:
                extractions.done(db, extracted, found=len({i for i, _ in made_from}))
            failpoint("change.applied")
        failpoint("change.committed")
        return done

    def buried(self, scope: Scope, ids: Sequence[str]) -> dict[str, int]:
        """When the owner's knowledge with these ids was deleted, by id; what was not is left out."""
        keys = {bytes.fromhex(self.key(scope, id=i, knowledge=True)): i for i in ids}
        with self._db.read() as db:
            rows = [db.execute("SELECT key, deleted_at FROM tombstones WHERE key = ?", (k,)).fetchone() for k in keys]
        return {keys[row[0]]: row[1] for row in rows if row is not None}

    def unextracted(self, scope: Scope, *, attempts: int | None) -> list[Entry]:
        """The session's segments whose turns were not looked through for knowledge yet, oldest first."""
        with self._db.read() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            return [] if head is None else extractions.left(db, head, scope=scope, attempts=attempts)

    def to_extract(self, *, attempts: int) -> list[Scope]:
        """The sessions that have such segments."""
        with self._db.read() as db:
            return extractions.sessions_left(db, attempts=attempts)

    def extraction_failed(self, segment: Entry) -> None:
        with self._db.lock, self._db.write() as db:
            extractions.failed(db, segment)

    def known(self, scope: Scope, texts: Sequence[str]) -> dict[str, Entry]:
        """The owner's knowledge (of the scope's agent) that says one of *texts*, word for word, and was not superseded."""
        with self._db.read() as db:
            head = sessions.head(db, scope, session_id=KNOWLEDGE)
            return {} if head is None else versions.known(db, head, texts, scope=scope)

    def history(self, scope: Scope, number: int) -> list[Entry]:
        """What the owner's entry with this number was and is, oldest version first; empty when it is gone."""

        def found(db: sqlite3.Connection, _: Texts) -> list[Entry]:
            owner = sessions.owner_of(db, scope)
            if owner is None or number >> OWNER_SHIFT != owner:
                return []
            return versions.history(db, number, scope=scope, owner=owner)

        return self._at_once(found)

    def drop(self, scope: Scope, doomed: Sequence[Entry], *, now: int, cleared: StateRecord | None = None) -> int:
        """Delete entries for good, leaving a tombstone each, also what retention has deleted before; how many there were.

        With *cleared*, the session's state and its history go, too, if it has any; that stands in their place, at the next
        version.
        """
        with self._db.lock, self._db.write() as db:
            owner = sessions.owner_of(db, scope)
            head = None if cleared is None else sessions.head(db, scope, session_id=_session_id(scope))
            if cleared is not None and head is not None:
                states.clear(self._ram or db, head, cleared)
            gone: dict[int, dict[int, Entry]] = {}
            purged: dict[int, str] = {}
            only = 0  # there because retention had deleted it
            for entry in doomed:
                if owner is None or entry.number >> OWNER_SHIFT != owner:
                    continue
                row = db.execute("SELECT session FROM entries WHERE no = ?", (entry.number,)).fetchone()
                if row is not None:
                    gone.setdefault(row[0], {})[entry.number] = entry
                kept = cold.purge(db, bytes.fromhex(entry.key))
                purged |= dict.fromkeys(kept, entry.id)
                only += row is None and bool(kept)
            if purged:
                extractions.forget(db, purged, owner=owner or 0, now=now)
            for session, theirs in gone.items():
                ids = [e.id for e in theirs.values()]
                extractions.forget(db, {n: e.id for n, e in theirs.items()}, owner=owner or 0, now=now)
                # First: a summary that is deleted gives back what it covers, as one that has become stale does.
                summaries.unfold(
                    db, owner=owner or 0, session=session, changed=ids, gone=theirs.keys(), asked=True, now=now
                )
                for number, entry in theirs.items():
                    versions.release(db, number)
                    summaries.remove(db, number, bytes.fromhex(entry.key), owner=owner or 0, now=now, asked=True)
            count = only + sum(len(theirs) for theirs in gone.values())
            if owner is not None and count:
                vectors.forget_questions(db, owner)
            failpoint("change.applied")
        failpoint("change.committed")
        return count

    # -- the window

    def window(self, scope: Scope) -> StoredWindow | None:
        """The session's window and summary; reads nothing of what was folded. None for a session without a row."""

        def found(db: sqlite3.Connection, texts: Texts) -> StoredWindow | None:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            return None if head is None else windows.load(db, head, scope=scope, counter=self._counter, texts=texts)

        return self._at_once(found)

    def _at_once(self, read: Callable[[sqlite3.Connection, Texts], T], *, damaged: Texts = "skip") -> T:
        """What *read* finds, as of one moment; *damaged*: how it is to do so where a block can't be read."""
        try:
            return self._at_one_moment(lambda db: read(db, "read"))
        except ArchiveError:  # a block that was replaced meanwhile is found the second time
            return self._at_one_moment(lambda db: read(db, damaged))

    def _at_one_moment(self, read: Callable[[sqlite3.Connection], T]) -> T:
        with self._db.read() as db:
            db.execute("BEGIN")
            try:
                return read(db)
            finally:
                db.execute("COMMIT")

    def set_window(self, scope: Scope, kept: Sequence[Entry | Record], *, now: int) -> list[Record]:
        """Make *kept* the window, in this order. Records among them are new, or new versions of entries.

        Entries that are not in it leave the window and stay in the transcript. Raises `ConflictError` when one that is to be
        changed is not as it was read, or one that is new is there already; `NotFound` when it is gone.
        """
        with self._db.lock, self._db.write() as db:
            head = sessions.open_head(db, scope, session_id=_session_id(scope), now=now)
            for record in kept:
                if isinstance(record, Record):
                    log.unchanged(db, record.entry, scope=scope)
            written = windows.arrange(db, head, kept)
            versions.keep(db, written)
            log.apply(db, head, written, counter=self._counter, restore=False)
            if any(record.entry.version > 1 for record in written):
                vectors.forget_questions(db, head.owner)
            head.active_at = now
            sessions.save_head(db, head)
            failpoint("change.applied")
        failpoint("change.committed")
        return written

    def fold(
        self,
        scope: Scope,
        *,
        folded: Sequence[Entry],
        before: StoredWindow,
        segments: Sequence[Record],
        summary: Record,
        read: Sequence[Entry] = (),
    ) -> list[Record] | None:
        """Take *folded* out of the window, store *segments* and make *summary* the session's summary, in one transaction.

        None, and nothing is done, when they are stale: an entry changed, left the window or was deleted, another fold
        came first, the subject was erased.
        """
        with self._db.lock, self._db.write() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            read = [*read, *(r.entry for r in segments if r.entry.number)]
            if head is None or not windows.unchanged(db, head, folded=folded, before=before, read=read):
                return None
            records: list[Record] = []
            for given in (*segments, summary):
                records.append(windows.numbered(db, head, given))
                log.apply(db, head, records[-1:], counter=self._counter)
            windows.leave(db, folded)
            head.summary = records[-1].entry.number
            sessions.save_head(db, head)
            failpoint("fold.applied")
        failpoint("fold.committed")
        return records

    def segments(self, scope: Scope, *, last: int | None = None) -> list[Entry]:
        """The segments of a session's summary, or those made last, in the order of the turns that they cover."""
        with self._db.read() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            if head is None:
                return []
            where = "e.session = ? AND e.seq < 0 AND e.type = 3 AND e.no IS NOT ? AND substr(e.id, 1, 8) != ?"
            tail = "ORDER BY e.no DESC" if last is None else f"ORDER BY e.no DESC LIMIT {int(last)}"
            given = (head.session, head.summary, summaries.EPISODE)
            rows = entries.select(db, where, given, scope=scope, owner=head.owner, tail=tail)
            return sorted((e for e, _ in rows), key=lambda e: int(e.metadata.get("first", e.number)))

    def pin(self, scope: Scope, pinned: Sequence[Entry], *, to: bool) -> None:
        """Mark turns as pinned, and put those that had left the window back into it; or take the mark away."""
        with self._db.lock, self._db.write() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            numbers = [e.number for e in pinned]
            db.executemany("UPDATE entries SET pinned = ? WHERE no = ?", [(to, n) for n in numbers])
            if to and head is not None:
                summaries.put_back(db, head.session, numbers)
            failpoint("change.applied")
        failpoint("change.committed")

    def work(
        self, scope: Scope, *, tasks: Sequence[Record], over: Sequence[Entry], outcome: Record | None, now: int
    ) -> tuple[list[Record], int]:
        """Write tasks (new, or new versions of those that were read), delete *over* and append *outcome*, all or none.

        Raises `ConflictError` when a task has changed since it was read, or one of a new one's name was begun; `NotFound` when
        it is gone.
        """
        with self._db.lock, self._db.write() as db:
            head = sessions.open_head(db, scope, session_id=_session_id(scope), now=now)
            written = []
            for record in tasks:
                entry = record.entry
                if entry.number:
                    log.place(db, entry, scope=scope)  # raises unless it is as it was read
                    entry = replace(entry, version=entry.version + 1)
                else:
                    log.no_twin(db, head, entry)
                    entry = log.placed_below(db, head, entry)
                written.append(replace(record, entry=entry))
                log.apply(db, head, written[-1:], counter=self._counter)
            for entry in over:
                summaries.remove(db, entry.number, bytes.fromhex(entry.key), owner=head.owner, now=now)
            if over:
                vectors.forget_questions(db, head.owner)
            if outcome is not None:
                written.append(replace(outcome, entry=log.placed(head, outcome.entry, version=1)))
                log.apply(db, head, written[-1:], counter=self._counter)
            sessions.save_head(db, head)
            failpoint("change.applied")
        failpoint("change.committed")
        return written, head.session

    # -- states

    def state(self, scope: Scope) -> StoredState | None:
        """The session's state; None for a session without a row."""
        with self._db.read() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            return None if head is None else states.current(self._ram or db, head)

    def states(self, scope: Scope, *, last: int | None = None, version: int | None = None) -> list[StateRecord]:
        """The versions kept of the session's state, oldest first; only the newest *last*, or the one of this number."""
        with self._db.read() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            return [] if head is None else states.versions(self._ram or db, head.session, last=last, version=version)

    def write_state(self, scope: Scope, record: StateRecord) -> None:
        """Make *record* the session's state; versions beyond those to be kept go.

        Raises `ConflictError` when the state is at another version than the one before.
        """
        with self._db.lock:
            with self._db.write() as db:
                head = sessions.open_head(db, scope, session_id=_session_id(scope), now=record.at)
                states.check(self._ram or db, head, record, name=_session_id(scope))
                head.active_at = max(head.active_at, record.at)
                db.execute("UPDATE sessions SET active_at = ? WHERE id = ?", (head.active_at, head.session))
                if self._ram is None:
                    states.put(db, head, record, keep=self._max_states)
                failpoint("change.applied")
            self._put_in_ram(head, record)
        failpoint("change.committed")

    def _put_in_ram(self, head: Head, record: StateRecord | None) -> None:
        """Where states are in RAM: once the turns that they belong to are stored; hold the database's lock."""
        if self._ram is not None and record is not None:
            states.put(self._ram, head, record, keep=self._max_states)

    def silent(self, *, idle: int, expired: int) -> list[tuple[Scope, StoredState]]:
        """Sessions with a state that have become idle (no write since *idle*, a time), expired, or active again."""
        found = []
        with self._db.read() as db:
            for number in states.aged(db, self._ram or db, idle=idle, expired=expired):
                key, session_id = db.execute(
                    "SELECT o.key, s.session_id FROM sessions s JOIN owners o ON o.id = s.owner WHERE s.id = ?",
                    (number,),
                ).fetchone()
                tenant, user, _ = json.loads(key)
                stored = states.current(self._ram or db, sessions.head_of(db, number))
                found.append((Scope(tenant, user, session_id), stored))
        return found

    def record_life(self, scope: Scope, stored: StoredState, life: Life) -> bool:
        """Note how a session stands, which is no new version; False if something has changed since *stored* was read."""
        with self._db.lock, self._db.write() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            return head is not None and states.record_life(self._ram or db, head, stored, life)

    def trim_states(self) -> None:
        """Drop the versions beyond those to be kept; in RAM, also the states of sessions that have expired."""
        with self._db.lock:
            if self._ram is not None:
                states.forget_expired(self._ram)
                return
            with self._db.write() as db:
                states.trim(db, keep=self._max_states)

    def snapshot(self, scope: Scope) -> tuple[StoredWindow | None, StoredState | None]:
        """The session's window with summary and tasks, and its state, as of one moment."""

        def both(db: sqlite3.Connection, texts: Texts) -> tuple[StoredWindow | None, StoredState | None]:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            if head is None:
                return None, None
            found = windows.load(db, head, scope=scope, counter=self._counter, texts=texts)
            return found, states.current(self._ram or db, head)

        return self._at_once(both)

    def restore(self, scope: Scope, made: Restored, *, now: int) -> None:
        """Make the session what *made* says, all or nothing.

        Raises `ConflictError` or `NotFound` when something that it was made from has changed.
        """
        with self._db.lock:
            with self._db.write() as db:
                head = sessions.open_head(db, scope, session_id=_session_id(scope), now=now)
                for item in (*made.window, *made.tasks):
                    if isinstance(item, Record):
                        log.unchanged(db, item.entry, scope=scope)
                written = windows.arrange(db, head, made.window)
                log.apply(db, head, written, counter=self._counter, restore=False)
                summary = [r for r in (made.segment, made.summary) if r is not None and head.summary is None]
                for record in (*made.tasks, *summary):
                    if record.entry.type is MemoryType.WORKING and not record.entry.number:
                        log.no_twin(db, head, record.entry)
                    last = windows.numbered(db, head, record)
                    log.apply(db, head, [last], counter=self._counter)
                    if record is made.summary:
                        head.summary = last.entry.number
                for item in made.window:
                    own = item if isinstance(item, Entry) else item.entry
                    pin = (own.id in made.pinned, bytes.fromhex(own.key))
                    db.execute("UPDATE entries SET pinned = ? WHERE key = ?", pin)
                vectors.forget_questions(db, head.owner)
                head.active_at = now
                sessions.save_head(db, head)
                if made.state is not None:
                    states.check(self._ram or db, head, made.state, name=_session_id(scope))
                    if self._ram is None:
                        states.put(db, head, made.state, keep=self._max_states)
                failpoint("change.applied")
            self._put_in_ram(head, made.state)
        failpoint("change.committed")

    # -- keyed values

    def values(
        self, scope: Scope, names: Sequence[tuple[Namespace, str]], *, now: int
    ) -> dict[tuple[Namespace, str], StoredValue]:
        """Values of the owner by namespace and key; those that are not there, or have expired, are left out."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            return {} if owner is None else items.get(db, owner, names, now=now)

    def values_below(self, scope: Scope, prefix: Namespace, *, now: int, limit: int | None = None) -> list[StoredValue]:
        """The owner's values, without their JSON, whose namespace begins with the labels of *prefix*, latest change first."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            return [] if owner is None else items.below(db, owner, prefix, now=now, limit=limit)

    def value_texts(self, scope: Scope, prefix: Namespace) -> list[int]:
        """Numbers of the entries that the owner's values below *prefix* are found by; some may be gone."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            return [] if owner is None else items.texts(db, owner, prefix)

    def values_of(self, scope: Scope, numbers: Sequence[int]) -> dict[int, tuple[Namespace, str]]:
        """Namespace and key of the owner's values that are found by entries, by the numbers of those."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            return {} if owner is None else items.found_by(db, owner, numbers)

    def namespaces(self, scope: Scope, prefix: Namespace, *, now: int) -> list[Namespace]:
        """The namespaces that begin with the labels of *prefix* and hold a value of the owner."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            return [] if owner is None else list(items.namespaces(db, owner, prefix, now=now))

    def write_values(
        self, scope: Scope, records: Sequence[ValueRecord], *, read: Sequence[tuple[Namespace, str]] = (), now: int
    ) -> ValuesWritten:
        """Write values with the entries that they are found by, all or none; the values *read* begin to live anew.

        Texts that a value had before keep their entries. Some of the owner's values that have expired are deleted with it.
        """
        with self._db.lock, self._db.write() as db:
            head = sessions.head(db, scope, session_id=KNOWLEDGE)
            if head is None:
                if all(record.value is None for record in records):
                    return ValuesWritten()
                head = sessions.open_head(db, scope, session_id=KNOWLEDGE, now=now)
            deleted = [r for r in records if r.value is None and items.exists(db, head.owner, r.namespace, r.key)]
            done = items.write(db, head, records, scope=scope, read=read, now=now, counter=self._counter)
            for record in deleted:
                key = self._value_key(scope, record.namespace, record.key)
                db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?, 0, ?, 1)", (key, head.owner, now))
            failpoint("change.applied")
        failpoint("change.committed")
        return done

    def _value_key(self, scope: Scope, namespace: Namespace, key: str) -> bytes:
        """What stands for a value among tombstones."""
        text = json.dumps(["value", *scope.owner, namespace, key], ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=16, key=self._secret).digest()

    # -- to other ledgers and from them

    def dump(
        self, *, unread: list[int], tenant: str | None = None, user_id: str | None = None, model: int | None = None
    ) -> Generator[Moved, None, None]:
        """All that is stored, or what is of a tenant or a user, as of one moment; with the vectors of *model*."""
        with self._db.read() as db:
            db.execute("BEGIN")
            try:
                yield from transfer.dump(db, tenant=tenant, user_id=user_id, model=model, unread=unread)
            finally:
                db.execute("COMMIT")

    def load(
        self,
        owner: Scope,
        moved: Sequence[Moved],
        *,
        source: str,
        tainted: Collection[str],
        model: int | None,
        restore_deleted: bool,
        now: int,
    ) -> Loaded:
        """Put what was dumped elsewhere in place, all or none, as far as it is not here; what is here stays as it is."""
        with self._db.lock, self._db.write() as db:
            done = transfer.Loading(
                db,
                owner,
                source=source,
                counter=self._counter,
                key_of=lambda scope, own_id, knowledge: self.key(scope, id=own_id, knowledge=knowledge),
                value_key=self._value_key,
                tainted=tainted,
                model=model,
                restore_deleted=restore_deleted,
                max_states=self._max_states if self._ram is None else None,
                now=now,
            ).load(moved)
            failpoint("load.applied")
        failpoint("load.committed")
        return done

    def loaded(self, source: str, *, uncovered: Mapping[int, Sequence[int]]) -> None:
        """All that was dumped in *source* is in place; turns that nothing covers go back into the window."""
        with self._db.lock, self._db.write() as db:
            transfer.finish(db, source, uncovered=uncovered)

    def copy(
        self, target: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, int], list[str]]:
        """Copy all of it into a new file, as of one moment, and check the copy; how many rows each table has, and the names of
        the blocks that it reads.
        """
        with self._db.read() as db:
            return backup.copied(db, target, progress=progress)

    def prepare(self, copy: Path, *, lineage: str, terms: Callable[[Entry], Record]) -> None:
        """Bring a copy of a ledger of *lineage*, perhaps of an older version, up to date."""
        empty = self.totals(parked_at=0)["owners"] == 0
        if lineage != self.lineage and not empty:
            raise BackupError(
                f"the backup is of another memory than {self._db.path.parent}, and would replace it; restore it into a new folder, "
                "or bring what is in it here by export and import",
                path=str(copy.parent),
            )
        with self._db.read() as db:
            lexical = db.execute("SELECT value FROM meta WHERE name = 'lexical'").fetchone()
        try:
            saved = SqliteLedger(copy, counter=self._counter, archive=self._archive)
        except FolderError as error:
            raise BackupError(f"the backup can't be read: {error}", path=str(copy.parent)) from error
        try:
            sound = saved.verify()
            if sound != "ok" or saved.lineage != lineage:
                raise BackupError(f"the backup is damaged ({sound}); take another one", path=str(copy.parent))
            if lexical is not None:
                saved.retokenize(lexical[0], terms)
        finally:
            saved.close()

    def models_in(self, copy: Path) -> list[str]:
        """Names of the models whose vectors are in a copy."""
        saved = SqliteLedger(copy, counter=self._counter)
        try:
            return [name for name, _ in saved.models()]
        finally:
            saved.close()

    def become(self, copy: Path, *, restore_deleted: bool, forget_vectors: bool, now: int) -> Became:
        """Become what was copied, all or nothing; but what was deleted since stays so, unless *restore_deleted*."""
        own_id = self.id
        with self._db.lock, self._db.attached(copy, "saved") as db:
            secret = db.execute("SELECT value FROM saved.meta WHERE name = 'secret'").fetchone()[0]
            before, self._secret = self._secret, secret
            try:
                done = backup.become(
                    db,
                    own_id=own_id,
                    value_key=self._value_key,
                    restore_deleted=restore_deleted,
                    forget_vectors=forget_vectors,
                    origin=self._db.origin,
                    now=now,
                )
                failpoint("restore.applied")
                db.execute("COMMIT")
            except BaseException:
                self._secret = before
                raise
        failpoint("restore.committed")
        return done

    # -- what models take

    def spend(self, session: int, *, day: int, summary: Summary) -> None:
        with self._db.lock, self._db.write() as db:
            usage.spend(db, session, day=day, summary=summary)

    def spent(self, *, day: int | None = None, session: int | None = None) -> dict[str, float]:
        with self._db.read() as db:
            return usage.spent(db, day=day, session=session)

    def calibrate(self, scope: Scope, *, model: str, ratio: float) -> tuple[int, float, float]:
        with self._db.lock, self._db.write() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
            if head is not None:
                db.execute("UPDATE sessions SET model = ? WHERE id = ?", (model, head.session))
            return usage.calibrate(db, tenant=scope.tenant, model=model, ratio=ratio)

    def calibration(self, tenant: str | None = None) -> list[tuple[str, str, int, float, float]]:
        with self._db.read() as db:
            return usage.calibration(db, tenant=tenant)

    # -- reading

    def by_keys(self, scope: Scope, keys: Sequence[str], *, texts: Texts = "read") -> dict[str, Entry]:
        """Entries of the owner by key; unknown keys, and other owners', are left out."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            if owner is None:
                return {}
            return {e.key: e for e in log.by_keys(db, keys, scope=scope, owner=owner, texts=texts)}

    def by_numbers(self, scope: Scope, numbers: Sequence[int], *, texts: Texts = "read") -> dict[int, Entry]:
        """Entries of the owner by number; unknown numbers, and other owners', are left out."""
        found: dict[int, Entry] = {}
        with self._db.read() as db:
            for start in range(0, len(numbers), _CHUNK):
                part = numbers[start : start + _CHUNK]
                query = (
                    f"{entries.SELECT} WHERE e.no IN ({','.join('?' * len(part))}) "
                    "AND +s.owner = (SELECT id FROM owners WHERE key = ?)"  # no index: the numbers are the way
                )
                rows = db.execute(query, (*part, sessions.owner_key(scope))).fetchall()
                for row in cold.filled(db, rows, texts=texts):
                    found[row[0]] = entries.entry_of(row, scope=scope)[0]
        return found

    def select(
        self,
        scope: Scope,
        *,
        session_only: bool,
        types: Iterable[MemoryType] | None = None,
        since: int | None = None,
        after: int = 0,
        last: int | None = None,
        limit: int | None = None,
        texts: Texts = "read",
    ) -> Iterator[Entry]:
        """Entries of a session in the order of `seq`, or of the whole owner in the order they were written.

        *after*: only those after the entry with this number. *last*: only the newest so many, still in order. *limit*: only
        the first so many.
        """
        where, parameters = ["e.no > ?"], [after]
        if session_only and after:
            where = ["e.seq > (SELECT seq FROM entries WHERE no = ?)"]
        tail = "ORDER BY e.no"
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            if owner is None:
                return
            if session_only:
                head = sessions.head(db, scope, session_id=_session_id(scope))
                if head is None:
                    return
                where.append("e.session = ?")
                parameters.append(head.session)
                tail = "ORDER BY e.seq"
            if types is not None:
                numbers = [TYPE_NUMBER[t] for t in types]
                where.append(f"e.type IN ({','.join('?' * len(numbers))})")
                parameters.extend(numbers)
            if since is not None:
                where.append("e.created_at >= ?")
                parameters.append(since)
            if last is not None:
                tail = f"{tail} DESC LIMIT {int(last)}"
            elif limit is not None:
                tail = f"{tail} LIMIT {int(limit)}"
            given = " AND ".join(where)
            rows = entries.select(db, given, parameters, scope=scope, owner=owner, tail=tail, texts=texts)
            found = [e for e, _ in rows]
        yield from found if last is None else reversed(found)

    def count(self, scope: Scope, *, session_only: bool) -> int:
        """How many entries a session, or its whole owner, has."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            if owner is None:
                return 0
            if not session_only:
                low, high = owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT
                return int(
                    db.execute("SELECT count(*) FROM entries WHERE no >= ? AND no < ?", (low, high)).fetchone()[0]
                )
            head = sessions.head(db, scope, session_id=_session_id(scope))
            where = (None if head is None else head.session,)
            return int(db.execute("SELECT count(*) FROM entries WHERE session = ?", where).fetchone()[0])

    def features(self, owner: int, numbers: Sequence[int] | None = None) -> list[Feature]:
        """What search reads of all of an owner's entries, or of those with *numbers*."""
        return self._at_one_moment(lambda db: fulltext.load(db, owner, numbers))

    def unanalysed(self, *, limit: int) -> list[Entry]:
        """Entries of any owner, up to *limit*, whose texts were not analysed yet."""
        with self._db.read() as db:
            return fulltext.left(db, limit=limit)

    def analysed(self, records: Sequence[Record]) -> None:
        """Put what was found in the texts of entries, but of those that were changed meanwhile."""
        with self._db.lock, self._db.write() as db:
            fulltext.complete(db, records)

    def session_number(self, scope: Scope) -> int | None:
        """The number that `features` show for a session."""
        with self._db.read() as db:
            head = sessions.head(db, scope, session_id=_session_id(scope))
        return None if head is None else head.session

    def sessions(self, *, tenant: str, user_id: str | None) -> list[SessionInfo]:
        with self._db.read() as db:
            return sessions.listing(db, tenant=tenant, user_id=user_id)

    def retokenize(self, version: str, terms: Callable[[Entry], Record]) -> None:
        """Make the full text anew, with *terms*, if it was made by another version of the rules."""
        known = "SELECT value FROM meta WHERE name = 'lexical'"
        with self._db.read() as db:
            row = db.execute(known).fetchone()
        if row is not None and row[0] == version:
            return
        if row is not None:
            self._refuse_beside_others("its full text was made by other rules, and has to be made anew")
        with self._db.lock, self._db.write() as db:
            row = db.execute(known).fetchone()
            if row is not None:
                anyone = Scope(session_id="-")
                for stored in cold.filled(db, db.execute(f"{entries.SELECT}").fetchall(), texts="skip"):
                    entry, _ = entries.entry_of(stored, scope=anyone)
                    made = terms(entry)
                    row = (made.terms, made.traits, made.called, entry.number)
                    db.execute("UPDATE features SET terms = ?, traits = ?, called = ? WHERE no = ?", row)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('lexical', ?)", (version,))

    # -- vectors and the dirty set

    def known_model(self, name: str) -> tuple[int, int] | None:
        """Number and dimensions of an embedding model, None while nothing was embedded with it."""
        with self._db.read() as db:
            return vectors.model(db, name)

    def model(self, name: str, *, dimensions: int) -> int:
        """The number of an embedding model; it is made known if it is new."""
        found = self.known_model(name)
        if found is None:
            with self._db.lock, self._db.write() as db:
                other = db.execute("SELECT name FROM models WHERE name != ?", (name,)).fetchone()
                if other is not None:  # another process was first, or took up another model since
                    raise ModelMismatch(
                        f"this folder is indexed with {other[0]!r}, by another process, and was opened here with {name!r}; open "
                        "it with the same model everywhere",
                        stored=other[0],
                        given=name,
                    )
                db.execute("INSERT OR IGNORE INTO models (name, dimensions) VALUES (?, ?)", (name, dimensions))
                found = vectors.model(db, name)
        assert found is not None
        if found[1] != dimensions:
            raise EmbeddingError(
                f"{name!r} gives vectors of {dimensions} numbers, and gave {found[1]} before: it is another model; give the "
                "embedder a model_id of its own, and open the folder with embedder={'on_change': 'reindex'}"
            )
        return found[0]

    def models(self) -> list[tuple[str, int]]:
        """Name and dimensions of the model whose vectors are in use here; none before the first vector."""
        with self._db.read() as db:
            found = vectors.in_use(db)
        return [] if found is None else [found[1:]]

    def forget_models(self, *, keep: str) -> None:
        """Drop all vectors and what is known of their models, and mark every entry as changed.

        But those of *keep*, if it was being taken up: then it is the one in use.
        """
        self._refuse_beside_others("with another embedding model every entry has to be embedded anew")
        with self._db.lock, self._db.write() as db:
            kept = vectors.next_model(db)
            kept = kept if kept is not None and kept[1] == keep else (-1, keep, 0)
            db.execute("DELETE FROM vectors WHERE model != ?", kept[:1])
            db.execute("DELETE FROM questions")
            db.execute("DELETE FROM models WHERE id != ?", kept[:1])
            # What is cached of an owner may have been found by these vectors.
            noted = f"SELECT id << {OWNER_SHIFT}, NULL, ? FROM owners"
            db.execute(f"INSERT INTO changes (no, session, origin) {noted}", (self._db.origin,))
            vectors.mark_all(db)

    def next_model(self, name: str, *, dimensions: int | None = None) -> tuple[int, int] | None:
        """Number and dimensions of the model *name*, which is being taken up; None while it has no vectors.

        With *dimensions* it is made known; what another has left, which was not taken up after all, is to be cleared before.
        """
        with self._db.lock, self._db.write() as db:
            found = vectors.next_model(db)
            if found is None and dimensions is not None:
                used = vectors.in_use(db)
                assert used is not None
                found = (used[0] + 1, name, dimensions)
                db.execute("INSERT INTO models (id, name, dimensions) VALUES (?, ?, ?)", found)
            if found is None or found[1] != name:
                return None
        if dimensions is not None and found[2] != dimensions:
            raise EmbeddingError(
                f"{name!r} gives vectors of {dimensions} numbers, and gave {found[2]} before: it is another model; give the "
                "embedder a model_id of its own, and call reindex() with it again"
            )
        return found[0], found[2]

    def unembedded(self, model: int, *, after: int, limit: int) -> list[int]:
        """Numbers above *after*, in order, of entries of all owners that have words and no vector by a model."""
        with self._db.read() as db:
            return vectors.missing(db, model, after=after, limit=limit)

    def embedded(self, model: int) -> tuple[int, int]:
        """How many entries of all owners have a vector by a model, and how many have words, and so are to have one."""
        with self._db.read() as db:
            return vectors.counted(db, model)

    def switch_model(self, before: str, after: str) -> None:
        """Take up the model *after* in the place of *before*, and mark every entry as changed.

        What anybody has in RAM is read anew. The vectors of *before* stay until they are cleared; nobody asks for them any more.
        Raises `ModelMismatch` when *before* is not in use.
        """
        with self._db.lock, self._db.write() as db:
            used, coming = vectors.in_use(db), vectors.next_model(db)
            if used is not None and used[1] != before:
                raise ModelMismatch(
                    f"this folder was indexed with {used[1]!r} meanwhile, by another process, and was opened here with {before!r}; "
                    "open it again with that model",
                    stored=used[1],
                    given=before,
                )
            if coming is not None and coming[1] != after:
                raise ConflictError(
                    f"{after!r} is not the model that is being taken up any more; call reindex() again", id=after
                )
            if coming is None:  # there was nothing to embed
                db.execute("DELETE FROM vectors")
            db.execute("DELETE FROM models WHERE name != ?", (after,))
            db.execute("DELETE FROM questions")
            vectors.mark_all(db)
            # With a gap in their numbers, the changes say that anything may have changed.
            db.execute(
                "INSERT INTO changes (id, no, session, origin) SELECT coalesce(max(id), 0) + 2, 0, NULL, ? FROM changes",
                (self._db.origin,),
            )
            failpoint("reindex.applied")
        failpoint("reindex.committed")

    def clear_vectors(self, *, keep: str | None = None, limit: int = _CHUNK) -> bool:
        """Delete some of the vectors that are neither of the model in use nor of *keep*; whether none is left."""
        with self._db.lock, self._db.write() as db:
            return vectors.clear_unused(db, keep=keep, limit=limit)

    def largest_owners(self, limit: int) -> list[Scope]:
        """The owners with the most entries, ever; a userless one as the scope of its session."""
        with self._db.read() as db:
            rows = db.execute("SELECT key FROM owners ORDER BY last_n DESC, id LIMIT ?", (limit,)).fetchall()
        return [Scope(*json.loads(key)) for (key,) in rows]

    def mark_all(self, *, again: bool = True) -> None:
        """Mark every entry as changed: the vector index is to be rebuilt, from the vectors that are kept here.

        With *again* False those that are marked stay as they are, also since when.
        """
        with self._db.lock, self._db.write() as db:
            vectors.mark_all(db, again=again)

    def vectors(self, owner: int, model: int, numbers: Sequence[int] | None = None) -> list[tuple[int, bytes]]:
        with self._db.read() as db:
            return vectors.load(db, owner, model, numbers)

    def cached_vectors(self, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        with self._db.read() as db:
            return vectors.cached(db, hashes)

    def question(self, scope: Scope, digest: bytes) -> tuple[bytes | None, int]:
        """The vector kept of a question, by content hash, None where there is none; and the owner's epoch."""
        known = (
            "SELECT erase_epoch + forgotten, (SELECT vector FROM questions WHERE hash = ?) FROM owners WHERE key = ?"
        )
        with self._db.read() as db:
            row = db.execute(known, (digest, sessions.owner_key(scope))).fetchone()
        return (None, 0) if row is None else (row[1], row[0])

    def keep_questions(self, asked: Iterable[Asked]) -> None:
        """Keep the vectors of questions among the newest 256 of their owners, unless an owner has another epoch now.

        Waits for nobody who has the file locked: raises `FolderInUse` at once.
        """
        same = "SELECT id FROM owners WHERE key = ? AND erase_epoch + forgotten = ?"
        with self._db.lock, self._db.write(patience=0) as db:
            owners = set()
            for one in asked:
                row = db.execute(same, (sessions.owner_key(one.scope), one.epoch)).fetchone()
                if row is not None:
                    vectors.keep_question(db, row[0], one.digest, model=one.model, vector=one.vector)
                    owners.add(row[0])
            vectors.trim_questions(db, owners)

    def put_vectors(self, model: int, rows: Sequence[tuple[int, int, bytes, bytes]]) -> list[int]:
        """Keep vectors (number, version, hash, float32 bytes); the numbers whose entry still is at that version."""
        with self._db.lock, self._db.write() as db:
            return vectors.put(db, model, rows)

    def claim(self, *, now: int, limit: int, gone: bool = False) -> list[Dirty]:
        with self._db.read() as db:
            return vectors.claim(db, now=now, limit=limit, gone=gone)

    def clear_dirty(self, marks: Sequence[tuple[int, int]]) -> None:
        with self._db.lock, self._db.write() as db:
            vectors.clear(db, marks)

    def postpone(self, mark: Dirty, *, retry_at: int, error: str) -> None:
        with self._db.lock, self._db.write() as db:
            vectors.postpone(db, number=mark.number, version=mark.version, retry_at=retry_at, error=error)

    def hold(self, marks: Sequence[Dirty]) -> None:
        """Let marks wait until `release`, which is no failure of theirs."""
        with self._db.lock, self._db.write() as db:
            rows = [(_HELD, mark.number, mark.version) for mark in marks]
            db.executemany("UPDATE dirty SET retry_at = ? WHERE no = ? AND version = ?", rows)

    def release(self) -> None:
        """Let the marks on hold be tried now."""
        with self._db.lock, self._db.write() as db:
            db.execute("UPDATE dirty SET retry_at = 0 WHERE retry_at = ?", (_HELD,))

    def retry_parked(self) -> None:
        """Let every waiting mark be tried again now."""
        with self._db.lock, self._db.write() as db:
            db.execute("UPDATE dirty SET retry_at = 0, attempts = 0 WHERE retry_at > 0")

    def next_retry(self, *, gone: bool = False) -> int | None:
        with self._db.read() as db:
            return vectors.next_retry(db, gone=gone)

    def waiting(self, *, parked_at: int, marked_by: float | None = None) -> int:
        """How many marks are there, without those that are parked; or those made until a time (seconds since 1970)."""
        query, given = "SELECT count(*) FROM dirty WHERE retry_at < ?", [float(parked_at)]
        if marked_by is not None:
            query, given = f"{query} AND marked_at <= ?", [*given, marked_by]
        with self._db.read() as db:
            return int(db.execute(query, given).fetchone()[0])

    def totals(self, *, parked_at: int) -> dict[str, Any]:
        """Counts over the whole folder, for `stats()`."""
        with self._db.read() as db:
            names = ("owners", "sessions", "entries", "vectors", "dirty")
            found: dict[str, Any] = {n: db.execute(f"SELECT count(*) FROM {n}").fetchone()[0] for n in names}
            coming = vectors.next_model(db)
            found["next_embedder"] = None if coming is None else coming[1]
            used = vectors.in_use(db)
            if used is not None:  # counted by an index, which the sign keeps SQLite from leaving for the table
                its = f"SELECT count(*) FROM vectors WHERE {vectors.place(1, used[0])} * no > 0"
                found["vectors"] = db.execute(its).fetchone()[0]
            count = (self._ram or db).execute("SELECT count(*) FROM states").fetchone()
            found |= {"states": count[0], "states_persist": self._ram is None}
            found["sessions"] = db.execute("SELECT count(*) FROM sessions WHERE session_id != ''").fetchone()[0]
            found |= cold.totals(db)
            found["parked_count"] = db.execute(
                "SELECT count(*) FROM dirty WHERE retry_at >= ?", (parked_at,)
            ).fetchone()[0]
            oldest = (
                "SELECT max(0, CAST(strftime('%s', 'now') AS INTEGER) - min(marked_at)) FROM dirty WHERE retry_at < ? "
                "AND no NOT IN (SELECT no FROM archived)"
            )
            found["dirty_age"] = db.execute(oldest, (parked_at,)).fetchone()[0]
            parked = db.execute("SELECT key, attempts, error FROM dirty WHERE retry_at >= ? LIMIT 20", (parked_at,))
            found["parked"] = [{"key": k.hex(), "attempts": a, "error": e} for k, a, e in parked]
        return found

    def expired_values(self, *, now: int) -> list[tuple[Scope, int]]:
        """How many keyed values have expired, by their owner's widest scope."""
        query = (
            "SELECT o.key, count(*) FROM items i JOIN owners o ON o.id = i.owner WHERE i.expires_at <= ? GROUP BY o.id"
        )
        with self._db.read() as db:
            return [(Scope(*json.loads(key)), count) for key, count in db.execute(query, (now,))]

    # -- the archive

    def owners(self) -> list[tuple[int, Scope]]:
        """Every owner that has entries: its number and its widest scope."""
        some = "EXISTS (SELECT 1 FROM entries e WHERE e.no >= o.id << 32 AND e.no < (o.id + 1) << 32)"
        with self._db.read() as db:
            rows = db.execute(f"SELECT o.id, o.key FROM owners o WHERE {some} ORDER BY o.id").fetchall()
        return [(number, Scope(*json.loads(key))) for number, key in rows]

    def standings(self, owner: int) -> list[Standing]:
        with self._db.read() as db:
            return list(cold.standings(db, owner))

    def use(self, uses: Mapping[int, tuple[int, int]], *, halving: int) -> None:
        with self._db.lock, self._db.write() as db:
            cold.use(db, uses, halving=halving)

    def records(self, numbers: Sequence[int]) -> dict[int, tuple[int, bytes]]:
        with self._db.read() as db:
            return cold.records(db, numbers)

    def open_block(self, owner: int, *, label: str | None, size: int, entries: int) -> Block | None:
        with self._db.read() as db:
            return cold.open_block(db, owner, label=label, size=size, entries=entries)

    def worn_blocks(self) -> list[Block]:
        with self._db.read() as db:
            return cold.worn_blocks(db)

    def block_names(self) -> list[str]:
        with self._db.read() as db:
            return cold.block_names(db)

    def pack(
        self,
        name: str,
        *,
        owner: int,
        label: str | None,
        size: int,
        versions: Mapping[int, int],
        moved: Block | None,
        now: int,
    ) -> list[int]:
        """Take over a block that was written, in place of texts here, and of the block *moved*; the numbers that became cold."""
        with self._db.lock, self._db.write(power=True) as db:
            done = cold.pack(db, name, owner=owner, label=label, size=size, versions=versions, moved=moved, now=now)
            failpoint("archive.applied")
        failpoint("archive.committed")
        return done

    def thaw(self, numbers: Sequence[int]) -> list[int]:
        with self._db.lock, self._db.write() as db:
            return cold.thaw(db, numbers)

    def discard(self, numbers: Sequence[int], *, run: str, now: int, undo: bool) -> list[int]:
        with self._db.lock, self._db.write() as db:
            done = cold.discard(db, numbers, run=run, now=now, undo=undo)
            failpoint("change.applied")
        failpoint("change.committed")
        return done

    def bring_back(self, run: str) -> list[int]:
        with self._db.lock, self._db.write() as db:
            return cold.bring_back(db, run)

    def discarded(self, scope: Scope, keys: Sequence[str] | None = None) -> dict[str, Entry]:
        """What `discard` has kept under *keys*, by these, or of the session."""
        with self._db.read() as db:
            owner = sessions.owner_of(db, scope)
            head = None if keys is not None else sessions.head(db, scope, session_id=_session_id(scope))
            if owner is None or (keys is None and head is None):
                return {}
            found = {}
            for values in cold.discarded(db, owner, keys=keys or (), session=None if head is None else head.session):
                name = db.execute("SELECT session_id FROM sessions WHERE id = ?", (values["session"],)).fetchone()[0]
                entry, _ = entries.entry_of(entries.row_from(values, session_id=name), scope=scope)
                found[entry.key] = entry
            return found

    def tidy(self, *, discarded_before: int) -> None:
        with self._db.lock, self._db.write(power=True) as db:
            cold.tidy(db, discarded_before=discarded_before)

    def vacuum(self) -> None:
        self._db.vacuum()

    def note(self, name: str, text: str) -> None:
        with self._db.lock, self._db.write() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, text))

    def noted(self, name: str) -> str | None:
        with self._db.read() as db:
            row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def verify(self) -> str:
        """What SQLite says of the file's integrity: "ok", or the first problem."""
        with self._db.read() as db:
            return str(db.execute("PRAGMA quick_check(1)").fetchone()[0])

    def twins(self) -> list[str]:
        """Session ids that stand both for a chat of a user and for a chat of nobody, in one tenant."""
        with self._db.read() as db:
            return sessions.twins(db)

    def _refuse_beside_others(self, why: str) -> None:
        if not self._alone:
            path = self._db.path
            raise FolderInUse(
                f"{path.parent} is open in another process, and {why}; close it there first", path=str(path), pid=None
            )


def _session_id(scope: Scope, *, knowledge: bool = False) -> str:
    if knowledge:
        return KNOWLEDGE
    assert scope.session_id is not None
    return scope.session_id


__all__ = ["SqliteLedger"]
