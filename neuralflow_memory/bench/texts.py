"""Texts of made-up words, as frequent as words are (Zipf); the same for the same seed."""

from __future__ import annotations

import itertools
import random

_FUNCTION = """
    the of and to a in is it you that he was for on are with as I his they be at one have this from or had by not but
    what all were we when your can said there use an each which she do how their if will up other about out many then
    them these so some her would make like him into time has look two more write go see no way could my than been
"""
_SYLLABLES = "ba ce di fo gu ha ke li mo nu pa re si to va wen zar tol min der gal ost ur ik"
_ENDINGS = ("", "", "s", "ed", "ing", "er", "ly")
_VOCABULARY = 12_000
_EXPONENT = 1.25
"""Of Zipf's law. New words then come as fast as in a chat between two people: 1,270 different ones in 8,500."""


def _vocabulary() -> list[str]:
    rng = random.Random(20)
    made: dict[str, None] = dict.fromkeys(_FUNCTION.split())
    syllables = _SYLLABLES.split()
    while len(made) < _VOCABULARY:
        made["".join(rng.choices(syllables, k=rng.randint(2, 4))) + rng.choice(_ENDINGS)] = None
    return list(made)


class Texts:
    """A source of texts, no two alike."""

    _words: tuple[str, ...] = ()
    _weights: tuple[float, ...] = ()

    def __init__(self, seed: int) -> None:
        if not Texts._words:
            Texts._words = tuple(_vocabulary())
            Texts._weights = tuple(itertools.accumulate(rank**-_EXPONENT for rank in range(1, _VOCABULARY + 1)))
        self._rng = random.Random(seed)
        self._seed = seed
        self._made = 0

    def sentence(self, words: int) -> str:
        """A text of *words* words, the last of which is in no other text."""
        self._made += 1
        chosen = self._rng.choices(self._words, cum_weights=self._weights, k=max(1, words - 1))
        return f"{' '.join(chosen).capitalize()} n{self._seed}x{self._made}."

    def chatty(self) -> str:
        """A text as long as what people write in chats: 5 to 40 words, short ones more often."""
        return self.sentence(min(40, 5 + int(self._rng.expovariate(1 / 12))))

    def shuffled(self, text: str) -> str:
        """The words of *text* in another order: as many tokens, nearly, and another text."""
        words = text.split()
        self._rng.shuffle(words)
        return " ".join(words)


__all__ = ["Texts"]
