"""Full text for many languages: words to terms, terms to 32-bit ids, ids to BM25 scores, all in this process."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]

VERSION = 1
"""Of the rules in this file. Stored term ids of another version (or of another PyStemmer release) don't
match today's words: whoever stores ids stores both beside them and makes the ids anew when either changes."""

MAX_WORD = 64
"""Characters; what is longer is cut. Keeps a pasted key or a base64 line from filling the caches."""


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


STOP_WORDS = _words(
    """a about after again all also am an and any are as at be because been before being both but by can could did do
    does doing done down each few for from further get got had has have having he her here hers herself him himself his
    how i if in into is it its itself just let me more most my myself no nor not now of off on once only or other our
    ours out over own same she should so some such than that the their theirs them themselves then there these they this
    those through to too under until up us very was we were what when where which while who whom whose why will with
    would you your yours yourself dont didnt doesnt cant im ive thats"""
)
"""English function words; they carry no content and are dropped from every text."""

FUNCTION_WORDS = {
    language: _words(listed)
    for language, listed in {
        "german": """aber auch auf aus bei das dass dem der des ein eine einen einer es für habe haben hat ich ihr ist
            kann mein meine mich mir mit nach nicht noch oder schon sich sie sind über um und uns vom von wann warum wenn
            werden wie wir wird wo wurde zu zum zur""",
        "french": """au aux avec ce ces cette dans de des du elle est et il ils je la le les leur lui mais mes mon ma
            nous où par pas pour quand que quel quelle qui sa ses sont suis sur très tu un une vous""",
        "spanish": """al como con cuando cuándo de del donde dónde el ella es ese esta está este ha hay la las lo los
            más mi mis muy nos para pero por porque que qué quién se son su sus tengo también un una y ya yo""",
        "portuguese": """ao aos as com como da das de do dos e ela ele em essa esse está eu foi isso mais mas meu minha
            muito na nas não no nos os ou para pela pelo por quando que quem são se seu sua também tem um uma você""",
        "italian": """al alla anche che chi come con cosa da dal dalla degli dei del della delle di dove e è gli ha ho il
            io la le lo ma mi mia mio nel nella non per perché più quando questo si sono sua sul sulla suo un una""",
        "dutch": """aan als bij dat de deze die dit een en er geen haar heb hebben heeft het hij ik is je kan maar
            met mijn naar niet nog om ons ook op uit van voor waar wanneer wat wel wij ze zijn zij""",
        "swedish": """att av de den det din du där efter en ett från för har hur hon inte jag kan med men mig min mitt
            när och om på sig som så till under var varför vad vi är""",
        "danish": """af at de den der det din du efter en et fra for har hun hvad hvor hvordan hvornår ikke jeg kan med
            men mig min mitt mit når og om på seg sig som så til var vi er""",
    }.items()
}
# Norwegian shares its function words with Danish and is stemmed as it: on both sides alike, which is what counts.

_ALL_FUNCTION_WORDS: frozenset[str] = frozenset().union(*FUNCTION_WORDS.values())

_SCRIPTS = {
    "LATIN": "english",
    "CYRILLIC": "russian",
    "ARABIC": "arabic",
    "GREEK": "greek",
    "DEVANAGARI": "hindi",
    "TAMIL": "tamil",
    "ARMENIAN": "armenian",
}

