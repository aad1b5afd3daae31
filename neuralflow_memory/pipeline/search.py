"""`search`: authorize, embed the question, let the entries of the scope be scored, and walk down the ranking."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate, chain, islice, repeat
from operator import mul
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ClosedError, ModelMismatch, QueryError, ScopeError, brief
from ..rules import ranking
from ..rules.filters import Filter, parse
from ..rules.question import depends_on_day, understood
from ..types import TYPE_NUMBER, TYPES, Entry, Hit, MemoryType, Scope, microseconds, utc
from . import cached
from .cached import Holds
from .index import embed_now, embed_question
from .parts import EmbeddingModel, Parts
from .resident import Resident
from .scope_index import ScopeIndex
from .scoring import SEEDS, Compared, compared

Within = Literal["user", "session", "agent"]
Row = npt.NDArray[np.bool_]

LONGEST_QUERY = 10_000  # characters; an embedder reads the first few hundred words anyway
RERANKED = 50  # candidates that a reranker reads
_EPISODIC = TYPE_NUMBER[MemoryType.EPISODIC]
_INT64 = np.iinfo(np.int64)
_AT_FIRST = 64  # hits that are read at once, at most
_MORE = 8  # times as many seeds, once what was compared is used up
_TRIES = 3  # of a search during which another embedding model is taken up
_FROM_INDEX = 200  # candidates that the vector index is asked for


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a hit must fulfil beside being relevant."""

    types: Iterable[MemoryType] | None = None
    filter: Mapping[str, Any] | None = None
    since: datetime | str | None = None
    until: datetime | str | None = None
    within: Within | None = None
    as_of: datetime | str | None = None
    """What held then; None: what holds now; "ever": whatever has."""
    besides: frozenset[int] = frozenset()
    """Numbers of entries that are no hits and count for nothing, such as the question itself."""
    summaries: bool = True
    """Whether running summaries, which repeat what their turns say, may be hits where *types* asks for episodes."""


def search(
    parts: Parts, scope: Scope, query: str, *, principal: str | None, k: int, conditions: Conditions
) -> list[Hit]:
    """The *k* best entries of the scope for *query*, best first."""
    if not isinstance(query, str) or not query.strip():
        raise QueryError("the query is empty: say what to look for")
    if len(query) > LONGEST_QUERY:
        raise QueryError(
            f"the query has {len(query)} characters; pass the part that asks, at most {LONGEST_QUERY} characters"
        )
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise QueryError(f"k is a number of hits, at least 1, not {brief(k)}")
    parts.authorize(principal, "read", scope)
    if conditions.types is not None:
        conditions = replace(conditions, types=checked_types(conditions.types))

    holds = Holds()

    def find() -> tuple[list[Hit], Mapping[int, Entry]]:
        hits = ranked(parts, scope, query, principal=principal, conditions=conditions, expected=k, holds=holds)
        return list(islice(hits, min(k, sys.maxsize))), {}

    place = cached.place(parts, scope, "search", query, k, cached.as_asked(conditions, scope))
    found, _ = cached.hits(parts, scope, place, find, holds=holds)
    return [Hit(cached.own(hit.entry), hit.score, hit.signals) for hit in found]


