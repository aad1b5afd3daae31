"""`context`: tasks, the summary, the recent turns and what search finds, fitted to the token budget.

In order of need: the newest user turn, the host's instructions, pinned turns, tasks, the summary, temporary notes, a share
for hits, the other recent turns newest first, then hits with what is left. How the prompt is laid out, `blocks` says.
Everything considered is in the report, in or out, and why.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from types import MappingProxyType
from typing import Literal

from ..errors import BudgetError, InputError, brief
from ..rules.budget import MOST_MARGIN, REPLY_OVERHEAD, Unit, items, message_tokens, opening, units
from ..types import Candidate, Context, Entry, Hit, MemoryType, Message, Scope
from . import cached
from .blocks import MOST_HITS, Blocks, Quote, brief_turns, line_of, quotes
from .cached import HIT, Holds
from .ingest import own_copy
from .parts import Parts
from .resident import Window
from .search import LONGEST_QUERY, Conditions, ranked, turns_before
from .tasks import Shown, shown_until
from .tasks import shown as shown_tasks

_HITS_FROM = (MemoryType.SHORT_TERM, MemoryType.LONG_TERM, MemoryType.EPISODIC)
_CUT = " […]"
_MESSAGE = 500  # bytes that one takes beside its text, about
_MOST_TOKENS = 1 << 40  # no prompt is longer, and floats are exact up to there
_NONE: Mapping[str, Message] = MappingProxyType({})
_NO_PLACE = "pinned, and no room for it"
_QUOTED = "pinned; quoted beside the summary, since no user turn comes before it"
_LEAST_CUT = 64  # tokens to which an older message may be cut at most
_STEPS = (
    4  # the oldest turns yield by so many parts of the conversation's cap, so that the prompt's front rarely changes
)


@dataclass(slots=True)
class _Plan:
    """What is chosen so far. `chosen` maps rows of the window to the messages sent for them."""

    budget: int
    entries: Sequence[Entry]
    messages: list[Message]
    units: list[Unit]
    chosen: dict[int, Message] = field(default_factory=dict)
    costs: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    used: int = REPLY_OVERHEAD
    given: Container[str] = ()
    """Ids of turns that the caller's own messages stand for."""

    @property
    def left(self) -> int:
        return self.budget - self.used

    def take(self, rows: Sequence[int], reason: str) -> None:
        for row in rows:
            self.put(row, self.messages[row], self.entries[row].tokens, reason)

    def put(self, row: int, message: Message, cost: int, reason: str) -> None:
        self.chosen[row], self.costs[row], self.reasons[row] = message, cost, reason
        self.used += cost

    def cost(self, rows: Sequence[int]) -> int:
        return sum(self.entries[row].tokens for row in rows)

    def drop_oldest(self, *, keep: set[int]) -> bool:
        """Give up the oldest item that is not to be kept; False when there is none."""
        old = [row for row in sorted(self.chosen) if row not in keep]
        if not old:
            return False
        starts = [row for row in old if self.messages[row].role == "user"]
        end = starts[1] if len(starts) > 1 else old[-1] + 1
        gone = {row for u in self.units for row in u.rows if old[0] <= u.rows[0] < end} & set(old)
        for row in gone or {old[0]}:
            del self.chosen[row]
            self.used -= self.costs.pop(row)
            self.reasons[row] = "no room beside what is needed more"
        return True


