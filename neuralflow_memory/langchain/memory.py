"""A session as the memory of a LangChain Classic chain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

try:
    from langchain_classic.memory.chat_memory import BaseChatMemory
    from langchain_classic.memory.utils import get_prompt_input_key
except ImportError as error:
    from neuralflow_memory import MissingDependency

    raise MissingDependency("langchain-classic", "langchain", "Memory for LangChain Classic chains") from error
from langchain_core.messages import BaseMessage, get_buffer_string
from pydantic import Field

from neuralflow_memory import Context, Memory, Message, Session

from .history import NeuralFlowChatMessageHistory
from .messages import MARK, to_langchain


class NeuralFlowMemory(BaseChatMemory):
    """Drop-in for `ConversationBufferMemory` and its relatives.

    A prompt variable holds the running summary, the recent turns and what search finds for the chain's input, within
    the token budget, the input counted.

    LangChain's `BaseChatMemory` hands over text only: tool calls never reach any memory of this kind. Agents belong on
    `NeuralFlowChatMessageHistory` or on LangChain's middleware.

    Args:
        session: The session. Or give `memory` (default: `open_memory()`) and the ids.
        memory: The memory that holds the session.
        session_id: The session's id; a new one if none is given, so that two chains never share by accident.
        user_id: The session's user.
        **fields: The fields below, and those of `BaseChatMemory`: `input_key`, `output_key`, `return_messages`.

    Attributes:
        memory_key: The prompt variable.
        human_prefix: Speaks for the user where the prompt takes text. `ai_prefix`: for the model.
        return_messages: Whether the variable holds messages rather than text.
        recall_key: A second prompt variable, for what search finds, as text; by default it stands in the first one.
        max_tokens: The budget, in tokens, of history and input; by default the memory's `budget.total`.
    """

    chat_memory: NeuralFlowChatMessageHistory = Field(default_factory=NeuralFlowChatMessageHistory)
    memory_key: str = "history"
    human_prefix: str = "Human"
    ai_prefix: str = "AI"
    recall_key: str | None = None
    max_tokens: int | None = None

    def __init__(
        self,
        session: Session | None = None,
        *,
        memory: Memory | None = None,
        session_id: str | None = None,
        user_id: str | None = None,
        **fields: Any,
    ) -> None:
        if "chat_memory" not in fields:
            fields["chat_memory"] = NeuralFlowChatMessageHistory(
                session, memory=memory, session_id=session_id, user_id=user_id
            )
        super().__init__(**fields)

    @property
    def session(self) -> Session:
        """The session behind `chat_memory`."""
        return self.chat_memory.session

    @property
    def memory_variables(self) -> list[str]:
        """The prompt variables this memory fills."""
        return [self.memory_key] if self.recall_key is None else [self.memory_key, self.recall_key]

    def load_memory_variables(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The history for a prompt; *inputs*, if it holds one question, steers the search."""
        return self._variables(self.session.context(**self._request(inputs)))

    async def aload_memory_variables(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same as `load_memory_variables`, without blocking the event loop."""
        return self._variables(await self.session.acontext(**self._request(inputs)))

    def _request(self, inputs: dict[str, Any]) -> dict[str, Any]:
        query = self._query(inputs)
        pending = self.session.memory.count_tokens([Message("user", query)]) if query else 0
        return {"query": query, "max_tokens": self.max_tokens, "reserve_tokens": pending, "overflow": "truncate"}

    def _query(self, inputs: dict[str, Any]) -> str | None:
        try:
            key = self.input_key or get_prompt_input_key(inputs, self.memory_variables)
        except ValueError:  # none or several: the caller asks for the history as such
            return None
        return _text(inputs.get(key, "")).strip() or None

    def _variables(self, context: Context) -> dict[str, Any]:
        messages, found = list(context.messages), {}
        if self.recall_key is not None:
            recalled = [m for m in messages if MARK in m.metadata and m.role == "user"]
            messages = [m for m in messages if m not in recalled]
            found = {self.recall_key: "\n\n".join(m.text for m in recalled)}
        if self.return_messages:
            return {self.memory_key: [to_langchain(m) for m in messages], **found}
        # In a text, what the memory quotes must not read as if the user had said it.
        said = [to_langchain(replace(m, role="system") if MARK in m.metadata else m) for m in messages]
        text = get_buffer_string(said, human_prefix=self.human_prefix, ai_prefix=self.ai_prefix)
        return {self.memory_key: text, **found}

    def _get_input_output(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> tuple[str, str]:
        said, answered = super()._get_input_output(inputs, outputs)
        return _text(said), _text(answered)


def _text(value: Any) -> str:
    """What a chain's input or output says: chains hand over text, messages, content blocks, or anything."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseMessage):
        return str(value.text)
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        return str(value["text"])
    if isinstance(value, list | tuple):
        return "\n".join(_text(part) for part in value)
    return json.dumps(value, ensure_ascii=False, default=str)


__all__ = ["NeuralFlowMemory"]
