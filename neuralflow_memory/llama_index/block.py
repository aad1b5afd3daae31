"""A memory block for LlamaIndex's own `Memory`: what left its short-term queue is kept, and comes back when it is asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory.memory import BaseMemoryBlock
from llama_index.core.storage.chat_store.base_db import MessageStatus
from llama_index.core.utils import get_tokenizer
from pydantic import Field

from neuralflow_memory import Message

from .connected import STATUS, Connected
from .messages import MARK, from_llama_index

_CUT = " […] "


class NeuralFlowMemoryBlock(Connected, BaseMemoryBlock[str]):
    """Keeps the turns that `Memory` flushes, and gives back what matters to the newest user turn.

    What it gives is one text: the session's tasks, the summary of its older turns, the flushed turns that came last, and what
    search finds in all of the user's sessions, within `token_limit`. Writing waits for no model.

    One block serves any number of sessions, since `Memory` says which one is meant. Its fields say where the memory is;
    JSON and pickle hold nothing else.

    Args:
        memory: The memory to keep turns in (default: `open_memory(path)`).
        path: The memory's folder; by default the one of the settings (`NEURALFLOW_PATH`).
        **fields: The fields below, and those of every LlamaIndex block: `description`, `priority`,
            `accept_short_term_memory`.

    Attributes:
        name: The block's name, which is the tag around its text in the prompt.
        session_id: The session when the caller names none; a new one by default.
        user_id: Whose sessions these are. None: each session is a chat of its own, and sees nothing of the others.
        tenant: The tenant of all. `agent_id`: marks who writes.
        path: The memory's folder.
        token_limit: The budget of the text, in tokens.
    """

    name: str = "NeuralFlow"
    session_id: str = Field(default_factory=lambda: uuid4().hex)
    token_limit: int = Field(default=2000, ge=100)

    async def _aget(self, messages: list[ChatMessage] | None = None, **block_kwargs: Any) -> str:
        shown = [from_llama_index(message) for message in messages or []]
        query = next((m.text for m in reversed(shown) if m.role == "user" and m.text.strip()), None)
        session = self._session(block_kwargs.get("session_id") or self.session_id)
        context = await session.acontext(query, max_tokens=self.token_limit, overflow="truncate")
        seen = {(message.role, message.text) for message in shown}
        parts = [
            message.text if MARK in message.metadata else _line(message)
            for message in context.messages
            if (message.role, message.text) not in seen
        ]
        # Stored text must not be able to close the tag that LlamaIndex's template puts around it.
        text = "\n\n".join(filter(None, parts)).replace("</", "&lt;/")
        return _cut(text, self.token_limit, count=lambda cut: self._memory.count_tokens([Message("system", cut)]))

    async def aput(
        self, messages: list[ChatMessage], from_short_term_memory: bool = False, session_id: str | None = None
    ) -> None:
        """Keep *messages*, unless they come from a `NeuralFlowChatStore` over this memory, which keeps them already."""
        if from_short_term_memory and await self._kept(messages, session_id or self.session_id):
            return
        await super().aput(messages, from_short_term_memory, session_id)

    async def _aput(self, messages: list[ChatMessage]) -> None:
        by_session: dict[str, list[Message]] = {}
        for message in messages:
            kwargs = dict(message.additional_kwargs)
            session_id = kwargs.pop("session_id", None) or self.session_id  # LlamaIndex writes it into what it flushes
            said = from_llama_index(message.model_copy(update={"additional_kwargs": kwargs}))
            # Marked, so that a chat store over the same session does not take it for one of its active messages.
            said = replace(said, metadata={**said.metadata, STATUS: "flushed"})
            by_session.setdefault(str(session_id), []).append(said)
        for session_id, said_there in by_session.items():
            await self._session(session_id).aadd(said_there)

    async def _kept(self, messages: list[ChatMessage], session_id: str) -> bool:
        """Whether *messages* are turns that a chat store has just archived in this session."""
        session = self._session(session_id)
        condition = {STATUS: MessageStatus.ARCHIVED.value}
        found = await asyncio.to_thread(self._turns_after_place, session, filter=condition)
        wanted = [(m.role, m.text) for m in map(from_llama_index, messages)]
        archived = [(e.role, e.content) for e in found]
        for start in range(len(archived) - len(wanted), -1, -1):
            if wanted and archived[start : start + len(wanted)] == wanted:
                self._move_place(session, found[start + len(wanted) - 1])
                return True
        return False

    async def atruncate(self, content: Any, tokens_to_truncate: int) -> str | None:
        """Cut *content*, from its middle, by at least so many of LlamaIndex's tokens; None if nothing would be left."""
        if not content:  # LlamaIndex passes [] for a block that had nothing to say
            return None
        tokens = get_tokenizer()
        limit = len(tokens(content)) - tokens_to_truncate
        return _cut(content, limit, count=lambda text: len(tokens(text))) or None


def _line(message: Message) -> str:
    """A turn as text; what follows its first line is indented, so that it can't pass for another turn."""
    calls = [f"[calls {call.name} {json.dumps(dict(call.args), ensure_ascii=False)}]" for call in message.tool_calls]
    said = " ".join(filter(None, [message.text, *calls]))
    return f"{message.name or message.role}: " + "\n  ".join(said.splitlines()) if said else ""


def _cut(text: str, tokens: int, *, count: Callable[[str], int]) -> str:
    """*text* in at most so many tokens: two thirds of what stays are its beginning, one is its end."""
    if not text or count(text) <= tokens:
        return text
    fitted = ""
    low, high = 1, len(text)
    while low <= high:
        middle = (low + high) // 2
        end = middle // 3
        tried = text[: middle - end].rstrip() + _CUT + text[len(text) - end :].lstrip()
        if count(tried) <= tokens:
            fitted, low = tried, middle + 1
        else:
            high = middle - 1
    return fitted


__all__ = ["NeuralFlowMemoryBlock"]
