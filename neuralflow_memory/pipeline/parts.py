"""What the verbs work with: the parts of one open memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from ..config import Settings
from ..protocols import AccessPolicy, Clock, Embedder, EntryStore, Ledger, Record, Summarizer, TokenCounter
from ..rules.budget import message_tokens
from ..rules.lexical import term_ids
from ..security.access import authorize
from ..types import Entry, Message, Scope
from .resident import Resident, Residents, Window


@dataclass(slots=True)
class Parts:
    """Built once by `settings.py`; every verb is given it first.

    Attributes:
        floor: The summarizer that needs no model, for when `summarizer` fails.
        model_id: Names the embedder; None without one.
        embedding: Held around `embed_documents`, which embedders serve one call at a time. Never taken under another lock.
        changed: Called after a write that left dirty marks.
        full: Called with the scope of a session whose window is over its limits.
        tally: Counts of what happened since the memory was opened, for `stats()`.
        count_again: Counts text that is likely to be asked for again: summaries, quotes.
        shortened: A summary cut to so many tokens, without a model; also likely to be asked for again.
        trouble: The last failure of background work, for `stats()`.
    """

    settings: Settings
    ledger: Ledger
    store: EntryStore | None
    embedder: Embedder | None
    model_id: str | None
    counter: TokenCounter
    summarizer: Summarizer
    floor: Summarizer
    policy: AccessPolicy
    clock: Clock
    residents: Residents
    changed: Callable[[], None] = lambda: None
    full: Callable[[Scope], None] = lambda _: None
    embedding: threading.Lock = field(default_factory=threading.Lock)
    tally: Counter[str] = field(default_factory=Counter)
    trouble: str | None = None
    count_again: Callable[[str], int] = field(init=False)
    shortened: Callable[[str, int], str] = field(init=False)

    def __post_init__(self) -> None:
        self.count_again = lru_cache(maxsize=512)(self.counter.count)
        self.shortened = lru_cache(maxsize=64)(
            lambda text, tokens: self.floor.summarize([], previous=text, max_tokens=tokens)
        )

    def authorize(self, principal: str | None, action: str, scope: Scope) -> None:
        authorize(self.policy, principal, action=action, scope=scope)

    def count(self, message: Message) -> int:
        """What a message costs in a prompt."""
        return message_tokens(message, self.counter.count)

    def resident(self, scope: Scope) -> Resident:
        """The resident of the scope's owner, to be held by name and used under its lock.

        With its last holder goes its lock, so `with parts.resident(scope).lock` is not enough. And it is the lock's own
        `with`, not one of a generator, because an interrupt between the two would leave it locked.
        """
        return self.residents.of(scope)

    def window(self, scope: Scope) -> Window:
        """The session's window; for those who hold its resident's lock."""
        return self.residents.of(scope).window(scope, count=self.count)


def recorded(entry: Entry) -> Record:
    """*entry* with what search needs of it."""
    text = entry.content
    question = text.rstrip().endswith(("?", "？", "؟"))
    return Record(entry, len(text.split()), question, term_ids(text).astype("<u4").tobytes())


__all__ = ["Parts", "recorded"]
