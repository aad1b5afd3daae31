"""Tasks of a session: begin, change, read and end one; and what a prompt shows of them.

A task is one WORKING entry that holds everything in its metadata. Ending it empties that and appends the outcome, an
EPISODIC entry. Each verb is one transaction of the ledger, made from the versions that it read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal, get_args

from .._ids import new_id
from .._json import copied, dumped
from ..errors import ConflictError, InputError, MessageError, NotFound, TaskError, brief
from ..protocols import Record
from ..rules.analysis import recorded
from ..types import Entry, MemoryType, Scope, microseconds
from .ingest import encodable, take
from .parts import Parts

Ending = Literal["completed", "failed"]
Stored = Literal["open", Ending]
State = dict[str, Any]
"""The metadata of a task's entry."""

LONGEST_NAME = 200  # characters, of a task's name and of a value's
LONGEST_DETAIL = 500  # characters of a value, note or result where others stand beside it, and of an exception's text
MOST_DETAILS = 10  # of the values that were set last, and of the newest notes, in an outcome
MOST_NOTES = 200  # lasting notes of a task, and temporary ones
MOST_VALUES = 200  # of a task
LONGEST_NOTE = 2000  # characters
LONGEST_VALUE = 20_000  # characters of a value's JSON
MOST_OVER = 5  # ended tasks in a prompt, the newest
_REST = " […]"  # in place of what is cut off
_TRIES = 5  # a change that was overtaken by another starts again
_NEW: State = {
    "kind": "task",
    "name": "",
    "status": "open",
    "progress": None,
    "step": None,
    "values": {},
    "notes": [],
    "parent": None,
    "result": None,
}


@dataclass(frozen=True, slots=True)
class Shown:
    """What a prompt shows of a task (heading, values, notes), or one of its temporary notes. `id` is the task's."""

    id: str
    lines: list[str]
    over: bool = False


