"""What an entry's text is by itself, as far as ranking asks: noted once, when it is written down.

The word lists are English. In other languages the traits that rest on them are missing, and nothing else depends on them.
"""

from __future__ import annotations

import re

from .sentences import MONTHS, WEEKDAYS

VERSION = 2
"""Of the rules in this file: what was noted by another version is noted anew."""

QUESTION = 1
"""It ends with a question mark."""
TIMED = 2
"""It says when or how long: "yesterday", "last week", "for two years", "in May", "1998", "the 7th"."""
WISH = 4
"""It says how the assistant is to behave from now on, or what the speaker prefers."""

_UNITS = "days?|nights?|weeks?|weekends?|months?|years?|hours?"
_DAYS = "|".join(f"{day}s?" for day in WEEKDAYS)
_TIME = re.compile(
    rf"\b(?:yesterday|today|tonight|tomorrow|recently|since|{'|'.join(MONTHS)}|{_DAYS}"
    rf"|(?:last|next|this) (?:{_UNITS}|morning|afternoon|evening|spring|summer|fall|autumn|winter)"
    rf"|\w+ (?:{_UNITS}) ago|(?:a )?few (?:{_UNITS})|(?:a )?couple (?:of )?(?:{_UNITS})|for \w+ (?:{_UNITS})"
    r"|(?:19|20)\d\d|\d+(?:st|nd|rd|th))\b",
    re.IGNORECASE,
)
_WISHES = re.compile(
    r"^\s*(?:please,? )?(?:always|never|from now on|whenever|don't ever|do not ever)\b"
    r"|\bI(?:'d|’d| would)? (?:\w+ )?prefer\b|\bmy preference\b|\bfrom now on\b"
    r"|\b(?:when|whenever|if) I (?:ask|request|inquire)\b",
    re.IGNORECASE,
)


_GREETED = re.compile(
    r"\b(?:[Hh]ey|[Hh]i|[Hh]ello|[Tt]hanks|[Tt]hank you|[Mm]orning|[Nn]ight|[Bb]ye|[Cc]ongrats|[Ss]orry|[Ww]ow|[Oo]h|[Yy]es|[Nn]o"
    r"|[Yy]eah|[Oo]k|[Oo]kay|[Ll]ol|[Hh]aha)[,!]? ([A-Z][a-z]{2,})\b"
)
_INTRODUCED = re.compile(r"\b(?:[Mm]y name is|I['’]m|I am|[Cc]all me|[Tt]his is) ([A-Z][a-z]{2,})\b")


def called(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that the speaker gives: to the one spoken to, as in a greeting, and to themself. Some are none, and mere words."""
    return tuple(_GREETED.findall(text)), tuple(_INTRODUCED.findall(text))


def traits(text: str) -> int:
    """The traits of *text*, as a sum."""
    asks = text.rstrip().endswith(("?", "？", "؟"))
    return QUESTION * asks | TIMED * bool(_TIME.search(text)) | WISH * bool(_WISHES.search(text))


__all__ = ["QUESTION", "TIMED", "VERSION", "WISH", "called", "traits"]
