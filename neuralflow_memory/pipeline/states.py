"""The state of a session: read it, change it, go back; and what time makes of it.

A change is made from the version that was read, under no lock, since a user's rules are asked; it is stored only if that
version still is the newest, and otherwise made again from the one that is.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from .._json import copied, dumped
from ..errors import ConflictError, InputError, NotFound, StateError, StatePersistenceError, StorageError, brief
from ..protocols import OnConflict, StateRecord, StoredState
from ..rules import states
from ..rules.states import Fields, StateRules
from ..types import Life, Scope, StateDiff, StateVersion, microseconds, moment
from . import ingest
from .ingest import Messages
from .parts import Parts

LONGEST_WHY = 1000  # characters
_TRIES = 200  # a change that was overtaken by others starts again
_LONGEST_PAUSE = 0.02  # seconds before it does


@dataclass(frozen=True, slots=True)
class Ref:
    """Whose state, on whose behalf, and by which rules."""

    scope: Scope
    principal: str | None
    rules: StateRules


@dataclass(frozen=True, slots=True)
class _Made:
    """What a change comes to. `fields` None: those that a state begins with."""

    fields: Fields | None
    life: Life = "active"


# -- verbs


def get(parts: Parts, ref: Ref) -> StateVersion:
    """The state now; version 0 before the first change."""
    parts.authorize(ref.principal, "read", ref.scope)
    return shown(parts, ref, parts.ledger.state(ref.scope))


def update(parts: Parts, ref: Ref, given: Any, *, expect: int | None = None, why: str | None = None) -> StateVersion:
    """Merge fields into the state, as a new version."""
    return _write(parts, ref, _merging(ref, given), act="update", expect=expect, why=why)


def change(
    parts: Parts, ref: Ref, make: Callable[[Fields], Mapping[str, Any]], *, why: str | None = None
) -> StateVersion:
    """Put what *make* makes of the fields in their place; it is asked again when somebody was faster."""

    def made(before: StateVersion) -> _Made:
        states.open_for_writing(before.life)
        return _Made(ref.rules.replaced(before.fields, make(copied(before.fields, what="a state"))))

    return _write(parts, ref, made, act="update", why=why)


def transition(
    parts: Parts,
    ref: Ref,
    to: str | None,
    given: Any = None,
    *,
    life: Life | None = None,
    expect: int | None = None,
    why: str | None = None,
) -> StateVersion:
    """Move the status, the session's life, or both, and merge fields with it."""
    if to is None and life is None:
        raise InputError("transition() takes a status to go to, or life=, or both")
    if to is None and given is not None:
        raise InputError("transition(life=...) takes no fields: give the status, too, or call update()")

    def made(before: StateVersion) -> _Made:
        if life is None:
            states.open_for_writing(before.life)
        after = "active" if life is None else states.living(before.life, life)
        if to is None:
            return _Made(None if before.fields == ref.rules.beginning else before.fields, after)
        ref.rules.allow(before.status, to)
        fields = ref.rules.merged(before.fields, {} if given is None else given, to=to)
        return _Made(fields, after)

    return _write(parts, ref, made, act="transition", expect=expect, why=why)


def rollback(
    parts: Parts, ref: Ref, version: int, *, expect: int | None = None, why: str | None = None
) -> StateVersion:
    """Make the fields what they were at *version*, as a new version."""
    then = _record(parts, ref, version)

    def made(before: StateVersion) -> _Made:
        states.open_for_writing(before.life)
        return _Made(None if then.fields is None else ref.rules.valid(json.loads(then.fields)))

    return _write(parts, ref, made, act="rollback", expect=expect, why=why)


def history(parts: Parts, ref: Ref, *, last: int | None = None) -> list[StateVersion]:
    """The versions that are kept, oldest first."""
    parts.authorize(ref.principal, "read", ref.scope)
    if last is not None and (not isinstance(last, int) or last < 0):
        raise InputError(f"last is a number of versions, not {brief(last)}")
    return [_version(ref, record) for record in parts.ledger.states(ref.scope, last=last and min(last, sys.maxsize))]


