"""What is cold: the index of the archive, how often entries are used, and what retention has deleted and may bring back.

The text of a cold entry (content, blocks and calls, payload, metadata) has left its row in `entries`, whose codec says so, and
its earlier versions have left `versions`. Both are read from the archive where the row is read: by the connection, which knows
the archive.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from ...errors import ArchiveError
from ...protocols import Archive, Block, Standing, Texts
from ...rules.analysis import worth
from ...types import TYPES, MemoryType
from . import summaries, vectors
from .schema import OWNER_SHIFT

COLD = 1
"""The codec of a row whose text is in the archive."""

_TEXTS = "content, body, payload, metadata"
_OLDER = 4
"""Where a record has the earlier versions, beside these."""
_CODEC, LABEL = 14, 35
"""Where a row of `entries.COLUMNS` has them."""
_TRIES = 3  # blocks may be replaced while they are looked for


class Connection(sqlite3.Connection):
    """A connection that knows where the texts of cold entries are; None where nothing can be cold."""

    archive: Archive | None = None


# -- reading


def filled(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]], *, texts: Texts) -> Iterator[tuple[Any, ...]]:
    """*rows* of `entries` with the texts of those that are cold; with *texts* "skip" without those that can't be read.

    Each cold row has its block's label in its place.
    """
    cold = [row[0] for row in rows if row[_CODEC] == COLD]
    if not cold:
        yield from rows
        return
    labels = _labels(db, cold)
    known = {} if texts == "bare" else _texts(db, cold, skip=texts == "skip")
    for row in rows:
        if row[_CODEC] != COLD:
            yield row
        elif texts == "bare":
            yield _labelled(row, labels)
        elif (found := known.get(row[0])) is not None:
            content, body, payload, metadata, *_ = found
            yield _labelled((*row[:10], content, body, payload, metadata, *row[_CODEC:]), labels)


def _labelled(row: tuple[Any, ...], labels: Mapping[int, str | None]) -> tuple[Any, ...]:
    return (*row[:LABEL], labels.get(row[0]), *row[LABEL + 1 :])


def _texts(db: sqlite3.Connection, numbers: Sequence[int], *, skip: bool) -> dict[int, list[Any]]:
    """Content, body, payload and metadata of cold entries, and their earlier versions if there are any."""
    found: dict[int, list[Any]] = {}
    failed: ArchiveError | None = None
    for _ in range(_TRIES):
        left = [n for n in numbers if n not in found]
        if not left:
            break
        by_block: dict[str, list[int]] = {}
        for number, name in _places(db, left):
            by_block.setdefault(name, []).append(number)
        failed = None
        for name, there in by_block.items():
            try:
                records = _archive(db).read(name)
            except ArchiveError as error:  # or it was replaced just now: looked for once more
                failed = error
                continue
            found.update((n, json.loads(records[n])) for n in there if n in records)
        # Those that are in no block any more are warm again, or gone.
        placed = {n for there in by_block.values() for n in there}
        some = json.dumps([n for n in left if n not in placed])
        query = f"SELECT no, {_TEXTS} FROM entries WHERE no IN (SELECT value FROM json_each(?)) AND codec != {COLD}"
        found.update((number, texts) for number, *texts in db.execute(query, (some,)))
    if failed is not None and not skip:
        raise failed
    return found


def earlier(db: sqlite3.Connection, number: int) -> list[dict[str, Any]]:
    """What a cold entry was before, by the columns of `versions`, oldest version first."""
    found = _texts(db, [number], skip=False).get(number, [])
    return found[_OLDER] if len(found) > _OLDER else []


def _archive(db: sqlite3.Connection) -> Archive:
    archive = db.archive if isinstance(db, Connection) else None
    assert archive is not None, "a ledger with cold entries is opened with its archive"
    return archive


def _places(db: sqlite3.Connection, numbers: Sequence[int]) -> list[tuple[int, str]]:
    query = (
        "SELECT a.no, b.name FROM archived a JOIN blocks b ON b.id = a.block "
        "WHERE a.no IN (SELECT value FROM json_each(?)) ORDER BY b.id"
    )
    return db.execute(query, (json.dumps(numbers),)).fetchall()


def _labels(db: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, str | None]:
    query = (
        "SELECT a.no, b.label FROM archived a JOIN blocks b ON b.id = a.block "
        "WHERE b.label IS NOT NULL AND a.no IN (SELECT value FROM json_each(?))"
    )
    return dict(db.execute(query, (json.dumps(numbers),)))


def standings(db: sqlite3.Connection, owner: int) -> Iterator[Standing]:
    """What decides where an owner's entries belong."""
    rows = db.execute(
        "SELECT e.no, e.id, s.session_id, e.type, e.seq, e.position, e.pinned, i.no, e.importance, e.tags, e.written_at, "
        "u.used_at, coalesce(u.count, 0), e.expires_at, e.valid_to, a.archived_at, e.version, "
        "CASE WHEN e.importance < 0 THEN e.content END, e.role, e.name FROM entries e JOIN sessions s ON s.id = e.session "
        "LEFT JOIN archived a ON a.no = e.no LEFT JOIN uses u ON u.no = e.no LEFT JOIN item_texts i ON i.no = e.no "
        "WHERE e.no >= ? AND e.no < ? ORDER BY e.no",
        (owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT),
    )
    for (
        no,
        own_id,
        session,
        kind,
        seq,
        position,
        pinned,
        item,
        importance,
        tags,
        written,
        used,
        uses,
        expires,
        ended,
        cold,
        version,
        text,
        role,
        name,
    ) in rows:
        yield Standing(
            no,
            own_id,
            session or None,
            TYPES[kind],
            _exempt(seq=seq, position=position, pinned=pinned, item=item),
            importance if text is None else worth(text, role=role, name=name),
            tuple(json.loads(tags)) if tags else (),
            max(written, used or 0),
            uses,
            expires,
            ended,
            cold,
            version,
        )


