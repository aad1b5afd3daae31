"""What the verbs work with: the parts of one open memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any
from weakref import WeakValueDictionary

from ..config import Settings
from ..errors import StorageError
from ..protocols import (
    AccessPolicy,
    Archive,
    Asked,
    Clock,
    Embedder,
    EntryStore,
    Extractor,
    Floor,
    Ledger,
    Reranker,
    Summarizer,
    TokenCounter,
)
from ..rules.breaker import Breaker
from ..rules.budget import margin, message_tokens
from ..rules.excerpt import excerpt
from ..rules.states import StateRules
from ..rules.tiering import DAY
from ..security.access import authorize
from ..types import Message, Scope, microseconds
from .cached import Hot
from .resident import Resident, Residents, Window

_USES = 512  # entries whose uses are gathered in RAM before they are written down
_ASKED = 256  # questions that are gathered likewise, and make room for newer ones
_HALVING_DAYS = 30.0  # where no option says how fast uses fade


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """An embedder, and the name that its vectors are known by. Whoever reads both at once never mixes those of two models."""

    embedder: Embedder
    id: str


def _no_choice(_: object) -> EmbeddingModel:
    raise AssertionError("settings.py sets it")


@dataclass(slots=True)
class Parts:
    """Built once by `settings.py`; every verb is given it first.

    Attributes:
        floor: The summarizer that needs no model, for when `summarizer` fails.
        model: The embedding model, None without one. `reindex` changes it: who needs it twice reads it once.
        outdated: It has none any more, because another process has taken up another one.
        embedding: Held around `embed_documents`, which embedders serve one call at a time. Never taken under another lock.
        exclusive: Held around what only one process may do at a time, by name; waits for the others. Taken under no lock but
            `embedding` or a fold's.
        sole: Held around what no other process may have the folder open for; it says whether none has, and lets none in.
        changed: Called after a write that left dirty marks, or texts to be analysed.
        full: Called with the scope of a session whose window is over its limits.
        later: Called with what is to be done in the background, once.
        tally: Counts of what happened since the memory was opened, for `stats()`.
        excerpt: As much of a text as fits so many tokens: the sentences that say most about a question.
        count_again: Counts text that is likely to be asked for again: summaries, quotes. `count_lines` does so line by line.
        shortened: A summary cut to so many tokens, without a model; also likely to be asked for again.
        trouble: The last failure of background work, for `stats()`.
        state_rules: What the states of sessions may be, where a session has no rules of its own.
        breaker: Keeps calls away from a summarizer that fails; `extracting` from an extractor.
        closing: Background work that takes several steps is to end after the one in hand.
        choose: Makes an embedding model of what a user passes; `chosen` is told which one was taken up.
    """

    settings: Settings
    ledger: Ledger
    store: EntryStore | None
    model: EmbeddingModel | None
    counter: TokenCounter
    summarizer: Summarizer
    floor: Floor
    policy: AccessPolicy
    clock: Clock
    residents: Residents
    hot: Hot
    archive: Archive
    reranker: Reranker | None = None
    state_rules: StateRules = field(default_factory=StateRules)
    extractor: Extractor | None = None
    changed: Callable[[], None] = lambda: None
    full: Callable[[Scope], None] = lambda _: None
    later: Callable[[Callable[[], None]], None] = lambda _: None
    embedding: threading.Lock = field(default_factory=threading.Lock)
    exclusive: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
    sole: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True)
    tally: Counter[str] = field(default_factory=Counter)
    trouble: str | None = None
    breaker: Breaker = field(default_factory=Breaker)
    extracting: Breaker = field(default_factory=Breaker)
    closing: bool = False
    outdated: bool = False
    choose: Callable[[Any], EmbeddingModel] = _no_choice
    chosen: Callable[[Any], None] = lambda _: None
    _margins: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each model of a tenant, as far as they were asked for."""
    _priced: int = 0
    """`Residents.models` when they were read."""
    _known_model: tuple[int, str, tuple[int, int]] | None = None
    """`Residents.models` when it was read, an embedding model's name, its number and dimensions."""
    _uses: dict[int, tuple[int, int]] = field(default_factory=dict)
    """How often entries were used, and when last, since that was written down."""
    _asked: dict[bytes, Asked] = field(default_factory=dict)
    """Questions that were embedded since they were written down, by their hashes."""
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _folds: WeakValueDictionary[Scope, threading.Lock] = field(default_factory=WeakValueDictionary)
    count_again: Callable[[str], int] = field(init=False)
    count_lines: Callable[[str], int] = field(init=False)
    shortened: Callable[[str, int], str] = field(init=False)
    excerpt: Callable[[str, str, int], str] = field(init=False)

    def __post_init__(self) -> None:
        self.count_again = lru_cache(maxsize=4096)(self.counter.count)
        self.count_lines = lru_cache(maxsize=256)(
            lambda text: sum(self.count_again(f"{line}\n") for line in text.splitlines())
        )
        self.excerpt = lru_cache(maxsize=256)(partial(excerpt, count=self.count_again))
        self.shortened = lru_cache(maxsize=64)(
            lambda text, tokens: self.floor.summarize([], previous=text, max_tokens=tokens)
        )

    @property
    def embedder(self) -> Embedder | None:
        return None if self.model is None else self.model.embedder

    @property
    def model_id(self) -> str | None:
        """Names the embedder."""
        return None if self.model is None else self.model.id

    def known_model(self, name: str) -> tuple[int, int] | None:
        """Number and dimensions of an embedding model, as of the last look at what others have changed; None while it has none."""
        now, kept = self.residents.models, self._known_model
        if kept is not None and kept[:2] == (now, name):
            return kept[2]
        found = self.ledger.known_model(name)
        if found is not None:
            self._known_model = now, name, found
        return found

    def margins(self, tenant: str) -> dict[str, float]:
        """By how much each model's tokens exceed ours at most, by what a tenant's sessions reported of it.

        Also of other processes, as far as `residents` were told.
        """
        if self._priced != self.residents.models:  # another process has learned something
            self._priced = self.residents.models
            self._margins.clear()
        known = self._margins.get(tenant)
        if known is None:
            known = self._margins[tenant] = {row[1]: margin(*row[2:]) for row in self.ledger.calibration(tenant)}
        return known

    def calibrate(self, scope: Scope, *, model: str, ratio: float) -> float:
        """Take in that *model* was charged *ratio* times our tokens; its margin now."""
        known = self.margins(scope.tenant)
        known[model] = margin(*self.ledger.calibrate(scope, model=model, ratio=ratio))
        return known[model]

    def folding(self, scope: Scope) -> threading.Lock:
        """The lock around a fold of the scope's session, to be held by name. Folds call models; no other lock covers them."""
        with self._guard:
            return self._folds.setdefault(replace(scope, agent_id=None), threading.Lock())

    def authorize(self, principal: str | None, action: str, scope: Scope) -> None:
        authorize(self.policy, principal, action=action, scope=scope)

    def count(self, message: Message) -> int:
        """What a message costs in a prompt."""
        return message_tokens(message, self.counter.count)

    def used(self, numbers: Iterable[int]) -> None:
        """Count a use of entries: in RAM, to be written down with many others."""
        now = microseconds(self.clock())
        with self._guard:
            for number in numbers:
                self._uses[number] = (self._uses.get(number, (0, 0))[0] + 1, now)
            many = len(self._uses) >= _USES
        if many:
            self.later(self.write_uses)

    def write_uses(self) -> None:
        """Write down what was used. What a killed process has not written is not counted."""
        with self._guard:
            uses, self._uses = self._uses, {}
        if uses:
            days = self.settings.tiers.warm_tier_max_age_days or _HALVING_DAYS
            self.ledger.use(uses, halving=int(days * DAY))

    def asked(self, question: Asked) -> None:
        """Keep the vector of a question: in RAM, to be written down with others, so that no search waits for who writes."""
        with self._guard:
            self._asked[question.digest] = question
            if len(self._asked) > _ASKED:
                del self._asked[next(iter(self._asked))]

    def asked_before(self, digest: bytes, *, epoch: int) -> bytes | None:
        """The vector of a question that is still to be written down, if its owner is in the same epoch."""
        question = self._asked.get(digest)
        return None if question is None or question.epoch != epoch else question.vector

    def write_questions(self) -> None:
        """Write down what was asked. While the ledger takes nothing it waits."""
        with self._guard:
            asked = list(self._asked.values())
        if not asked:
            return
        with suppress(StorageError):
            self.ledger.keep_questions(asked)
            with self._guard:
                for question in asked:
                    if self._asked.get(question.digest) is question:
                        del self._asked[question.digest]

    def resident(self, scope: Scope, *, look: bool = True) -> Resident:
        """The resident of the scope's owner, to be held by name and used under its lock.

        It knows what other processes have written until now, or, without a *look*, what was seen of that before.
        With its last holder goes its lock, so `with parts.resident(scope).lock` is not enough. And it is the lock's own
        `with`, not one of a generator, because an interrupt between the two would leave it locked.
        """
        return self.residents.of(scope, look=look)

    def window(self, scope: Scope, resident: Resident | None = None) -> Window:
        """The session's window; for those who hold its resident's lock. To give the *resident* spares looking for it."""
        resident = resident or self.residents.unused(scope)
        return resident.window(scope, count=self.count, expiry=self.settings.context.expiry_time)


__all__ = ["EmbeddingModel", "Parts"]