def ranked(
    parts: Parts,
    scope: Scope,
    query: str,
    *,
    principal: str | None,
    conditions: Conditions,
    expected: int = _AT_FIRST,
    holds: Holds | None = None,
) -> Iterator[Hit]:
    """Every entry that fulfils *conditions*, best first, read a few at a time, *expected* first.

    What is not relevant at all is left out. The entries are for reading only. *holds* is told how long this holds.
    """
    holds = holds or Holds()
    parts.authorize(principal, "read", scope)
    condition = parse(conditions.filter)
    kinds = checked_types(conditions.types)
    session = _session(parts, scope, conditions.within)
    resident = parts.resident(scope)
    using, model = _in_use(parts)
    with resident.lock:
        fresh = resident.index is None
        index = resident.load(model)
        rows, pending, held = index.rows, index.kept(_waiting), index.holds_vectors
    if fresh:
        parts.residents.weigh(resident)
    if not rows:
        return
    now = parts.clock()
    with resident.lock:
        asked = understood(query, speakers=index.kept(ScopeIndex.names), known=index.knows, now=now)
        for times in [_expiries] if conditions.as_of is not None else [_expiries, _bounds]:
            later = index.kept(times)
            if len(later):  # from one of them on, something else is found
                holds.until = int(np.min(later, where=later > microseconds(now), initial=holds.until))
    if depends_on_day(query):
        holds.end_with(now)
    # Recency changes with each moment, and the vector index when it likes.
    holds.sure &= held and not parts.settings.ranking.recency
    question = _question(parts, scope, asked.text, using=using, model=model, pending=pending, holds=holds)
    near: dict[int, float] | None = None
    if not held:
        near = {}
        with tolerated(parts, "searching by words alone", holds=holds):
            near = _near(parts, scope, question, using)

    def compare(seeds: int) -> Compared:
        nonlocal using, model, question
        for left in reversed(range(_TRIES)):
            with resident.lock:
                model = model or _known(parts, using)
                index = resident.load(model)
                if question is None or near is not None or not index.model or (model and index.model == model[0]):
                    return scored(index, seeds)
            # Another model was taken up since the question was embedded.
            using, model = _in_use(parts)
            question = None
            if left:
                question = _question(parts, scope, asked.text, using=using, model=model, pending=False, holds=holds)
        with resident.lock:
            return scored(resident.load(model), seeds)

    def scored(index: ScopeIndex, seeds: int) -> Compared:
        def exactly(numbers: list[int]) -> list[tuple[int, bytes]]:
            return parts.ledger.vectors(numbers[0] >> 32, index.model, numbers) if index.model and numbers else []

        counted = index.alive
        if not conditions.summaries or kinds is None or MemoryType.EPISODIC not in kinds:
            counted = index.kept(_without_summaries)
        if conditions.besides:
            counted = counted.copy()
            counted[[row for number in conditions.besides if (row := index.row(number)) >= 0]] = False
        wanted = counted & _allowed(parts, scope, index, conditions, kinds=kinds, session=session)
        return compared(
            index,
            asked,
            question,
            near,
            exactly=exactly,
            counted=counted,
            wanted=wanted,
            weights=parts.settings.ranking,
            now=microseconds(parts.clock()),
            seeds=seeds,
        )

    reranks = parts.reranker is not None and parts.settings.ranking.rerank > 0
    first = _AT_FIRST if reranks else min(expected, _AT_FIRST)
    hits = _walked(parts, scope, compare, condition, first=first, holds=holds)
    yield from _reranked(parts, query, hits, holds=holds) if reranks else hits


def _walked(
    parts: Parts,
    scope: Scope,
    compare: Callable[[int], Compared],
    condition: Filter | None,
    *,
    first: int,
    holds: Holds,
) -> Iterator[Hit]:
    """Hits that fulfil *condition*, best first; where not all entries were compared, at the end of those more are."""
    given: set[int] = set()
    for seeds in accumulate(repeat(_MORE), mul, initial=SEEDS):
        found = compare(seeds)
        for top in _tops(found.scores, found.allowed, first=first):
            numbers = found.numbers[top].tolist()
            entries = cached.entries(parts, scope, numbers)
            holds.sure &= len(entries) == len(top)  # what can't be read may be there again
            scores = np.minimum(found.scores[top], 1.0).tolist()
            shares = found.shares[:, top].T.astype(np.float64).round(4).tolist()
            for number, score, own in zip(numbers, scores, shares, strict=True):
                entry = entries.get(number)
                if entry is not None and number not in given and (condition is None or condition.matches(entry)):
                    yield Hit(entry, score, dict(zip(found.signals, own, strict=True)))
        if found.complete:
            return
        given.update(found.numbers[found.allowed].tolist())


def _reranked(parts: Parts, query: str, hits: Iterator[Hit], *, holds: Holds) -> Iterator[Hit]:
    """*hits* with the reranker's say in the first of them, which leaves the others behind, as they were."""
    first = list(islice(hits, RERANKED))
    relevance = _relevance(parts, query, [hit.entry for hit in first], holds=holds)
    if relevance is None:
        yield from chain(first, hits)
        return
    kept, added = ranking.shares(first[0].signals, "rerank", parts.settings.ranking)

    def judged(hit: Hit, opinion: float) -> Hit:
        shares = {name: round(kept * share, 4) for name, share in hit.signals.items()}
        return Hit(
            hit.entry, min(1.0, kept * hit.score + added * opinion), {**shares, "rerank": round(added * opinion, 4)}
        )

    yield from sorted(map(judged, first, relevance.tolist()), key=lambda hit: -hit.score)
    yield from (judged(hit, 0.0) for hit in hits)


def _relevance(parts: Parts, query: str, entries: Sequence[Entry], *, holds: Holds) -> ranking.Scores | None:
    """How sure the reranker is of each of *entries*, 0..1. None where there is nothing to ask, and if that fails."""
    if parts.reranker is None or not entries:
        return None
    texts = [f"{e.name}: {e.content}" if e.name else e.content for e in entries]  # the question may name who said it
    relevance: ranking.Scores | None = None
    with tolerated(parts, "ranking without the reranker", holds=holds, count="search_without_reranker"):
        given = np.asarray(parts.reranker.rerank(query, texts), np.float64)
        if given.shape != (len(texts),) or not np.isfinite(given).all():
            raise ValueError(
                f"it returned an array of shape {given.shape} for {len(texts)} texts, or one that is not finite; it must "
                "return one finite number per text"
            )
        relevance = ranking.outstanding(given)
    return relevance  # noqa: RET504 - None where the block above was left by an error


