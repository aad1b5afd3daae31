"""The file that memories are exported to: JSON Lines, a record a line. docs/backup.md describes it for others.

The first line says which format it is, the last one how many lines came before and what they hash to. `FORMAT` grows with
each kind of record or field that an older reader would not know; files of older formats stay readable.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .._json import dumped
from ..errors import FormatError, InputError
from ..protocols import (
    Moved,
    MovedDerivation,
    MovedEntry,
    MovedMargin,
    MovedSession,
    MovedState,
    MovedValue,
    MovedVersion,
    Record,
    StateRecord,
    StoredValue,
)
from ..rules.states import LONGEST_STATE
from ..types import Entry, Life, MemoryType, Role, Scope, ToolCall, microseconds, moment, utc

Int = Annotated[int, Field(ge=-(2**62), le=2**62)]
"""What a column of the ledger holds."""

FORMAT = 2
MAGIC = "neuralflow-memory"
"""The kind of the first line."""


class Line(BaseModel):
    """A record. What is not there has its default: None, nothing, no."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Line):
    """The embedding model of the vectors."""

    name: str = Field(min_length=1)
    dimensions: int = Field(gt=0)


class Header(Line):
    """The first line. `id` names the export, `counter` what tokens were counted with."""

    kind: Literal["neuralflow-memory"]
    format: int
    id: str = Field(min_length=1)
    created_at: datetime
    counter: str
    model: Model | None = None


class _Scoped(Line):
    tenant: str = "default"
    user_id: str | None = None

    def scope(self, session_id: str | None = None, agent_id: str | None = None) -> Scope:
        return Scope(self.tenant, self.user_id, session_id, agent_id)


class SessionLine(_Scoped):
    """A session. One of knowledge belongs to its user, or, where there is none, to the session of its id."""

    kind: Literal["session"]
    session_id: str | None = None
    knowledge: bool = False
    created_at: datetime
    active_at: datetime
    last_seq: Int
    last_position: Int
    model: str | None = None
    spent: list[tuple[Int, Int, Int, Int, float]] = Field(default_factory=list)


class Call(Line):
    """A tool call."""

    id: str
    name: str
    args: dict[str, Any]


class Name(Line):
    """The place of a keyed value."""

    namespace: list[str]
    key: str


class Standing(Line):
    """How a session stood when that was recorded last: `at` its last write and its last place, `position`."""

    life: Life
    at: datetime
    position: Int


class StateLine(_Scoped):
    """A version of a session's state; the newest has `stands`. Without `fields`: those that a state begins with."""

    kind: Literal["state"]
    session_id: str
    version: Int = Field(ge=1)
    fields: dict[str, Any] | None = None
    life: Life
    at: datetime
    act: str
    principal: str | None = None
    agent_id: str | None = None
    why: str | None = None
    turn: str | None = None
    stands: Standing | None = None


class Extracted(Line):
    """That a segment's turns were looked through for knowledge: how much was found, none if that failed each time."""

    found: Int | None = Field(default=None, ge=0)
    attempts: Int = Field(default=0, ge=0)


class _Versioned(_Scoped):
    """What every version of an entry has, its own or the same as the others."""

    session_id: str | None = None
    knowledge: bool = False
    id: str = Field(min_length=1)
    role: Role | None = None
    name: str | None = None
    content: str
    blocks: list[dict[str, Any]] | None = None
    tool_calls: list[Call] = Field(default_factory=list)
    tool_call_id: str | None = None
    payload: dict[str, Any] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    tags: list[str] = Field(default_factory=list)
    category: str | None = None
    source: str | None = None
    importance: float | None = Field(default=None, ge=0, le=1)
    provenance: str
    trust: float = Field(default=1.0, ge=0, le=1)
    sources: list[str] = Field(default_factory=list)
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    supersedes: list[str] = Field(default_factory=list)
    superseded_by: str | None = None
    version: Int = Field(ge=1)
    tokens: Int | None = Field(default=None, ge=0)


class VersionLine(_Versioned):
    """What the entry that came before was, before it was changed."""

    kind: Literal["version"]


class EntryLine(_Versioned):
    """An entry: the fields of `types.Entry` that are not the ledger's own."""

    kind: Literal["entry"]
    agent_id: str | None = None
    type: MemoryType
    seq: Int
    written_at: datetime
    position: Int | None = None
    pinned: bool = False
    summary: bool = False
    value: Name | None = None
    vector: str | None = None
    extraction: Extracted | None = None