def _exempt(*, seq: int, position: int | None, pinned: int, item: int | None) -> str | None:
    if seq < 0:
        return "a task, a running summary or a part of one"
    if pinned:
        return "pinned"
    if position is not None:
        return "in the window"
    return None if item is None else "what a keyed value is found by"


def use(db: sqlite3.Connection, uses: Mapping[int, tuple[int, int]], *, halving: int) -> None:
    """Count uses; those counted before are worth half after *halving* microseconds."""
    for number, (times, when) in uses.items():
        row = db.execute("SELECT count, used_at FROM uses WHERE no = ?", (number,)).fetchone()
        before, last = row or (0.0, when)
        count = before * 0.5 ** (max(0, when - last) / halving) + times
        db.execute("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", (number, count, max(when, last)))


# -- to the archive, and back


# And not before its text was analysed, for which it would have to be brought back.
_MAY_BE_COLD = f"codec != {COLD} AND seq > 0 AND position IS NULL AND pinned = 0 AND importance >= 0"


def records(db: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, tuple[int, bytes]]:
    """Versions and records of the entries that are warm and may become cold."""
    query = (
        f"SELECT no, version, {_TEXTS} FROM entries WHERE no IN (SELECT value FROM json_each(?)) AND {_MAY_BE_COLD} "
        "AND no NOT IN (SELECT no FROM item_texts)"
    )
    rows = db.execute(query, (json.dumps(numbers),)).fetchall()
    older = _versions(db, [row[0] for row in rows])
    return {
        number: (
            version,
            json.dumps([*texts, *([older[number]] if number in older else [])], ensure_ascii=False).encode(),
        )
        for number, version, *texts in rows
    }