@dataclass(frozen=True, slots=True)
class _Built:
    """A context that was built, and what its session learned from it."""

    context: Context
    room: int
    turn: int
    quoted: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes in RAM, about."""
        said = sum(_MESSAGE + sys.getsizeof(m.content) for m in self.context.messages)
        return said + HIT * len(self.context.report)


def context(
    parts: Parts,
    scope: Scope,
    query: str | None,
    *,
    principal: str | None,
    max_tokens: int | None = None,
    reserve_tokens: int = 0,
    search: bool | Literal["once"] = True,
    overflow: Literal["raise", "truncate"] = "raise",
    pending_calls: bool = False,
    given: Mapping[str, Message] = _NONE,
    only: Container[str] | None = None,
) -> Context:
    """The messages for the next call of the model; with *reserve_tokens* never more than *max_tokens*.

    *search* "once": what was found for the newest user turn is used until it is answered. *given*: messages to send in
    place of turns, by their ids; the objects themselves, if they need no cut. *only*: no other turns (ids) are sent.
    """
    parts.authorize(principal, "read", scope)
    place = None
    if search is True and not given and only is None and isinstance(query, str | None):
        asked = (query, max_tokens, reserve_tokens, overflow, bool(pending_calls))
        place = cached.place(parts, scope, "context", scope.session_id, *asked)
    resident = parts.resident(scope)
    with resident.lock:
        window = parts.window(scope, resident)
        stored, summary, tasks = list(window.entries), window.summary, list(window.tasks)
    margin = parts.margins(scope.tenant).get(window.model or "", 1.0)
    budget = _budget(parts, max_tokens, reserve_tokens, overflow, margin)
    kept = None if place is None else parts.hot.kept(place)
    if kept is not None and kept.value.context.margin == margin:
        built: _Built = kept.value
        _learn_room(parts, window, room=built.room, turn=built.turn)
        parts.used(built.quoted)
        return _sent(parts, scope, window, _own(built.context), reserve_tokens=reserve_tokens)
    now, holds = parts.clock(), Holds()
    entries = stored
    if given or only is not None:
        entries = [_as_given(parts, e, given.get(e.id)) for e in stored if only is None or e.id in only]
    messages = [given.get(e.id) or e.message for e in entries]
    plan = _Plan(budget, entries, messages, units(messages, pending_calls=pending_calls), given=given)
    for unit in plan.units:
        if unit.broken:
            plan.reasons.update(dict.fromkeys(unit.rows, unit.broken))
    caps = parts.settings.budget
    scale = min(1.0, budget / caps.total)
    rest = _newest(parts, plan, overflow=overflow)
    _opening(plan)
    _following(plan, [u for u in rest if not plan.chosen.keys() & set(u.rows)])
    needed = set(plan.chosen)
    unsent = _pinned(plan)
    blocks = Blocks(parts, together=parts.settings.context.hits_placement == "start")
    notes: Sequence[Shown] = ()
    if tasks:
        open_tasks, notes = shown_tasks(tasks, now=now, open_max_age=parts.settings.tasks.open_max_age)
        holds.end(shown_until(tasks, now=now, open_max_age=parts.settings.tasks.open_max_age))
        blocks.take_tasks(open_tasks, room=min(int(caps.task * scale), plan.left))
    blocks.take_summary(summary, unsent, room=min(int(caps.summary * scale), plan.left - blocks.cost))
    quoted = {e.key for e in unsent if line_of(e) in blocks.summary}
    for row, entry in enumerate(entries):
        if entry.key in quoted:
            plan.reasons[row], plan.costs[row] = _QUOTED, blocks.tokens([line_of(entry)])
    if notes:
        blocks.take_notes(notes, room=min(int(caps.temporary * scale), plan.left - blocks.cost))
    if search == "once":
        hits = _hits_once(parts, scope, window, stored, principal=principal)
    else:
        hits = _hits(parts, scope, query, stored, principal=principal, holds=holds) if search else []
    wanted = sum(q.cost for q in hits[:MOST_HITS] if q.relevant)
    left = plan.left - blocks.cost
    # What the hits don't want, older turns may have.
    cap = max(int(caps.conversation * scale), min(caps.conversation, left - wanted))
    room = left - min(int(budget * caps.hits_share), wanted)
    instructions = {row for row in plan.chosen if plan.messages[row].role in ("system", "developer")}
    room = min(room, cap - sum(plan.costs[row] for row in plan.chosen if row not in instructions))
    room_sent, turn = _room(plan, room=room)
    _learn_room(parts, window, room=room_sent, turn=turn)
    _older(parts, plan, room=room, step=max(1, int(caps.conversation * scale) // _STEPS))
    # Of a turn that was cut, a hit may bring back what answers.
    sent = {entries[row].key for row, m in plan.chosen.items() if m is messages[row]} | quoted
    if hits:
        blocks.take_quotes(hits, room=plan.left - blocks.cost, sent=sent)
    quoted_now = tuple(quote.hit.entry.number for quote in blocks.quotes)
    if quoted_now:
        parts.used(quoted_now)
    while (cost := blocks.cost) > plan.left and (plan.drop_oldest(keep=needed) or blocks.shrink()):
        pass
    laid, stable = _ordered(parts, plan, blocks)
    done = Context(
        tuple(laid),
        plan.used + cost,
        budget,
        tuple(_reported(plan, blocks)),
        estimated=not parts.counter.exact,
        margin=margin,
        cacheable=stable,
    )
    if place is not None and holds.sure and holds.until > place.now:
        built = _Built(_own(done), room_sent, turn, quoted_now)
        parts.hot.keep(place, built, size=built.size, until=holds.until)
    return _sent(parts, scope, window, done, reserve_tokens=reserve_tokens)


def _sent(parts: Parts, scope: Scope, window: Window, context: Context, *, reserve_tokens: int) -> Context:
    """*context*, with what its session is to know of it."""
    window.sent.tokens = context.tokens + reserve_tokens
    if window.cramped:
        parts.full(scope)  # what prompts have no room for is to be in the summary
    return context


def _room(plan: _Plan, *, room: int) -> tuple[int, int]:
    """How much of what may be folded the prompt has room for, *room* and what is chosen already; and its user turn."""
    front = opening(plan.messages)
    room += sum(c for row, c in plan.costs.items() if row >= front and not plan.entries[row].pinned)
    return room, max((plan.entries[row].number for row in plan.chosen if plan.messages[row].role == "user"), default=0)


def _learn_room(parts: Parts, window: Window, *, room: int, turn: int) -> None:
    """Note the room that a prompt had, and the user turn that it is to answer."""
    sent = window.sent
    sent.room = room
    if sent.room >= parts.settings.pruning.max_context_tokens:
        sent.short = 0
    elif turn != sent.turn:
        sent.short += 1
    sent.turn = turn


def report_usage(parts: Parts, scope: Scope, model: str, tokens: int, *, principal: str | None) -> float:
    """Learn from what *model* was charged for the session's last prompt; its safety margin now."""
    parts.authorize(principal, "write", scope)
    if not isinstance(model, str) or not model:
        raise InputError(f"model is the model's name, not {brief(model)}")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens <= 0:
        raise InputError(f"tokens is the number of input tokens, at least 1, not {brief(tokens)}")
    resident = parts.resident(scope)
    with resident.lock:
        window = parts.window(scope)
        if window.sent.tokens == 0:
            return parts.margins(scope.tenant).get(model, 1.0)
        window.model = model
        # A report that is far off is about another prompt, or about much that nobody reserved.
        most = int(window.sent.tokens * MOST_MARGIN)
        ratio = max(min(tokens, most) / window.sent.tokens, 1 / MOST_MARGIN)
        return parts.calibrate(scope, model=model, ratio=ratio)


