"""How search ranks: signals of one kind are brought to 0..1 and added by weight.

The default weights were set on five year-long chats between two people (786 questions); around them the result is flat:
halving or doubling a weight moves the share of evidence among the first ten hits by less than one point.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
_ASKING = re.compile(
    r"[?？؟]|^\W*(?:what|who|whom|whose|when|where|which|why|how|did|do|does|is|are|was|were|can|could|has|have|had"
    r"|wer|was|wann|wo|wie|warum|welche\w*|qui|que|quoi|quand|où|comment|pourquoi|quel\w*|qué|quién|cuándo|dónde|cómo"
    r"|кто|что|когда|где|как|почему)\b",
    re.IGNORECASE,
)
_SATURATED = np.log(21)  # twenty words say as much as they can by their number


@dataclass(frozen=True, slots=True)
class Weights:
    """What each signal counts. A signal is 0..1; the score is their weighted mean, so it is 0..1 too.

    Attributes:
        dense: Cosine of the entry's vector and the question's, negative ones taken as 0.
        next: The same of the turn that follows in its session: an answer vouches for what it answers.
        lexical: BM25 of the entry (with the end of the turn before it), relative to the best of the search.
        session: BM25 of the entry's session as one document, relative to the best: what the talk was about.
        length: See `length`.
        statement: See `statement`. Counts for questions only: who quotes a sentence may look for a question.
    """

    dense: float = 1.0
    next: float = 0.2
    lexical: float = 0.7
    session: float = 0.4
    length: float = 0.5
    statement: float = 0.35


def weighted(signals: Mapping[str, Scores], weights: Weights) -> dict[str, Scores]:
    """Each signal's part of the score: they add up to it. A missing signal leaves the others its share.

    All have the shape (rows,).
    """
    total = sum(getattr(weights, name) for name in signals)
    return {name: np.float32(getattr(weights, name) / total) * values for name, values in signals.items()}


def relative(scores: Scores) -> Scores:
    """*scores* divided by the best, so that it is 1; all 0 when nothing matches."""
    best = scores.max(initial=0.0)
    return scores / best if best > 0 else scores


def length(words: npt.NDArray[Any]) -> Scores:
    """How much an entry can say by its length: rises with the logarithm up to 20 words, falls beyond 60."""
    rising = np.minimum(np.log1p(words), _SATURATED)
    falling = np.maximum(np.log((words + 1) / 61), 0.0)
    share: Scores = np.clip((rising - falling) / _SATURATED, 0.0, 1.0).astype(np.float32)
    return share


def statement(question: npt.NDArray[np.bool_], words: npt.NDArray[Any]) -> Scores:
    """Whether an entry says something: 1, but less for a question of under 40 words, and 0 for one of up to 10."""
    return (1.0 - question * np.clip(1.0 - (words - 10) / 30, 0.0, 1.0)).astype(np.float32)


def asks(query: str) -> bool:
    """Whether *query* is a question: by its mark, or by the word that it begins with."""
    return bool(_ASKING.search(query))


def best(scores: Scores, allowed: npt.NDArray[np.bool_], *, k: int) -> npt.NDArray[np.int64]:
    """Rows of the *k* best allowed scores, best first; of equal ones the earlier row."""
    rows = np.flatnonzero(allowed)
    if len(rows) > k:
        kept = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores[rows] >= kept]
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


__all__ = ["Weights", "asks", "best", "length", "relative", "statement", "weighted"]
