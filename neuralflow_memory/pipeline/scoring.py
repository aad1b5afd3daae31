"""What each entry of a scope scores for a question: the signals of `rules.ranking`, from the arrays of the scope."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..config import Ranking
from ..rules import ranking
from ..rules.lexical import term_ids
from ..rules.postings import Matches
from ..rules.question import ROLES, Question
from ..rules.traits import QUESTION, TIMED, WISH
from .scope_index import REACH, Floats, Rows, ScopeIndex, every

Some = Rows | slice
Mask = npt.NDArray[np.bool_]
T = TypeVar("T")

SEEDS = 256  # entries nearest by meaning, and as many by words, around which a large scope is compared
MOST_COMPARED = 8192  # entries of a scope that are all compared
_PART = 16  # a scope is compared as a whole if it has not so many times more entries than seeds
_SAMPLE, _BLOCK = 64, 32  # blocks of entries, and their size, that stand for all where an average is asked for
_EXACT = 64  # nearest entries of a scope with compressed vectors whose cosines are computed from what the ledger has
_AROUND = 4  # turns on each side whose words stand around one
_DAY = 86_400_000_000  # microseconds
_EPOCH = date(1970, 1, 1)
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Compared:
    """Entries with their scores, in arrays of one length.

    Attributes:
        numbers: Which entries.
        scores: 0..1.
        signals: Their names.
        shares: What each of them adds to the score, shape (signals, entries).
        allowed: Which of them may be hits.
        complete: Whether they are all that may be hits.
    """

    numbers: npt.NDArray[np.int64]
    scores: Floats
    signals: list[str]
    shares: Floats
    allowed: Mask
    complete: bool


def compared(
    index: ScopeIndex,
    asked: Question,
    question: Floats | None,
    near: Mapping[int, float] | None,
    *,
    exactly: Callable[[list[int]], Iterable[tuple[int, bytes]]],
    counted: Mask,
    wanted: Mask,
    weights: Ranking,
    now: int,
    seeds: int,
) -> Compared:
    """Score entries for a question: all of them, or in a large scope those around the *seeds* that are nearest.

    Args:
        index: The scope.
        asked: The question.
        question: Its vector.
        near: In place of the scope's vectors, the nearest entries that the vector index knows: cosines by number.
        exactly: Given numbers of entries, those and their vectors (float32), as they were before they were compressed.
        counted: Which entries count for anything.
        wanted: Which of them may be hits.
        weights: What each signal counts.
        now: Microseconds since 1970.
        seeds: How many entries to begin with where not all are compared.
    """
    matches = index.postings.matches(term_ids(asked.text), alive=counted)
    lexical = index.postings.bm25(matches)
    fits = _fitting(index, asked) if asked.times else None
    meaning = _Meaning(index, question, near, counted=counted)
    rows: Rows | None = None  # all, whose arrays are used as they are
    sample: Rows | None = None
    if index.rows > max(MOST_COMPARED, _PART * seeds):
        pools = [wanted] if fits is None else [wanted, wanted & fits]
        found = [meaning.nearest(pool, k=seeds) for pool in pools]
        found += [ranking.best(lexical, pool & (lexical > 0), k=seeds) for pool in pools]
        rows = index.with_neighbours(np.concatenate(found), reach=REACH)
        starts = np.linspace(0, index.rows - _BLOCK, _SAMPLE).astype(np.int64)
        sample = (starts[:, None] + np.arange(_BLOCK)).ravel()
    relevant, signals = meaning.signals(rows, sample, exactly=exactly)
    some = _some(rows)
    signals |= {
        "lexical": ranking.relative(lexical)[some],
        "around": ranking.relative(_around(index, matches, rows)),
        **_structure(index, asked, rows),
        **_standing_alone(index, some, weights=weights, now=now),
    }
    _words_stand_for_meaning(signals, index.cold[some])
    if fits is not None:
        signals["date"] = fits[some].astype(np.float32)
    shares = ranking.weighted(signals, weights)
    return Compared(
        index.number[some],  # which stay what they are, also while others write
        shares.sum(axis=0),
        list(signals),
        shares,
        wanted[some] & (relevant | (lexical[some] > 0)),
        complete=rows is None or len(rows) == index.rows,
    )


def _some(rows: Rows | None) -> Some:
    return _ALL if rows is None else rows


def _around(index: ScopeIndex, matches: Matches, rows: Rows | None) -> Floats:
    if rows is None:
        beside = index.kept(_turns_around)
        return index.postings.around(matches, lambda docs: list(beside[:, docs]), index.kept(every))
    return index.postings.around(matches, partial(index.neighbours, reach=_AROUND), rows)


def _turns_around(index: ScopeIndex) -> Rows:
    return np.array(index.neighbours(every(index), reach=_AROUND))


def _words_stand_for_meaning(signals: dict[str, Floats], cold: Mask) -> None:
    """Let what is cold, and has no vector, not fall behind for that: its words say how near it is.

    The best by words then stands where the best of the warm stands by meaning. On 2,000 made-up turns, half of them cold, what is
    cold is among the first five for 40 % of questions (43 % when all was warm), and what is warm for 57 % (61 %); without
    this, for 1 % and 62 %.
    """
    if cold.any():
        for meaning, words in (("dense", "lexical"), ("near", "around")):
            if meaning in signals:
                best = signals[meaning].max(where=~cold, initial=0.0)
                signals[meaning] = np.where(cold, best * signals[words], signals[meaning]).astype(np.float32)


class _Meaning:
    """Cosines of a scope's entries with a question, as far as they are known or asked for; 0 for what does not count."""

    def __init__(
        self, index: ScopeIndex, question: Floats | None, near: Mapping[int, float] | None, *, counted: Mask
    ) -> None:
        self._index = index
        self._counted = counted
        self._warm = counted & ~index.cold
        self._near = near
        self._question = question if index.vectors.dimensions and near is None else None
        self._average: tuple[float, float] | None = None
        if self._question is not None and index.vectors.exact:
            self._cosines = index.vectors.cosines(self._question, slice(index.rows))
            self._cosines[~counted] = 0.0
            self._average = ranking.average(self._cosines[self._warm])
            return
        self._cosines = np.zeros(index.rows, np.float32)
        if near is not None:
            self._average = ranking.average_behind(np.array(list(near.values()), np.float32), number=index.rows)
            self._cosines[:] = min(self._average[0], 0.0)
            for number, cosine in near.items():
                if (row := index.row(number)) >= 0:
                    self._cosines[row] = cosine

    def nearest(self, among: Mask, *, k: int) -> Rows:
        if self._question is not None and not self._index.vectors.exact:
            return self._index.vectors.nearest(self._question, k=k, among=among & self._warm)
        return ranking.best(self._cosines, among & (self._cosines > 0), k=k)

    def signals(
        self, rows: Rows | None, sample: Rows | None, *, exactly: Callable[[list[int]], Iterable[tuple[int, bytes]]]
    ) -> tuple[Mask, dict[str, Floats]]:
        """Which of *rows* have to do with the question, and the signals of meaning; *sample* stands for all. None: all rows."""
        index, some = self._index, _some(rows)
        if self._question is None and self._near is None:
            return np.zeros_like(index.alive[some]), {}
        if self._question is not None and not index.vectors.exact:
            self._compute(self._question, rows, sample, exactly=exactly)
        cosines, standing = self._cosines[some], self._warm[_some(sample)]
        average = self._average or ranking.average(self._cosines[_some(sample)][standing])
        signals = {"dense": ranking.standing(cosines, average)}
        if self._near is None:
            together = index.near(rows, self._cosines, counted=self._counted)
            of_sample = together if sample is rows else index.near(sample, self._cosines, counted=self._counted)
            signals["near"] = ranking.standing(together, ranking.average(of_sample[standing]))
        return cosines > 0, signals

    def _compute(
        self,
        question: Floats,
        rows: Rows | None,
        sample: Rows | None,
        *,
        exactly: Callable[[list[int]], Iterable[tuple[int, bytes]]],
    ) -> None:
        """Compute what compressed vectors tell of *rows* and *sample*, and exact cosines of the nearest."""
        index = self._index
        there = rows = index.kept(every) if rows is None else rows
        if sample is not None:
            there = index.with_neighbours(np.concatenate([rows, sample]), reach=REACH)
        self._cosines[there] = index.vectors.cosines(question, there) * self._counted[there]
        nearest = rows[np.argsort(-self._cosines[rows])[:_EXACT]]
        exact = list(exactly(index.number[nearest[self._counted[nearest]]].tolist()))
        if exact:
            vectors = np.frombuffer(b"".join(vector for _, vector in exact), np.float32)
            there = np.searchsorted(index.number, [number for number, _ in exact])
            self._cosines[there] = vectors.reshape(len(exact), -1) @ question


