"""Summarizes without a model: picks the sentences of a chat that hold the most facts per token."""

from __future__ import annotations

import heapq
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..protocols import TokenCounter
from ..types import Message

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_END = re.compile(
    r"(?<=[.!?…])(?<![\s.][A-Z]\.)(?<!\bMr\.)(?<!\bDr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<!\bSt\.)(?<!\be\.g\.)\s+"
    r"|(?<=[.!?…][\"'”’)])\s+|(?<=[。！？])"
)
_FENCE = re.compile(r"```(\w*)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SPEAKER = re.compile(r"([^:\n]{1,60}?)(?: \(\d{4}-\d\d-\d\d\))?: (?=\S)")
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
_STOP_WORDS = (
    "a about after again all also am an and any are as at be because been but by can could did do does doing for from "
    "get getting go going good got great had has have he her here him his how i if in into is it its just know like "
    "lot made make many me more much my nice no not now of on one or our out over really she so some something such "
    "sure take than that the their them then there these they thing things think this those to too up us very want was "
    "way we well were what when where which who why will with would yes yet you your"
)
_DAYS_AND_MONTHS = (
    "january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday"
)
_STOP = frozenset(_STOP_WORDS.split())
_CALENDAR = frozenset(_DAYS_AND_MONTHS.split())
_COMMITMENT = re.compile(
    r"\b(?:will|won't|must|promised?|plan(?:s|ned|ning)?|decided?|agreed?|deadline|due|remind|never|don't|didn't|can't|"
    r"cannot|not|nicht|kein\w*|werde|muss|не|нет|надо|буду|jamais|pas|doit|nunca|debe)\b|[不没沒必]",
    re.IGNORECASE,
)
_RELATIVE = re.compile(
    r"\b(?:yesterday|today|tonight|tomorrow|ago|(?:last|next|this) (?:night|week|weekend|month|year|summer|winter|spring"
    r"|fall|autumn|\w+day|morning|afternoon|evening)|gestern|heute|morgen|hier|demain|ayer|mañana|вчера|сегодня|завтра)\b"
    r"|昨天|今天|明天|昨日|今日|明日",
    re.IGNORECASE,
)
_MAX_WORDS = 40
_MAX_CHARS = 280
_TOOL_WORDS = 20
# What a word is worth beside a fact, and how a fact's worth grows with the lines that hold it. On long chats between
# two people the share of facts kept is flat (70 to 71 %) for 0.05 to 0.15 and 0.3 to 0.7, and falls beyond.
_WORD_WORTH = 0.15
_FACT_POWER = 0.5
_LINE_COST = 3
"""Tokens that a line costs its reader beyond its own, so that scraps don't win by being short."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A candidate. `facts` and `terms` are lower case; `weight` scales what it is worth."""

    text: str
    facts: frozenset[str]
    terms: frozenset[str]
    weight: float
    tokens: int


class ExtractiveSummarizer:
    """A summary of a chat's own sentences, one per line: "Ada: ...". Deterministic, in any language, never fails.

    Sentences are taken greedily by what they add per token: facts (numbers, dates, names) and content words that no
    line taken so far holds, each weighted by how often the chat uses it (weighted coverage, after Lin and Bilmes,
    "A Class of Submodular Functions for Document Summarization", ACL 2011). The lines of the previous summary compete
    on the same terms, and keep their place before the new ones.
    """

    name = "extractive"

    def __init__(self, counter: TokenCounter) -> None:
        self._count = counter.count

    def summarize(self, messages: Sequence[Message], *, previous: str, max_tokens: int) -> str:
        """Return at most *max_tokens* tokens of lines of *previous* and of *messages*, in order.

        Empty only if there is nothing to say, or no room to say it.
        """
        texts = list(dict.fromkeys([*_old(previous), *_new(messages)]))
        users = frozenset(_speaker(m) for m in messages if m.role == "user")
        speakers = frozenset(w for text in texts if (match := _SPEAKER.match(text)) for w in _words(match[1]))
        lines = [self._line(text, speakers=speakers, users=users) for text in texts]
        lines = [line for line in lines if line.facts or len(line.terms) > 1] or lines[:1]
        chosen = _chosen(lines, max_tokens=max_tokens)
        while chosen and self._count(_joined(chosen)) > max_tokens:  # where a tokenizer isn't additive
            chosen.pop()
        return _joined(chosen) or self._cut(_joined(lines[:1]), max_tokens=max_tokens)

    def _line(self, text: str, *, speakers: frozenset[str], users: frozenset[str]) -> _Line:
        match = _SPEAKER.match(text)
        body = text[match.end() :] if match else text
        told = _without_filler(body)
        facts = frozenset(_facts(told)) - speakers
        terms = frozenset(_terms(told)) - speakers - facts
        weight = 1.15 if match and match[1] in users else 1.0
        if len(facts | terms) < 3:  # a name by itself tells nothing
            weight *= 0.4
        weight += 0.2 * bool(_COMMITMENT.search(body)) - 0.3 * body.endswith(("?", "？"))
        return _Line(text, facts, terms, weight, self._count(text + "\n"))

    def _cut(self, text: str, *, max_tokens: int) -> str:
        """The beginning of *text*, for when not even one line fits."""
        short = text
        while short and self._count(short) > max_tokens:
            short = short[: len(short) * 3 // 4]
        return short if short == text else short.rpartition(" ")[0] or short


def _joined(lines: Iterable[_Line]) -> str:
    return "\n".join(line.text for line in lines)


def _chosen(lines: list[_Line], *, max_tokens: int) -> list[_Line]:
    """Fill *max_tokens* greedily by gain per token; in the order of *lines*."""
    worth = _worth(lines)
    covered: set[str] = set()
    left, taken = max_tokens, []

    def gain(line: _Line) -> float:
        # Sets have another order in every process; an exact sum has none.
        new = math.fsum(worth[t] for t in (line.facts | line.terms) if t not in covered)
        return line.weight * new / (line.tokens + _LINE_COST)

    # A gain only falls as more is covered, so an entry whose gain is still the best of the heap is the best of all.
    heap = [(-gain(line), i) for i, line in enumerate(lines)]
    heapq.heapify(heap)
    while heap:
        known, i = heapq.heappop(heap)
        line = lines[i]
        now = -gain(line)
        if line.tokens > left or now == 0:
            continue
        if now > known:
            heapq.heappush(heap, (now, i))
            continue
        taken.append(i)
        left -= line.tokens
        covered |= line.facts | line.terms
    return [lines[i] for i in sorted(taken)]


def _worth(lines: list[_Line]) -> Mapping[str, float]:
    """What covering a fact or a content word is worth, by how many lines hold it."""
    n = len(lines)
    facts = Counter(f for line in lines for f in line.facts)
    terms = Counter(t for line in lines for t in line.terms)
    worth = {t: _WORD_WORTH * math.log1p(df) * math.log(1 + n / df) / math.log(1 + n) for t, df in terms.items()}
    return worth | {f: df**_FACT_POWER for f, df in facts.items()}


def _old(previous: str) -> Iterator[str]:
    for line in previous.splitlines():
        match = _SPEAKER.match(line.strip())
        prefix = match[0] if match else ""
        for sentence in _sentences(line.strip()[len(prefix) :]):  # a model's summary may be one paragraph
            yield prefix + sentence


def _new(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        speaker = _speaker(message)
        if message.role == "tool":
            yield _short(speaker, message.text)
            continue
        for sentence in _sentences(message.text):
            for clause in _CLAUSE.split(sentence):
                text = _without_filler(clause) or clause.strip()
                # "last Friday" means nothing to who reads it later.
                dated = message.created_at is not None and _RELATIVE.search(text)
                if text:
                    yield f"{speaker} ({message.created_at:%Y-%m-%d}): {text}" if dated else f"{speaker}: {text}"
        for call in message.tool_calls:
            yield _short(f"{speaker} calls {call.name}", json.dumps(dict(call.args), ensure_ascii=False, default=str))


def _speaker(message: Message) -> str:
    name = " ".join((message.name or "").replace(":", " ").split())[:40]
    if message.role == "tool":
        return f"tool {name}".strip()
    return name or message.role


def _short(speaker: str, text: str) -> str:
    return f"{speaker}: {' '.join(text.split()[:_TOOL_WORDS])[:_MAX_CHARS] or '(nothing)'}"


def _sentences(text: str) -> Iterator[str]:
    text = _FENCE.sub(lambda m: f"\n{_short(f'code {m[1]}'.strip(), m[2])}\n", text)
    for line in text.splitlines():
        for sentence in _END.split(line):
            yield from _pieces(sentence)


def _pieces(sentence: str) -> Iterator[str]:
    """*sentence* whole, or cut where it has too many words, or where one of them has no end."""
    words = [w[i : i + _MAX_CHARS] for w in sentence.split() for i in range(0, len(w), _MAX_CHARS)]
    piece: list[str] = []
    for word in words:
        if piece and (len(piece) == _MAX_WORDS or sum(map(len, piece)) + len(word) > _MAX_CHARS):
            yield " ".join(piece)
            piece = []
        piece.append(word)
    if piece:
        yield " ".join(piece)


def _without_filler(text: str) -> str:
    filler = _FILLER.match(text)
    return text[filler.end() if filler else 0 :].strip()


def _words(text: str) -> list[str]:
    return [w.lower() for w in _WORD.findall(text)]


def _facts(text: str) -> Iterator[str]:
    """Numbers, days and months, and capitalised names inside the sentence; lower case."""
    for i, word in enumerate(_WORD.findall(text)):
        low = word.lower()
        named = word[0].isupper() and len(word) > 2 and low not in _STOP and "'" not in word and "’" not in word
        if any(c.isdigit() for c in word) or (named and (i > 0 or low in _CALENDAR)):
            yield low


def _terms(text: str) -> Iterator[str]:
    """Content words; pairs of characters where words aren't separated."""
    for word in _words(text):
        if _CJK.search(word):
            yield from (word[i : i + 2] for i in range(max(1, len(word) - 1)))
        elif len(word) > 2 and word not in _STOP:
            yield word


__all__ = ["ExtractiveSummarizer"]