class ValueLine(_Scoped):
    """A keyed value. `session_id`: of an owner without a user. `ttl` is in microseconds, `texts` are entries' ids."""

    kind: Literal["value"]
    session_id: str | None = None
    namespace: list[str]
    key: str
    value: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    ttl: Int | None = Field(default=None, gt=0)
    texts: list[str] = Field(default_factory=list)


class DerivationLine(_Scoped):
    """That knowledge was found in a turn of a session: ids."""

    kind: Literal["derivation"]
    session_id: str
    turn: str
    known: str


class MarginLine(Line):
    """How a model's token counts compare with ours: how many were reported, their mean and squared deviations."""

    kind: Literal["margin"]
    tenant: str
    model: str
    n: Int = Field(ge=0)
    mean: float
    m2: float


class End(Line):
    """The last line. `lines`: how many came before; `blake2b`: the hash of their bytes."""

    kind: Literal["end"]
    lines: int
    blake2b: str


Body = SessionLine | StateLine | EntryLine | VersionLine | ValueLine | DerivationLine | MarginLine
"""What stands between the first line and the last."""
AnyLine = Header | Body | End
"""Every kind of record."""
_READER: TypeAdapter[AnyLine] = TypeAdapter(Annotated[AnyLine, Field(discriminator="kind")])


# -- out


def written(record: Mapping[str, Any]) -> bytes:
    """A record as its line; what has its default is left out."""
    kept = {name: value for name, value in record.items() if value is not None and value is not False and value != []}
    return json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def sealed(header: Mapping[str, Any], lines: Iterable[bytes]) -> Iterator[bytes]:
    """A whole file: its first line, *lines*, and the last one, by which a reader sees that it is whole."""
    digest, count = hashlib.blake2b(digest_size=32), 0
    for line in chain([written({"kind": MAGIC, "format": FORMAT, **header})], lines):
        digest.update(line)
        count += 1
        yield line
    yield written({"kind": "end", "lines": count, "blake2b": digest.hexdigest()})


def line_of(moved: Moved, *, counter: str) -> bytes:
    """What the ledger gave, as a line. Tokens that another counter than *counter* counted are left out."""
    match moved:
        case MovedSession():
            return written(
                {
                    "kind": "session",
                    **_scope(moved.scope),
                    "knowledge": moved.knowledge,
                    "created_at": _time(moved.created_at),
                    "active_at": _time(moved.active_at),
                    "last_seq": moved.last_seq,
                    "last_position": moved.last_position,
                    "model": moved.model,
                    "spent": [list(row) for row in moved.spent],
                }
            )
        case MovedState():
            return written(_state(moved))
        case MovedEntry():
            return written(_entry(moved, counter=counter))
        case MovedVersion():
            entry = moved.entry
            named = {"kind": "version", **_scope(entry.scope), "knowledge": moved.knowledge, "id": entry.id}
            return written({**named, **_versioned(entry, counted=moved.counter == counter)})
        case MovedDerivation():
            return written(
                {"kind": "derivation", **_scope(moved.scope), "turn": moved.turn, "known": moved.known},
            )
        case MovedValue():
            stored = moved.stored
            return written(
                {
                    "kind": "value",
                    **_scope(moved.scope),
                    "namespace": list(stored.namespace) or (),
                    "key": stored.key,
                    "value": json.loads(stored.value),
                    "created_at": _time(stored.created_at),
                    "updated_at": _time(stored.updated_at),
                    "expires_at": None if stored.expires_at is None else _time(stored.expires_at),
                    "ttl": moved.ttl,
                    "texts": list(moved.texts),
                }
            )
        case MovedMargin():
            names = ("tenant", "model", "n", "mean", "m2")
            return written({"kind": "margin", **{name: getattr(moved, name) for name in names}})


def _state(moved: MovedState) -> dict[str, Any]:
    record = moved.record
    stands = None
    if moved.stands is not None:
        life, at, position = moved.stands
        stands = {"life": life, "at": _time(at), "position": position}
    return {
        "kind": "state",
        **_scope(moved.scope),
        "version": record.version,
        "fields": None if record.fields is None else json.loads(record.fields),
        "life": record.life,
        "at": _time(record.at),
        "act": record.act,
        "principal": record.principal,
        "agent_id": record.agent_id,
        "why": record.why,
        "turn": record.turn,
        "stands": stands,
    }


