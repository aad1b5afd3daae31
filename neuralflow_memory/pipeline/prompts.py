"""A prompt from a host's own list of messages: the session's turns in the host's words, memory's blocks, and what else is there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from ..types import Context, Entry, Message, Scope
from . import assemble
from .ingest import INJECTED, Messages, listed
from .parts import Parts
from .threads import edited, is_recalled, resent, says


@dataclass(frozen=True, slots=True)
class _List:
    """What a host's list is to the window.

    Attributes:
        turns: The messages that are turns of the window, by the turns' ids.
        others: The messages to be sent as they are, each with the turns before it in the list, the nearest first.
    """

    turns: dict[str, Message]
    others: list[tuple[list[str], Message]]


def prompt(
    parts: Parts,
    scope: Scope,
    messages: Messages,
    *,
    principal: str | None,
    max_tokens: int | None,
    reserve_tokens: int,
    search: bool,
    older: bool,
) -> Context:
    """The messages for the next call of the model, which with *reserve_tokens* are never more than *max_tokens*."""
    parts.authorize(principal, "read", scope)
    given = listed(messages, injected=True)
    resident = parts.resident(scope)
    with resident.lock:
        window = list(parts.window(scope).entries)
    found = _found(window, given)
    asked = max((row for row, e in enumerate(window) if e.role == "user"), default=len(window))
    run = {e.id for e in window[asked + 1 :]}
    shown = {
        e.id: replace(m, id=e.id) if m.id != e.id else m
        for e in window
        if (m := found.turns.get(e.id)) is not None and (says(e, m) or edited(e, m) or (is_recalled(m) and e.id in run))
    }
    cost = sum(parts.count(m) for _, m in found.others)
    context = assemble.context(
        parts,
        scope,
        None,
        principal=principal,
        max_tokens=max_tokens,
        reserve_tokens=assemble.checked_tokens("reserve_tokens", reserve_tokens) + cost,
        search="once" if search else False,
        overflow="truncate",
        given=shown,
        only=None if older else {*found.turns, *(e.id for e in window[asked:])},
    )
    laid = _laid(context.messages, found)
    same = takewhile(lambda pair: pair[0] is pair[1], zip(laid, context.messages, strict=False))
    stable = min(context.cacheable, sum(parts.count(m) for m, _ in same)) if found.others else context.cacheable
    own = {id(m): found.turns[own_id] for own_id, m in shown.items()}
    return replace(
        context,
        messages=tuple(own.get(id(m), m) for m in laid),
        tokens=context.tokens + cost,
        budget=context.budget + cost,
        cacheable=stable,
    )


def _found(window: Sequence[Entry], given: Sequence[Message]) -> _List:
    """Which of a list's messages are turns of the window.

    Of the others, those before the last of these are older turns, which the summary stands for; except for those that are
    marked as nobody's turns.
    """
    rows: dict[str | None, int] = {e.id: row for row, e in enumerate(window)}
    turns = [(place, m) for place, m in enumerate(given) if m.metadata.get(INJECTED[0]) != INJECTED[1]]
    own = {place: window[row].id for place, m in reversed(turns) if (row := rows.pop(m.id, None)) is not None}
    if not own:
        end = resent(window, [m for _, m in turns])
        size = min(end, len(window))
        pairs = zip(turns[end - size : end], window[len(window) - size :], strict=True)
        own = {place: e.id for (place, _), e in pairs}
    last = max(own, default=-1)
    older = {place for place, _ in turns if place < last} - own.keys()
    before: list[str] = []
    others: list[tuple[list[str], Message]] = []
    for place, message in enumerate(given):
        if place in own:
            before = [own[place], *before]
        elif place not in older:
            others.append((before, message))
    return _List({own_id: given[place] for place, own_id in own.items()}, others)


def _laid(messages: Sequence[Message], found: _List) -> list[Message]:
    """*messages* with the host's others in their places: after the nearest turn before them that is sent."""
    sent = {m.id for m in messages}
    after: dict[str | None, list[Message]] = defaultdict(list)
    for before, message in found.others:
        after[next((own_id for own_id in before if own_id in sent), None)].append(message)
    front = after.pop(None, [])
    laid = [m for m in front if m.role in ("system", "developer")]
    waiting = [m for m in front if m.role not in ("system", "developer")]
    for message in messages:
        # Nothing stands among instructions, or between a call and its results.
        if message.role not in ("system", "developer", "tool"):
            laid += waiting
            waiting = []
        laid.append(message)
        waiting += after.get(message.id, ())
    return [*laid, *waiting]


__all__ = ["prompt"]