def diff(parts: Parts, ref: Ref, a: int, b: int | None = None) -> StateDiff:
    """What differs between the fields of two versions, or of one and now."""
    before = _version(ref, _record(parts, ref, a))
    after = get(parts, ref) if b is None else _version(ref, _record(parts, ref, b))
    return states.diff(before.fields, after.fields)


def add(
    parts: Parts,
    ref: Ref,
    messages: Messages,
    given: Any,
    *,
    on_conflict: OnConflict,
    expect: int | None = None,
) -> list[str]:
    """Append messages, and merge fields into the state with them, all or nothing; the messages' ids."""
    parts.authorize(ref.principal, "write", ref.scope)
    turns = ingest.listed(messages)
    ids: list[str] = []

    def store(record: StateRecord) -> bool:
        if not turns:
            parts.ledger.write_state(ref.scope, record)
            return True
        done = ingest.append(parts, ref.scope, turns, principal=ref.principal, on_conflict=on_conflict, state=record)
        assert done is not None
        ids[:] = done.ids
        return done.stated

    try:
        _write(parts, ref, _merging(ref, given), act="update", expect=expect, store=store)
    except (StateError, ConflictError):
        last = turns[-1].id if turns else None
        if last is None or all(record.turn != last for record in parts.ledger.states(ref.scope)):
            raise
        # It is repeated, and the state has moved on since it was done.
        return ingest.add(parts, ref.scope, turns, principal=ref.principal, on_conflict=on_conflict)
    return ids


# -- what time does


def cleanup(parts: Parts) -> int:
    """Note which sessions have become idle or expired, or are active again, and tell the hooks; how many there were."""
    now = parts.clock()
    expiry = parts.settings.context.expiry_time
    us = microseconds(now)
    # A time beyond all times is none.
    idle, expired = (us - int(min(n * expiry, 1e12) * 1_000_000) for n in (1, 2))
    count = 0
    for scope, stored in parts.ledger.silent(idle=idle, expired=expired):
        ref = Ref(scope, None, parts.state_rules)
        before, life = _version(ref, stored.record, life=stored.life), _life(parts, stored, now)
        if life != before.life and parts.ledger.record_life(scope, stored, life):
            count += 1
            tell(parts, ref, before, replace(before, life=life))
    parts.ledger.trim_states()
    return count


def _life(parts: Parts, stored: StoredState | None, now: datetime) -> Life:
    """How a session stands, by what was recorded of it and by the time that has passed."""
    if stored is None:
        return "active"
    if stored.life == "closed":
        return stored.life
    silence = (microseconds(now) - stored.active_at) / 1_000_000
    by_time = states.by_silence(silence, expiry=parts.settings.context.expiry_time)
    return by_time if stored.resumed else states.later(stored.life, by_time)


# -- writing


def _merging(ref: Ref, given: Any) -> Callable[[StateVersion], _Made]:
    def made(before: StateVersion) -> _Made:
        states.open_for_writing(before.life)
        return _Made(ref.rules.merged(before.fields, given))

    return made


