"""The entries table: `Entry` to row and back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from ..._json import dumped
from ...protocols import Texts
from ...rules.analysis import worth
from ...types import TYPE_NUMBER, TYPES, Entry, Scope, ToolCall, microseconds, moment
from .archive import COLD, LABEL, filled
from .schema import OWNER_SHIFT

_PLAIN = 0  # codec tag of stored text and payload; `archive.COLD` means that they are in the archive

_COLUMNS = (
    "no, session, seq, position, key, id, type, role, name, agent_id, content, body, payload, metadata, codec, tags, "
    "category, source, importance, provenance, trust, sources, created_at, written_at, updated_at, expires_at, "
    "version, tokens, counter, pinned, valid_from, valid_to, supersedes, superseded_by"
)
_PUT = (
    f"INSERT INTO entries ({_COLUMNS}) VALUES ({', '.join('?' * len(_COLUMNS.split(', ')))}) ON CONFLICT (no) DO UPDATE SET "
    + ", ".join(f"{c} = excluded.{c}" for c in _COLUMNS.split(", ")[1:])
    + " WHERE excluded.version > entries.version"
)
SESSION = len(_COLUMNS.split(", "))
"""Where a row of `COLUMNS` has the session's id."""
COLUMNS = f"{', '.join('e.' + c for c in _COLUMNS.split(', '))}, s.session_id, NULL"
"""What `entry_of` takes, of entries as `e` and their sessions as `s`, with room for a block's label; more may follow."""
SELECT = f"SELECT {COLUMNS} FROM entries e JOIN sessions s ON s.id = e.session"
_FIXED = {"no", "session", "seq", "position", "key", "id", "type", "agent_id", "written_at", "pinned"}
"""What is the same in every version of an entry."""
KEPT = ", ".join(c for c in _COLUMNS.split(", ") if c not in _FIXED)
"""What a row of `versions` has, beside the entry's number."""
SELECT_VERSIONS = (
    f"SELECT {', '.join(('e.' if c in _FIXED else 'v.') + c for c in _COLUMNS.split(', '))}, s.session_id, NULL "
    "FROM versions v JOIN entries e ON e.no = v.no JOIN sessions s ON s.id = e.session"
)


def _optional(when: datetime | None) -> int | None:
    return None if when is None else microseconds(when)


def row_of(entry: Entry, *, session: int, counter: str) -> tuple[Any, ...]:
    """The row that stores *entry*."""
    body: dict[str, Any] = {}
    if entry.blocks is not None:
        body["blocks"] = entry.blocks
    if entry.tool_calls:
        body["calls"] = [[c.id, c.name, c.args] for c in entry.tool_calls]
    if entry.tool_call_id is not None:
        body["answers"] = entry.tool_call_id
    return (
        entry.number,
        session,
        entry.seq,
        entry.position,
        bytes.fromhex(entry.key),
        entry.id,
        TYPE_NUMBER[entry.type],
        entry.role,
        entry.name,
        entry.scope.agent_id,
        entry.content,
        dumped(body, what="tool calls and content blocks") if body else None,
        None if entry.payload is None else dumped(entry.payload, what="payload"),
        dumped(entry.metadata, what="metadata") if entry.metadata else None,
        _PLAIN,
        dumped(entry.tags, what="tags") if entry.tags else None,
        entry.category,
        entry.source,
        entry.importance,
        entry.provenance,
        entry.trust,
        dumped(entry.sources, what="sources") if entry.sources else None,
        microseconds(entry.created_at),
        microseconds(entry.written_at),
        microseconds(entry.updated_at),
        _optional(entry.expires_at),
        entry.version,
        entry.tokens,
        counter,
        entry.pinned,
        _optional(entry.valid_from),
        _optional(entry.valid_to),
        dumped(entry.supersedes, what="ids") if entry.supersedes else None,
        entry.superseded_by,
    )


