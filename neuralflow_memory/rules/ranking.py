"""How search ranks: signals of one kind are brought to 0..1 and added by weight (`config.Ranking`).

- dense: how far the cosine of the entry's vector and the question's is above the average of the scope.
- near: the same of the entry together with the two turns on each side, the nearest of which count most.
- lexical: BM25 of the entry (with the end of the turn before it), relative to the best of the search.
- around: BM25 of the entry and the four turns on each side as one document, relative to the best.
- speaker: it was said by the one speaker that the question names; knowledge, which nobody said, counts too.
- user: in a chat with an assistant, the user said it; not where the question is what the assistant said.
- date: it was said at a time that the question names.
- time: it says when or how long, and the question asks for that.
- wish: in a chat with an assistant, the user says how it is to behave, or what the user prefers.
- importance: that of the entry (`rules.importance`, or what it was set to).
- recency: see below.
- rerank: how far a reranker's opinion of the entry is above the average of the candidates that it was shown.
- length, statement: see below; statement counts for questions only, as who quotes a sentence may look for a question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Ranking

Scores = npt.NDArray[np.float32]
_SATURATED = np.log(21)  # twenty words say as much as they can by their number
_FALLING = 0.75
_HALF_LIFE = 30 * 86_400e6  # microseconds after which what was said counts half as recent
_SURE, _STEEP = 1.0, 2.0  # standard deviations above the mean that count as 0.5; how fast it goes on from there
_MOST = 6.0  # standard deviations above the mean that count as 1
# What cosines of unrelated texts look like, and how many entries that is worth: in a scope of few entries their own mean and
# deviation say nothing.
_MEAN, _DEVIATION, _WORTH = 0.1, 0.12, 20


def weighted(signals: Mapping[str, Scores], weights: Ranking) -> Scores:
    """Each signal's part of the score, of shape (signals, rows): they add up to it. A missing signal leaves the others its share.

    Each of *signals* has the shape (rows,).
    """
    counts = np.array([getattr(weights, name) for name in signals])
    return np.array(list(signals.values())) * (counts / (counts.sum() or 1.0)).astype(np.float32)[:, None]


def shares(signals: Iterable[str], later: str, weights: Ranking) -> tuple[float, float]:
    """What a score of *signals* keeps, and what a signal that comes *later* has, when the two are added; together 1."""
    before, weight = sum(getattr(weights, name) for name in signals), getattr(weights, later)
    share = weight / (before + weight or 1.0)
    return 1.0 - share, share


def outstanding(opinions: npt.NDArray[np.float64]) -> Scores:
    """How far each of a reranker's *opinions*, on whatever scale, stands out: a logistic curve over standard deviations.

    Few of the candidates answer a question, so the average one counts little (0.12), one that is a deviation better 0.5, two
    0.88. An outlier does not flatten the differences of the others to nothing, as it would if the best were 1 and the worst 0;
    and among two or three candidates none stands out much.
    """
    scaled = opinions / (np.abs(opinions).max() or 1.0)
    deviation = scaled.std()
    above = (scaled - scaled.mean()) / deviation if deviation > 1e-6 else np.zeros_like(scaled)  # noise is no opinion
    share: Scores = (1.0 / (1.0 + np.exp(_STEEP * (_SURE - above)))).astype(np.float32)
    return share


def relative(scores: Scores) -> Scores:
    """*scores* divided by the best, so that it is 1; all 0 when nothing matches."""
    best = scores.max(initial=0.0)
    return scores / best if best > 0 else scores


def average(cosines: Scores) -> tuple[float, float]:
    """Mean and standard deviation of a scope's cosines, shape (entries,)."""
    number = len(cosines) + _WORTH
    mean = (float(cosines.sum()) + _WORTH * _MEAN) / number
    spread = float(np.square(cosines - mean).sum()) + _WORTH * _DEVIATION**2
    return mean, float(np.sqrt(spread / number))


def average_behind(best: Scores, *, number: int) -> tuple[float, float]:
    """The same, guessed from the *best* of so many cosines only, best first: by two of its ranks, as in a normal distribution."""
    if len(best) < _WORTH:
        return _MEAN, _DEVIATION
    high, low = len(best) // 10, len(best) * 9 // 10
    places = [NormalDist().inv_cdf(1 - (rank + 0.5) / (number + 1)) for rank in (high, low)]
    deviation = max(float(best[high] - best[low]) / (places[0] - places[1]), 1e-3)
    return float(best[low]) - places[1] * deviation, deviation


def standing(cosines: Scores, average: tuple[float, float]) -> Scores:
    """How far above the average (mean, deviation) each is: 0 up to the mean, 1 from six standard deviations on."""
    mean, deviation = average
    share: Scores = np.minimum(np.maximum((cosines - mean) / (deviation * _MOST), 0.0), 1.0).astype(
        np.float32, copy=False
    )
    return share


def length(words: npt.NDArray[Any]) -> Scores:
    """How much an entry can say by its length: rises with the logarithm up to 20 words, falls beyond 60."""
    rising = np.minimum(np.log1p(words), _SATURATED)
    falling = _FALLING * np.maximum(np.log((words + 1) / 61), 0.0)
    share: Scores = np.clip((rising - falling) / _SATURATED, 0.0, 1.0).astype(np.float32)
    return share


def statement(question: npt.NDArray[np.bool_], words: npt.NDArray[Any]) -> Scores:
    """Whether an entry says something: 1, but less for a question of under 40 words, and 0 for one of up to 10."""
    return (1.0 - question * np.clip(1.0 - (words - 10) / 30, 0.0, 1.0)).astype(np.float32)


def recency(created: npt.NDArray[np.int64], *, now: int) -> Scores:
    """How lately each was said, by times in microseconds: 1 now and later, and half of it with every 30 days before."""
    age = np.maximum(now - created, 0)
    return np.exp2(-age / _HALF_LIFE).astype(np.float32)


def best(scores: Scores, allowed: npt.NDArray[np.bool_], *, k: int) -> npt.NDArray[np.int64]:
    """Rows of the *k* best allowed scores, best first; of equal ones the earlier row."""
    rows = np.flatnonzero(allowed)
    if len(rows) > k:
        kept = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores[rows] >= kept]
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


__all__ = [
    "average",
    "average_behind",
    "best",
    "length",
    "outstanding",
    "recency",
    "relative",
    "shares",
    "standing",
    "statement",
    "weighted",
]