def _entry(moved: MovedEntry, *, counter: str) -> dict[str, Any]:
    entry = moved.record.entry
    value = moved.value
    extraction = None if moved.extraction is None else dict(zip(("found", "attempts"), moved.extraction, strict=True))
    return {
        "kind": "entry",
        **_scope(entry.scope),
        "knowledge": moved.knowledge,
        "agent_id": entry.scope.agent_id,
        "id": entry.id,
        "type": str(entry.type),
        "seq": entry.seq,
        **_versioned(entry, counted=moved.counter == counter),
        "written_at": entry.written_at.isoformat(),
        "position": entry.position,
        "pinned": entry.pinned,
        "summary": moved.summary,
        "value": None if value is None else {"namespace": value[0], "key": value[1]},
        "vector": None if moved.vector is None else base64.b64encode(moved.vector).decode(),
        "extraction": extraction,
    }


def _versioned(entry: Entry, *, counted: bool) -> dict[str, Any]:
    return {
        "role": entry.role,
        "name": entry.name,
        "content": entry.content,
        "blocks": None if entry.blocks is None else (*entry.blocks,),
        "tool_calls": [{"id": c.id, "name": c.name, "args": c.args} for c in entry.tool_calls],
        "tool_call_id": entry.tool_call_id,
        "payload": entry.payload,
        "metadata": entry.metadata or None,
        "tags": list(entry.tags),
        "category": entry.category,
        "source": entry.source,
        "importance": entry.importance,
        "provenance": entry.provenance,
        "trust": entry.trust,
        "sources": list(entry.sources),
        "created_at": entry.created_at.isoformat(),
        "updated_at": entry.updated_at.isoformat(),
        "expires_at": _iso(entry.expires_at),
        "valid_from": _iso(entry.valid_from),
        "valid_to": _iso(entry.valid_to),
        "supersedes": list(entry.supersedes),
        "superseded_by": entry.superseded_by,
        "version": entry.version,
        "tokens": entry.tokens if counted else None,
    }


def _scope(scope: Scope) -> dict[str, Any]:
    tenant = None if scope.tenant == "default" else scope.tenant
    return {"tenant": tenant, "user_id": scope.user_id, "session_id": scope.session_id}


def _time(us: int) -> str:
    return moment(us).isoformat()


