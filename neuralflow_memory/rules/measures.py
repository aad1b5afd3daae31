"""How well a ranking answers labelled questions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import mean

DEPTHS = (1, 5, 10, 20)
BUDGETS = (500, 1000)
_GAIN_DEPTH = 10


def measures(ranked: Sequence[str], evidence: Collection[str], *, tokens: Sequence[int]) -> dict[str, float]:
    """What the ranking of one question is worth, each 0..1.

    `R@k`: the share of the evidence among the first k; `R@Nt`: among the first that fit N tokens; `NDCG@10`: the normalized
    discounted cumulative gain (Järvelin and Kekäläinen, ACM TOIS 20, 2002).

    Args:
        ranked: Ids of what was found, best first.
        evidence: Ids of what answers the question, at least one.
        tokens: What each of *ranked* costs in a prompt.
    """
    wanted = set(evidence)
    found = {f"R@{k}": len(wanted & set(ranked[:k])) / len(wanted) for k in DEPTHS}
    for budget in BUDGETS:
        used, fitting = 0, set()
        for own_id, cost in zip(ranked, tokens, strict=True):
            used += cost
            if used > budget:
                break
            fitting.add(own_id)
        found[f"R@{budget}t"] = len(wanted & fitting) / len(wanted)
    gains = [1 / math.log2(place + 2) for place in range(_GAIN_DEPTH)]
    ideal = sum(gains[: len(wanted)])
    gain = sum(g for own_id, g in zip(ranked, gains, strict=False) if own_id in wanted)
    return found | {f"NDCG@{_GAIN_DEPTH}": gain / ideal}


def averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over the questions."""
    return {name: mean(row[name] for row in rows) for name in rows[0]} if rows else {}


__all__ = ["BUDGETS", "DEPTHS", "averaged", "measures"]