@dataclass(frozen=True, slots=True)
class Ref:
    """A task that was begun, and on whose behalf it is used. `key` is its entry's."""

    scope: Scope
    principal: str | None
    name: str
    id: str
    key: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be written: `task`, which it is about, is among `changed` if it changes."""

    task: Entry
    changed: Sequence[Entry] = ()
    over: Sequence[Entry] = ()
    outcome: Entry | None = None


# -- verbs


def begin(
    parts: Parts,
    scope: Scope,
    name: str,
    *,
    principal: str | None,
    around: Sequence[str],
    inside: Callable[[], Collection[str]],
) -> Ref:
    """Begin the task, or resume the open one of this name, unless it is around this code.

    *around*: keys of the tasks around this code, the innermost last; *inside* says those of all tasks whose blocks are
    running. Outside of all open tasks it is a switch of context: the other open tasks lose their temporary notes, except
    those that it is a part of, and those whose blocks are running.
    """
    parts.authorize(principal, "write", scope)

    def plan(tasks: Sequence[Entry], now: datetime) -> _Plan:
        running = [t for t in tasks if _is_open(t)]
        by_key = {t.key: t for t in running}
        parent = next((by_key[key] for key in reversed(around) if key in by_key), None)
        task = next((t for t in running if t.metadata["name"] == name), None)
        if task is not None and task.key in around:
            raise TaskError(
                f"task {name!r} is running in a block around this code, and would be ended by the inner one: give the inner "
                "one another name",
                name=name,
            )
        changed = []
        if task is None:
            task = _new(parts, scope, name, parent=parent, now=now)
            changed = [task]
        if parent is None:
            kept = {task.id, *_above(task, running)}
            busy = inside()
            for other in running:
                lasting = [n for n in other.metadata["notes"] if n["until"] is None]
                if other.id not in kept and other.key not in busy and len(lasting) < len(other.metadata["notes"]):
                    changed.append(_version(parts, other, {**other.metadata, "notes": lasting}, now=now))
        return _Plan(task, changed)

    task = _write(parts, scope, plan)
    return Ref(scope, principal, name, task.id, task.key)


def set_value(parts: Parts, ref: Ref, name: str, value: Any) -> None:
    """Keep a JSON value under a name, in place of the one before."""
    parts.authorize(ref.principal, "write", ref.scope)
    checked_value_name(name)
    size = len(encodable(dumped(value, what="a task's value")))
    if size > LONGEST_VALUE:
        raise InputError(
            f"a task's value has at most {LONGEST_VALUE:,} characters as JSON, and {brief(name)} has {size:,}; keep it "
            "elsewhere, and here where to find it"
        )

    def change(state: State, _: datetime) -> None:
        values = state["values"]
        if name not in values and len(values) >= MOST_VALUES:
            raise InputError(f"a task holds at most {MOST_VALUES} values; put several into one, as a list or a mapping")
        values.pop(name, None)  # what was set last stands last
        values[name] = copied(value, what="a task's value")

    _change(parts, ref, change)


def note(parts: Parts, ref: Ref, text: str, *, temporary: bool, lifetime: float | None) -> None:
    """Write a note down; a temporary one for *lifetime* seconds."""
    parts.authorize(ref.principal, "write", ref.scope)
    if not isinstance(text, str) or not text.strip():
        raise MessageError("there is nothing to note: give it a text")
    if len(encodable(text)) > LONGEST_NOTE:
        raise MessageError(
            f"a note has at most {LONGEST_NOTE:,} characters, and this one has {len(text):,}; note what matters of it, "
            "or keep it whole with session.remember()"
        )
    if lifetime is not None and not temporary:
        raise InputError("only temporary notes have a lifetime: pass temporary=True, too")
    if lifetime is None:
        lifetime = parts.settings.context.expiry_time
    if not isinstance(lifetime, int | float) or not lifetime > 0:
        raise InputError(f"lifetime is a number of seconds, more than 0, not {brief(lifetime)}")

    def change(state: State, now: datetime) -> None:
        until = _after(now, lifetime).isoformat() if temporary else None
        notes = [*_living(state["notes"], now), {"text": text, "at": now.isoformat(), "until": until}]
        same = [place for place, n in enumerate(notes) if (n["until"] is not None) == temporary]
        dropped = set(same[:-MOST_NOTES])
        state["notes"] = [n for place, n in enumerate(notes) if place not in dropped]

    _change(parts, ref, change)


def progress(parts: Parts, ref: Ref, fraction: float, step: str | None) -> None:
    """Say how much of the task is done, 0..1, and what is being done now."""
    parts.authorize(ref.principal, "write", ref.scope)
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise InputError(f"progress is a number between 0 and 1, not {brief(fraction)}")
    if step is not None and (not isinstance(step, str) or not step.strip()):
        raise MessageError(f"what is being done is a text or None, not {brief(step)}")
    encodable(step or "")
    _change(parts, ref, lambda state, _: state.update(progress=float(fraction), step=step))


def end(parts: Parts, ref: Ref, status: Ending, result: BaseException | str | None) -> None:
    """End the task, and first, in the same way, those open tasks that are parts of it; all in one transaction."""
    parts.authorize(ref.principal, "write", ref.scope)
    text = _result(result)

    def plan(tasks: Sequence[Entry], now: datetime) -> _Plan:
        task = _held(ref, next((t for t in tasks if t.key == ref.key), None))
        return _ended(parts, task, tasks, status, text, now=now)

    _write(parts, ref.scope, plan)


def read(parts: Parts, ref: Ref) -> State:
    """What the open task holds, without temporary notes that have outlived their time; the caller's own."""
    parts.authorize(ref.principal, "read", ref.scope)
    task = _held(
        ref, parts.ledger.by_keys(ref.scope, [ref.key]).get(ref.key), aged=ref.id in _now_aged(parts, ref.scope)
    )
    return {**task.metadata, "notes": _living(task.metadata["notes"], parts.clock())}


def listed(parts: Parts, scope: Scope, *, principal: str | None, status: str | None) -> list[tuple[Ref, Stored]]:
    """The session's tasks with their status, oldest first: open ones, and ended ones that have not expired."""
    parts.authorize(principal, "read", scope)
    known = get_args(Stored)
    if status not in (None, *known):
        raise InputError(f"status is one of {', '.join(known)}, or None for all, not {brief(status)}")
    resident = parts.resident(scope)
    with resident.lock:
        now = parts.clock()
        tasks = [t for t in parts.window(scope).tasks if _is_task(t) and not _expired(t, now)]
    aged = _aged(tasks, now, age=parts.settings.tasks.open_max_age)
    tasks.sort(key=lambda t: t.number)
    found: list[tuple[Ref, Stored]] = [
        (Ref(scope, principal, t.metadata["name"], t.id, t.key), "failed" if t.id in aged else t.metadata["status"])
        for t in tasks
    ]
    return [(ref, stands) for ref, stands in found if status in (None, stands)]


