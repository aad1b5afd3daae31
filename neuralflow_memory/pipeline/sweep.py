"""`sweep`: what says the same is merged, what nobody uses becomes cold, what is used again comes back, what has expired or is
selected by retention is archived or deleted.

After merging everything is planned, from what is known of entries without their texts; then it is done in batches of one
transaction each. What is cut short is planned anew by the next sweep, which finds what is left to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .._ids import new_id
from ..errors import InputError, NotFound, brief
from ..protocols import Standing
from ..rules.retention import due
from ..rules.tiering import DAY, cooled, warmed
from ..types import MemoryType, Move, Scope, SweepReport, microseconds
from .archive import damaged, freeze, rewrite, thaw
from .cached import forget
from .consolidate import merge
from .index import PARKED
from .parts import Parts
from .values import delete_expired

_DELETED_AT_ONCE = 200  # entries that retention deletes in one transaction
_MUCH = 0.25  # of an owner's entries
_NOTE = "swept"
_STEPS: tuple[Literal["merge", "warm", "archive", "delete"], ...] = ("merge", "warm", "archive", "delete")
_COMPARED = "compared:"
"""In the ledger's notes, before the number of an owner: what its knowledge was when nothing in it said the same."""


@dataclass(frozen=True, slots=True)
class _Owned:
    """The moves of one owner, and how many entries it has."""

    scope: Scope
    entries: int
    moves: list[Move] = field(default_factory=list)
    merged: int = 0

    def numbers(self, what: str) -> list[int]:
        return [m.number for m in self.moves if m.what == what]


def sweep(parts: Parts, *, dry_run: bool) -> SweepReport:
    """Move entries to where they belong; with *dry_run* only say what would be moved, and why."""
    if dry_run:
        return _swept(parts, dry_run=True)
    with parts.exclusive("sweep"):
        report = _swept(parts, dry_run=False)
    note: dict[str, Any] = {what: report.count(what) for what in _STEPS}
    note |= {"at": report.at.isoformat(), "run": report.run, "done": report.done, "refused": report.refused}
    parts.ledger.note(_NOTE, json.dumps(note))
    return report


def last_sweep(parts: Parts) -> dict[str, Any] | None:
    """When the folder was last swept, and what came of it."""
    noted = parts.ledger.noted(_NOTE)
    return None if noted is None else json.loads(noted)


def _swept(parts: Parts, *, dry_run: bool) -> SweepReport:
    parts.write_uses()
    now = parts.clock()
    report = SweepReport(f"sweep-{new_id()[:12]}", now, dry_run, ())
    expired = _expired(parts, now=microseconds(now), dry_run=dry_run)
    planned = [
        _planned(parts, number, scope, now=microseconds(now), dry_run=dry_run)
        for number, scope in parts.ledger.owners()
    ]
    doomed, entries = sum(len(own.numbers("delete")) for own in planned), sum(own.entries for own in planned)
    most = parts.settings.retention.max_delete_share
    refused = None
    if doomed > most * entries:
        refused = (
            f"{doomed:,} of {entries:,} entries would be deleted, a greater share than retention.max_delete_share "
            f"({most:g}): nothing was deleted; see that the options are meant so, and raise it for a sweep"
        )
    report = replace(report, moves=tuple(m for own in planned for m in own.moves), expired=expired, refused=refused)
    if dry_run:
        return replace(report, damaged=damaged(parts))
    parts.hot.entries.expire(now=microseconds(now))
    done = sum(own.merged + _done(parts, own, report) for own in planned)
    kept = int(parts.settings.retention.undo_days * DAY)
    rewritten = 0 if parts.closing else rewrite(parts, discarded_before=microseconds(now) - kept)
    return replace(report, done=done, rewritten=rewritten, complete=not parts.closing, damaged=damaged(parts))


def _expired(parts: Parts, *, now: int, dry_run: bool) -> int:
    """How many keyed values had expired, and were deleted unless this is a *dry_run*."""
    count = 0
    for scope, expired in parts.ledger.expired_values(now=now):
        if parts.closing:
            break
        count += expired if dry_run else delete_expired(parts, scope)
    return count