def _budget(parts: Parts, max_tokens: int | None, reserve_tokens: int, overflow: str, margin: float) -> int:
    total = parts.settings.budget.total if max_tokens is None else max_tokens
    if overflow not in ("raise", "truncate"):
        raise InputError(f"overflow must be 'raise' or 'truncate', not {brief(overflow)}")
    total, reserve_tokens = checked_tokens("max_tokens", total), checked_tokens("reserve_tokens", reserve_tokens)
    available = int(min(total, _MOST_TOKENS) / margin) - reserve_tokens
    if available < REPLY_OVERHEAD:
        raise BudgetError(
            f"of max_tokens={brief(total)} nothing is left beside reserve_tokens={brief(reserve_tokens)}"
            + (f" with a safety margin of {margin:.2f}" if margin > 1 else "")
            + "; raise the one or lower the other",
            needed=REPLY_OVERHEAD,
            available=available,
        )
    return available


def checked_tokens(name: str, value: int) -> int:
    """*value*, if it is a number of tokens."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name} is a number of tokens, not {brief(value)}")
    return value


def _newest(parts: Parts, plan: _Plan, *, overflow: str) -> list[Unit]:
    """The newest user turn, which is always there, and the last of what followed it; the rest of that is returned."""
    user = next((row for row in reversed(range(len(plan.messages))) if plan.messages[row].role == "user"), None)
    if user is not None:
        _must(parts, plan, user, overflow=overflow)
    following = [u for u in plan.units if not u.broken and (user is None or u.rows[0] > user)]
    if not following:
        return []
    last = following.pop()
    if plan.cost(last.rows) <= plan.left:
        plan.take(last.rows, "follows the newest user turn")
        return following
    _shrink(parts, plan, last.rows)  # without it, an agent would make the same call again
    return []


def _following(plan: _Plan, rest: Sequence[Unit]) -> None:
    """What else followed the newest user turn, newest first, as long as it fits."""
    for unit in reversed(rest):
        if plan.cost(unit.rows) > plan.left:
            break
        plan.take(unit.rows, "follows the newest user turn")


def _must(parts: Parts, plan: _Plan, row: int, *, overflow: str) -> None:
    needed = plan.entries[row].tokens
    if needed <= plan.left:
        plan.take([row], "the newest user turn")
        return
    cut = _truncated(parts, plan.messages[row], plan.left) if overflow == "truncate" else None
    if cut is None:
        raise BudgetError(
            f"the newest user turn needs {needed + REPLY_OVERHEAD} tokens and {plan.budget} are available; raise max_tokens, "
            "lower reserve_tokens, or pass overflow='truncate' to have it cut",
            needed=needed + REPLY_OVERHEAD,
            available=plan.budget,
        )
    plan.put(row, cut, parts.count(cut), "the newest user turn, cut to fit")


def _shrink(parts: Parts, plan: _Plan, rows: Sequence[int]) -> None:
    """Take a unit that is too long by cutting its contents, longest first; calls and ids stay whole."""
    cut = {row: plan.messages[row] for row in rows}
    costs = {row: plan.entries[row].tokens for row in rows}
    for row in sorted(rows, key=lambda r: -costs[r]):
        over = sum(costs.values()) - plan.left
        if over <= 0:
            break
        floor = parts.count(replace(cut[row], content="", payload=cut[row].payload or {}))
        shorter = _truncated(parts, cut[row], max(floor + 8, costs[row] - over))
        if shorter is not None:
            cut[row], costs[row] = shorter, parts.count(shorter)
    if sum(costs.values()) <= plan.left:
        for row in rows:
            plan.put(row, cut[row], costs[row], "follows the newest user turn, cut to fit")


def _truncated(parts: Parts, message: Message, tokens: int) -> Message | None:
    """*message* with its text cut so that it costs at most *tokens*; None if not even a character fits.

    Two thirds of what stays are its beginning, one is its end, where a paste has its question and a tool its error.
    """
    text = message.text or " ".join(f"[{b['type']}]" for b in message.content if isinstance(b, Mapping))
    low, high = 1, len(text)
    fitted: Message | None = None
    while low <= high:
        middle = (low + high) // 2
        end = middle // 3
        kept = f"{text[: middle - end].rstrip()}{_CUT} {text[len(text) - end :].lstrip()}".rstrip()
        tried = replace(message, content=kept, payload=None)
        if message_tokens(tried, parts.counter.count) <= tokens:
            fitted, low = tried, middle + 1
        else:
            high = middle - 1
    return fitted


def _opening(plan: _Plan) -> None:
    """The host's own instructions, at the front of the window."""
    for row in range(opening(plan.messages)):
        if row not in plan.chosen and plan.entries[row].tokens <= plan.left:
            plan.take([row], "instructions")