def status(parts: Parts, ref: Ref) -> str | None:
    """How the task stands, None when it is not there any more."""
    parts.authorize(ref.principal, "read", ref.scope)
    task = parts.ledger.by_keys(ref.scope, [ref.key]).get(ref.key)
    if task is None or not _is_task(task):
        return None
    return "failed" if ref.id in _now_aged(parts, ref.scope) else str(task.metadata["status"])


def shown(tasks: Sequence[Entry], *, now: datetime, open_max_age: float) -> tuple[list[Shown], list[Shown]]:
    """What a prompt shows of a session's tasks: the tasks, and their living temporary notes, oldest first.

    Open tasks come first, parents before children, then the newest of those that have ended and not expired, as they
    ended. A line changes only when its task does.
    """
    mine = list(filter(_is_task, tasks))
    aged = _aged(mine, now, age=open_max_age)
    running = _nested([t for t in mine if _is_open(t) and t.id not in aged], None)
    names = {t.id: t.metadata["name"] for t in running}
    ended = [t for t in mine if not _is_open(t) and not _expired(t, now)]
    ended.sort(key=lambda t: (t.updated_at, t.number))
    lines = [Shown(t.id, _lines(t.metadata, within=names.get(t.metadata["parent"]))) for t in running]
    lines += [Shown(t.id, _lines(t.metadata), over=True) for t in ended[-MOST_OVER:]]
    notes = [
        (n["at"], Shown(t.id, [_cut(f"{t.metadata['name']}: {n['text']}")]))
        for t in running
        for n in _living(t.metadata["notes"], now)
        if n["until"] is not None
    ]
    return lines, [n for _, n in sorted(notes, key=lambda n: datetime.fromisoformat(n[0]))]


def kept(parts: Parts, tasks: Sequence[Entry], *, now: datetime) -> list[State]:
    """The open ones of *tasks* as JSON, oldest first: what they hold, for `again_open`."""
    mine = sorted(filter(_is_task, tasks), key=lambda t: t.number)
    aged = _aged(mine, now, age=parts.settings.tasks.open_max_age)
    names = ("name", "progress", "step", "values", "parent")
    return [
        {"id": t.id, "created_at": t.created_at.isoformat(), **{n: t.metadata[n] for n in names}}
        | {"notes": _living(t.metadata["notes"], now)}
        for t in mine
        if _is_open(t) and t.id not in aged
    ]


def again_open(
    parts: Parts, scope: Scope, wanted: Sequence[State], tasks: Sequence[Entry], *, now: datetime
) -> list[Entry]:
    """Entries that make tasks open as `kept` told of them: new versions of those among *tasks*, else new ones."""
    by_id = {t.id: t for t in tasks if _is_task(t)}
    by_name = {t.metadata["name"]: t for t in by_id.values() if _is_open(t)}
    found = []
    for given in wanted:
        entry = by_name.get(given["name"]) or by_id.get(given["id"])
        if entry is None:
            key = parts.ledger.key(scope, id=given["id"])
            begun = datetime.fromisoformat(given["created_at"])
            entry = replace(
                _new(parts, scope, given["name"], parent=None, now=now), id=given["id"], key=key, created_at=begun
            )
        about = {k: v for k, v in given.items() if k in _NEW}
        state = {**copied(_NEW, what="a task"), **copied(about, what="a task")}
        found.append(_version(parts, entry, state, now=now))
    return found


def shown_until(tasks: Sequence[Entry], *, now: datetime, open_max_age: float) -> datetime | None:
    """When a prompt shows something else of the same tasks, because something of them has come to its end; None for never."""
    mine = list(filter(_is_task, tasks))
    ends = [t.expires_at for t in mine if t.expires_at is not None]
    ends += [_after(t.updated_at, open_max_age) for t in mine if _is_open(t)]
    ends += [datetime.fromisoformat(n["until"]) for t in mine for n in t.metadata["notes"] if n["until"] is not None]
    return min((end for end in ends if end > now), default=None)


def checked_name(name: str) -> str:
    """A task's name, which is a text that is not blank and not too long; `InputError` otherwise."""
    return _named(name, what="a task's name")


