"""Filling memories with many entries: by the front door, or straight into the ledger where that would take hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from neuralflow_memory.types import Entry, MemoryType, Scope, microseconds

from .texts import Texts
from .vectors import PreparedEmbedder

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory
    from neuralflow_memory.protocols import Record
    from neuralflow_memory.storage.ledger.sqlite import SqliteLedger

_SESSION = 20
"""Turns of a session: too few to be folded."""


def texts_of(user: int, entries: int) -> list[str]:
    """What a user said; the same each time."""
    texts = Texts(1_000_000 + user)
    return [texts.chatty() for _ in range(entries)]


def add_user(memory: Memory, user: int, entries: int) -> list[str]:
    """Let a user say so many things, in sessions of twenty; what was said."""
    said = texts_of(user, entries)
    for number, start in enumerate(range(0, entries, _SESSION)):
        memory.session(f"s{number}", user_id=name(user)).add(said[start : start + _SESSION])
    return said


def name(user: int) -> str:
    return f"user-{user}"


def fill_ledger(folder: Path, *, users: int, entries: int) -> None:
    """Make a memory whose vector index is empty and up to date as far as it knows: ledger and vectors only.

    The texts are those of the first thousand users, over and over; the vectors are each entry's own.
    """
    from neuralflow_memory.settings import CHROMA_FOLDER, LEDGER_FILE
    from neuralflow_memory.storage.chroma import ChromaStore
    from neuralflow_memory.storage.ledger.sqlite import SqliteLedger

    folder.mkdir(parents=True)
    embedder = PreparedEmbedder()
    store = ChromaStore(folder / CHROMA_FOLDER)
    dimensions = embedder.embed_documents(["x"]).shape[1]
    store.reset(model_id=embedder.model_id, dimensions=dimensions)  # so that opening it finds nothing to do
    store.close()
    ledger = SqliteLedger(folder / LEDGER_FILE, counter="cl100k_base")
    model = ledger.model(embedder.model_id, dimensions=dimensions)
    for user in range(users):
        _write(ledger, user, entries, embedder=embedder, model=model)
    ledger.close()


def _write(ledger: SqliteLedger, user: int, entries: int, *, embedder: PreparedEmbedder, model: int) -> None:
    scope = Scope("default", name(user), "s0")
    now = datetime.now(UTC)
    records = []
    for number, record in enumerate(_records(user % 1_000, entries)):
        own_id = f"{user}-{number}"
        entry = replace(record.entry, id=own_id, key=ledger.key(scope, id=own_id), scope=scope, created_at=now)
        records.append(replace(record, entry=entry))
    written = ledger.append(scope, records, on_conflict="raise", now=microseconds(now)).written
    vectors = embedder.embed_documents([f"{record.entry.content} {user}" for record in written])
    rows = [
        (
            record.entry.number,
            record.entry.version,
            ledger.content_hash(scope, text=f"{record.entry.content} {user}", model_id=embedder.model_id),
            vector.tobytes(),
        )
        for record, vector in zip(written, vectors, strict=True)
    ]
    ledger.put_vectors(model, rows)
    ledger.clear_dirty([(record.entry.number, record.entry.version) for record in written])


@lru_cache(maxsize=1_000)
def _records(user: int, entries: int) -> tuple[Record, ...]:
    return tuple(_recorded(texts_of(user, entries)))


def _recorded(texts: list[str]) -> Iterator[Record]:
    from neuralflow_memory.rules.analysis import recorded

    then = datetime.now(UTC)
    for text in texts:
        entry = Entry(
            id="",
            key="",
            type=MemoryType.SHORT_TERM,
            content=text,
            scope=Scope(),
            seq=0,
            created_at=then,
            written_at=then,
            updated_at=then,
            role="user",
            tokens=len(text) // 4,
        )
        yield recorded(entry)


__all__ = ["add_user", "fill_ledger", "name", "texts_of"]
