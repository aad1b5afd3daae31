"""What became of the facts of folded turns: whether a summary holds them, and which sentences to pin beside it.

No model is asked. A fact is something by which a sentence can be checked: a number, a date, a name, a negation, an open
question, a commitment. Negations are known by their commonest words in twenty languages, months and promises in about ten.
What is missed is not checked; what is taken for a fact by mistake costs a pin at most.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from ..types import Message
from . import selection, sentences
from .lexical import FUNCTION_WORDS, language_of


class Kind(StrEnum):
    """What a fact is."""

    NUMBER = "number"
    DATE = "date"
    NAME = "name"
    NEGATION = "negation"
    QUESTION = "question"
    COMMITMENT = "commitment"


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a sentence says.

    Attributes:
        kind: What it is.
        text: What a summary must hold, lower case: the number, date or name; of a negation its negating word; of a
            question and a commitment nothing, "".
        line: The sentence with its speaker, as it would be pinned.
        words: The other content words of the sentence, lower case; pairs of characters where words aren't separated.
        row: Which of the messages said it, by index; -1 if none did.
    """

    kind: Kind
    text: str
    line: str
    words: frozenset[str]
    row: int = field(default=-1, compare=False)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Facts by whether a text holds them, each part in the order they were given."""

    kept: tuple[Fact, ...]
    missing: tuple[Fact, ...]


WORTH: Mapping[Kind, float] = {
    Kind.COMMITMENT: 2.5,
    Kind.QUESTION: 2.5,
    Kind.NEGATION: 2.5,
    Kind.NUMBER: 2.0,
    Kind.DATE: 2.0,
    Kind.NAME: 1.0,
}
"""What pinning a fact is worth. Nobody searches for a promise that he has forgotten, and a summary without a "not" or with
a vague number is wrong, while one without a name only tells less."""
_NEW = 1.1
"""How much more a line is worth that was not pinned before, so that old pins give way when all else is equal."""
_MOST = 8.0
"""What one line is worth at most: a table of numbers tells less than their count says."""
_ENOUGH = 3.0
"""Words that no other line has, by which a negation, a question or a commitment is worth all of `WORTH`. Of 120 promises
and negations strewn into five long chats, 110, 116, 110, 98, 88 are kept or pinned right after their fold for 2 to 6."""
_SHORT = 160
"""Characters; a longer answer that says "later" somewhere is an answer all the same."""

_MONTHS_AND_DAYS = """
    januar februar märz april juni juli oktober dezember montag dienstag mittwoch donnerstag freitag samstag sonnabend
    sonntag janvier février avril juin juillet août septembre octobre novembre décembre lundi mardi mercredi jeudi vendredi
    samedi dimanche enero febrero abril mayo junio julio septiembre octubre noviembre diciembre lunes martes miércoles
    jueves viernes sábado gennaio febbraio aprile maggio giugno luglio settembre ottobre dicembre lunedì martedì mercoledì
    giovedì venerdì domenica janeiro fevereiro março maio junho julho setembro outubro dezembro
    января февраля марта апреля июня июля августа сентября октября ноября декабря январь февраль апрель июнь июль
    август сентябрь октябрь ноябрь декабрь понедельник вторник среда среду четверг пятница пятницу суббота субботу
    воскресенье
"""
# Common words as well: months only beside a number, or with a capital letter inside a sentence.
_AMBIGUOUS = frozenset({"march", "may", "mayo", "mai", "mars", "marzo"})
_CALENDAR = sentences.CALENDAR | _AMBIGUOUS | frozenset(_MONTHS_AND_DAYS.split())
_HAN_DAY = (
    r"[一二三四五六七八九十]{1,2}月(?:[一二三四五六七八九十]{1,3}[日号號])?|(?:星期|礼拜|禮拜|周|週)[一二三四五六日天]"
    r"|[月火水木金土日]曜日?|[월화수목금토일]요일"
)
_DAY = (
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?!\d)|\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d\d)(?![\d.]\d|\d)"
    rf"|(?:\d{{4}}年)?\d{{1,2}}月(?:\d{{1,2}}[日号號])?|\d{{1,2}}월(?: ?\d{{1,2}}일)?|{_HAN_DAY}"
)
_DATE = re.compile(_DAY)
# Plain words first: they are the most.
_TOKEN = re.compile(
    rf"(?=[^\W_])(?:[^\W\d_{sentences.CJK}][^\W_{sentences.CJK}]*|{_DAY}|\d+(?:[.,:/-]\d+){{0,4}}[^\W_{sentences.CJK}]*"
    rf"|(?:(?!{_HAN_DAY})[{sentences.CJK}])+)"
)
_UNIT = re.compile(r"(\d[\d.,:/-]*)[^\W\d_]{1,2}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

_NEGATIONS = """
    no none nobody nothing nowhere neither nor without dont doesnt didnt isnt arent wasnt werent wont cant hasnt havent
    couldnt wouldnt shouldnt kein keine keinen keinem keiner keines nichts nie niemals niemand ohne weder ne rien aucun
    aucune sans nada nadie tampoco ningún ninguno ninguna jamás sin non niente nessun nessuno nessuna senza não nem ninguém
    nenhum nenhuma sem niet geen nooit niets zonder inte ikke aldrig ingen inget inga utan uden uten nigdy nic bez
    ни никогда никто ничего нельзя без ні немає değil yok asla لا لم لن ليس بدون לא אין בלי 안