def _iso(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat()


# -- in


def parsed(text: bytes, *, file: str, number: int) -> AnyLine:
    """The record of a line; `FormatError` names the line and what is wrong with it."""
    try:
        return _READER.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        match first["type"] if first["loc"] or first["type"] == "union_tag_invalid" else "json_invalid":
            case "json_invalid" | "union_tag_not_found":
                what = "not a record; the file is cut or damaged: take another copy, or export it again"
            case "union_tag_invalid":
                what = f"there is no kind of record named {first['ctx']['tag']!r:.40}"
            case _:
                field = ".".join(map(str, first["loc"][1:])) or "it"
                what = f"{field}: {first['msg']}"
        raise FormatError(f"{file}, line {number}: {what}", path=file, line=number) from None


def session_of(line: SessionLine) -> MovedSession:
    """The record that the ledger takes."""
    return MovedSession(
        line.scope(line.session_id),
        line.knowledge,
        microseconds(utc(line.created_at)),
        microseconds(utc(line.active_at)),
        line.last_seq,
        line.last_position,
        line.model,
        tuple(line.spent),
    )


def state_of(line: StateLine) -> MovedState:
    """The record that the ledger takes."""
    fields = None if line.fields is None else dumped(line.fields, what="a state")
    if len(fields or "") > LONGEST_STATE:
        raise InputError(f"fields: more than {LONGEST_STATE:,} characters of JSON")
    at = microseconds(utc(line.at))
    about = (line.principal, line.agent_id, line.why, line.turn)
    stands = line.stands
    return MovedState(
        line.scope(line.session_id),
        StateRecord(line.version, fields, line.life, at, line.act, *about),
        None if stands is None else (stands.life, microseconds(utc(stands.at)), stands.position),
    )


def entry_of(line: EntryLine, *, scope: Scope, dimensions: int | None) -> MovedEntry:
    """The record that the ledger takes, of *scope*, without key, terms and hash; tokens and importance are -1 where they have to be found.

    Raises:
        InputError: It can't be an entry: a message without content, a vector of other than *dimensions* numbers.
    """
    entry = replace(
        _version(line, scope=scope),
        type=line.type,
        seq=line.seq,
        written_at=utc(line.written_at),
        position=line.position,
        pinned=line.pinned,
    )
    if line.session_id is None and not (line.knowledge and (line.user_id or line.value)):
        raise InputError("it has no session_id, and is no knowledge of a user")
    value = None if line.value is None else (tuple(line.value.namespace), line.value.key)
    vector = None if line.vector is None else _vector(line.vector, dimensions=dimensions)
    extraction = None if line.extraction is None else (line.extraction.found, line.extraction.attempts)
    record = Record(entry, 0, 0, None, b"")
    return MovedEntry(record, line.knowledge, "", line.summary, value, vector, extraction=extraction)


def version_of(line: VersionLine, *, scope: Scope) -> MovedVersion:
    """The record that the ledger takes; tokens and importance as for `entry_of`.

    Raises:
        InputError: It can't have been an entry.
    """
    return MovedVersion(_version(line, scope=scope), line.knowledge)


def _version(line: _Versioned, *, scope: Scope) -> Entry:
    """An entry with what one version has of its own."""
    entry = Entry(
        id=line.id,
        key="",
        type=MemoryType.LONG_TERM,
        content=line.content,
        scope=scope,
        seq=0,
        created_at=utc(line.created_at),
        written_at=utc(line.updated_at),
        updated_at=utc(line.updated_at),
        role=line.role,
        name=line.name,
        blocks=None if line.blocks is None else tuple(line.blocks),
        tool_calls=tuple(ToolCall(c.id, c.name, c.args) for c in line.tool_calls),
        tool_call_id=line.tool_call_id,
        payload=line.payload,
        metadata=line.metadata,
        tags=tuple(line.tags),
        category=line.category,
        source=line.source,
        importance=-1.0 if line.importance is None else line.importance,
        provenance=line.provenance,
        trust=line.trust,
        sources=tuple(line.sources),
        expires_at=_utc(line.expires_at),
        valid_from=_utc(line.valid_from),
        valid_to=_utc(line.valid_to),
        supersedes=tuple(line.supersedes),
        superseded_by=line.superseded_by,
        version=line.version,
        tokens=-1 if line.tokens is None else line.tokens,
    )
    if entry.role is not None or entry.blocks is not None:
        replace(entry.message)  # raises where it can't be one
    return entry


def _utc(when: datetime | None) -> datetime | None:
    return None if when is None else utc(when)


def _vector(text: str, *, dimensions: int | None) -> bytes:
    import numpy as np

    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise InputError("vector: not base64") from None
    if dimensions is None or len(raw) != 4 * dimensions:
        raise InputError(f"vector: {len(raw) // 4} numbers, and the first line says {dimensions}")
    numbers = np.frombuffer(raw, "<f4")
    length = float(np.linalg.norm(numbers))
    if not (length == 0 or abs(length - 1.0) < 1e-3):
        raise InputError("vector: not of length 1")
    return raw


def value_of(line: ValueLine) -> MovedValue:
    """The record that the ledger takes."""
    if any(not label or "\0" in label for label in line.namespace):
        raise InputError("namespace: a label is a text, not empty and without NUL")
    stored = StoredValue(
        tuple(line.namespace),
        line.key,
        microseconds(utc(line.created_at)),
        microseconds(utc(line.updated_at)),
        None if line.expires_at is None else microseconds(utc(line.expires_at)),
        len(line.texts),
        json.dumps(line.value, ensure_ascii=False),
    )
    return MovedValue(line.scope(line.session_id), stored, line.ttl, tuple(line.texts))


__all__ = [
    "FORMAT",
    "MAGIC",
    "AnyLine",
    "Body",
    "DerivationLine",
    "End",
    "EntryLine",
    "Header",
    "MarginLine",
    "SessionLine",
    "StateLine",
    "ValueLine",
    "VersionLine",
    "entry_of",
    "line_of",
    "parsed",
    "sealed",
    "session_of",
    "state_of",
    "value_of",
    "version_of",
    "written",
]