_UNACCENTED = frozenset({"english", "greek", *FUNCTION_WORDS})
"""Whose stems lose their accents, as people type them with and without."""

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Scripts written without spaces, and Hangul, whose particles cling to the word: Thai, Lao, Myanmar, Khmer, kana.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3031-\u3035\u3041-\u312f\u31a0-\u31ff\uac00-\ud7af"
_MARK_BLOCKS = (range(0x300, 0x1CFF), range(0x1DC0, 0x2100), range(0xA66F, 0xABFF), range(0xFE20, 0xFE30))
# Python's \w leaves out combining marks, which would cut every Devanagari word at its vowels.
_MARKS = "".join(chr(c) for block in _MARK_BLOCKS for c in block if unicodedata.category(chr(c))[0] == "M")
_LETTERS = rf"[^\W_{_HAN}{_UNSPACED}]+(?:[{_MARKS}]+[^\W_{_HAN}{_UNSPACED}]*)*"
_NUMBER = r"\d+(?:[.,]\d+)+"
_ASCII_PIECE = re.compile(rf"{_NUMBER}|[a-z0-9]+(?:'[a-z]+)*")
_PIECE = re.compile(rf"{_NUMBER}|{_LETTERS}(?:'{_LETTERS})*|[{_HAN}{_UNSPACED}]+")
_UNSPACED_RUN = re.compile(f"[{_HAN}{_UNSPACED}]")
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"\d+\.\d+")
_ENDING = re.compile(r"'(?:s|re|ve|ll|d|m)$")
# Curly apostrophes are apostrophes; soft hyphens and joiners are no part of a word; Russian writes ё or е at will.
_SPELLING = {0x2019: "'", 0x02BC: "'", 0xAD: None, 0x200D: None, 0xFEFF: None, 0x451: 0x435, 0x401: 0x415}

_known: dict[tuple[str, bytes], dict[str, tuple[int, ...]]] = {}
"""Ids of the terms of words, by language and key. A plain dict: an `lru_cache` would take longer than all else on this way."""
_MOST_KNOWN = 1 << 15
_stemmers: dict[str, Any] = {}
_stemming = threading.Lock()  # a stemmer keeps the word it works on in itself


def tokens(text: str) -> list[str]:
    """Return the terms of *text* in order, with repeats: what is indexed, and what a query is made of.

    Words are normalized (NFKC, case folded), stemmed and stripped of accents; English function words are dropped.
    A word's stem follows from its script: Cyrillic is stemmed as Russian, Latin as English, and so on, so that a word
    finds itself whatever surrounds it. A text that is surely German, French, ... (at least two of that language's
    function words, more than of any other) yields each word's stem in that language too, where it differs: there a
    word also finds its other forms, and a query too short to tell its language still meets the first form.

    Text without spaces between words (Chinese, Japanese, Korean, Thai, ...) becomes pairs of neighbouring characters,
    and single Han characters besides, as many are words by themselves. Decimals stay whole ("3.5"), thousands lose
    their commas, dates fall into their parts.
    """
    pieces, _, language = _pieces(text)
    terms: list[str] = []
    for piece in pieces:
        terms += _terms(piece, language)
    return terms


def term_ids(text: str, *, key: bytes = b"") -> Ids:
    """Return the tokens of *text* as 32-bit ids, in order with repeats, shape (number of tokens,).

    An id is the token's BLAKE2b digest of four bytes, keyed by *key* (at most 64 bytes) where the index must not tell
    the words. Ids and not strings are stored because they are small, need no vocabulary table to be written
    beside them, and say nothing of the text without the key. Two given terms share an id with odds of
    1 in 4.3 billion; a query term meets a false match among a user's 50,000 distinct terms once in 86,000 queries, and
    then only gains that document one term's score.
    """
    pieces, _, language = _pieces(text)
    known = _known.setdefault((language, key), {})
    ids: list[int] = []
    for piece in pieces:
        found = known.get(piece)
        ids += _learned(piece, language, key) if found is None else found
    return np.array(ids, dtype=np.uint32)


def words_of(text: str) -> frozenset[str]:
    """Return the words and numbers of *text*, normalized but not stemmed; of "I'm" also its parts."""
    words = _pieces(text)[1]
    joined = [word for word in words if "'" in word]
    return words.union(*(word.split("'") for word in joined)) if joined else words