def _tops(scores: ranking.Scores, allowed: Row, *, first: int) -> Iterator[npt.NDArray[np.int64]]:
    """The ranking in pieces that grow, so that the first hits cost little and a rare filter is not slow."""
    size, given = first, 0
    total = int(allowed.sum())
    while given < total:
        rows = ranking.best(scores, allowed, k=min(total, given + size))
        yield rows[given:]
        given, size = len(rows), size * 4


def _session(parts: Parts, scope: Scope, within: Within | None) -> int | None:
    """The session to stay in, None for the whole owner."""
    if within not in (None, "user", "session", "agent"):
        raise QueryError(f"within must be 'user', 'session' or 'agent', not {brief(within)}")
    if within == "user" and scope.user_id is None:
        raise ScopeError("within='user' needs a user: open the session with user_id=...")
    if within == "agent" and scope.agent_id is None:
        raise ScopeError("within='agent' needs an agent: open the session with agent_id=...")
    if within != "session":
        return None
    return parts.ledger.session_number(scope) or -1


def _model(parts: Parts) -> tuple[int, int] | None:
    """Number and dimensions of the embedding model, None until it has embedded something."""
    return _in_use(parts)[1]


def _in_use(parts: Parts) -> tuple[EmbeddingModel | None, tuple[int, int] | None]:
    """The embedding model; and its number and dimensions, None until it has embedded something."""
    while True:
        using = parts.model
        known = _known(parts, using)
        if parts.model is using:  # who takes up another one says so here before the ledger forgets this one
            return using, known


def _known(parts: Parts, using: EmbeddingModel | None) -> tuple[int, int] | None:
    return None if using is None else parts.known_model(using.id)


def index_of(parts: Parts, resident: Resident) -> ScopeIndex:
    """What search reads of the resident's owner; hold its lock."""
    return resident.load(_model(parts))


def turns_before(parts: Parts, scope: Scope, numbers: Sequence[int], *, holds: Holds) -> dict[int, Entry]:
    """The turns that come before those of *numbers*, in their sessions, by the number of the later one."""
    resident = parts.resident(scope)
    with resident.lock:
        index = index_of(parts, resident)
        rows = {n: int(index.before[row]) for n in numbers if (row := index.row(n)) >= 0}
        earlier = {n: int(index.number[row]) for n, row in rows.items() if row >= 0}
    found = cached.entries(parts, scope, list(earlier.values())) if earlier else {}
    holds.sure &= found.keys() >= set(earlier.values())
    return {n: found[other] for n, other in earlier.items() if other in found}


def checked_types(types: Iterable[MemoryType] | None) -> list[MemoryType] | None:
    """*types* as a list of known ones; `QueryError` otherwise."""
    if types is None:
        return None
    kinds = list(types) if isinstance(types, Iterable) and not isinstance(types, str) else [None]
    if not all(kind in TYPES for kind in kinds):
        raise QueryError(f"types is a list of {', '.join(TYPES)}, not {brief(types)}")
    return [MemoryType(str(kind)) for kind in kinds]


def _allowed(
    parts: Parts,
    scope: Scope,
    index: ScopeIndex,
    conditions: Conditions,
    *,
    kinds: list[MemoryType] | None,
    session: int | None,
) -> Row:
    allowed: Row = index.alive.copy()
    if len(index.kept(_expiries)):
        allowed &= index.expires > microseconds(parts.clock())
    if session is not None:
        allowed &= index.session == session
    if conditions.within == "agent":
        allowed &= index.agent == scope.agent_id
    if kinds is not None:
        named = np.zeros(len(TYPES), np.bool_)
        named[[TYPE_NUMBER[kind] for kind in kinds]] = True
        allowed &= named[index.kind]
    if conditions.since is not None:
        allowed &= index.created >= microseconds(checked_time(conditions.since, "since"))
    if conditions.until is not None:
        allowed &= index.created <= microseconds(checked_time(conditions.until, "until"))
    if conditions.as_of != "ever" and (conditions.as_of is not None or len(index.kept(_bounds))):
        allowed &= _held(parts, index, conditions.as_of)
    return allowed


def _waiting(index: ScopeIndex) -> bool:
    return bool(index.pending.any())


def _without_summaries(index: ScopeIndex) -> Row:
    found: Row = index.alive & ((index.seq > 0) | (index.kind != _EPISODIC))
    return found