def _versions(db: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """The rows of `versions`, by number, without what is not there."""
    query = "SELECT * FROM versions WHERE no IN (SELECT value FROM json_each(?)) ORDER BY no, version"
    rows = db.execute(query, (json.dumps(numbers),))
    names = [column[0] for column in rows.description]
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        values = {name: value for name, value in zip(names, row, strict=True) if value is not None}
        found.setdefault(values.pop("no"), []).append(values)
    return found


def said(text: str) -> int:
    """What cold knowledge is looked up by: few texts have the same, and none is told by it."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


_BLOCK = (
    "SELECT b.id, b.owner, b.name, b.label, b.entries, b.size, json_group_array(a.no) FROM blocks b "
    "LEFT JOIN archived a ON a.block = b.id"
)


def _blocks(rows: Iterable[tuple[Any, ...]]) -> list[Block]:
    return [
        Block(own_id, owner, name, label, entries, size, tuple(sorted(n for n in json.loads(live) if n is not None)))
        for own_id, owner, name, label, entries, size, live in rows
    ]


def open_block(db: sqlite3.Connection, owner: int, *, label: str | None, size: int, entries: int) -> Block | None:
    """The owner's newest block of this label that has less than *size*, and fewer than *entries*."""
    newest = "SELECT max(id) FROM blocks WHERE owner = ? AND label IS ? AND size < ? AND entries < ?"
    found = _blocks(db.execute(f"{_BLOCK} WHERE b.id = ({newest}) GROUP BY b.id", (owner, label, size, entries)))
    return found[0] if found else None


def worn_blocks(db: sqlite3.Connection) -> list[Block]:
    """Blocks that some entry has left, but not all."""
    worn = "HAVING count(a.no) BETWEEN 1 AND b.entries - 1"
    return _blocks(db.execute(f"{_BLOCK} GROUP BY b.id {worn} ORDER BY b.owner, b.id"))


def block_names(db: sqlite3.Connection) -> list[str]:
    """The names of all blocks in which something stands."""
    some = "EXISTS (SELECT 1 FROM archived a WHERE a.block = b.id)"
    return [name for (name,) in db.execute(f"SELECT name FROM blocks b WHERE {some}")]


def pack(
    db: sqlite3.Connection,
    name: str,
    *,
    owner: int,
    label: str | None,
    size: int,
    versions: Mapping[int, int],
    moved: Block | None,
    now: int,
) -> list[int]:
    """Take over a block; the numbers of the entries that became cold."""
    entries = len(versions) + len(moved.live if moved else ())
    block = db.execute(
        "INSERT INTO blocks (owner, name, label, entries, size) VALUES (?, ?, ?, ?, ?)",
        (owner, name, label, entries, size),
    ).lastrowid
    chilled = []
    for number, version in versions.items():
        row = db.execute(
            f"SELECT key, type, content FROM entries WHERE no = ? AND version = ? AND {_MAY_BE_COLD}", (number, version)
        ).fetchone()
        if row is not None:
            chilled.append((number, *row))
    empty = (
        f"UPDATE entries SET content = '', body = NULL, payload = NULL, metadata = NULL, codec = {COLD} WHERE no = ?"
    )
    for number, key, kind, content in chilled:
        db.execute(empty, (number,))
        db.execute("DELETE FROM versions WHERE no = ?", (number,))
        db.execute("UPDATE features SET cold = 1 WHERE no = ?", (number,))
        known = said(content) if TYPES[kind] is MemoryType.LONG_TERM else None
        db.execute(
            "INSERT INTO archived (no, block, archived_at, said) VALUES (?, ?, ?, ?)", (number, block, now, known)
        )
        db.execute("DELETE FROM uses WHERE no = ?", (number,))  # from now on they tell whether it is to come back
        db.execute("DELETE FROM vectors WHERE no IN (?1, -?1)", (number,))  # by both models, where another is taken up
        vectors.mark(db, [(number, key, _moved())])  # it leaves the vector index, where it may be, or is just coming
    if moved is not None:
        db.execute("UPDATE archived SET block = ? WHERE block = ?", (block, moved.id))
        db.execute("DELETE FROM blocks WHERE id = ?", (moved.id,))
    return [number for number, *_ in chilled]


def _moved() -> int:
    """What stands for the version in the mark of an entry that became cold or warm: negative, and another one each time.

    Whoever is indexing the entry as it was before clears its own mark, and not this one.
    """
    return -1 - secrets.randbits(62)


def thaw(db: sqlite3.Connection, numbers: Sequence[int], *, skip: bool = True) -> list[int]:
    """Take the texts of cold entries back, but with *skip* of none that can't be read; their numbers."""
    query = f"SELECT no FROM entries WHERE no IN (SELECT value FROM json_each(?)) AND codec = {COLD}"
    cold = [number for (number,) in db.execute(query, (json.dumps(numbers),))]
    found = _texts(db, cold, skip=skip) if cold else {}
    for number, (*texts, older) in ((n, (*t[:_OLDER], t[_OLDER:])) for n, t in found.items()):
        set_ = "content = ?, body = ?, payload = ?, metadata = ?, codec = 0"
        db.execute(f"UPDATE entries SET {set_} WHERE no = ?", (*texts, number))
        db.execute("UPDATE features SET cold = 0 WHERE no = ?", (number,))
        db.execute("DELETE FROM archived WHERE no = ?", (number,))
        for values in older[0] if older else ():
            _insert(db, "versions", {"no": number, **values})
        key = db.execute("SELECT key FROM entries WHERE no = ?", (number,)).fetchone()[0]
        vectors.mark(db, [(number, key, _moved())])
    return sorted(found)


# -- what retention deletes


def discard(db: sqlite3.Connection, numbers: Sequence[int], *, run: str, now: int, undo: bool) -> list[int]:
    """Delete entries of one owner; with *undo* keep them aside. Those whose texts can't be read stay."""
    found = _whole(db, numbers)
    sessions: dict[int, list[str]] = {}
    for whole in found.values():
        sessions.setdefault(whole["entries"]["session"], []).append(whole["entries"]["id"])
    for session, ids in sessions.items():
        owner = min(found) >> OWNER_SHIFT
        gone = [n for n, whole in found.items() if whole["entries"]["session"] == session]
        # What only their segments covered is as old: it stays where it is, and the summary is made anew without them.
        summaries.unfold(db, owner=owner, session=session, changed=ids, gone=gone, now=now, restore=False)
    for number, whole in found.items():
        key = bytes.fromhex(whole["entries"]["key"])
        if undo:
            packed = zlib.compress(json.dumps(whole, ensure_ascii=False).encode())
            db.execute(
                "INSERT OR REPLACE INTO trash VALUES (?, ?, ?, ?, ?, ?)",
                (number, key, whole["entries"]["session"], run, now, packed),
            )
        found_in = db.execute("SELECT source FROM derivations WHERE no = ?", (number,)).fetchall()
        summaries.remove(db, number, key, owner=number >> OWNER_SHIFT, now=now)
        if undo:  # so that it goes, should somebody delete these turns
            db.executemany("INSERT INTO derivations (source, no) VALUES (?, ?)", [(s, number) for (s,) in found_in])
    if found:
        vectors.forget_questions(db, min(found) >> OWNER_SHIFT)
    return sorted(found)


_BYTES = ("key", "terms")


def _whole(db: sqlite3.Connection, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """All that is stored of entries, by table, by number; without those whose texts can't be read."""
    found: dict[int, dict[str, Any]] = {}
    given = (json.dumps(numbers),)
    for table in ("entries", "features"):
        rows = db.execute(f"SELECT * FROM {table} WHERE no IN (SELECT value FROM json_each(?))", given)
        names = [column[0] for column in rows.description]
        for row in rows.fetchall():
            values = dict(zip(names, (v.hex() if isinstance(v, bytes) else v for v in row), strict=True))
            found.setdefault(values["no"], {"versions": []})[table] = values
    found = {number: whole for number, whole in found.items() if "entries" in whole}
    for number, older in _versions(db, list(found)).items():
        found[number]["versions"] = older
    cold = [n for n, whole in found.items() if whole["entries"]["codec"] == COLD]
    texts = _texts(db, cold, skip=True) if cold else {}
    for number in cold:
        if number in texts:
            *own, older = (*texts[number][:_OLDER], texts[number][_OLDER:])
            found[number]["entries"] |= dict(zip(_TEXTS.split(", "), own, strict=True)) | {"codec": 0}
            found[number]["features"]["cold"] = 0
            found[number]["versions"] = older[0] if older else []
        else:
            del found[number]
    return found


def bring_back(db: sqlite3.Connection, run: str) -> list[int]:
    """Put back what `discard` kept aside for *run*, but nothing whose id was used again; the numbers."""
    back = []
    for number, key, packed in db.execute("SELECT no, key, entry FROM trash WHERE run = ?", (run,)).fetchall():
        if db.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone() is not None:
            continue
        whole = _unpacked(packed)
        row = whole["entries"]
        dead = db.execute("DELETE FROM tombstones WHERE key = ? RETURNING version", (key,)).fetchone()
        row["version"] = max(row["version"], dead[0] if dead else 0) + 1
        row["position"] = None
        _insert(db, "entries", row)
        _insert(db, "features", whole["features"])
        for values in whole["versions"]:
            _insert(db, "versions", {"no": number, **values})
        vectors.mark(db, [(number, key, row["version"])])
        db.execute("DELETE FROM trash WHERE no = ?", (number,))
        back.append(number)
    return back


def _insert(db: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    values = [bytes.fromhex(v) if name in _BYTES else v for name, v in row.items()]
    db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(values))})", values)


