"""What a message is worth keeping, told by its text and by who said it: 0 for a greeting, near 1 for a fact about the user.

    worth = substance · (0.4 + 0.2 own + 0.25 facts + 0.15 weighty)

- substance: 1 - 0.5ⁿ for n words with content; greetings and interjections have none.
- own: it is in the first person.
- facts: 1 - 0.6ⁿ for n different numbers, dates and names. A capital inside a sentence makes a name.
- weighty: it promises, plans or denies something, or is a wish (`rules.traits.WISH`).

Sentences that ask count 0.4 of that, and those that state are looked at without them. What is long says less by the word:
beyond 150 words (60 of an assistant's) the worth falls with the root of the length. An assistant's message counts half and
has no first person; one with a name is taken for a person's, as in search. A tool's output counts a fifth. Code counts neither
way, and what can't be judged is worth 0.5: the host's instructions, and messages without any text. So is knowledge, at least:
somebody chose to tell it.

Numbers and capitals are told in every language that has them, the words in about ten.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from . import sentences
from .lexical import FUNCTION_WORDS
from .question import ROLES
from .traits import TIMED, WISH
from .traits import traits as traits_of

UNJUDGED = 0.5
"""What a text is worth of which nothing can be told."""

_READ = 6_000  # characters; more do not change what a text is about
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_ENDS = re.compile(r"[.!?…][\"'”’)]?\s|[。！？]")
"""What is found wherever `sentences.END` is, and sooner."""
_LIKE_A_QUESTION = ("?", "？", "؟")
_CLOSING = " \"'”’)*_»"
_GREETINGS = """
    hi hello hey bye goodbye thanks thank welcome please sorry ok okay yes yeah yep yup sure great good nice cool awesome
    amazing wonderful perfect fantastic lovely wow oh ah aww haha hahaha lol right exactly indeed absolutely definitely
    totally course fine glad happy hear see sounds congrats congratulations anyway actually honestly hope again
    hallo servus moin tschüss danke dank vielen bitte ja nein genau super toll gut gute guten klar schön gerne freut prima
    bonjour salut merci beaucoup oui bien sûr d'accord hola gracias muchas sí vale claro bueno buenos buenas ciao grazie
    prego sì bene olá oi obrigado obrigada sim bom hoi hej tack tak
    привет спасибо да нет хорошо ладно пожалуйста здравствуйте отлично
"""
_PEOPLE = """
    i ive my mine we our ours ich mein meine meinen meinem meiner wir unser unsere unseren j je mon ma mes nous notre nos
    yo mi mis soy tengo estoy vivo nosotros nuestro nuestra io mio mia miei mie sono ho abito eu meu minha meus minhas sou
    tenho moro ik mijn wij onze jag min mitt mina jeg я мой моя моё мои меня мне мы наш наша