def kept_row(entry: Entry, *, counter: str) -> tuple[Any, ...]:
    """The row of `versions` that stores *entry*."""
    row = zip(_COLUMNS.split(", "), row_of(entry, session=0, counter=counter), strict=True)
    return (entry.number, *(value for column, value in row if column not in _FIXED))


_scope_of = lru_cache(maxsize=1024)(Scope)


def entry_of(row: Sequence[Any], *, scope: Scope) -> tuple[Entry, str]:
    """The entry in *row*, and the name of the counter that its `tokens` were counted with."""
    body = json.loads(row[11]) if row[11] else {}
    session_id = row[SESSION] or None
    entry = Entry(
        id=row[5],
        key=row[4].hex(),
        type=TYPES[row[6]],
        content=row[10],
        scope=_scope_of(
            scope.tenant, scope.user_id, session_id or (scope.session_id if scope.user_id is None else None), row[9]
        ),
        seq=row[2],
        created_at=moment(row[22]),
        written_at=moment(row[23]),
        updated_at=moment(row[24]),
        role=row[7],
        name=row[8],
        blocks=tuple(body["blocks"]) if "blocks" in body else None,
        tool_calls=tuple(ToolCall(*c) for c in body.get("calls", ())),
        tool_call_id=body.get("answers"),
        payload=json.loads(row[12]) if row[12] else None,
        metadata=json.loads(row[13]) if row[13] else {},
        tags=tuple(json.loads(row[15])) if row[15] else (),
        category=row[16],
        source=row[17],
        importance=row[18] if row[18] >= 0 else worth(row[10], role=row[7], name=row[8]),
        provenance=row[19],
        trust=row[20],
        sources=tuple(json.loads(row[21])) if row[21] else (),
        expires_at=None if row[25] is None else moment(row[25]),
        version=row[26],
        tokens=row[27],
        position=row[3],
        number=row[0],
        pinned=bool(row[29]),
        valid_from=None if row[30] is None else moment(row[30]),
        valid_to=None if row[31] is None else moment(row[31]),
        supersedes=tuple(json.loads(row[32])) if row[32] else (),
        superseded_by=row[33],
        tier="cold" if row[14] == COLD else "warm",
        archive_label=row[LABEL],
    )
    return entry, row[28]


def row_from(values: Mapping[str, Any], *, session_id: str) -> tuple[Any, ...]:
    """What `entry_of` takes, of a row whose values are given by their columns, the key in hexadecimal digits."""
    row = {**values, "key": bytes.fromhex(values["key"])}
    return (*(row.get(column) for column in _COLUMNS.split(", ")), session_id, None)


def row_before(row: Sequence[Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """An entry's row as it was when *values* were those of a row of `versions`."""
    names = _COLUMNS.split(", ")
    was = (old if name in _FIXED else values.get(name) for name, old in zip(names, row, strict=False))
    return (*was, *row[len(names) :])


def put(db: sqlite3.Connection, rows: Iterable[tuple[Any, ...]]) -> None:
    """Write rows whole. A row that is there at the same or a newer version stays: writing twice changes nothing."""
    db.executemany(_PUT, rows)


def select(
    db: sqlite3.Connection,
    where: str,
    parameters: Sequence[Any],
    *,
    scope: Scope,
    owner: int,
    tail: str = "",
    texts: Texts = "read",
) -> Iterator[tuple[Entry, str]]:
    """Entries of *owner* (whose scope is *scope*) for which *where* holds. No other owner's rows can come back."""
    low, high = owner << OWNER_SHIFT, (owner + 1) << OWNER_SHIFT
    query = f"{SELECT} WHERE {where} AND e.no >= ? AND e.no < ? {tail}"
    # All at once: with rows left to read, the archive's index would be read as of the same moment, before blocks were replaced.
    for row in filled(db, db.execute(query, (*parameters, low, high)).fetchall(), texts=texts):
        yield entry_of(row, scope=scope)