def discarded(
    db: sqlite3.Connection, owner: int, *, keys: Sequence[str] = (), session: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows in `entries` of what `discard` has kept of *owner* under *keys*, or of a session."""
    where, given = (
        ("session = ?", [session])
        if session is not None
        else (f"key IN ({', '.join('?' * len(keys))})", [bytes.fromhex(key) for key in keys])
    )
    query = f"SELECT entry FROM trash WHERE {where} AND no >= ? AND no < ?"
    for (packed,) in db.execute(query, (*given, owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT)):
        yield _unpacked(packed)["entries"]


def _unpacked(packed: bytes) -> dict[str, Any]:
    """What `_whole` gave."""
    found: dict[str, Any] = json.loads(zlib.decompress(packed))
    return found


def purge(db: sqlite3.Connection, key: bytes) -> list[int]:
    """Let what was discarded under *key* not be brought back, since somebody wants it to go; its numbers."""
    gone = db.execute("DELETE FROM trash WHERE key = ? RETURNING no", (key,)).fetchall()
    if gone:
        db.execute("UPDATE tombstones SET asked = 1 WHERE key = ?", (key,))
    return [number for (number,) in gone]


def purge_found(db: sqlite3.Connection, number: int) -> None:
    """The same for knowledge whose turns somebody has deleted, unless it was told as well."""
    row = db.execute("SELECT key, entry FROM trash WHERE no = ?", (number,)).fetchone()
    if row is not None and _unpacked(row[1])["entries"]["provenance"] == "derived":
        purge(db, row[0])


def tidy(db: sqlite3.Connection, *, discarded_before: int) -> None:
    """Forget what was discarded before then, counts of entries that are gone, and blocks in which nothing stands."""
    db.execute("DELETE FROM trash WHERE deleted_at < ?", (discarded_before,))
    # What was found in turns that retention has deleted for good stays, and stands by itself.
    for column in ("source", "no"):
        there = " AND ".join(f"{column} NOT IN (SELECT no FROM {table})" for table in ("entries", "trash"))
        db.execute(f"DELETE FROM derivations WHERE {there}")
    db.execute("DELETE FROM uses WHERE NOT EXISTS (SELECT 1 FROM entries e WHERE e.no = uses.no)")
    db.execute("DELETE FROM blocks WHERE NOT EXISTS (SELECT 1 FROM archived a WHERE a.block = blocks.id)")


def totals(db: sqlite3.Connection) -> dict[str, Any]:
    """Counts for `stats()`."""
    found = {"cold": "SELECT count(*) FROM archived", "blocks": "SELECT count(*) FROM blocks"}
    # Those that are cold do not wait to be embedded.
    found["dirty"] = "SELECT count(*) FROM dirty WHERE no NOT IN (SELECT no FROM archived)"
    found["discarded"] = "SELECT count(*) FROM trash"
    return {name: db.execute(query).fetchone()[0] for name, query in found.items()}


__all__ = ["COLD", "LABEL", "Connection", "filled"]
