"""What is told of an entry by its text alone: the terms that search looks for, its traits, and what it is worth keeping.

A turn is written down without that, and analysed in the background: it takes as long as all the rest of a write. Whoever
needs it sooner works it out on the spot, with the same result.
"""

from __future__ import annotations

from dataclasses import replace

from ..protocols import Record
from ..types import Entry
from .importance import worth_keeping
from .lexical import term_ids
from .traits import called, traits

LATER = -1
"""Stands for words and importance that are still to be found."""


def recorded(entry: Entry, *, fresh: bool = False) -> Record:
    """*entry* with what search needs of it; *fresh*: its id was made for it just now."""
    text = entry.content
    if entry.importance < 0:
        entry = replace(entry, importance=worth(text, role=entry.role, name=entry.name))
    others, own = called(text)
    names = "\n".join((*others, *(f"={name}" for name in own))) if entry.name else ""
    return Record(entry, len(text.split()), traits(text), names or None, term_ids(text).astype("<u4").tobytes(), fresh)


def recorded_first(entry: Entry, *, fresh: bool) -> Record:
    """*entry* as it is written down before its text is analysed. Its importance is to be `LATER`, if that is by its text."""
    if not entry.content.strip():
        return recorded(entry, fresh=fresh)
    return Record(entry, LATER, 0, None, b"", fresh)


def worth(text: str, *, role: str | None = None, name: str | None = None) -> float:
    """The importance that an entry's own text gives it."""
    return worth_keeping(text, traits=traits(text), role=role, name=name)


__all__ = ["LATER", "recorded", "recorded_first", "worth"]
