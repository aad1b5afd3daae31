"""Fills a budget with the lines that tell the most per token."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

_LINE_COST = 3
"""Tokens that a line costs its reader beyond its own, so that scraps don't win by being short."""


def best(
    tokens: Sequence[int], *, worth: Callable[[int], float], take: Callable[[int], object], max_tokens: int
) -> list[int]:
    """The lines to take, by their number and in order; line *i* costs `tokens[i]`, together at most *max_tokens*.

    Greedy: each time the line of the most `worth(i)` per token that still fits, then `take(i)`. What a line is worth must
    not rise as others are taken; a line worth nothing stays out. Equals go in order.
    """

    def gain(i: int) -> float:
        return worth(i) / (tokens[i] + _LINE_COST)

    left, taken = max_tokens, []
    # A gain only falls, so an entry whose gain is still the best of the heap is the best of all.
    heap = [(-gain(i), i) for i in range(len(tokens))]
    heapq.heapify(heap)
    while heap:
        known, i = heapq.heappop(heap)
        now = -gain(i)
        if tokens[i] > left or now == 0:
            continue
        if now > known:
            heapq.heappush(heap, (now, i))
            continue
        taken.append(i)
        left -= tokens[i]
        take(i)
    return sorted(taken)


__all__ = ["best"]