def _write(
    parts: Parts,
    ref: Ref,
    make: Callable[[StateVersion], _Made],
    *,
    act: str,
    expect: int | None = None,
    why: str | None = None,
    store: Callable[[StateRecord], bool] | None = None,
) -> StateVersion:
    """Store what *make* makes of the newest version, made anew if another was stored meanwhile; unless one is expected."""
    parts.authorize(ref.principal, "write", ref.scope)
    _check(expect, why)
    for tried in range(_TRIES):
        stored = parts.ledger.state(ref.scope)
        before = shown(parts, ref, stored)
        if expect is not None and before.version != expect:
            raise states.overtaken(ref.scope.session_id or "", expected=expect, found=before.version)
        made = make(before)
        record = recorded(ref, before.version + 1, made.fields, made.life, at=parts.clock(), act=act, why=why)
        try:
            if store is None:
                parts.ledger.write_state(ref.scope, record)
            elif not store(record):
                return before
            break
        except ConflictError as error:
            if error.found is None or expect is not None or tried == _TRIES - 1:
                raise
        except StorageError as error:
            if store is not None:  # it is no less about the turns
                raise
            raise StatePersistenceError(
                f"the state could not be written, and stands as it was: {error}", path=error.path
            ) from error
        time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.0005 * 2**tried)))
    after = _version(ref, record)
    known = before if stored is None or stored.record is None else replace(before, life=stored.life)
    tell(parts, ref, known, after)
    return after


def recorded(
    ref: Ref, version: int, fields: Fields | None, life: Life, *, at: datetime, act: str, why: str | None = None
) -> StateRecord:
    """A version as it is to be stored."""
    text = None if fields is None else dumped(fields, what="a state")
    return StateRecord(version, text, life, microseconds(at), act, ref.principal, ref.scope.agent_id, why)


def tell(parts: Parts, ref: Ref, before: StateVersion, after: StateVersion) -> None:
    """Call the hooks if status or life has changed. What is stored stays so, whatever they raise."""
    if (before.status, before.life) == (after.status, after.life):
        return
    for hook in ref.rules.hooks:
        try:
            hook(before, after)
        except Exception as error:
            parts.trouble = f"on_transition: {type(error).__name__}: {error}"


def _check(expect: int | None, why: str | None) -> None:
    if expect is not None and (not isinstance(expect, int) or isinstance(expect, bool)):
        raise InputError(f"expect is the number of a version, or None, not {brief(expect)}")
    if why is not None and (not isinstance(why, str) or len(why) > LONGEST_WHY):
        raise InputError(f"why is a text of at most {LONGEST_WHY:,} characters, not {brief(why)}")
    ingest.encodable(why or "")


# -- reading


def shown(parts: Parts, ref: Ref, stored: StoredState | None) -> StateVersion:
    """What is stored, as it stands at this moment."""
    return _version(ref, None if stored is None else stored.record, life=_life(parts, stored, parts.clock()))


def _version(ref: Ref, record: StateRecord | None, *, life: Life | None = None) -> StateVersion:
    """A version as callers see it; *life*: where it stands otherwise now."""
    if record is None:
        record = StateRecord(0, None, "active", 0, "")
    fields = ref.rules.beginning if record.fields is None else json.loads(record.fields)
    return StateVersion(
        ref.scope,
        record.version,
        fields,
        life or record.life,
        ref.rules.status_of(fields),
        moment(record.at) if record.version else None,
        record.act or None,
        record.principal,
        record.agent_id,
        record.why,
        record.turn,
    )


def _record(parts: Parts, ref: Ref, version: int) -> StateRecord:
    """A version that is kept; `NotFound` otherwise."""
    parts.authorize(ref.principal, "read", ref.scope)
    if not isinstance(version, int) or isinstance(version, bool):
        raise InputError(f"a version is a number, not {brief(version)}")
    found = parts.ledger.states(ref.scope, version=min(version, sys.maxsize)) if version > 0 else []
    if not found:
        kept = parts.ledger.states(ref.scope)
        which = f"versions {kept[0].version} to {kept[-1].version}" if kept else "no version yet"
        raise NotFound(
            f"version {brief(version)} is not in the history of {ref.scope.session_id!r}, which has {which}; to keep more, open the "
            "memory with a greater state.max_states",
            id=str(version),
        )
    return found[0]


__all__ = [
    "LONGEST_WHY",
    "Ref",
    "add",
    "change",
    "cleanup",
    "diff",
    "get",
    "history",
    "recorded",
    "rollback",
    "shown",
    "tell",
    "transition",
    "update",
]
