"""Cuts messages into lines, one sentence each with its speaker before it, and names what words they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from ..types import Message

SPEAKER = re.compile(r"([^:\n]{1,60}?)(?: \(\d{4}-\d\d-\d\d\))?: (?=\S)")
"""What a line begins with: who said it, and the day where the sentence needs it."""
END = re.compile(
    r"(?<=[.!?…])(?<![\s.][A-Z]\.)(?<!\bMr\.)(?<!\bDr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<!\bSt\.)(?<!\be\.g\.)\s+"
    r"|(?<=[.!?…][\"'”’)])\s+|(?<=[。！？])"
)
"""Between two sentences of a line of text."""
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
"""Characters, as in a character class, of scripts whose words stand side by side."""

_STOP_WORDS = (
    "a about after again all also am an and any are as at be because been but by can could did do does doing for from "
    "get getting go going got good great had has have he her here him his how i if in into is it its just know like "
    "lot made make many me more much my nice no not now of on one or our out over really she so some something such "
    "sure take than that the their them then there these they thing things think this those to too up us very want was "
    "way we well were what when where which who why will with would yes yet you your"
)
MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
STOP = frozenset(_STOP_WORDS.split())
CALENDAR = frozenset((*MONTHS, *WEEKDAYS))
_COMMITMENTS = (
    "will must promise promised plan plans planned planning decide decided agree agreed deadline due remind werde muss надо "
    "буду doit debe"
)
_NEGATIONS = "won't never don't didn't can't cannot not nicht не нет jamais pas nunca"
COMMITMENTS = frozenset(_COMMITMENTS.split())
"""Words by which people bind themselves or others."""
NEGATIONS = frozenset(_NEGATIONS.split())
"""The commonest words that turn a sentence around."""

_FENCE = re.compile(r"```(\w*)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
# A clause with a subject of its own stands on its own.
_CLAUSE = re.compile(
    r"[;—]\s+|(?<!\d) - (?!\d)|,\s+(?:and|but|so|because|which is why)\s+(?=(?:I|we|he|she|they|it|there|my|our)\b)"
)
# Only where a comma or an end follows: "thanks, ..." but not "thanks to Ada ...".
_FILLER = re.compile(
    r"(?:(?:wow|oh|ah|aw+|yeah|yes|yep|yup|no way|haha+|lol|hey|hi|hello|ok|okay|sure|well|so|anyway|actually|honestly"
    r"|thanks(?: a lot| so much)?|thank you(?: so much)?|congrats|congratulations|great|good|nice|cool|awesome|amazing"
    r"|absolutely|definitely|totally|of course|by the way|btw|you know|i mean|glad to hear (?:it|that)"
    r"|that's (?:so |really )?(?:great|awesome|amazing|cool|nice|wonderful))\s*(?:[,.!:;]+\s*|\s-\s|$))+",
    re.IGNORECASE,
)
_RELATIVE = re.compile(
    r"\b(?:yesterday|today|tonight|tomorrow|ago|(?:last|next|this) (?:night|week|weekend|month|year|summer|winter|spring"
    r"|fall|autumn|\w+day|morning|afternoon|evening)|gestern|heute|morgen|hier|demain|ayer|mañana|вчера|сегодня|завтра)\b"
    r"|昨天|今天|明天|昨日|今日|明日",
    re.IGNORECASE,
)
_CJK = re.compile(f"[{CJK}]")
_MAX_WORDS = 40
_MAX_CHARS = 280
_TOOL_WORDS = 20


def lines(messages: Sequence[Message]) -> Iterator[str]:
    """What *messages* say, a clause a line, as "Ada: ..."; times like "yesterday" get their date: "Ada (2024-05-03): ...".

    Of a tool's result, a tool call and a block of code the first 20 words are left.
    """
    for message in messages:
        who = speaker(message)
        if message.role == "tool":
            yield _short(who, message.text)
            continue
        for sentence in sentences(message.text):
            for clause in _CLAUSE.split(sentence):
                text = without_filler(clause) or clause.strip()
                # "last Friday" means nothing to who reads it later.
                dated = message.created_at is not None and _RELATIVE.search(text)
                if text:
                    yield f"{who} ({message.created_at:%Y-%m-%d}): {text}" if dated else f"{who}: {text}"
        for call in message.tool_calls:
            called = " ".join(call.name.split())
            yield _short(f"{who} calls {called}", json.dumps(dict(call.args), ensure_ascii=False, default=str))


def speaker(message: Message) -> str:
    """The name that a message's lines begin with."""
    name = " ".join((message.name or "").replace(":", " ").split())[:40]
    if message.role == "tool":
        return f"tool {name}".strip()
    return name or message.role


def sentences(text: str) -> Iterator[str]:
    """The sentences of *text*, each on one line and of at most 40 words."""
    text = _FENCE.sub(lambda m: f"\n{_short(f'code {m[1]}'.strip(), m[2])}\n", text)
    for line in text.splitlines():
        for sentence in END.split(line):
            yield from _pieces(sentence)


def _short(who: str, text: str) -> str:
    return f"{who}: {' '.join(text.split()[:_TOOL_WORDS])[:_MAX_CHARS] or '(nothing)'}"


def _pieces(sentence: str) -> Iterator[str]:
    """*sentence* whole, or cut where it has too many words, or where one of them has no end."""
    parts = [w[i : i + _MAX_CHARS] for w in sentence.split() for i in range(0, len(w), _MAX_CHARS)]
    piece: list[str] = []
    for part in parts:
        if piece and (len(piece) == _MAX_WORDS or sum(map(len, piece)) + len(part) > _MAX_CHARS):
            yield " ".join(piece)
            piece = []
        piece.append(part)
    if piece:
        yield " ".join(piece)


def without_filler(text: str) -> str:
    """*text* without the interjections that it begins with."""
    filler = _FILLER.match(text)
    return text[filler.end() if filler else 0 :].strip()


def words(text: str) -> list[str]:
    """The words of *text*, lower case."""
    return [w.lower() for w in WORD.findall(text)]


def named(word: str) -> bool:
    """Whether *word*, if it doesn't begin its sentence, looks like a name."""
    return word[0].isupper() and len(word) > 2 and word.lower() not in STOP and "'" not in word and "’" not in word


def terms(text: str) -> Iterator[str]:
    """Content words, lower case; pairs of characters where words aren't separated."""
    for word in words(text):
        if _CJK.search(word):
            yield from (word[i : i + 2] for i in range(max(1, len(word) - 1)))
        elif len(word) > 2 and word not in STOP:
            yield word


__all__ = [
    "CALENDAR",
    "CJK",
    "COMMITMENTS",
    "END",
    "MONTHS",
    "NEGATIONS",
    "SPEAKER",
    "STOP",
    "WEEKDAYS",
    "WORD",
    "lines",
    "named",
    "sentences",
    "speaker",
    "terms",
    "without_filler",
    "words",
]
