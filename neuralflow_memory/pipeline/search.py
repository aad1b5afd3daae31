"""`search`: authorize, embed the question, score every entry of the scope, and walk down the ranking."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ClosedError, EmbeddingError, QueryError, ScopeError, brief
from ..rules import ranking
from ..rules.filters import Filter, parse
from ..rules.lexical import term_ids
from ..rules.question import ROLES, Question, understood
from ..rules.traits import QUESTION, TIMED, WISH
from ..rules.vectors import unit_rows
from ..types import TYPE_NUMBER, TYPES, Entry, Hit, MemoryType, Scope, microseconds, utc
from .index import embed_now
from .parts import Parts
from .resident import Resident
from .scope_index import ScopeIndex

Within = Literal["user", "session", "agent"]
Row = npt.NDArray[np.bool_]

LONGEST_QUERY = 10_000  # characters; an embedder reads the first few hundred words anyway
MOST_IN_RAM = 50_000  # entries; above, the vector index answers for the dense part
RERANKED = 50  # candidates that a reranker reads
_EPISODIC = TYPE_NUMBER[MemoryType.EPISODIC]
_AT_FIRST = 64  # hits that are read at once, at most
_AROUND = 4  # turns on each side whose words stand around one
_DAY = 86_400_000_000  # microseconds
_EPOCH = date(1970, 1, 1)
_FROM_INDEX = 200  # candidates that the vector index is asked for


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a hit must fulfil beside being relevant."""

    types: Iterable[MemoryType] | None = None
    filter: Mapping[str, Any] | None = None
    since: datetime | str | None = None
    until: datetime | str | None = None
    within: Within | None = None
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
    hits = ranked(parts, scope, query, principal=principal, conditions=conditions, expected=k)
    return list(islice(hits, min(k, sys.maxsize)))


def ranked(
    parts: Parts, scope: Scope, query: str, *, principal: str | None, conditions: Conditions, expected: int = _AT_FIRST
) -> Iterator[Hit]:
    """Every entry that fulfils *conditions*, best first, read a few at a time, *expected* first.

    What is not relevant at all is left out.
    """
    parts.authorize(principal, "read", scope)
    condition = parse(conditions.filter)
    kinds = checked_types(conditions.types)
    session = _session(parts, scope, conditions.within)
    model = _model(parts)
    resident = parts.resident(scope)
    with resident.lock:
        fresh = resident.index is None
        index = resident.load(model, most_vectors=MOST_IN_RAM)
        rows, pending = index.rows, bool(index.pending.any())
    if fresh:
        parts.residents.weigh(resident)
    if not rows:
        return
    with resident.lock:
        asked = understood(query, speakers=index.names(), known=index.knows, now=parts.clock())
    question = _question(parts, scope, asked.text, model=model, pending=pending)
    near: dict[int, float] | None = None
    if rows > MOST_IN_RAM:
        near = {}
        with _tolerated(parts, "searching by words alone"):
            near = _near(parts, scope, question)
    with resident.lock:
        index = resident.load(model or _model(parts), most_vectors=MOST_IN_RAM)
        allowed = _allowed(parts, scope, index, conditions, kinds=kinds, session=session)
        counted = index.alive.copy()
        if not conditions.summaries or kinds is None or MemoryType.EPISODIC not in kinds:
            counted &= (index.seq > 0) | (index.kind != _EPISODIC)
        counted[[index.row_of[number] for number in conditions.besides if number in index.row_of]] = False
        allowed &= counted
        signals, relevant = _signals(index, asked, question, near, counted)
        signals |= _standing_alone(index, parts)
        parts_of_score = ranking.weighted(signals, parts.settings.ranking)
        scores: ranking.Scores = np.sum(list(parts_of_score.values()), axis=0, dtype=np.float32)
        allowed &= relevant
        numbers = index.number.copy()
    reranks = parts.reranker is not None and parts.settings.ranking.rerank > 0
    tops = _tops(scores, allowed, first=_AT_FIRST if reranks else min(expected, _AT_FIRST))
    found = _read(parts, scope, tops, numbers, condition)
    first = list(islice(found, RERANKED)) if reranks else []
    relevance = _relevance(parts, query, [entry for _, entry in first])
    if relevance is not None:
        kept, added = ranking.shares(parts_of_score, "rerank", parts.settings.ranking)
        reranked = np.zeros(len(scores), np.float32)  # which leaves the others behind, as they were
        reranked[[row for row, _ in first]] = added * relevance
        parts_of_score = {name: kept * values for name, values in parts_of_score.items()} | {"rerank": reranked}
        scores = kept * scores + reranked
        first.sort(key=lambda candidate: -scores[candidate[0]])
    for row, entry in chain(first, found):
        yield Hit(
            entry,
            float(min(1.0, scores[row])),
            {name: round(float(values[row]), 4) for name, values in parts_of_score.items()},
        )


