"""What of a long text answers a question."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .selection import best
from .sentences import sentences, terms

_GAP = " … "
_FIRST = 0.5  # what the first sentence is worth by itself, beside one word of the question


def excerpt(text: str, query: str, max_tokens: int, *, count: Callable[[str], int]) -> str:
    """The sentences of *text* that hold most words of *query* per token, in order, at most about *max_tokens* tokens."""
    pieces, words = _read(text)
    wanted = set(terms(query))

    def worth(i: int) -> float:
        return len(words[i] & wanted) + _FIRST * (i == 0)

    chosen = best([count(piece) + 1 for piece in pieces], worth=worth, take=lambda _: None, max_tokens=max_tokens)
    found = ""
    for place, i in enumerate(chosen):
        gap = _GAP if i - (chosen[place - 1] if place else -1) > 1 else " "
        found += gap + pieces[i]
    if chosen and chosen[-1] < len(pieces) - 1:
        found += _GAP
    return found.strip()


@lru_cache(maxsize=512)
def _read(text: str) -> tuple[list[str], list[set[str]]]:
    """The sentences of *text* and the words of each. What is found for one question is often found for the next."""
    pieces = list(sentences(text))
    return pieces, [set(terms(piece)) for piece in pieces]


__all__ = ["excerpt"]