def checked_value_name(name: str) -> str:
    """A value's name, which is a text that is not blank and not too long; `InputError` otherwise."""
    return _named(name, what="a value's name")


# -- writing


def _change(parts: Parts, ref: Ref, change: Callable[[State, datetime], None]) -> None:
    """Have *change* change the state of the open task."""

    def plan(tasks: Sequence[Entry], now: datetime) -> _Plan:
        task = _held(ref, next((t for t in tasks if t.key == ref.key), None))
        state = copied(task.metadata, what="a task")
        change(state, now)
        return _Plan(task, [_version(parts, task, state, now=now)])

    _write(parts, ref.scope, plan)


def _write(parts: Parts, scope: Scope, plan: Callable[[Sequence[Entry], datetime], _Plan]) -> Entry:
    """Write what *plan* makes of the session's tasks, and what is in RAM with it.

    First, open tasks that have reached their age are ended. Ended tasks that have expired are deleted with it. The task that
    the plan is about, as planned.
    """
    resident = parts.resident(scope)
    with resident.lock:
        now = parts.clock()
        age = parts.settings.tasks.open_max_age
        for old in _aged(parts.window(scope).tasks, now, age=age).values():
            _write_once(parts, scope, partial(_ended_for_age, parts, old), now=now)
        return _write_once(parts, scope, plan, now=now)


def _ended_for_age(parts: Parts, old: Entry, tasks: Sequence[Entry], now: datetime) -> _Plan:
    task = next((t for t in tasks if t.key == old.key and _is_open(t)), None)
    if task is None:  # it was a part of one that was ended before, or somebody was faster
        return _Plan(old)
    age = str(timedelta(seconds=parts.settings.tasks.open_max_age)).removesuffix(", 0:00:00")
    return _ended(parts, task, tasks, "failed", f"nothing was done for {age}", now=now)


def _write_once(
    parts: Parts, scope: Scope, plan: Callable[[Sequence[Entry], datetime], _Plan], *, now: datetime
) -> Entry:
    """One transaction, made again if somebody was faster; hold the resident's lock."""
    resident = parts.resident(scope)
    for left in reversed(range(_TRIES)):
        tasks = list(filter(_is_task, parts.window(scope).tasks))
        made = plan(tasks, now)
        if not made.changed:
            return made.task
        over = [*made.over, *(t for t in tasks if not _is_open(t) and _expired(t, now))]
        try:
            written, session = parts.ledger.work(
                scope,
                tasks=[recorded(t) for t in made.changed],
                over=over,
                outcome=None if made.outcome is None else recorded(made.outcome),
                now=microseconds(now),
            )
            _take(parts, scope, written, over, session=session)
            break
        except (ConflictError, NotFound):
            resident.forget()
            if not left:
                raise
        except BaseException:
            resident.forget()
            raise
    parts.changed()
    return made.task


def _take(parts: Parts, scope: Scope, written: Sequence[Record], over: Sequence[Entry], *, session: int) -> None:
    """Bring what is in RAM up to date; hold the resident's lock."""
    gone = {t.number for t in over}
    left = [r for r in written if r.entry.number not in gone]
    take(parts, scope, left, session=session)
    resident = parts.resident(scope)
    if resident.index is not None:
        for number in gone:
            resident.index.drop(number)
    window = parts.window(scope)
    window.session = session  # it may have been loaded before the session had a row
    now_there = {t.number: t for t in window.tasks if t.number not in gone}
    now_there.update((r.entry.number, r.entry) for r in left if r.entry.type is MemoryType.WORKING)
    window.tasks = list(now_there.values())


def _held(ref: Ref, task: Entry | None, *, aged: bool = False) -> Entry:
    """*task*, which is to be the open one that *ref* means; `TaskError` otherwise. *aged*: its time is over."""
    if task is None or not _is_task(task):
        raise TaskError(
            f"task {ref.name!r} is not there any more: its session was cleared, or it ended and its time is over; "
            f"begin it anew with session.task({ref.name!r})",
            name=ref.name,
        )
    if aged or not _is_open(task):
        stands = "failed" if aged else task.metadata["status"]
        raise TaskError(
            f"task {ref.name!r} is over ({stands}): what it held is in its outcome, which search finds; "
            f"begin it anew with session.task({ref.name!r})",
            name=ref.name,
        )
    return task