"""
_DAYS = "gestern heute übermorgen demain ayer mañana hoy ieri domani oggi вчера сегодня завтра"
_DAYS_FROM_NOW = frozenset(_DAYS.split())
_FIRST_PERSON = frozenset(_PEOPLE.split())
_WEIGHTY = sentences.COMMITMENTS | sentences.NEGATIONS
_EMPTY = sentences.STOP.union(_GREETINGS.split(), _FIRST_PERSON - {"j"}, *FUNCTION_WORDS.values())
_DIGIT = re.compile(r"\d")
_UNSPACED = re.compile(f"[{sentences.CJK}]")
_UNSPACED_GREETING = re.compile(
    "[你您]好|早上好|晚安|再[见見]|[谢謝]{2}[你您]?|好的|好[啊吧呀]|[哈嗯啊哦呵]+|太好了|真[棒好]|不客[气氣]|[没沒][关關][系係]|[没沒][问問][题題]"
    "|ありがとう(?:ございます)?|こんにちは|おはよう(?:ございます)?|こんばんは|はい|いいえ|ええ|なるほど|すごい(?:ですね)?|そうですね?"
    "|안녕(?:하세요)?|감사합니다|고마워요?|좋아요?|그래요?"
)
_UNSPACED_FIRST_PERSON = re.compile("[我咱私僕俺]|나[는의도]|저[는의도]|[내제] |우리")
_UNSPACED_WEIGHTY = re.compile("[不没沒无無必別别]|打算|答应|答應|[会會]|ない|ません|つもり|予定|않|못|약속")
_UNSPACED_FACT = re.compile(
    "[一二三四五六七八九十百千万萬两兩]+[年月日号號点點岁歲个個元块塊人天周週次]|(?:星期|[周週])[一二三四五六日天]|[昨今明][天日]|어제|오늘|내일"
)
_OWN, _WEIGHS, _SUBSTANCE, _FACT, _NAMED = 1, 2, 4, 8, 16
_LONG, _LONG_ANSWER = 150, 60  # words
_ANSWER, _TOOL, _ASKED = 0.5, 0.2, 0.4


def worth_keeping(text: str, *, traits: int, role: str | None = None, name: str | None = None) -> float:
    """What a message or an entry is worth keeping, 0..1, to two decimals.

    Args:
        text: What it says.
        traits: Of the text (`rules.traits.traits`).
        role: Whose it is; None is knowledge that was told.
        name: Who said it, if it has one.
    """
    if role in ("system", "developer"):
        return UNJUDGED
    answer = role == "assistant" and (name or role).lower() in ROLES
    text = text[:_READ].replace("’", "'")
    if "```" in text:
        text = _CODE.sub("\n", text)
        traits = traits_of(text)
    worth = UNJUDGED
    if text.strip():
        worth = _worth(text, traits, own=not answer, longest=_LONG_ANSWER if answer else _LONG)
    if role is None:
        worth = max(worth, UNJUDGED)
    return round(worth * (_ANSWER if answer else _TOOL if role == "tool" else 1.0), 2)


def _worth(text: str, traits: int, *, own: bool, longest: int) -> float:
    stated: list[str] = []
    asked: list[str] = []
    for line in text.splitlines():
        for sentence in sentences.END.split(line) if _ENDS.search(line) else (line,):
            (asked if sentence.rstrip(_CLOSING).endswith(_LIKE_A_QUESTION) else stated).append(sentence)
    states, asks = (_said(told, traits, own=own, longest=longest) for told in (stated, asked))
    return max(states, _ASKED * asks)


@lru_cache(maxsize=1 << 14)
def _kind(word: str) -> tuple[str, int]:
    """A word in lower case, and what it shows by itself."""
    low = word.lower()
    stem = low.partition("'")[0]  # "I'm" is "I", and "that's" says as little as "that"
    kind = _OWN * (stem in _FIRST_PERSON) | _WEIGHS * (low in _WEIGHTY)
    if low not in _EMPTY and stem not in _EMPTY:
        known = low in _DAYS_FROM_NOW or _DIGIT.search(word) is not None
        kind |= _SUBSTANCE | _FACT * known | _NAMED * sentences.named(word)
    return low, kind


def _said(told: Sequence[str], traits: int, *, own: bool, longest: int) -> float:
    """What *told* sentences are worth, as if none of them were a question."""
    if not told:
        return 0.0
    number, content, facts, seen = 0, set[str](), set[str](), 0
    first, later = set[str](), set[str]()
    for sentence in told:
        found = sentences.WORD.findall(sentence)
        number += len(found)
        first.update(found[:1])
        later.update(found[1:])
    for some, shows_fact in ((first, _FACT), (later, _FACT | _NAMED)):
        for word in some:
            low, kind = _kind(word)
            seen |= kind
            if kind & _SUBSTANCE:
                content.add(low)
                if kind & shows_fact:
                    facts.add(low)
    first_person, weighty = seen & _OWN > 0, seen & _WEIGHS > 0
    text = "\n".join(told)
    size = len(content)
    if not text.isascii() and _UNSPACED.search(text):
        text = _UNSPACED_GREETING.sub(" ", text)
        characters = len(_UNSPACED.findall(text))
        number += characters // 2
        size = sum(not _UNSPACED.search(word) for word in content) + characters // 2
        facts.update(_UNSPACED_FACT.findall(text))
        first_person |= _UNSPACED_FIRST_PERSON.search(text) is not None
        weighty |= _UNSPACED_WEIGHTY.search(text) is not None
    known = 1 - 0.6 ** (len(facts) or bool(traits & TIMED))
    worth = 0.4 + 0.2 * (own and first_person) + 0.25 * known + 0.15 * (weighty or traits & WISH > 0)
    return (1 - 0.5**size) * worth * math.sqrt(min(1.0, longest / max(number, 1)))


__all__ = ["UNJUDGED", "worth_keeping"]
