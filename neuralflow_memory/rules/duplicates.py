"""Which knowledge says the same: the measure, and what one entry becomes when it takes another in.

Two texts say the same if they have the same words in the same order, whatever their case, punctuation and fillers; one of
them may have words more, as long as the two are alike enough (`SAME`). Words in place of others, numbers, negations and names
tell them apart, however near their vectors are: "room 12" and "room 21", "likes tea" and "doesn't like tea", "Ada owes Bo" and
"Bo owes Ada". So a paraphrase is no duplicate: what is merged by mistake costs more than what is kept twice.

How alike two texts are is the mean of how near their vectors are and of the share of words that they have in common; without
vectors, that share alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..types import Entry
from . import sentences
from .coverage import negations
from .lexical import tokens

SAME = 0.85
"""From how alike on two texts say the same, of which one has words more."""
_FLOOR = 0.5
"""A cosine that is no nearness at all: texts on one subject have as much."""
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_EMPTY = frozenset(
    [
        "a",
        "an",
        "the",
        "that",
        "really",
        "very",
        "just",
        "also",
        "so",
        "please",
        "indeed",
        "der",
        "die",
        "das",
        "ein",
        "eine",
        "le",
        "la",
        "les",
        "un",
        "une",
        "el",
        "los",
    ]
)
# Added to a text, they make another of it.
_TURNING = frozenset(
    [
        "used",
        "former",
        "formerly",
        "ex",
        "except",
        "only",
        "hardly",
        "barely",
        "rarely",
        "anymore",
        "longer",
        "until",
        "till",
        "unless",
        "if",
        "maybe",
        "perhaps",
        "might",
        "almost",
        "before",
        "after",
        "instead",
        "stopped",
        "quit",
        "nur",
        "kaum",
        "früher",
        "bis",
        "außer",
        "vielleicht",
        "wenn",
        "fast",
        "sauf",
        "sans",
        "jusque",
        "peut",
        "avant",
        "après",
    ]
)


@dataclass(frozen=True, slots=True)
class Said:
    """What is compared of a text.

    Attributes:
        words: Its terms (`rules.lexical.tokens`), each once.
        order: Its words, lower case, in their order, without fillers.
        numbers: Its numbers, dates and times, in their order.
        denied: How many words of it deny something.
        names: Those of its words that are written as names, lower case.
    """

    words: frozenset[str]
    order: tuple[str, ...]
    numbers: tuple[str, ...]
    denied: int
    names: frozenset[str]


def said(text: str) -> Said:
    """What is compared of *text*."""
    written = [w.replace("’", "'") for w in sentences.WORD.findall(text)]
    return Said(
        frozenset(tokens(text)),
        tuple(w.lower() for w in written if w.lower() not in _EMPTY),
        tuple(_NUMBER.findall(text)),
        negations(text),
        frozenset(w.lower() for w in written if w[0].isupper() and w != "I"),
    )


def agree(one: Said, other: Said) -> bool:
    """Whether one of two texts says all that the other does, and nothing that turns it around."""
    if one.numbers != other.numbers or one.denied != other.denied:
        return False
    short, long = sorted((one, other), key=lambda s: len(s.order))
    left = iter(long.order)
    if not all(word in left for word in short.order):  # in this order
        return False
    more = set(long.order) - set(short.order)
    return len(short.order) == len(long.order) or not more & (_TURNING | long.names)


def alike(one: Said, other: Said, cosine: float | None) -> float:
    """How alike two texts are, 0..1; *cosine*: of their vectors, if they have any."""
    both = one.words | other.words
    share = len(one.words & other.words) / len(both) if both else float(one.order == other.order)
    if cosine is None:
        return share
    return (min(1.0, max(0.0, (cosine - _FLOOR) / (1.0 - _FLOOR))) + share) / 2


def same(one: Said, other: Said, cosine: float | None) -> bool:
    """Whether two texts say the same."""
    return agree(one, other) and (one.order == other.order or alike(one, other, cosine) >= SAME)


def pairs(texts: Sequence[Said], filed: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """Which of *texts* may say the same, by their rows: one may have all words of the other; no pair twice.

    Of those that have the same words, and are *filed* alike, only the first is paired with others.
    """
    first: dict[Hashable, int] = {}
    where: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        known = first.setdefault((text.order, filed[row]), row)
        if known != row:
            yield known, row
        else:
            for word in set(text.order):
                where[word].append(row)
    for row in first.values():
        text = texts[row]
        if not text.order:
            continue
        rarest = min((where[word] for word in text.order), key=len)
        for other in rarest:
            longer = len(texts[other].order) - len(text.order)
            if longer > 0 or (longer == 0 and other > row):
                yield row, other


def strengthened(before: Entry, again: Entry, *, weigh: bool = True) -> Entry:
    """*before*, after what it says was said *again*.

    It is as important as the more important (*weigh*: the importance of *again* counts) and as trusted as the more trusted,
    has the tags and sources of both, holds since the earlier, and expires with the later; category, source and metadata are
    those said last.
    """
    begun = min(before.valid_from or before.created_at, again.valid_from or again.created_at)
    expiry = [at for at in (before.expires_at, again.expires_at) if at is not None]
    return replace(
        before,
        importance=max(before.importance, again.importance) if weigh else before.importance,
        trust=max(before.trust, again.trust),
        tags=union(before.tags, again.tags),
        sources=union(before.sources, again.sources),
        metadata={**before.metadata, **again.metadata},
        category=before.category if again.category is None else again.category,
        source=before.source if again.source is None else again.source,
        created_at=min(before.created_at, again.created_at),
        valid_from=begun if before.valid_from or again.valid_from else None,
        expires_at=max(expiry) if len(expiry) == 2 else None,
        provenance="told" if "told" in (before.provenance, again.provenance) else before.provenance,
    )


def apart(one: Entry, other: Entry) -> bool:
    """Whether two entries are kept apart whatever they say: filed under other categories, or with other metadata."""
    filed = {one.category, other.category} - {None}
    both = one.metadata.keys() & other.metadata.keys()
    return (
        len(filed) > 1
        or one.scope.agent_id != other.scope.agent_id
        or any(one.metadata[name] != other.metadata[name] for name in both)
    )


def union(one: Iterable[str], other: Iterable[str]) -> tuple[str, ...]:
    """What is in either, each once, in order."""
    return tuple(dict.fromkeys((*one, *other)))


__all__ = ["SAME", "Said", "agree", "alike", "apart", "pairs", "said", "same", "strengthened", "union"]
