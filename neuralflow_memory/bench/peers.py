"""What a conversation costs elsewhere: a bare transaction, LangChain, LlamaIndex; each used as its documentation says."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

Turn = tuple[str, str]
"""What the user says, and what the assistant answers."""
Encode = Callable[[str], list[int]]
_BULK = 10


def encoder() -> Encode:
    """What tiktoken makes of a text with cl100k_base, from the files on this machine; its estimate where they are missing."""
    from neuralflow_memory.models.tokens import TiktokenCounter, token_counter

    counter = token_counter("cl100k_base")
    if isinstance(counter, TiktokenCounter):
        return counter._encode
    return lambda text: [0] * counter.count(text)


class BareSqlite:
    """What any durable memory must do for a turn: two rows, their full text, their outbox rows, their tokens; one transaction."""

    name = "bare SQLite"

    def __init__(self, file: Path, *, encode: Encode) -> None:
        self._encode = encode
        self._db = sqlite3.connect(file, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(
            "CREATE TABLE messages (id INTEGER PRIMARY KEY, session TEXT, role TEXT, content TEXT, tokens INTEGER)"
        )
        self._db.execute("CREATE VIRTUAL TABLE words USING fts5 (content)")
        self._db.execute("CREATE TABLE outbox (id INTEGER PRIMARY KEY)")

    def turn(self, said: Turn) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        for role, text in zip(("user", "assistant"), said, strict=True):
            row = ("chat", role, text, len(self._encode(text)))
            made = db.execute("INSERT INTO messages (session, role, content, tokens) VALUES (?, ?, ?, ?)", row)
            db.execute("INSERT INTO words (rowid, content) VALUES (?, ?)", (made.lastrowid, text))
            db.execute("INSERT INTO outbox (id) VALUES (?)", (made.lastrowid,))
        db.execute("COMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()


class TrimMessages:
    """LangChain: a list of messages, cut to the budget by `trim_messages` with exact counts, as its guide shows."""

    name = "LangChain trim_messages (not durable)"

    def __init__(self, before: Sequence[Turn], *, encode: Encode, max_tokens: int) -> None:
        from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, trim_messages

        def tokens(messages: list[BaseMessage]) -> int:
            return 3 + sum(4 + len(encode(str(message.content))) for message in messages)

        def pair(said: Turn) -> list[BaseMessage]:
            return [HumanMessage(said[0]), AIMessage(said[1])]

        self._pair = pair
        self._history = [message for said in before for message in self._pair(said)]

        def trim(messages: list[BaseMessage]) -> list[BaseMessage]:
            return trim_messages(
                messages, max_tokens=max_tokens, token_counter=tokens, strategy="last", start_on="human"
            )

        self._trim = trim
        trim(self._history[:2])  # which imports what it needs

    def turn(self, said: Turn) -> Any:
        self._history += self._pair(said)
        return self._trim(self._history)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LlamaIndexMemory:
    """LlamaIndex's `Memory` on a SQLite file, used from one running event loop, which costs it least."""

    name = "LlamaIndex Memory on SQLite"

    def __init__(self, before: Sequence[Turn], *, file: Path, encode: Encode, max_tokens: int) -> None:
        from llama_index.core.base.llms.types import ChatMessage
        from llama_index.core.memory import Memory
        from sqlalchemy.ext.asyncio import create_async_engine

        self._engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
        self._memory = Memory.from_defaults(
            session_id="chat", token_limit=max_tokens, tokenizer_fn=encode, async_engine=self._engine
        )

        def pair(said: Turn) -> list[ChatMessage]:
            return [ChatMessage(role="user", content=said[0]), ChatMessage(role="assistant", content=said[1])]

        self._pair = pair
        self._loop = asyncio.Runner()
        for start in range(0, len(before), _BULK):  # many at once take it longer: it archives them a few at a time
            messages = [message for said in before[start : start + _BULK] for message in self._pair(said)]
            self._loop.run(self._memory.aput_messages(messages))

    def turn(self, said: Turn) -> Any:
        return self._loop.run(self._turn(said))

    async def _turn(self, said: Turn) -> Any:
        await self._memory.aput_messages(self._pair(said))
        return await self._memory.aget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._engine.dispose())
        self._loop.close()


class ChatMemoryBuffer:
    """LlamaIndex's older `ChatMemoryBuffer`: a list in RAM."""

    name = "LlamaIndex ChatMemoryBuffer (not durable)"

    def __init__(self, before: Sequence[Turn], *, encode: Encode, max_tokens: int) -> None:
        from llama_index.core.base.llms.types import ChatMessage
        from llama_index.core.memory import ChatMemoryBuffer as Theirs

        def pair(said: Turn) -> list[ChatMessage]:
            return [ChatMessage(role="user", content=said[0]), ChatMessage(role="assistant", content=said[1])]

        self._pair = pair
        history = [message for said in before for message in self._pair(said)]
        self._buffer = Theirs.from_defaults(chat_history=history, token_limit=max_tokens, tokenizer_fn=encode)

    def turn(self, said: Turn) -> Any:
        for message in self._pair(said):
            self._buffer.put(message)
        return self._buffer.get()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Peer = TrimMessages | LlamaIndexMemory | ChatMemoryBuffer


def conversations(
    before: Sequence[Turn], *, folder: Path, encode: Encode, max_tokens: int
) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """The hosts' own memories of a conversation: their names, and what makes each of them."""
    yield TrimMessages.name, lambda: TrimMessages(before, encode=encode, max_tokens=max_tokens)
    yield (
        LlamaIndexMemory.name,
        lambda: LlamaIndexMemory(
            before, file=folder / f"llama-{len(before)}.sqlite3", encode=encode, max_tokens=max_tokens
        ),
    )
    yield ChatMemoryBuffer.name, lambda: ChatMemoryBuffer(before, encode=encode, max_tokens=max_tokens)


def installed(make: Callable[[], Any]) -> tuple[Any, str]:
    """What *make* makes, or None and what is missing for it."""
    try:
        return make(), ""
    except ImportError as error:
        return None, f"not installed: {error.name or error}"


__all__ = [
    "BareSqlite",
    "ChatMemoryBuffer",
    "Encode",
    "LlamaIndexMemory",
    "Peer",
    "TrimMessages",
    "Turn",
    "conversations",
    "encoder",
    "installed",
]