"""
_NEGATING = sentences.NEGATIONS | frozenset(_NEGATIONS.split())
_NEGATING_PART = re.compile(
    r"[不没沒无無勿]|未(?![来來])|(?<![特分区區个個性級级类類告離离差識识])[别別](?![人的墅])|ない|なかった|ません|않|못|없|아니"
)
_REMINDERS = (
    "remind me|remind us|remind him|remind her|remind them|remember to|don't forget|not forget|make sure|erinnere|erinner"
    "|rappelle|recuérdame|recuerda|напомни"
)
_REMINDING = frozenset(_REMINDERS.split("|"))
_REMINDING_PART = re.compile("提醒|记得|記得|忘れない")
_COMMITMENTS = """
    shall gonna owe owes promises promising swear swore committed verspreche verspricht versprach versprochen müssen musst
    soll sollst sollen sollt frist fällig spätestens dois devons devez doivent échéance promets debo deben prometo plazo
    devo deve prometto scadenza vou prazo moet moeten beloof beloofd måste skal ska нужно должен должна должны обещаю обещал
    обещала срок будем
"""
_COMMITTING_PAIRS = (
    "going to|has to|have to|need to|needs to|werden wir|je vais|nous allons|il faut|tengo que|tiene que|hay que|voy a"
    "|vamos a|tenho que"
)
_COMMITTING = sentences.COMMITMENTS | _REMINDING | {*_COMMITMENTS.split(), *_COMMITTING_PAIRS.split("|")}
_COMMITTING_PART = re.compile(
    rf"{_REMINDING_PART.pattern}|必|[我你您他她们們][会會]|答应|答應|承诺|承諾|保证|保證|截止|打算|一定|約束|締め?切|つもり|予定|なければ"
    "|약속|반드시|마감|해야|할게"
)
# Small talk and guesses: they deny nothing and bind nobody.
_HOLLOW = re.compile(
    r"\b(?:no (?:problem|worries|doubt|wonder|kidding|regrets|way)|can(?:'t|not|t) (?:wait|believe|imagine|help but)"
    r"|(?:can't|couldn't) agree more|could(?:n't| not) be \w+er|why not|not (?:only|just|bad|at all|to mention)"
    r"|don't (?:worry|mention it|you think)|never (?:know|too late)|kein problem|pas de (?:problème|souci)|de nada|не за что"
    r"|must(?:'ve| have| be| of)|due to|agreed?(?! (?:to|on|that)\b)|(?:a|great|good|solid|nice) plan|remind\w* (?:me|us) (?:of|that)"
    r"|(?:you|it|that|this|there|things|what|which)(?:'ll| will| shall|(?:'s|'re| is| are)? (?:gonna|going to))"
    r"|(?:will|'ll) (?:be (?:so|great|awesome|amazing|fun)|always|never forget|keep (?:you|ya|it|going|at it)|let you know|do my best))\b"
    r"|没关系|沒關係|没问题|沒問題|不客气|不客氣",
    re.IGNORECASE,
)
_ASKS = ("?", "？", "؟")
_EVASIVE = re.compile(
    r"\b(?:don't know|do not know|dont know|dunno|no idea|not sure|can't say|let me (?:check|see|look|ask|think|find out|get back)"
    r"|(?:will|'ll|going to|have to|need to|must|should) (?:check|find out|look|ask|see|think|get back|let you know)|later"
    r"|get back to you|to be (?:decided|determined)|tbd|haven't decided|weiß (?:ich |es |das )*(?:noch |leider )*nicht"
    r"|keine ahnung|später|muss (?:ich )?(?:noch |mal |erst )*(?:nachsehen|nachschauen|fragen|überlegen)|schaue? (?:mal )?nach"
    r"|sais pas|aucune idée|plus tard|vais (?:vérifier|voir|demander)|no s[eé]|ni idea|más tarde|luego|voy a (?:ver|preguntar)"
    r"|non (?:lo )?so|più tardi|não sei|mais tarde|weet (?:ik )?(?:het )?niet|не знаю|позже|потом|узнаю|уточню|проверю)\b"
    r"|不知道|不清楚|不确定|不確定|晚点|晚點|稍后|稍後|待会|待會|回头|回頭|[问問查]一下|わから|分から|後で|確認し|모르|나중|확인해",
    re.IGNORECASE,
)
_CONTRACTED = re.compile(r"\b\w+n't\b|'", re.IGNORECASE)
# Pairs of characters that are grammar more than content.
_EMPTY_PAIR = re.compile(r"[的了是我你您他她它们們在这這那就也都和与與吗嗎呢吧啊把被请請不没沒]|[\u3040-\u309f]{2}")
_RUSSIAN_WORDS = (
    "это что как для при или его она они мне меня все был была были есть мой моя наш так тоже уже если когда где"
)
_RUSSIAN = frozenset(_RUSSIAN_WORDS.split())


def facts(messages: Sequence[Message]) -> list[Fact]:
    """The facts of *messages* in order, each of a sentence once.

    A question is open when nobody else says anything after it, or only that he can't tell yet. Of a tool's result and a
    tool call only the beginning counts, as `sentences.lines` leaves it.
    """
    told = [list(sentences.lines([message])) for message in messages]
    speakers = frozenset(word for who in {*map(sentences.speaker, messages)} for word in sentences.words(who))
    found: list[Fact] = []
    for row, (lines, asking) in enumerate(zip(told, _unanswered(messages), strict=True)):
        empty = _function_words(" ".join(lines))
        for line in lines:
            found += _of_line(line, row=row, speakers=speakers, empty=empty, asking=asking)
    return list(dict.fromkeys(found))


def check(facts: Sequence[Fact], text: str) -> Coverage:
    """Which of *facts* the summary *text* holds.

    A number, date or name is held where it stands as a word, and anywhere beside it two of its sentence's words (or all,
    if those are fewer); a negation, where one sentence has a negating word, any, and two of its words; a question and a
    commitment, where one sentence has 60 % of its words. A line that stands there word for word is held whatever it says.
    """
    view = _view(text)
    held = [view.holds(fact) for fact in facts]
    return Coverage(
        tuple(fact for fact, kept in zip(facts, held, strict=True) if kept),
        tuple(fact for fact, kept in zip(facts, held, strict=True) if not kept),
    )


def pins(
    missing: Sequence[Fact], earlier: Sequence[str], text: str, *, count: Callable[[str], int], max_tokens: int
) -> list[str]:
    """The lines to pin beside the summary *text*: of *earlier*, pinned so far, and of the facts that are *missing* now.

    Chosen greedily by the worth (`WORTH`), per token, of the facts that neither *text* nor a line chosen before holds.
    Earlier lines come first, all in the order given; joined by line breaks they have at most *max_tokens* by *count*.
    """
    speakers = _speakers(earlier)
    told = {
        line: list(_of_line(line, row=-1, speakers=speakers, empty=_function_words(line), asking=True))
        for line in earlier
    }
    fresh: dict[str, list[Fact]] = defaultdict(list)
    for fact in missing:
        fresh[fact.line].append(fact)
    told |= fresh
    open_facts = set(check([fact for own in told.values() for fact in own], text).missing)
    lines = [line for line, own in told.items() if not open_facts.isdisjoint(own)]
    values = _values(told.values(), open_facts)

    def worth(i: int) -> float:
        line = lines[i]
        new = sum(values[f] for f in told[line] if f in open_facts)
        return min(new, _MOST) * (_NEW if line in fresh else 1.0)

    def take(i: int) -> None:
        open_facts.difference_update(check(list(open_facts), lines[i]).kept)

    taken = selection.best([count(line + "\n") for line in lines], worth=worth, take=take, max_tokens=max_tokens)
    chosen = [lines[i] for i in taken]
    while chosen and count("\n".join(chosen)) > max_tokens:  # where a tokenizer isn't additive
        chosen.pop()
    return chosen


def _values(told: Collection[Sequence[Fact]], open_facts: Iterable[Fact]) -> dict[Fact, float]:
    """What pinning each fact is worth; *told*: the facts of each line.

    A negation, a question or a commitment is worth what its words say, and words that many lines share say little: else
    phrases like "I'll do my best", being short, would fill the room.
    """
    lines = Counter(word for own in told for word in frozenset().union(*(fact.words for fact in own)))
    says = {word: math.log1p(len(told) / n) / math.log1p(len(told)) for word, n in lines.items()}

    def share(fact: Fact) -> float:
        # Sets have another order in every process; an exact sum has none.
        return min(1.0, math.fsum(says[word] for word in fact.words) / _ENOUGH)

    by_words = (Kind.NEGATION, Kind.QUESTION, Kind.COMMITMENT)
    return {fact: WORTH[fact.kind] * (share(fact) if fact.kind in by_words else 1.0) for fact in open_facts}


def _of_line(line: str, *, row: int, speakers: frozenset[str], empty: frozenset[str], asking: bool) -> Iterator[Fact]:
    """The facts of one line, each once; *asking*: a question in it is open. *empty* are words without content."""
    match = sentences.SPEAKER.match(line)
    told = line[match.end() if match else 0 :].replace("’", "'")
    tokens = _tokens(told)
    content = frozenset(_content(tokens)) - speakers - empty - _NEGATING
    texts: dict[str, tuple[Kind, str]] = {}
    for i, token in enumerate(tokens):
        kind, text = _kind(tokens, i), token.lower()
        if kind and text not in speakers and (kind is not Kind.NAME or content - {text}):  # a mere name tells nothing
            texts.setdefault(_key(token), (kind, text))
    for kind, text in texts.values():
        yield Fact(kind, text, line, content - {text}, row)
    if not content:  # "No." and "Will you?" say nothing by themselves
        return
    asks = told.rstrip(" \"'”)*_").endswith(_ASKS)
    if asks and asking:
        yield Fact(Kind.QUESTION, "", line, content, row)
    negation, bound = _signs(told, asks=asks)
    if negation or bound:
        negation, bound = _signs(_HOLLOW.sub(" ", told), asks=asks)
    if negation:
        yield Fact(Kind.NEGATION, negation, line, content, row)
    if bound:
        yield Fact(Kind.COMMITMENT, "", line, content, row)


def _signs(told: str, *, asks: bool) -> tuple[str, bool]:
    """The word by which a sentence denies something, or "", and whether it binds somebody; a question can only remind."""
    words = sentences.words(told)
    phrases = {*words, *map(" ".join, pairwise(words))}
    if asks:
        return "", not phrases.isdisjoint(_REMINDING) or _part(_REMINDING_PART, told) != ""
    bound = not phrases.isdisjoint(_COMMITTING) or any(word.endswith("'ll") for word in words)
    return _negation(words, told), bound or _part(_COMMITTING_PART, told) != ""


def _part(pattern: re.Pattern[str], told: str) -> str:
    """What *pattern*, of scripts without spaces, finds in *told*, or ""."""
    match = None if told.isascii() else pattern.search(told)
    return match[0] if match else ""


def _unanswered(messages: Sequence[Message]) -> list[bool]:
    """For each message whether a question in it is still open."""
    runs: list[tuple[str, list[int]]] = []  # who spoke, and all that he said before another did
    for row, message in enumerate(messages):
        if message.role in ("user", "assistant") and message.text.strip():
            who = sentences.speaker(message)
            if not runs or runs[-1][0] != who:
                runs.append((who, []))
            runs[-1][1].append(row)
    asking = [False] * len(messages)
    later: dict[str, int] = {}  # the next run of each speaker
    for n, (who, rows) in reversed(list(enumerate(runs))):
        # An answer lasts until the asker speaks again; what it says last counts ("Let me check." ... "At nine.").
        last = later.get(who, len(runs)) - 1
        later[who] = n
        for row in rows:
            if any(mark in messages[row].text for mark in _ASKS):
                asking[row] = last == n or _evades(messages[runs[last][1][-1]].text)
    return asking


def _evades(answer: str) -> bool:
    return len(answer) <= _SHORT and _EVASIVE.search(answer.replace("’", "'")) is not None


@dataclass(frozen=True, slots=True)
class _View:
    """A text as facts are looked for in it. `where`: the sentences, by number, that hold a word."""

    lines: frozenset[str]
    keys: frozenset[str]
    where: Mapping[str, Sequence[int]]
    negating: frozenset[int]

    def holds(self, fact: Fact) -> bool:
        if fact.line in self.lines:
            return True
        if fact.kind in (Kind.QUESTION, Kind.COMMITMENT):
            return bool(fact.words) and self._together(fact.words) >= -(-3 * len(fact.words) // 5)
        enough = min(2, len(fact.words))
        if fact.kind is Kind.NEGATION:
            return bool(self.negating) and self._together(fact.words, self.negating) >= enough
        return _key(fact.text) in self.keys and sum(word in self.where for word in fact.words) >= enough

    def _together(self, words: Iterable[str], among: frozenset[int] | None = None) -> int:
        """How many of *words* one sentence holds at most, of all sentences or of those *among* them."""
        found = Counter(row for word in words for row in self.where.get(word, ()) if among is None or row in among)
        return max(found.values(), default=0)


def _view(text: str) -> _View:
    lines = text.splitlines()
    keys: set[str] = set()
    where: dict[str, list[int]] = defaultdict(list)
    negating: set[int] = set()
    told = (sentence for line in lines for sentence in sentences.END.split(line.replace("’", "'")))
    for row, sentence in enumerate(told):
        tokens = _tokens(sentence)
        keys.update(map(_key, tokens))
        for word in frozenset(_content(tokens)):
            where[word].append(row)
        if _negation(sentences.words(sentence), sentence):
            negating.add(row)
    return _View(frozenset(lines), frozenset(keys), where, frozenset(negating))


def _tokens(text: str) -> list[str]:
    """Words, numbers and dates of *text* as they are written, contracted negations left out."""
    return _TOKEN.findall(_CONTRACTED.sub(" ", text))


def _key(token: str) -> str:
    """*token* as it is compared: "1,250" is "1250", "3rd" and "3 kg" are both "3"."""
    low = token.lower()
    if not low[:1].isdecimal():
        return low
    unit = _UNIT.fullmatch(low)
    return _THOUSANDS.sub("", unit[1] if unit else low)


def _content(tokens: Iterable[str]) -> Iterator[str]:
    plain = " ".join(token for token in tokens if _plain(token) or not (_DATE.fullmatch(token) or _numeric(token)))
    return (term for term in sentences.terms(plain) if _plain(term) or not _EMPTY_PAIR.search(term))


def _kind(tokens: Sequence[str], i: int) -> Kind | None:
    token = tokens[i]
    if not _plain(token):
        if _DATE.fullmatch(token):
            return Kind.DATE
        if _numeric(token):
            return Kind.NUMBER
    inside = i > 0 and token[0].isupper()
    low = token.lower()
    if low in _CALENDAR:
        beside = (*tokens[max(0, i - 1) : i], *tokens[i + 1 : i + 2])
        return Kind.DATE if low not in _AMBIGUOUS or inside or any(map(_numeric, beside)) else None
    return Kind.NAME if inside and sentences.named(token) else None


def _plain(token: str) -> bool:
    """Whether *token* is a word of the letters from A to Z: neither a number nor of a script without spaces."""
    return token.isascii() and token.isalpha()


def _numeric(token: str) -> bool:
    return any(map(str.isdecimal, token))


def _negation(words: Iterable[str], told: str) -> str:
    """The first negating word of *told*, whose *words* these are; "" if it has none."""
    return next((w for w in words if w in _NEGATING or w.endswith("n't")), "") or _part(_NEGATING_PART, told)


def negations(text: str) -> int:
    """How many words of *text* deny something."""
    told = text.replace("’", "'")
    found = sum(w in _NEGATING or w.endswith("n't") for w in sentences.words(told))
    return found + (0 if told.isascii() else len(_NEGATING_PART.findall(told)))


def _speakers(lines: Iterable[str]) -> frozenset[str]:
    matches = map(sentences.SPEAKER.match, lines)
    return frozenset(word for match in matches if match for word in sentences.words(match[1]))


def _function_words(text: str) -> frozenset[str]:
    """Words without content in the language of *text*, beside the English ones."""
    return FUNCTION_WORDS.get(language_of(frozenset(sentences.words(text))), frozenset()) | _RUSSIAN


__all__ = ["WORTH", "Coverage", "Fact", "Kind", "check", "facts", "negations", "pins"]