def _expiries(index: ScopeIndex) -> npt.NDArray[np.int64]:
    """When entries expire, of those that do."""
    found: npt.NDArray[np.int64] = index.expires[index.expires != _INT64.max]
    return found


def _bounds(index: ScopeIndex) -> npt.NDArray[np.int64]:
    """From when, and until when, entries hold, of those that do not always."""
    return np.concatenate(
        [index.valid_from[index.valid_from != _INT64.min], index.valid_to[index.valid_to != _INT64.max]]
    )


def _held(parts: Parts, index: ScopeIndex, as_of: datetime | str | None) -> Row:
    """What holds now, or had been said and held *as_of* a time."""
    if as_of is None:
        now = microseconds(parts.clock())
        return (index.valid_from <= now) & (now < index.valid_to)
    then = microseconds(checked_time(as_of, "as_of"))
    begun = np.where(index.valid_from == _INT64.min, index.created, index.valid_from)
    return (begun <= then) & (then < index.valid_to)


def checked_time(value: datetime | str, name: str) -> datetime:
    """*value* as an aware time; `QueryError` if it is none."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise QueryError(
                f"{name} must be a datetime or an ISO time such as 2026-05-03, not {brief(value)}"
            ) from None
    if not isinstance(value, datetime):
        raise QueryError(f"{name} must be a datetime or an ISO time such as 2026-05-03, not {brief(value)}")
    return utc(value)


def _question(
    parts: Parts,
    scope: Scope,
    query: str,
    *,
    using: EmbeddingModel | None,
    model: tuple[int, int] | None,
    pending: bool,
    holds: Holds,
) -> npt.NDArray[np.float32] | None:
    """The question's vector, with what the scope has pending embedded first. None, and words alone, if that fails."""
    if using is None and not parts.outdated:
        return None
    vector: npt.NDArray[np.float32] | None = None
    with tolerated(parts, "searching by words alone", holds=holds):
        _refuse_outdated(parts, using, model)
        if pending:
            with tolerated(parts, "searching new entries by words alone", holds=holds):
                embed_now(parts, scope)
        assert using is not None
        model = model or _known(parts, using)  # the first entries embedded make it known
        vector = embed_question(parts, scope, query, model=using, dimensions=model[1] if model else None)
    return vector  # noqa: RET504 - None where the block above was left by an error


def _refuse_outdated(parts: Parts, using: EmbeddingModel | None, known: tuple[int, int] | None) -> None:
    """Raise `ModelMismatch` if another process has taken up another model than *using*, whose vectors are not there any more."""
    if known is not None:
        return
    stored = parts.ledger.models()
    if using is None or (stored and stored[0][0] != using.id and parts.model is using):
        raise outdated(parts, stored[0][0] if stored else "another model", None if using is None else using.id)


def outdated(parts: Parts, stored: str, given: str | None) -> ModelMismatch:
    """What to do in a process whose model is not that of the folder any more."""
    return ModelMismatch(
        f"{parts.settings.path} is indexed with {stored!r}, which another process has taken up since it was opened here"
        f"{'' if given is None else f' with {given!r}'}; open it again with that model, or call reindex(embedder=...) with it",
        stored=stored,
        given=given or "",
    )


@contextmanager
def tolerated(parts: Parts, consequence: str, *, holds: Holds, count: str = "search_without_vectors") -> Iterator[None]:
    """Turn what an embedder, an index or a reranker raises into a warning, and *count* it: the rest still answers."""
    try:
        yield
    except ClosedError:
        raise
    except Exception as error:
        holds.sure = False
        parts.tally[count] += 1
        parts.trouble = f"search: {type(error).__name__}: {error}"
        warnings.warn(f"{consequence}: {error}", RuntimeWarning, stacklevel=4)


def _near(
    parts: Parts, scope: Scope, question: npt.NDArray[np.float32] | None, using: EmbeddingModel | None
) -> dict[int, float]:
    """The dense part from the vector index: similarity by entry number, best first, existence checked against the ledger.

    Nothing as long as the index is of another model than *using*.
    """
    store = parts.store
    if store is None or question is None or using is None:
        return {}
    found = dict(store.query(question, partition=parts.ledger.partition(scope), k=_FROM_INDEX))
    if store.model_id not in (None, using.id):
        return {}
    there = parts.ledger.by_keys(scope, list(found), texts="bare")
    return {there[key].number: similarity for key, similarity in found.items() if key in there}


__all__ = [
    "LONGEST_QUERY",
    "Conditions",
    "Within",
    "checked_time",
    "checked_types",
    "index_of",
    "outdated",
    "ranked",
    "search",
    "tolerated",
    "turns_before",
]