def _read(
    parts: Parts,
    scope: Scope,
    tops: Iterable[npt.NDArray[np.int64]],
    numbers: npt.NDArray[np.int64],
    condition: Filter | None,
) -> Iterator[tuple[int, Entry]]:
    """Rows of the ranking with their entries, those that fulfil *condition*."""
    for top in tops:
        found = parts.ledger.by_numbers(scope, numbers[top].tolist())
        for row in top.tolist():
            entry = found.get(int(numbers[row]))
            if entry is not None and (condition is None or condition.matches(entry)):
                yield row, entry


def _relevance(parts: Parts, query: str, entries: Sequence[Entry]) -> ranking.Scores | None:
    """How sure the reranker is of each of *entries*, 0..1. None where there is nothing to ask, and if that fails."""
    if parts.reranker is None or not entries:
        return None
    texts = [f"{e.name}: {e.content}" if e.name else e.content for e in entries]  # the question may name who said it
    relevance: ranking.Scores | None = None
    with _tolerated(parts, "ranking without the reranker", count="search_without_reranker"):
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
    return None if parts.model_id is None else parts.ledger.known_model(parts.model_id)


def index_of(parts: Parts, resident: Resident) -> ScopeIndex:
    """What search reads of the resident's owner; hold its lock."""
    return resident.load(_model(parts), most_vectors=MOST_IN_RAM)


def turns_before(parts: Parts, scope: Scope, numbers: Sequence[int]) -> dict[int, Entry]:
    """The turns that come before those of *numbers*, in their sessions, by the number of the later one."""
    resident = parts.resident(scope)
    with resident.lock:
        index = index_of(parts, resident)
        rows = {n: int(index.before[index.row_of[n]]) for n in numbers if n in index.row_of}
        earlier = {n: int(index.number[row]) for n, row in rows.items() if row >= 0}
    found = parts.ledger.by_numbers(scope, list(earlier.values())) if earlier else {}
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
    allowed: Row = index.alive & (index.expires > microseconds(parts.clock()))
    if session is not None:
        allowed &= index.session == session
    if conditions.within == "agent":
        allowed &= index.agent == scope.agent_id
    if kinds is not None:
        allowed &= np.isin(index.kind, [TYPE_NUMBER[kind] for kind in kinds])
    if conditions.since is not None:
        allowed &= index.created >= _time(conditions.since, "since")
    if conditions.until is not None:
        allowed &= index.created <= _time(conditions.until, "until")
    return allowed


def _time(value: datetime | str, name: str) -> int:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise QueryError(
                f"{name} must be a datetime or an ISO time such as 2026-05-03, not {brief(value)}"
            ) from None
    if not isinstance(value, datetime):
        raise QueryError(f"{name} must be a datetime or an ISO time such as 2026-05-03, not {brief(value)}")
    return microseconds(utc(value))


def _question(
    parts: Parts, scope: Scope, query: str, *, model: tuple[int, int] | None, pending: bool
) -> npt.NDArray[np.float32] | None:
    """The question's vector, with what the scope has pending embedded first. None, and words alone, if that fails."""
    if parts.embedder is None:
        return None
    if pending:
        with _tolerated(parts, "searching new entries by words alone"):
            embed_now(parts, scope)
    model = model or _model(parts)  # the first entries embedded make it known
    vector: npt.NDArray[np.float32] | None = None
    with _tolerated(parts, "searching by words alone"):
        given = unit_rows([parts.embedder.embed_query(query)], rows=1)[0]
        if model is not None and model[1] != len(given):
            raise EmbeddingError(f"its vectors have {len(given)} numbers, and those of this folder {model[1]}")
        vector = given
    return vector  # noqa: RET504 - None where the block above was left by an error