# -- entries


def _new(parts: Parts, scope: Scope, name: str, *, parent: Entry | None, now: datetime) -> Entry:
    own_id = f"task-{new_id()[:12]}"
    state = {**copied(_NEW, what="a task"), "name": name, "parent": None if parent is None else parent.id}
    entry = Entry(
        id=own_id,
        key=parts.ledger.key(scope, id=own_id),
        type=MemoryType.WORKING,
        content="",
        scope=scope,
        seq=0,
        created_at=now,
        written_at=now,
        updated_at=now,
        provenance="told",
    )
    return _version(parts, entry, state, now=now)


def _version(parts: Parts, task: Entry, state: State, *, now: datetime, expires_at: datetime | None = None) -> Entry:
    """*task* with a new state, without temporary notes that have outlived their time."""
    text = "\n".join(_lines(state))
    return replace(
        task,
        content=text,
        metadata={**state, "notes": _living(state["notes"], now)},
        updated_at=now,
        expires_at=expires_at,
        tokens=parts.counter.count(text),
    )


def _ended(
    parts: Parts, task: Entry, tasks: Sequence[Entry], status: Ending, text: str | None, *, now: datetime
) -> _Plan:
    """End *task*, and first, in the same way, those of the open *tasks* that are parts of it."""
    doomed = [*reversed(_nested([t for t in tasks if _is_open(t)], task.id)), task]
    age = parts.settings.tasks.completed_max_age
    changed = []
    for one in doomed:
        empty = {**copied(_NEW, what="a task"), **{k: one.metadata[k] for k in ("name", "parent")}}
        state = {**empty, "status": status, "result": text if one is task or status == "failed" else None}
        changed.append(_version(parts, one, state, now=now, expires_at=_after(now, age)))
    outcome = _outcome(parts, task.scope, doomed, changed, now=now)
    return _Plan(task, changed, changed if age <= 0 else (), outcome)


def _outcome(parts: Parts, scope: Scope, before: Sequence[Entry], after: Sequence[Entry], *, now: datetime) -> Entry:
    """The episode that tells how tasks ended, from what they were before and after; the last is the one meant."""
    task, state = before[-1], after[-1].metadata
    told = [_told(b.metadata, a.metadata) for b, a in zip(before, after, strict=True)]
    text = " ".join(reversed(told))
    metadata = {k: state[k] for k in ("kind", "name", "status")}
    metadata |= {"started": task.created_at.isoformat(), "ended": now.isoformat()}
    if state["parent"] is not None:
        metadata["parent"] = state["parent"]
    own_id = new_id()
    return Entry(
        id=own_id,
        key=parts.ledger.key(scope, id=own_id),
        type=MemoryType.EPISODIC,
        content=text,
        scope=scope,
        seq=0,
        created_at=now,
        written_at=now,
        updated_at=now,
        metadata=metadata,
        provenance="derived",
        sources=tuple(t.id for t in reversed(before)),
        tokens=parts.counter.count(text),
    )


