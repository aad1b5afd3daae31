"""What of a long text answers a question."""

from __future__ import annotations

from collections.abc import Callable

from .selection import best
from .sentences import sentences, terms

_GAP = " … "
_FIRST = 0.5  # what the first sentence is worth by itself, beside one word of the question


def excerpt(text: str, query: str, max_tokens: int, *, count: Callable[[str], int]) -> str:
    """The sentences of *text* that hold most words of *query* per token, in order, at most about *max_tokens* tokens."""
    pieces = list(sentences(text))
    words = [set(terms(piece)) for piece in pieces]
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


__all__ = ["excerpt"]