@contextmanager
def _tolerated(parts: Parts, consequence: str, *, count: str = "search_without_vectors") -> Iterator[None]:
    """Turn what an embedder, an index or a reranker raises into a warning, and *count* it: the rest still answers."""
    try:
        yield
    except ClosedError:
        raise
    except Exception as error:
        parts.tally[count] += 1
        parts.trouble = f"search: {type(error).__name__}: {error}"
        warnings.warn(f"{consequence}: {error}", RuntimeWarning, stacklevel=4)


def _near(parts: Parts, scope: Scope, question: npt.NDArray[np.float32] | None) -> dict[int, float]:
    """The dense part from the vector index: similarity by entry number, best first, existence checked against the ledger."""
    if parts.store is None or question is None:
        return {}
    found = dict(parts.store.query(question, partition=parts.ledger.partition(scope), k=_FROM_INDEX))
    there = parts.ledger.by_keys(scope, list(found))
    return {there[key].number: similarity for key, similarity in found.items() if key in there}


def _signals(
    index: ScopeIndex,
    asked: Question,
    question: npt.NDArray[np.float32] | None,
    near: dict[int, float] | None,
    counted: Row,
) -> tuple[dict[str, ranking.Scores], Row]:
    """The signals of `rules.ranking` that apply, each of shape (rows,); and which rows have to do with the question."""
    terms = term_ids(asked.text)
    lexical = index.postings.bm25(terms, alive=counted)
    signals = {
        "lexical": ranking.relative(lexical),
        "around": ranking.relative(index.postings.around(terms, index.neighbours(_AROUND), alive=counted)),
        "length": ranking.length(index.words),
        **_structure(index, asked),
    }
    relevant = lexical > 0
    if near is not None:
        mean, deviation = ranking.average_behind(np.array(list(near.values()), np.float32), number=index.rows)
        cosines = np.full(index.rows, min(mean, 0.0), np.float32)
        for number, similarity in near.items():
            if number in index.row_of:
                cosines[index.row_of[number]] = similarity
        relevant |= cosines > 0
        signals["dense"] = ranking.standing(cosines, (mean, deviation))
    elif question is not None and len(index.vectors):
        cosines = index.vectors @ question
        cosines[~counted] = 0.0
        relevant |= cosines > 0
        signals["dense"] = ranking.standing(cosines, ranking.average(cosines[counted]))
        together = index.near(cosines, counted=counted)
        signals["near"] = ranking.standing(together, ranking.average(together[counted]))
    return signals, relevant


def _structure(index: ScopeIndex, asked: Question) -> dict[str, ranking.Scores]:
    """The signals that come from who said it, when, and what kind of sentence it is; those that apply to the question."""
    signals: dict[str, Row] = {}
    if len(asked.speakers) == 1:
        signals["speaker"] = (index.speaker == next(iter(asked.speakers))) | (index.speaker == None)  # noqa: E711
    if all(label is None or label.lower() in ROLES for label in index.labels):
        signals["wish"] = index.user & (index.traits & WISH > 0)
        if not asked.asks_assistant:
            signals["user"] = index.user | (index.speaker == None)  # noqa: E711
    if asked.times:
        signals["date"] = _fitting(index, asked)
    if asked.asks_time:
        signals["time"] = index.traits & TIMED > 0
    found = {name: values.astype(np.float32) for name, values in signals.items()}
    if asked.asks:
        found["statement"] = ranking.statement(index.traits & QUESTION > 0, index.words)
    return found


def _standing_alone(index: ScopeIndex, parts: Parts) -> dict[str, ranking.Scores]:
    """The signals that don't depend on the question; those that count anything."""
    weights, found = parts.settings.ranking, {}
    if weights.importance:
        found["importance"] = index.importance
    if weights.recency:
        found["recency"] = ranking.recency(index.created, now=microseconds(parts.clock()))
    return found


def _fitting(index: ScopeIndex, asked: Question) -> Row:
    """Rows of a day that the question may mean."""
    days, which = np.unique(index.created // _DAY, return_inverse=True)
    fits = [any(time.fits(_EPOCH + timedelta(days=int(day))) for time in asked.times) for day in days]
    return np.array(fits, np.bool_)[which]


__all__ = ["Conditions", "Within", "checked_types", "index_of", "ranked", "search", "turns_before"]