def _structure(index: ScopeIndex, asked: Question, rows: Rows | None) -> dict[str, Floats]:
    """The signals that come from who said it, and what kind of sentence it is; those that apply to the question."""

    def constant(work: Callable[..., T]) -> T:
        return index.kept(work) if rows is None else work(index, rows)

    signals = {"length": constant(_length)}
    if len(asked.speakers) == 1:
        said = index.speaker[_some(rows)] == next(iter(asked.speakers))
        signals["speaker"] = (said | constant(_unsaid)).astype(np.float32)
    if index.kept(_with_assistant):
        signals["wish"] = constant(_wish)
        if not asked.asks_assistant:
            signals["user"] = constant(_user)
    if asked.asks_time:
        signals["time"] = constant(_timed)
    if asked.asks:
        signals["statement"] = constant(_statement)
    return signals


def _with_assistant(index: ScopeIndex) -> bool:
    return all(label is None or label.lower() in ROLES for label in index.labels)


def _unsaid(index: ScopeIndex, rows: Some = _ALL) -> Mask:
    found: Mask = index.speaker[rows] == None  # noqa: E711 - element by element
    return found


def _user(index: ScopeIndex, rows: Some = _ALL) -> Floats:
    return (index.user[rows] | _unsaid(index, rows)).astype(np.float32)