def _merged(parts: Parts, owner: int, scope: Scope, standings: Sequence[Standing], *, dry_run: bool) -> Iterator[Move]:
    """Merge what says the same in an owner's knowledge, if any of it is new since nothing did."""
    known = [s for s in standings if s.type is MemoryType.LONG_TERM]
    state = f"{parts.model_id} {len(known)} {max((s.number for s in known), default=0)} {sum(s.version for s in known)}"
    if not known or state == parts.ledger.noted(f"{_COMPARED}{owner}") or parts.closing:
        return
    found = merge(parts, scope, dry_run=dry_run)
    for one in found:
        for own_id in one.merged:
            reason = f"{one.reason}: {one.kept}"
            session = scope.session_id if scope.user_id is None else None
            yield Move("merge", own_id, MemoryType.LONG_TERM, scope.user_id, session, "duplicates", reason)
    # What has no vector yet may turn out to say the same once it has one.
    settled = parts.model_id is None or not parts.ledger.waiting(parked_at=PARKED)
    if not (dry_run or found or parts.closing) and settled:
        parts.ledger.note(f"{_COMPARED}{owner}", state)


def _planned(parts: Parts, owner: int, scope: Scope, *, now: int, dry_run: bool) -> _Owned:
    """What is to be done with an owner's entries: each is moved once, and deleting comes before all else."""
    settings = parts.settings
    standings = parts.ledger.standings(owner)
    merged = list(_merged(parts, owner, scope, standings, dry_run=dry_run))
    if merged and not dry_run:
        standings = parts.ledger.standings(owner)
    over = {d.standing.number: d for d in due(standings, settings.retention, settings.archive, now=now)}
    found = _Owned(scope, len(standings), merged, 0 if dry_run else len(merged))
    for standing in standings:
        own = over.get(standing.number)
        if own is not None and own.delete:
            found.moves.append(_move("delete", standing, scope, own.rule, own.reason))
        elif standing.archived_at is not None:
            if (back := warmed(standing)) is not None:
                found.moves.append(_move("warm", standing, scope, *back))
        elif own is not None:
            found.moves.append(_move("archive", standing, scope, own.rule, own.reason))
        elif (
            standing.exempt is None
            and (away := cooled(standing, settings.tiers, settings.archive, now=now)) is not None
        ):
            found.moves.append(_move("archive", standing, scope, *away))
    return found


def _move(what: Literal["archive", "warm", "delete"], standing: Standing, scope: Scope, rule: str, reason: str) -> Move:
    session = standing.session_id or (scope.session_id if scope.user_id is None else None)
    return Move(what, standing.id, standing.type, scope.user_id, session, rule, reason, standing.number)


def _done(parts: Parts, own: _Owned, report: SweepReport) -> int:
    """Do what is planned for an owner; how many entries were moved."""
    done = len(thaw(parts, own.scope, own.numbers("warm")))
    # Turns of one chat side by side: its transcript then opens few blocks.
    going = sorted((m for m in own.moves if m.what == "archive"), key=lambda m: (m.session_id or "", m.number))
    cold = len(freeze(parts, own.scope, [m.number for m in going]))
    if cold > own.entries * _MUCH:
        resident = parts.resident(own.scope)
        with resident.lock:
            resident.forget()  # what is read anew has no room for vectors that are gone
    done += cold
    if report.refused is None:
        done += _deleted(parts, own.scope, own.numbers("delete"), run=report.run, now=microseconds(report.at))
    return done


def _deleted(parts: Parts, scope: Scope, numbers: Sequence[int], *, run: str, now: int) -> int:
    done = 0
    undo = parts.settings.retention.undo_days > 0
    resident = parts.resident(scope)
    for start in range(0, len(numbers), _DELETED_AT_ONCE):
        if parts.closing:
            break
        with resident.lock:
            try:
                some = numbers[start : start + _DELETED_AT_ONCE]
                done += len(parts.ledger.discard(some, run=run, now=now, undo=undo))
            finally:
                resident.forget()
        forget(parts, scope)
        parts.changed()
    return done


def undo(parts: Parts, run: str) -> int:
    """Bring back what a sweep's retention deleted, if it still can be; how many entries."""
    if not isinstance(run, str):
        raise InputError(f"run is that of a report, such as 'sweep-4f1c...', not {brief(run)}")
    back = parts.ledger.bring_back(run)
    if not back:
        raise NotFound(
            f"nothing that {brief(run)} deleted can be brought back: it deleted nothing, or that was more than "
            "retention.undo_days ago, or was undone",
            id=run,
        )
    for owner in {number >> 32 for number in back}:
        scope = parts.ledger.owner_scope(owner << 32)
        if scope is not None:
            resident = parts.resident(scope)
            with resident.lock:
                resident.forget()
    parts.changed()
    return len(back)


__all__ = ["last_sweep", "sweep", "undo"]