@lru_cache(maxsize=4)
def _pieces(text: str) -> tuple[list[str], frozenset[str], str]:
    """Return the words, numbers and unspaced runs of *text*, normalized, in order and as a set, and its language."""
    if text.isascii():
        pieces = _ASCII_PIECE.findall(text.lower())
    else:
        folded = unicodedata.normalize("NFKC", text.translate(_SPELLING)).casefold()
        pieces = _PIECE.findall(unicodedata.normalize("NFKC", folded))
    words = frozenset(pieces)
    return pieces, words, language_of(words)


def _is_word(piece: str) -> bool:
    """Whether *piece* is likely to be met again, and so belongs into the caches."""
    return len(piece) <= MAX_WORD and (piece.isascii() or not _UNSPACED_RUN.match(piece))


def _learned(piece: str, language: str, key: bytes) -> tuple[int, ...]:
    """Return the ids of a piece's terms, and keep them if it is a word."""
    ids = tuple(_id(term, key) for term in _terms(piece, language))
    if _is_word(piece):
        known = _known[language, key]
        if len(known) >= _MOST_KNOWN:
            known.clear()  # the words in use are soon there again
        known[piece] = ids
    return ids


@lru_cache(maxsize=1 << 16)
def _id(token: str, key: bytes) -> int:
    return int.from_bytes(blake2b(token.encode(), digest_size=4, key=key).digest(), "little")


def language_of(words: frozenset[str]) -> str:
    """Return the language, other than English, that a text of these words surely is in; else an empty string."""
    foreign = words & _ALL_FUNCTION_WORDS
    if len(foreign) < 2:
        return ""
    counts = sorted(((len(foreign & known), name) for name, known in FUNCTION_WORDS.items()), reverse=True)
    (best, name), (second, _) = counts[:2]
    sure = best >= 2 and best > second and best > len(words & STOP_WORDS - FUNCTION_WORDS[name])
    return name if sure else ""


def _terms(piece: str, language: str) -> Sequence[str]:
    """Return the terms of a number, a word (with its apostrophes) or an unspaced run."""
    if piece.isascii() and piece.isalpha():  # what most words are
        return () if piece in STOP_WORDS else _stems(piece[:MAX_WORD], language)
    if _UNSPACED_RUN.match(piece):
        return _pairs(piece)
    if piece[0].isdigit() and ("." in piece or "," in piece):
        if _THOUSANDS.fullmatch(piece):
            return (piece.replace(",", "")[:MAX_WORD],)
        numbers = [piece] if _DECIMAL.fullmatch(piece) else re.split("[.,]", piece)
        return tuple(number[:MAX_WORD] for number in numbers)
    if piece.endswith("n't"):
        return ()
    words = [w[:MAX_WORD] for w in _ENDING.sub("", piece).split("'") if w not in STOP_WORDS]
    return tuple(form for word in words for form in _stems(word, language))


def _stems(word: str, language: str) -> tuple[str, ...]:
    script = "LATIN" if word.isascii() and word.isalpha() else unicodedata.name(word[0], "").partition(" ")[0]
    own = _stem(word, _SCRIPTS.get(script, ""))
    other = _stem(word, language) if script == "LATIN" else own
    return (own,) if not language or own == other else (own, other)


def _stem(word: str, language: str) -> str:
    if not language:
        return word
    with _stemming:
        if language not in _stemmers:
            _stemmers[language] = import_module("Stemmer").Stemmer(language, 0)  # the words are kept here, not there
        stem = str(_stemmers[language].stemWord(word)) or word
    return stem if stem.isascii() or language not in _UNACCENTED else _without_accents(stem)


def _without_accents(word: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    return unicodedata.normalize("NFC", plain) or word


def _pairs(run: str) -> list[str]:
    if len(run) == 1:
        return [run]
    terms = []
    for i, character in enumerate(run):
        if _HAN_CHARACTER.match(character):
            terms.append(character)
        if i + 1 < len(run):
            terms.append(run[i : i + 2])
    return terms


__all__ = ["MAX_WORD", "STOP_WORDS", "VERSION", "Ids", "term_ids", "tokens", "words_of"]