def _wish(index: ScopeIndex, rows: Some = _ALL) -> Floats:
    return (index.user[rows] & (index.traits[rows] & WISH > 0)).astype(np.float32)


def _timed(index: ScopeIndex, rows: Some = _ALL) -> Floats:
    return (index.traits[rows] & TIMED > 0).astype(np.float32)


def _length(index: ScopeIndex, rows: Some = _ALL) -> Floats:
    return ranking.length(index.words[rows])


def _statement(index: ScopeIndex, rows: Some = _ALL) -> Floats:
    return ranking.statement(index.traits[rows] & QUESTION > 0, index.words[rows])


def _standing_alone(index: ScopeIndex, rows: Some, *, weights: Ranking, now: int) -> dict[str, Floats]:
    """The signals that don't depend on the question; those that count anything."""
    found = {}
    if weights.importance:
        found["importance"] = index.importance[rows]
    if weights.recency:
        found["recency"] = ranking.recency(index.created[rows], now=now)
    return found


def _fitting(index: ScopeIndex, asked: Question) -> Mask:
    """Rows of a day that the question may mean."""
    days = index.created // _DAY
    first = int(days.min())
    there = np.flatnonzero(np.bincount(days - first))
    fits = np.zeros(int(there[-1]) + 1, np.bool_)
    fits[there] = [any(time.fits(_EPOCH + timedelta(days=first + int(day))) for time in asked.times) for day in there]
    return fits[days - first]


__all__ = ["MOST_COMPARED", "SEEDS", "Compared", "compared"]
