"""What a question asks for beside its words: whom it names, which times it names, what kind of answer it wants.

Names and times are structure: entries are matched by who said them and when, and not by the words for it. The word lists
are English; what they find is missing in other languages, and nothing else depends on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from difflib import SequenceMatcher

from .sentences import MONTHS

ROLES = frozenset({"user", "human", "assistant", "ai", "bot", "system", "developer", "tool", "function"})
"""What speakers are called in a chat with an assistant, where nobody has a name."""
_USERS = frozenset({"user", "human"})

_ASKS = re.compile(
    r"[?？؟]|^\W*(?:what|who|whom|whose|when|where|which|why|how|did|do|does|is|are|was|were|can|could|has|have|had"
    r"|wer|was|wann|wo|wie|warum|welche\w*|qui|que|quoi|quand|où|comment|pourquoi|quel\w*|qué|quién|cuándo|dónde|cómo"
    r"|кто|что|когда|где|как|почему)\b",
    re.IGNORECASE,
)
_ASKS_TIME = re.compile(
    r"^\W*(?:when|how long|since when)\b|\b(?:what|which) (?:date|day|month|year|time|week)\b"
    r"|\bhow (?:many|much) (?:days|weeks|months|years|time)\b",
    re.IGNORECASE,
)
_ASKS_ASSISTANT = re.compile(
    r"\b(?:did|had|have) you\b"
    r"|\byou(?:['’]ve| have| had)? (?:recommend|suggest|advis|propos|explain|said|mention|gave|provid|outlin|describ|told|help)"
    r"|\byour (?:advice|suggestion|recommendation|explanation|answer|response|example)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_POSSESSIVE = re.compile(r"['’]s?$")
_MONTH = {form: n for n, name in enumerate(MONTHS, 1) for form in (name, name[:3])} | {"sept": 9}
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_NAMED_DATE = re.compile(
    rf"\b(?:{_DAY}(?: of)? )?({'|'.join(sorted(_MONTH, key=len, reverse=True))})\b\.?(?: {_DAY}\b)?(?:,? ((?:19|20)\d\d)\b)?",
    re.IGNORECASE,
)
_ISO_DATE = re.compile(r"\b((?:19|20)\d\d)-(\d\d?)-(\d\d?)\b")
_NUMERIC_DATE = re.compile(r"\b(\d\d?)([./])(\d\d?)\2((?:19|20)\d\d)\b")
_NUMBER = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_AGO = re.compile(rf"\b(\d{{1,3}}|{'|'.join(_NUMBER)}) (day|week|month|year)s? ago\b", re.IGNORECASE)
_RELATIVE = re.compile(r"\b(today|yesterday|(?:last|this) (?:week|weekend|month|year))\b", re.IGNORECASE)
_LENGTHS = {"day": 1, "week": 7, "month": 30, "year": 365}
_NEAR = 3  # days by which people misremember a date
_ALIKE = 0.7  # difflib ratio from which a word may be a misspelt name
_SHORTEST_NICKNAME = 3
_TWO = 2  # speakers, of whom one is spoken to when the other speaks
_LEAST_USES = 2
_RARE = 4  # times as often as a name, a word may occur


@dataclass(frozen=True, slots=True)
class Time:
    """A time that a question names: the month, with a day and a year or without, or a span from `start` up to `end`."""

    month: int | None = None
    day: int | None = None
    year: int | None = None
    start: date | None = None
    end: date | None = None

    def fits(self, when: date) -> bool:
        """Whether something that happened then may be meant; a named day may be off by three."""
        if self.start is not None and self.end is not None:
            return self.start <= when <= self.end
        return (
            when.month == self.month
            and (self.day is None or abs(when.day - self.day) <= _NEAR)
            and (self.year is None or when.year == self.year)
        )


@dataclass(frozen=True, slots=True)
class Question:
    """A query, understood.

    Attributes:
        text: What is compared with what was said: the query without the speakers' names.
        speakers: The speakers that it names.
        times: The times that it names.
        asks: Whether it is a question: by its mark, or by the word that it begins with.
        asks_time: Whether the answer is a time.
        asks_assistant: Whether the answer is something that the assistant said.
    """

    text: str
    speakers: frozenset[str] = frozenset()
    times: tuple[Time, ...] = ()
    asks: bool = False
    asks_time: bool = False
    asks_assistant: bool = False


def understood(query: str, *, speakers: Mapping[str, str], known: Callable[[str], bool], now: datetime) -> Question:
    """What *query* asks for.

    Args:
        query: As the user put it.
        speakers: Who speaks in the chats that are searched: their labels by what they are called, label itself included.
        known: Whether a word occurs in them; what does not may be a misspelt name.
        now: When it is asked, for "last week".
    """
    people = {name: label for name, label in speakers.items() if label.lower() not in ROLES}
    text, named = _without_names(query, people, known)
    return Question(
        text,
        named,
        tuple(_times(query, now.astimezone(UTC).date())),
        asks=bool(_ASKS.search(query)),
        asks_time=bool(_ASKS_TIME.search(query)),
        asks_assistant=bool(_ASKS_ASSISTANT.search(query)),
    )


def depends_on_day(query: str) -> bool:
    """Whether *query* names a time that is another one tomorrow, such as yesterday."""
    return bool(_AGO.search(query) or _RELATIVE.search(query))


def is_user(label: str | None) -> bool:
    """Whether a speaker is a user who has no name."""
    return label is not None and label.lower() in _USERS


def aliases(
    given: Iterable[tuple[str | None, str]], labels: Collection[str], *, count: Callable[[str], int]
) -> dict[str, str]:
    """Other names of the two speakers of a chat, by which they call each other or themselves.

    A word is one if it is used so at least twice, in a quarter of its uses or more, and twice as often for one as for the other.

    Args:
        given: Who said it, and the names that were given (`protocols.Record.called`).
        labels: Who speaks; of more than two nobody knows who is spoken to.
        count: How many entries hold a word.
    """
    people = [label for label in labels if label.lower() not in ROLES]
    if len(people) != _TWO:
        return {}
    uses: Counter[tuple[str, str]] = Counter()
    for label, names in given:
        if label not in people:
            continue
        other = people[1 - people.index(label)]
        for name in names.splitlines():
            uses[(name.removeprefix("="), label if name.startswith("=") else other)] += 1
    found: dict[str, str] = {}
    for (name, label), times in uses.items():
        rival = uses[(name, people[1 - people.index(label)])]
        if times >= _LEAST_USES and times >= 2 * rival and _RARE * times >= count(name):
            found[name] = label
    return found


def _without_names(query: str, speakers: Mapping[str, str], known: Callable[[str], bool]) -> tuple[str, frozenset[str]]:
    named: set[str] = set()
    text = query
    for name, label in speakers.items():
        if len(name) > 1 and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE):
            named.add(label)
            text = re.sub(rf"(?<!\w){re.escape(name)}(?:['’]s?)?(?!\w)", " ", text, flags=re.IGNORECASE)
        elif not name.isascii() and len(name) > 1 and name in text:  # words stand side by side
            named.add(label)
            text = text.replace(name, " ")
    for word in set(_WORD.findall(text)) if speakers else ():
        bare = _POSSESSIVE.sub("", word)
        meant = {label for name, label in speakers.items() if _means(bare, (name.split() or [name])[0], known)}
        if meant:
            named |= meant
            text = re.sub(rf"(?<!\w){re.escape(word)}(?:['’]s?)?(?!\w)", " ", text)
    return " ".join(text.split()) or query, frozenset(named)


def _means(word: str, first: str, known: Callable[[str], bool]) -> bool:
    """Whether *word* is the first name *first*, begins like it, or is it misspelt."""
    low, name = word.lower(), first.lower()
    if low == name or (len(name) > _SHORTEST_NICKNAME and low == f"{name}s"):
        return True
    if not word[:1].isupper() or low[:1] != name[:1]:
        return False
    if len(word) >= _SHORTEST_NICKNAME and name.startswith(low):
        return True
    return len(word) > _SHORTEST_NICKNAME and SequenceMatcher(None, low, name).ratio() >= _ALIKE and not known(word)


def _times(query: str, today: date) -> Iterator[Time]:
    for before, month, after, year in _NAMED_DATE.findall(query):
        day = before or after
        # "may", "march" and the short forms are words, too.
        if month[0].isupper() or day or year or len(month) > 5:
            yield Time(_MONTH[month.lower()], int(day) if day else None, int(year) if year else None)
    for year, month, day in _ISO_DATE.findall(query):
        yield Time(int(month), int(day), int(year))
    for one, _, two, year in _NUMERIC_DATE.findall(query):
        for day, month in {(int(one), int(two)), (int(two), int(one))}:
            yield Time(month, day, int(year))
    for count, unit in _AGO.findall(query):
        days = _LENGTHS[unit.lower()] * (int(count) if count.isdigit() else _NUMBER[count.lower()])
        slack = max(1, _LENGTHS[unit.lower()] // 2)
        yield _span(today, days + slack, days - slack)
    for words in _RELATIVE.findall(query):
        which, _, unit = words.lower().partition(" ")
        match which, unit:
            case "today", _:
                yield _span(today, 0, 0)
            case "yesterday", _:
                yield _span(today, 1, 1)
            case "this", "year":
                yield Time(start=today.replace(month=1, day=1), end=today)
            case "last", "year":
                yield Time(start=date(today.year - 1, 1, 1), end=date(today.year - 1, 12, 31))
            case "this", "month":
                yield Time(start=today.replace(day=1), end=today)
            case "last", "month":
                end = today.replace(day=1) - timedelta(days=1)
                yield Time(start=end.replace(day=1), end=end)
            case "this", _:
                yield _span(today, today.weekday(), 0)
            case _:  # last week, last weekend
                yield _span(today, today.weekday() + 7, today.weekday() + 1)


def _span(today: date, first: int, last: int) -> Time:
    """From *first* days ago to *last* days ago."""
    try:
        return Time(start=today - timedelta(days=first), end=today - timedelta(days=max(last, 0)))
    except OverflowError:
        return Time(start=date.min, end=date.min)


__all__ = ["ROLES", "Question", "Time", "aliases", "depends_on_day", "is_user", "understood"]
