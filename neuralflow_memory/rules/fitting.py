"""Finds weights for search from labelled questions: as much of the evidence as can be among the first hits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]

_DEPTHS = ((10, 0.7), (24, 0.3))  # among so many hits, and what that counts; 24 are about 1,000 tokens
_AROUND = 3  # ranks on each side of a depth whose mean is its threshold
_CANDIDATES = (
    150  # entries of a question that are looked at, beside its evidence: the best by the weights to begin with
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One question. `signals`: shape (entries, signals), each 0..1; `evidence`: rows that answer it."""

    signals: npt.NDArray[np.float64]
    evidence: npt.NDArray[np.int64]


def pruned(sample: Sample, weights: Weights) -> Sample:
    """*sample* with the entries only that may come into question."""
    others = np.setdiff1d(np.argsort(-(sample.signals @ weights), kind="stable")[:_CANDIDATES], sample.evidence)
    return Sample(
        np.concatenate([sample.signals[sample.evidence], sample.signals[others]]), np.arange(len(sample.evidence))
    )


def loss(
    weights: Weights, samples: Sequence[Sample], *, start: Weights, softness: float, pull: float
) -> tuple[float, Weights]:
    """How much of the evidence is not among the first hits, made smooth; and its gradient.

    The step at a rank becomes a logistic curve around the mean score of the ranks about it.

    Args:
        weights: Shape (signals,).
        samples: The questions.
        start: Weights that are believed in beforehand.
        softness: Width of the curve, in units of the score.
        pull: What a squared deviation from *start* costs.
    """
    value, gradient = 0.0, np.zeros_like(weights)
    for sample in samples:
        scores = sample.signals @ weights
        others = np.delete(np.arange(len(scores)), sample.evidence)
        ranked = others[np.argsort(-scores[others], kind="stable")]
        for depth, share in _DEPTHS:
            about = ranked[max(0, depth - _AROUND) : depth + _AROUND]
            if not len(about):
                continue
            distance = (scores[sample.evidence] - scores[about].mean()) / softness
            inside = 1 / (1 + np.exp(-np.clip(distance, -30, 30)))
            slope = inside * (1 - inside) / softness
            value -= share * float(inside.mean())
            away = sample.signals[sample.evidence] - sample.signals[about].mean(0)
            gradient -= share * (slope[:, None] * away).mean(0)
    count = max(1, len(samples))
    strayed = weights - start
    return value / count + pull * float(strayed @ strayed), gradient / count + 2 * pull * strayed


def recall(samples: Sequence[Sample], weights: Weights, *, depth: int) -> float:
    """The share of the evidence among the first *depth* entries, mean over the questions."""
    shares = []
    for sample in samples:
        first = np.argsort(-(sample.signals @ weights), kind="stable")[:depth]
        shares.append(np.isin(sample.evidence, first).mean())
    return float(np.mean(shares)) if shares else 0.0


__all__ = ["Sample", "loss", "pruned", "recall"]
