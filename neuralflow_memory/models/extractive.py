"""Summarizes without a model: picks the sentences of a chat that hold the most facts per token."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..protocols import TokenCounter
from ..rules import selection, sentences
from ..types import Message

_WEIGHTY = "|".join(sorted(sentences.COMMITMENTS | sentences.NEGATIONS))
_BINDING = re.compile(rf"\b(?:{_WEIGHTY}|kein\w*)\b|[不没沒必]", re.IGNORECASE)
# What a word is worth beside a fact, and how a fact's worth grows with the lines that hold it. On long chats between
# two people the share of facts kept is flat (70 to 71 %) for 0.05 to 0.15 and 0.3 to 0.7, and falls beyond.
_WORD_WORTH = 0.15
_FACT_POWER = 0.5


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
        texts = list(dict.fromkeys([*_old(previous), *sentences.lines(messages)]))
        users = frozenset(sentences.speaker(m) for m in messages if m.role == "user")
        speakers = frozenset(
            w for text in texts if (match := sentences.SPEAKER.match(text)) for w in sentences.words(match[1])
        )
        lines = [self._line(text, speakers=speakers, users=users) for text in texts]
        lines = [line for line in lines if line.facts or len(line.terms) > 1] or lines[:1]
        chosen = _chosen(lines, max_tokens=max_tokens)
        while chosen and self._count(_joined(chosen)) > max_tokens:  # where a tokenizer isn't additive
            chosen.pop()
        return _joined(chosen) or self._cut(_joined(lines[:1]), max_tokens=max_tokens)

    def _line(self, text: str, *, speakers: frozenset[str], users: frozenset[str]) -> _Line:
        match = sentences.SPEAKER.match(text)
        body = text[match.end() :] if match else text
        told = sentences.without_filler(body)
        facts = frozenset(_facts(told)) - speakers
        terms = frozenset(sentences.terms(told)) - speakers - facts
        weight = 1.15 if match and match[1] in users else 1.0
        if len(facts | terms) < 3:  # a name by itself tells nothing
            weight *= 0.4
        weight += 0.2 * bool(_BINDING.search(body)) - 0.3 * body.endswith(("?", "？"))
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
    """What to take of *lines*, in order: the most worth per token."""
    worth = _worth(lines)
    covered: set[str] = set()

    def gain(i: int) -> float:
        line = lines[i]
        # Sets have another order in every process; an exact sum has none.
        return line.weight * math.fsum(worth[t] for t in (line.facts | line.terms) if t not in covered)

    def take(i: int) -> None:
        covered.update(lines[i].facts, lines[i].terms)

    taken = selection.best([line.tokens for line in lines], worth=gain, take=take, max_tokens=max_tokens)
    return [lines[i] for i in taken]


def _worth(lines: list[_Line]) -> Mapping[str, float]:
    """What covering a fact or a content word is worth, by how many lines hold it."""
    n = len(lines)
    facts = Counter(f for line in lines for f in line.facts)
    terms = Counter(t for line in lines for t in line.terms)
    worth = {t: _WORD_WORTH * math.log1p(df) * math.log(1 + n / df) / math.log(1 + n) for t, df in terms.items()}
    return worth | {f: df**_FACT_POWER for f, df in facts.items()}


def _old(previous: str) -> Iterator[str]:
    for line in previous.splitlines():
        match = sentences.SPEAKER.match(line.strip())
        prefix = match[0] if match else ""
        for sentence in sentences.sentences(line.strip()[len(prefix) :]):  # a model's summary may be one paragraph
            yield prefix + sentence


def _facts(text: str) -> Iterator[str]:
    """Numbers, days and months, and capitalised names inside the sentence; lower case."""
    for i, word in enumerate(sentences.WORD.findall(text)):
        low = word.lower()
        if any(c.isdigit() for c in word) or (sentences.named(word) and (i > 0 or low in sentences.CALENDAR)):
            yield low


__all__ = ["ExtractiveSummarizer"]
