"""What an entry's text is by itself, as far as ranking asks: noted once, when it is written down.

The word lists are English. In other languages the traits that rest on them are missing, and nothing else depends on them.
"""

from __future__ import annotations

import re

from .lexical import words_of
from .sentences import MONTHS, WEEKDAYS

VERSION = 3
"""Of the rules in this file: what was noted by another version is noted anew."""

QUESTION = 1
"""It ends with a question mark."""
TIMED = 2
"""It says when or how long: "yesterday", "last week", "for two years", "in May", "1998", "the 7th"."""
WISH = 4
"""It says how the assistant is to behave from now on, or what the speaker prefers."""

_UNIT = ("day", "night", "weekend", "week", "month", "year", "hour")
_UNITS = "|".join(f"{unit}s?" for unit in _UNIT)
_SPANS = "morning|afternoon|evening|spring|summer|fall|autumn|winter"
_TIMES = frozenset({"yesterday", "today", "tonight", "tomorrow", "recently", "since", *MONTHS, *WEEKDAYS}).union(
    f"{day}s" for day in WEEKDAYS
)
_LENGTH = re.compile(
    rf"\b(?:(?:last|next|this) (?:{_UNITS}|{_SPANS})"
    rf"|\w+ (?:{_UNITS}) ago|(?:a )?few (?:{_UNITS})|(?:a )?couple (?:of )?(?:{_UNITS})|for \w+ (?:{_UNITS})"
    r")\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\b(?:(?:19|20)\d\d|\d+(?:st|nd|rd|th))\b", re.IGNORECASE)
_LENGTHS = frozenset({*_SPANS.split("|"), *(unit + ending for unit in _UNIT for ending in ("", "s"))})
_WISHES = re.compile(
    r"^\s*(?:please,? )?(?:always|never|from now on|whenever|don't ever|do not ever)\b"
    r"|\bI(?:'d|’d| would)? (?:\w+ )?prefer\b|\bmy preference\b|\bfrom now on\b"
    r"|\b(?:when|whenever|if) I (?:ask|request|inquire)\b",
    re.IGNORECASE,
)
_WISH_WORDS = frozenset(
    {"always", "never", "now", "ever", "whenever", "prefer", "preference", "ask", "request", "inquire"}
)
_GREETED = re.compile(
    r"\b(?:[Hh]ey|[Hh]i|[Hh]ello|[Tt]hanks|[Tt]hank you|[Mm]orning|[Nn]ight|[Bb]ye|[Cc]ongrats|[Ss]orry|[Ww]ow|[Oo]h|[Yy]es|[Nn]o"
    r"|[Yy]eah|[Oo]k|[Oo]kay|[Ll]ol|[Hh]aha)[,!]? ([A-Z][a-z]{2,})\b"
)
_GREETINGS = frozenset(
    {
        "hey",
        "hi",
        "hello",
        "thanks",
        "thank",
        "morning",
        "night",
        "bye",
        "congrats",
        "sorry",
        "wow",
        "oh",
        "yes",
        "no",
        "yeah",
    }
    | {"ok", "okay", "lol", "haha"}
)
_INTRODUCED = re.compile(r"\b(?:[Mm]y name is|I['’]m|I am|[Cc]all me|[Tt]his is) ([A-Z][a-z]{2,})\b")
_INTRODUCTIONS = frozenset({"name", "m", "am", "call", "this"})


def called(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that the speaker gives: to the one spoken to, as in a greeting, and to themself. Some are none, and mere words."""
    words = words_of(text)  # most texts hold none of a rule's, which is told faster than the rule is tried
    others = () if words.isdisjoint(_GREETINGS) else _GREETED.findall(text)
    own = () if words.isdisjoint(_INTRODUCTIONS) else _INTRODUCED.findall(text)
    return tuple(others), tuple(own)


def traits(text: str) -> int:
    """The traits of *text*, as a sum."""
    words = words_of(text)
    asks = text.rstrip().endswith(("?", "？", "؟"))
    timed = (
        not words.isdisjoint(_TIMES)
        or (not words.isdisjoint(_LENGTHS) and _LENGTH.search(text) is not None)
        or _NUMBER.search(text) is not None
    )
    wish = not words.isdisjoint(_WISH_WORDS) and _WISHES.search(text) is not None
    return QUESTION * asks | TIMED * timed | WISH * wish


__all__ = ["QUESTION", "TIMED", "VERSION", "WISH", "called", "traits"]
