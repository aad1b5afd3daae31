"""A chat store for LlamaIndex's own `Memory`: its messages are turns of the ledger, durable and found by search."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.storage.chat_store.base_db import AsyncDBChatStore, MessageStatus

from neuralflow_memory import Entry, Message, Session

from .connected import STATUS, Connected, turns
from .messages import from_llama_index, to_llama_index

T = TypeVar("T")

_REPLACED = "replaced"
_LOCKS = tuple(threading.Lock() for _ in range(64))
"""One session's calls go one at a time, whichever store object, thread or event loop they come from."""


class NeuralFlowChatStore(Connected, AsyncDBChatStore):
    """The messages of LlamaIndex's `Memory` as sessions of a memory: a key is a session's id.

    A message is active from when it is added until it is archived. What is archived stays in the session, as does what
    `set_messages` replaces, though the store shows it no more; both are found by search, and every other adapter sees them.
    What is deleted is gone. The calls for one key go one after another within a process.

    Its fields say where the memory is; JSON and pickle hold nothing else.

    Args:
        memory: The memory to keep messages in (default: `open_memory(path)`).
        path: The memory's folder; by default the one of the settings (`NEURALFLOW_PATH`).
        **fields: The fields below.

    Attributes:
        user_id: Whose sessions these are. None: each session is a chat of its own, and sees nothing of the others.
        tenant: The tenant of all. `agent_id`: marks who writes.
        path: The memory's folder.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows it."""
        return "NeuralFlowChatStore"

    async def get_messages(
        self,
        key: str,
        status: MessageStatus | None = MessageStatus.ACTIVE,
        limit: int | None = None,
        offset: int | None = None,
    ) -> list[ChatMessage]:
        """Messages in order, active ones by default, all with None; copies."""
        return await self._one_at_a_time(
            key, lambda session: _messages(self._turns(session, status)[offset or 0 :][:limit])
        )

    async def count_messages(self, key: str, status: MessageStatus | None = MessageStatus.ACTIVE) -> int:
        """How many messages `get_messages` gives."""
        return await self._one_at_a_time(key, lambda session: len(self._turns(session, status)))

    async def add_message(self, key: str, message: ChatMessage, status: MessageStatus = MessageStatus.ACTIVE) -> None:
        """Append a message."""
        await self.add_messages(key, [message], status)

    async def add_messages(
        self, key: str, messages: list[ChatMessage], status: MessageStatus = MessageStatus.ACTIVE
    ) -> None:
        """Append messages, all or none."""
        await self._session(key).aadd([_turn(message, status) for message in messages])

    async def set_messages(
        self, key: str, messages: list[ChatMessage], status: MessageStatus = MessageStatus.ACTIVE
    ) -> None:
        """Make *messages* those of this status; equal ones at the beginning stay, the others are replaced."""

        def work(session: Session) -> None:
            before = self._turns(session, status)
            pairs = zip(_messages(before), messages, strict=False)
            same = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(before), len(messages)))
            session.add([_turn(message, status) for message in messages[same:]])
            _mark(session, before[same:], _REPLACED)

        await self._one_at_a_time(key, work)

    async def delete_message(self, key: str, idx: int) -> ChatMessage | None:
        """Delete the message at this place among the active ones, from 0, and return it; None if there is none."""

        def work(session: Session) -> list[ChatMessage]:
            active = self._turns(session, MessageStatus.ACTIVE)
            return _deleted(session, active[idx : idx + 1] if idx >= 0 else [])

        deleted = await self._one_at_a_time(key, work)
        return deleted[0] if deleted else None

    async def delete_messages(self, key: str, status: MessageStatus | None = None) -> None:
        """Delete the messages of a status; with None all of the session, replaced ones and its summary, too."""

        def work(session: Session) -> None:
            if status is None:
                session.clear()
            else:
                _deleted(session, self._turns(session, status))

        await self._one_at_a_time(key, work)

    async def delete_oldest_messages(self, key: str, n: int) -> list[ChatMessage]:
        """Delete the *n* oldest active messages and return them."""
        return await self._one_at_a_time(key, lambda session: _deleted(session, self._oldest(session, n)))

    async def archive_oldest_messages(self, key: str, n: int) -> list[ChatMessage]:
        """Archive the *n* oldest active messages and return them."""

        def work(session: Session) -> list[ChatMessage]:
            oldest = self._oldest(session, n)
            _mark(session, oldest, MessageStatus.ARCHIVED.value)
            return _messages(oldest)

        return await self._one_at_a_time(key, work)

    async def get_keys(self) -> list[str]:
        """The ids of the user's sessions that hold messages, latest first."""
        sessions = await self._memory.asessions(user_id=self.user_id, tenant=self.tenant)
        return [session.session_id for session in sessions if session.messages]

    async def _one_at_a_time(self, key: str, work: Callable[[Session], T]) -> T:
        session = self._session(key)
        lock = _LOCKS[hash((self.path, self.tenant, self.user_id, key)) % len(_LOCKS)]

        def run() -> T:
            with lock:
                return work(session)

        return await asyncio.to_thread(run)

    def _oldest(self, session: Session, n: int) -> list[Entry]:
        return self._turns(session, MessageStatus.ACTIVE)[: max(n, 0)]

    def _turns(self, session: Session, status: MessageStatus | None) -> list[Entry]:
        if status != MessageStatus.ACTIVE:
            wanted = (None, MessageStatus.ARCHIVED) if status is None else (status,)
            return [e for e in turns(session) if e.metadata.get(STATUS) in wanted]
        entries = self._turns_after_place(session)
        settled = next((row for row, e in enumerate(entries) if STATUS not in e.metadata), len(entries))
        if settled:
            self._move_place(session, entries[settled - 1])
        return [e for e in entries[settled:] if STATUS not in e.metadata]


def _messages(entries: Sequence[Entry]) -> list[ChatMessage]:
    return [to_llama_index(entry.message) for entry in entries]


def _turn(message: ChatMessage, status: MessageStatus) -> Message:
    turn = from_llama_index(message)
    return turn if status == MessageStatus.ACTIVE else replace(turn, metadata={**turn.metadata, STATUS: status.value})


def _mark(session: Session, entries: Sequence[Entry], status: str) -> None:
    for entry in entries:  # oldest first: after a crash in between, the active ones still are the newest
        session.entries.update(entry.key, metadata={**entry.metadata, STATUS: status})


def _deleted(session: Session, entries: Sequence[Entry]) -> list[ChatMessage]:
    session.entries.delete([entry.key for entry in entries])
    return _messages(entries)


__all__ = ["NeuralFlowChatStore"]
