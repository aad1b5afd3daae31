"""How long entries of a user are kept, and how many: what is over leaves, oldest or least important first, and why.

Which rules an entry has: those of `retention`, where it is knowledge or an episode; those of its type, if it has some; and
over both those of its tags. What is pinned, in the window, a task or a running summary has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..config import Cold, Keep, Retention
from ..protocols import Standing
from ..types import MemoryType
from .tiering import DAY, ended, idle_days, warmed

KEPT_BY_DEFAULT = frozenset({MemoryType.LONG_TERM, MemoryType.EPISODIC})
"""The types that `retention` is about unless it names others."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds for an entry. `group`: those that `max_entries` counts together; `named`: what option said so."""

    group: str
    retention_days: float | None
    max_entries: int | None
    keep_importance: float
    delete: bool
    named: str = "retention"


@dataclass(frozen=True, slots=True)
class Due:
    """An entry whose time is over: to be archived, or deleted."""

    standing: Standing
    delete: bool
    rule: str
    reason: str


def policy(standing: Standing, retention: Retention) -> Policy | None:
    """The rules of an entry, None if it is kept for good."""
    general = Policy(
        "retention",
        retention.retention_days,
        retention.max_entries,
        retention.keep_importance,
        retention.delete,
    )
    kept = retention.types.get(standing.type)
    if kept is not None:
        # A type that is named only here is not counted with knowledge, nor is it as old as that may become.
        base = general if standing.type in KEPT_BY_DEFAULT else replace(general, retention_days=None, max_entries=None)
        found: Policy | None = _laid_over(base, kept, f"retention.types.{standing.type}", delete=retention.delete)
    else:
        found = general if standing.type in KEPT_BY_DEFAULT else None
    of_tags = [
        _laid_over(
            found or replace(general, retention_days=None, max_entries=None),
            retention.tags[tag],
            f"retention.tags.{tag}",
            delete=retention.delete,
        )
        for tag in standing.tags
        if tag in retention.tags
    ]
    return max(of_tags, key=_length) if of_tags else found


def _laid_over(base: Policy, kept: Keep, name: str, *, delete: bool) -> Policy:
    given = {field: getattr(kept, field) for field in kept.model_fields_set}
    if given.get("keep_importance", 0.0) is None:
        del given["keep_importance"]
    if "max_entries" in given:
        given["group"] = name
    # What deletes is `retention.delete` alone: a type or a tag may only be spared.
    given["delete"] = delete and given.get("delete") is not False and base.delete
    return replace(base, **given, named=name)


def _length(policy: Policy) -> tuple[bool, float, bool]:
    """How long a policy keeps: what it never deletes longest."""
    days = policy.retention_days
    return not policy.delete, float("inf") if days is None else days, policy.max_entries is None


def due(standings: Sequence[Standing], retention: Retention, archive: Cold, *, now: int) -> list[Due]:
    """What is to be archived or deleted of one user's entries, which are given whole; each once."""
    rules = {standing.number: policy(standing, retention) for standing in standings}
    found = {d.standing.number: d for d in _over_age(standings, rules, retention, archive, now=now)}
    for d in _over_number(standings, rules, found.keys(), now=now):
        found.setdefault(d.standing.number, d)
    # What is cold already needs no archiving.
    return [d for d in found.values() if d.delete or d.standing.archived_at is None]


def _over_age(
    standings: Iterable[Standing], rules: dict[int, Policy | None], retention: Retention, archive: Cold, *, now: int
) -> Iterator[Due]:
    for standing in standings:
        if standing.exempt is not None:
            continue
        own = rules[standing.number]
        delete = retention.delete if own is None else own.delete
        if standing.expires_at is not None and standing.expires_at <= now:
            yield Due(standing, delete, "expires_at", f"expired {(now - standing.expires_at) / DAY:.0f} days ago")
            continue
        if standing.importance >= (retention.keep_importance if own is None else own.keep_importance):
            continue
        idle = idle_days(standing, now=now)
        if own is not None and own.retention_days is not None and idle > own.retention_days:
            yield Due(
                standing,
                delete,
                f"{own.named}.retention_days",
                f"not used for {idle:.0f} days, and kept for {own.retention_days:g}",
            )
        elif delete and standing.archived_at is not None and archive.max_age_days is not None:
            days = (now - standing.archived_at) / DAY
            if days > archive.max_age_days and warmed(standing) is None:
                why = f"in the archive for {days:.0f} days, and kept there for {archive.max_age_days:g}"
                yield Due(standing, delete, "archive.max_age_days", why)


def _over_number(
    standings: Iterable[Standing], rules: dict[int, Policy | None], gone: Iterable[int], *, now: int
) -> Iterator[Due]:
    """Of those that are too many what holds no longer, then the least important; of equals, what was used longest ago."""
    left = set(gone)
    groups: dict[str, list[tuple[Standing, Policy]]] = {}
    for standing in standings:
        own = rules[standing.number]
        counts = own is not None and own.max_entries is not None and standing.number not in left
        # What is cold counts only where the number is kept by deleting.
        if own is not None and counts and (own.delete or standing.archived_at is None):
            groups.setdefault(own.group, []).append((standing, own))
    for group, members in groups.items():
        most = members[0][1].max_entries or 0
        over = len(members) - most
        may_go = [
            (standing, own)
            for standing, own in members
            if standing.exempt is None and standing.importance < own.keep_importance
        ]
        may_go.sort(key=lambda pair: (not ended(pair[0], now=now), pair[0].importance, pair[0].used_at, pair[0].number))
        for standing, own in may_go[: max(0, over)]:
            why = (
                f"one of {len(members):,} entries, of which {most:,} are kept; of importance {standing.importance:.2f}"
            )
            yield Due(standing, own.delete, f"{group}.max_entries", why)


__all__ = ["Due", "Policy", "due", "policy"]
