"""A session at one moment, as JSON: window, summary, open tasks and state; and a session made what such a snapshot says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from .._ids import new_id
from .._json import copied
from ..errors import InputError, brief
from ..protocols import Restored, StoredState
from ..rules.analysis import recorded
from ..types import Entry, Life, MemoryType, Message, Role, ToolCall, microseconds
from . import edit, states, tasks
from .cached import forget
from .ingest import encodable, to_compact
from .parts import Parts
from .resident import again
from .states import Ref

FORMAT = 1
"""The version of what a snapshot looks like."""


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Call(_Shape):
    id: str
    name: str
    args: dict[str, Any]


class _Turn(_Shape):
    id: str
    role: Role
    content: str | list[dict[str, Any]]
    created_at: AwareDatetime
    name: str | None = None
    tool_calls: list[_Call] = []
    tool_call_id: str | None = None
    metadata: dict[str, Any] = {}
    payload: dict[str, Any] | None = None
    pinned: bool = False


class _Summary(_Shape):
    text: str
    pins: list[str]
    covered: int
    by: str


class _Note(_Shape):
    text: str
    at: AwareDatetime
    until: AwareDatetime | None


class _Task(_Shape):
    id: str
    name: str
    created_at: AwareDatetime
    parent: str | None
    progress: float | None
    step: str | None
    values: dict[str, Any]
    notes: list[_Note]


class _State(_Shape):
    version: int
    fields: dict[str, Any]
    life: Life
    status: str | None = None


class _Snapshot(_Shape):
    format: Literal[1]
    taken_at: AwareDatetime
    tenant: str
    user_id: str | None
    session_id: str
    window: list[_Turn]
    summary: _Summary | None
    tasks: list[_Task]
    state: _State


def take(parts: Parts, ref: Ref) -> dict[str, Any]:
    """Window, summary, open tasks and state, as one read of the ledger."""
    parts.authorize(ref.principal, "read", ref.scope)
    window, state = parts.ledger.snapshot(ref.scope)
    now = parts.clock()
    summary = None if window is None else window.summary
    version = states.shown(parts, ref, state)
    made = _Snapshot(
        format=FORMAT,
        taken_at=now,
        tenant=ref.scope.tenant,
        user_id=ref.scope.user_id,
        session_id=ref.scope.session_id or "",
        window=[] if window is None else [_turn(e) for e in window.entries],
        summary=None if summary is None else _summary(summary),
        tasks=[] if window is None else [_Task(**t) for t in tasks.kept(parts, window.tasks, now=now)],
        state=_State(version=version.version, fields=version.fields, life=version.life, status=version.status),
    )
    return made.model_dump(mode="json")


def restore(parts: Parts, ref: Ref, snapshot: Mapping[str, Any]) -> None:
    """Make the session what *snapshot* says, all or nothing.

    Its turns become the window; those that are gone, or are in another memory, are written. Other turns leave the window and stay
    in the transcript. Its tasks are open again as they were, its state is written as a new version. A session that has a
    summary keeps it.
    """
    scope = ref.scope
    for action in ("read", "write"):
        parts.authorize(ref.principal, action, scope)
    given = _checked(snapshot)
    wanted = [_message(turn) for turn in given.window]
    fields = None
    if given.state.version and given.state.fields != ref.rules.beginning:  # which need not be valid yet
        fields = ref.rules.valid(given.state.fields)
    life: Life = "closed" if given.state.life == "closed" else "active"
    resident = parts.resident(scope)

    def made_so() -> StoredState | None:
        now = parts.clock()
        window = parts.window(scope)
        segment, summary = _as_entries(parts, ref, given.summary, now=now) if given.summary else (None, None)
        stored = parts.ledger.state(scope)
        version = 0 if stored is None or stored.record is None else stored.record.version
        state = None
        if version or given.state.version:
            state = states.recorded(ref, version + 1, fields, life, at=now, act="restore")
        made = Restored(
            window=edit.matched(parts, scope, wanted, [], now=now),
            pinned=frozenset(turn.id for turn in given.window if turn.pinned),
            segment=None if segment is None else recorded(segment, fresh=True),
            summary=None if summary is None else recorded(summary, fresh=True),
            tasks=[
                recorded(t)
                for t in tasks.again_open(
                    parts, scope, [t.model_dump(mode="json") for t in given.tasks], window.tasks, now=now
                )
            ],
            state=state,
        )
        parts.ledger.restore(scope, made, now=microseconds(now))
        return stored

    with resident.lock:
        stored = again(resident, made_so)
        resident.forget()
        work = to_compact(parts, parts.window(scope))
    forget(parts, scope)  # turns may be as they were then
    parts.changed()
    if work:
        parts.full(scope)
    after = states.shown(parts, ref, parts.ledger.state(scope))
    states.tell(parts, ref, states.shown(parts, ref, stored), after)


def _checked(snapshot: Any) -> _Snapshot:
    if not isinstance(snapshot, Mapping):
        raise InputError(f"restore() takes what snapshot() gave, not {brief(snapshot)}")
    found = snapshot.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise InputError(
            "this snapshot was taken by a newer version of neuralflow-memory; upgrade the package to restore it"
        )
    try:
        given = _Snapshot.model_validate(snapshot)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise InputError(f"this is no snapshot, and nothing was restored: {told}") from None
    for task in given.tasks:
        tasks.checked_name(task.name)
    copied(given.model_dump(mode="json"), what="a snapshot")
    return given


def _turn(entry: Entry) -> _Turn:
    m = entry.message
    return _Turn(
        id=entry.id,
        role=m.role,
        content=m.content if isinstance(m.content, str) else [dict(b) for b in m.content],
        created_at=entry.created_at,
        name=m.name,
        tool_calls=[_Call(id=c.id, name=c.name, args=dict(c.args)) for c in m.tool_calls],
        tool_call_id=m.tool_call_id,
        metadata=dict(m.metadata),
        payload=None if m.payload is None else dict(m.payload),
        pinned=entry.pinned,
    )


def _message(turn: _Turn) -> Message:
    return Message(
        turn.role,
        turn.content,
        id=turn.id,
        name=turn.name,
        tool_calls=[ToolCall(c.id, c.name, c.args) for c in turn.tool_calls],
        tool_call_id=turn.tool_call_id,
        created_at=turn.created_at,
        metadata=turn.metadata,
        payload=turn.payload,
    )


def _summary(entry: Entry) -> _Summary:
    about = entry.metadata
    return _Summary(
        text=entry.content,
        pins=list(about.get("pins", ())),
        covered=int(about.get("covered", 0)),
        by=about.get("by", ""),
    )


def _as_entries(parts: Parts, ref: Ref, summary: _Summary, *, now: datetime) -> tuple[Entry, Entry]:
    """A segment and a summary that say what *summary* says; the turns that it was made from are elsewhere."""
    text = encodable(summary.text)
    segment = Entry(
        id=f"segment-{new_id()[:12]}",
        key="",
        type=MemoryType.EPISODIC,
        content=text,
        scope=ref.scope,
        seq=0,
        created_at=now,
        written_at=now,
        updated_at=now,
        metadata={"kind": "segment", "covered": 0, "first": 0, "by": summary.by, "plain": False, "pins": summary.pins},
        provenance="derived",
        tokens=parts.counter.count(text),
    )
    segment = replace(segment, key=parts.ledger.key(ref.scope, id=segment.id))
    own_id = f"summary-{new_id()[:12]}"
    facts = dict.fromkeys(("kept", "pinned", "reachable", "lost"), 0)
    about = {"kind": "summary", "covered": summary.covered, "last": 0, "fresh": 1, "plain": False, "pins": summary.pins}
    return segment, replace(
        segment,
        id=own_id,
        key=parts.ledger.key(ref.scope, id=own_id),
        metadata={**about, "facts": facts},
        sources=(segment.id,),
    )


__all__ = ["FORMAT", "restore", "take"]
