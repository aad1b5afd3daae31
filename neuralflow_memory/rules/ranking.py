"""How search ranks: signals of one kind are brought to 0..1 and added by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Weights:
    """What each signal counts. A signal is 0..1; the score is the weighted mean, so it is 0..1 too.

    Attributes:
        dense: Cosine of the entry's vector and the question's, negative ones taken as 0.
        lexical: BM25, divided by the best of the search.
    """

    dense: float = 0.5
    lexical: float = 0.5


def combine(signals: Mapping[str, Scores], weights: Weights) -> Scores:
    """The weighted mean of *signals*, which all have the shape (rows,); a missing one leaves the others its share."""
    total = sum(getattr(weights, name) for name in signals)
    share = {name: np.float32(getattr(weights, name) / total) for name in signals}
    combined: Scores = np.sum([share[name] * values for name, values in signals.items()], axis=0, dtype=np.float32)
    return combined


def relative(scores: Scores) -> Scores:
    """*scores* divided by the best, so that it is 1; all 0 when nothing matches."""
    best = scores.max(initial=0.0)
    return scores / best if best > 0 else scores


def best(scores: Scores, allowed: npt.NDArray[np.bool_], *, k: int) -> npt.NDArray[np.int64]:
    """Rows of the *k* best allowed scores, best first; of equal ones the earlier row."""
    rows = np.flatnonzero(allowed)
    if len(rows) > k:
        kept = np.partition(scores[rows], len(rows) - k)[len(rows) - k]
        rows = rows[scores[rows] >= kept]
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


SIGNALS = tuple(f.name for f in fields(Weights))

__all__ = ["SIGNALS", "Weights", "best", "combine", "relative"]