def _pinned(plan: _Plan) -> list[Entry]:
    """Take pinned turns, newest first, each with its user turn; those that have none are returned, to be quoted."""
    unsent: list[Entry] = []
    if not any(entry.pinned for entry in plan.entries):
        return unsent
    for start, whole in reversed(_items(plan)):
        rows = [row for rows in whole if plan.entries[rows[0]].pinned for row in rows if row not in plan.chosen]
        if not rows:
            continue
        if plan.messages[start].role != "user" or not (plan.entries[start].pinned or start in plan.chosen):
            unsent[:0] = [plan.entries[row] for row in rows if plan.entries[row].content.strip()]
        elif plan.cost(rows) <= plan.left:
            plan.take(rows, "pinned")
            continue
        plan.reasons.update(dict.fromkeys(rows, _NO_PLACE))
    return unsent


def _older(parts: Parts, plan: _Plan, *, room: int, step: int) -> None:
    """Whole items before the newest, as many of the newest as fit.

    Where not all fit, long messages are cut to size, and the oldest items yield by steps: the first item sent is one that
    begins a *step* of tokens, so that the prompt's front stays the same for several turns.
    """
    newest = max((row for row in plan.chosen if plan.messages[row].role == "user"), default=len(plan.messages))
    while step > max(1, room // 2):  # by halves, so that it rarely changes
        step //= 2
    older = _items_before(plan, newest)
    costs = [plan.cost(rows) for rows in older]
    cut: dict[int, Message] = {}
    if sum(costs) > room:
        size = max(step, _LEAST_CUT)
        cut = {r: m for rows in older for r in rows if (m := _cut_to(parts, plan, r, tokens=size)) is not None}
        costs = [sum(parts.count(cut[r]) if r in cut else plan.entries[r].tokens for r in rows) for rows in older]
    first = _first_item(costs, room=room, step=step)
    for rows in older[first:]:
        plan.take([row for row in rows if row not in cut], "recent")
        for row in cut.keys() & set(rows) if cut else ():
            plan.put(row, cut[row], parts.count(cut[row]), "recent, cut to size")


def _items_before(plan: _Plan, newest: int) -> list[list[int]]:
    """Rows of the items that end before the row *newest*, without what is sent anyway or never."""
    found: list[list[int]] = []
    for start, whole in _items(plan):
        if start >= newest:
            break
        if plan.messages[start].role == "user":
            found.append([row for rows in whole for row in rows if row not in plan.chosen])
        else:
            for row in takewhile(lambda row: plan.messages[row].role != "user", range(len(plan.messages))):
                plan.reasons.setdefault(row, "stands before the first user turn")
    return found


def _items(plan: _Plan) -> list[tuple[int, list[tuple[int, ...]]]]:
    """The items of the window: the row where each starts, and its units that can be sent."""
    found: list[tuple[int, list[tuple[int, ...]]]] = [(start, []) for start in items(plan.messages)]
    place = 0
    for unit in plan.units:
        while place + 1 < len(found) and found[place + 1][0] <= unit.rows[0]:
            place += 1
        if not unit.broken:
            found[place][1].append(unit.rows)
    return found


def _first_item(costs: Sequence[int], *, room: int, step: int) -> int:
    """The first item to send: the oldest that fits *room* with all after it, of those that begin a step."""
    before, held = 0, sum(costs)
    for place, cost in enumerate(costs):
        begins = place == 0 or before // step > (before - costs[place - 1]) // step
        if begins and held <= room:
            return place
        before += cost
        held -= cost
    return len(costs)


def _cut_to(parts: Parts, plan: _Plan, row: int, *, tokens: int) -> Message | None:
    """A message of more than *tokens*, cut; None for one that is shorter, or holds more than text."""
    more = any(block["type"] != "text" for block in plan.entries[row].blocks or ())
    if more or plan.entries[row].tokens <= tokens:
        return None
    return _truncated(parts, plan.messages[row], tokens)


def _hits(
    parts: Parts, scope: Scope, query: str | None, entries: Sequence[Entry], *, principal: str | None, holds: Holds
) -> list[Quote]:
    if query is None:
        query = next((e.content for e in reversed(entries) if e.role == "user"), "")
    if not isinstance(query, str):
        raise InputError(f"the query is a text or None, not {brief(query)}")
    query = query.strip()[:LONGEST_QUERY]
    if not query:
        return []
    own = frozenset(e.number for e in entries if e.role == "user" and e.content.strip() == query)
    conditions = Conditions(types=_HITS_FROM, besides=own, summaries=False)
    most = MOST_HITS + len(entries)

    def find() -> tuple[list[Hit], Mapping[int, Entry]]:
        ranking = ranked(parts, scope, query, principal=principal, conditions=conditions, holds=holds)
        found = list(islice(ranking, most))
        return found, turns_before(parts, scope, [n for n in brief_turns(found) if n not in own], holds=holds)

    place = cached.place(parts, scope, "hits", query, most, cached.as_asked(conditions, scope))
    found, before = cached.hits(parts, scope, place, find, holds=holds)
    return quotes(parts, found, query, before=before)


def _hits_once(
    parts: Parts, scope: Scope, window: Window, entries: Sequence[Entry], *, principal: str | None
) -> list[Quote]:
    """What was found when the newest user turn was new, as far as it is still there and says the same."""
    asked = next(((e.number, e.version) for e in reversed(entries) if e.role == "user"), (0, 0))
    before = window.sent.hits
    if before is None or before[0] != asked:
        hits = _hits(parts, scope, None, entries, principal=principal, holds=Holds())
        window.sent.hits = asked, [q for q in hits if q.relevant]
        return hits
    shown = [(q, [e for e in (q.hit.entry, q.asked) if e is not None]) for q in before[1]]
    live = (
        parts.ledger.by_numbers(scope, list({e.number for _, own in shown for e in own}), texts="skip") if shown else {}
    )
    return [q for q, own in shown if all(e.number in live and live[e.number].version == e.version for e in own)]


def _as_given(parts: Parts, entry: Entry, message: Message | None) -> Entry:
    """*entry* with what *message*, which is sent in its place, says and costs."""
    if message is None or message.content == (entry.content if entry.blocks is None else entry.blocks):
        return entry
    blocks = None if isinstance(message.content, str) else tuple(message.content)
    return replace(entry, content=message.text, blocks=blocks, tokens=parts.count(message))


def _ordered(parts: Parts, plan: _Plan, blocks: Blocks) -> tuple[list[Message], int]:
    """The messages, and how many tokens at their front will be the same in the next prompt."""
    # A late result moves up to its call: providers refuse what stands between the two.
    rows = [row for unit in plan.units for row in unit.rows if row in plan.chosen]
    roles = [plan.messages[row].role for row in rows]
    front = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(rows))
    # The end block stands before the newest user turn; after everything, if that has its answer and another one is due.
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=front)
    answered = bool(rows) and roles[-1] == "assistant" and not plan.messages[rows[-1]].tool_calls
    place = len(rows) if answered else asked
    chosen = ((plan.entries[row].id, plan.chosen[row]) for row in rows)
    sent = [m if own_id in plan.given else _given(m) for own_id, m in chosen]
    first, last = blocks.front, blocks.end
    laid = [*sent[:front], *([first] if first else []), *sent[front:place], *([last] if last else []), *sent[place:]]
    stable = sum(plan.costs[row] for row in (rows[:place] if last else rows))
    stable += message_tokens(first, parts.count_again) if first else 0
    if blocks.together:  # the next question's hits will stand there
        stable = sum(plan.costs[row] for row in rows[:front])
    return laid, stable