def _told(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How a task ended, in a sentence or two, and what it held: the values set last and the newest lasting notes."""
    head = f"Task {_line(before['name'])}: {after['status']}"
    if after["result"] is not None:
        head += (". " if after["status"] == "completed" else ": ") + after["result"]
    values = [_valued(*item) for item in before["values"].items()][-MOST_DETAILS:]
    notes = [_cut(n["text"]) for n in before["notes"] if n["until"] is None][-MOST_DETAILS:]
    return " ".join(_sentence(text) for text in (head, "; ".join(values), "; ".join(notes)) if text)


# -- what tasks are and how they read


def _is_task(entry: Entry) -> bool:
    return entry.metadata.get("kind") == "task" and entry.metadata.keys() >= _NEW.keys()


def _is_open(task: Entry) -> bool:
    return bool(task.metadata["status"] == "open")


def _expired(task: Entry, now: datetime) -> bool:
    return task.expires_at is not None and task.expires_at <= now


def _aged(tasks: Sequence[Entry], now: datetime, *, age: float) -> dict[str, Entry]:
    """The open tasks, by id, to which, and to whose parts, nothing was written for *age* seconds."""
    running = [t for t in tasks if _is_task(t) and _is_open(t)]
    old = [t for t in running if _after(t.updated_at, age) <= now]
    if not old:
        return {}
    fresh = {t.id for t in running} - {t.id for t in old}
    fresh |= {i for t in running if t.id in fresh for i in _above(t, running)}
    return {t.id: t for t in old if t.id not in fresh}


def _now_aged(parts: Parts, scope: Scope) -> dict[str, Entry]:
    resident = parts.resident(scope)
    with resident.lock:
        return _aged(parts.window(scope).tasks, parts.clock(), age=parts.settings.tasks.open_max_age)


def _living(notes: Sequence[State], now: datetime) -> list[State]:
    return [n for n in notes if n["until"] is None or datetime.fromisoformat(n["until"]) > now]


def _parent(task: Entry, running: Mapping[str, Entry]) -> Entry | None:
    """The open task that *task* is a part of. It was begun before, so that no circle can be written into metadata."""
    parent = running.get(task.metadata["parent"])
    return parent if parent is not None and parent.number < task.number else None


def _above(task: Entry, running: Sequence[Entry]) -> set[str]:
    """Ids of the open tasks that *task* is a part of."""
    by_id = {t.id: t for t in running}
    above: set[str] = set()
    parent = _parent(task, by_id)
    while parent is not None:
        above.add(parent.id)
        parent = _parent(parent, by_id)
    return above


def _nested(running: Sequence[Entry], root: str | None) -> list[Entry]:
    """The open tasks below *root* (an id), or all of them; parents before children, in the order of their beginnings."""
    by_id = {t.id: t for t in running}
    children = defaultdict(list)
    for task in sorted(running, key=lambda t: t.number):
        parent = _parent(task, by_id)
        children[None if parent is None else parent.id].append(task)
    found: list[Entry] = []
    waiting = children[root][::-1]
    while waiting:
        found.append(waiting.pop())
        waiting += children[found[-1].id][::-1]
    return found


def _lines(state: Mapping[str, Any], *, within: str | None = None) -> list[str]:
    """Heading, values and lasting notes, each on a line. *within*: the name of the task that it is a part of."""
    heading = _line(state["name"]) + (f" (part of {_line(within)})" if within is not None else "")
    about = [state["status"]]
    if state["progress"] is not None:
        about.append(f"{state['progress']:.0%} done")
    about += [_cut(text) for text in (state["step"], state["result"]) if text is not None]
    values = [f"- {_valued(*item)}" for item in state["values"].items()]
    notes = [f"- {_cut(n['text'])}" for n in state["notes"] if n["until"] is None]
    return [f"{heading}: {', '.join(about)}", *values, *notes]


def _valued(name: str, value: Any) -> str:
    return _cut(f"{name}: {value if isinstance(value, str) else dumped(value, what=name)}")


def _line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str) -> str:
    line = _line(text)
    return line if len(line) <= LONGEST_DETAIL else f"{line[: LONGEST_DETAIL - len(_REST)]}{_REST}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…", "。", "！", "？", _REST)) else f"{text}."


# -- what callers give


def _named(name: str, *, what: str) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME:
        raise InputError(f"{what} is a text of 1 to {LONGEST_NAME} characters, not {brief(name)}")
    return encodable(name)


def _result(result: BaseException | str | None) -> str | None:
    """What a task came to, or what went wrong, as text; None for nothing."""
    if isinstance(result, BaseException):
        try:
            text = str(result)
        except Exception:  # whoever wrote that error; the task has failed all the same
            text = ""
        kind = type(result).__name__
        return _cut(f"{kind}: {text}" if text.strip() else kind).encode(errors="replace").decode()
    if result is not None and not isinstance(result, str):
        raise MessageError(f"what a task came to is a text, or an error, not {brief(result)}")
    return encodable(result).strip() or None if result is not None else None


def _after(now: datetime, seconds: float) -> datetime:
    try:
        return now + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


__all__ = [
    "LONGEST_DETAIL",
    "LONGEST_NAME",
    "LONGEST_NOTE",
    "LONGEST_VALUE",
    "MOST_DETAILS",
    "MOST_NOTES",
    "MOST_OVER",
    "MOST_VALUES",
    "Ref",
    "Shown",
    "Stored",
    "again_open",
    "begin",
    "checked_name",
    "checked_value_name",
    "end",
    "kept",
    "listed",
    "note",
    "progress",
    "read",
    "set_value",
    "shown",
    "status",
]