def _given(message: Message) -> Message:
    """A message for the caller to keep: nothing in it that may be changed is ours."""
    changeable = message.metadata or message.tool_calls or message.payload or not isinstance(message.content, str)
    return own_copy(message) if changeable else message


def _own(context: Context) -> Context:
    """*context* with nothing in it that may be changed and is anybody else's."""
    messages = tuple(_given(m) if m.metadata else replace(_given(m), metadata={}) for m in context.messages)
    report = tuple(
        Candidate(c.part, c.id, c.tokens, c.included, c.reason, c.score, dict(c.signals)) for c in context.report
    )
    return replace(context, messages=messages, report=report)


def _reported(plan: _Plan, blocks: Blocks) -> list[Candidate]:
    """Every candidate, in the order of the prompt's parts."""
    found: dict[str, list[Candidate]] = {"system": [], "task": [], "summary": [], "turn": [], "note": [], "hit": []}
    for candidate in blocks.report:
        found[candidate.part].append(candidate)
    for row, e in enumerate(plan.entries):
        part: Literal["system", "turn"] = "system" if e.role in ("system", "developer") else "turn"
        cost, reason = plan.costs.get(row, e.tokens), plan.reasons.get(row, "older than what fits")
        found[part].append(Candidate(part, e.id, cost, row in plan.chosen, reason))
    return [candidate for part in found.values() for candidate in part]


__all__ = ["checked_tokens", "context", "report_usage"]
