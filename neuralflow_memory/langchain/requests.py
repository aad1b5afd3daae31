"""A call of an agent's model: what it is to be sent, as ours, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from langchain.agents.middleware import ModelRequest
from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
from langchain_core.messages import AnyMessage, BaseMessage, RemoveMessage, SystemMessage, convert_to_messages
from langchain_core.utils.function_calling import convert_to_openai_tool

from neuralflow_memory import Context, Message

from .messages import MARK, from_langchain, to_langchain

SUMMARIZED = "The conversation is kept in memory; in short:"
"""Begins what `NeuralFlowMiddleware.summarize` returns, so that it is known again."""
_NO_TURN = {MARK: "context"}
_RECENT = (
    128  # messages at a thread's end that are converted each time, so that a long thread costs no more than a short one
)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the model, and what is to be sent, as ours.

    Attributes:
        beside: What the model is told beside the messages, which memory only counts.
        given: The request's messages, each with what it is in ours.
        older: Whether no summary of LangChain's stands for the turns that are not in the request.
    """

    request: ModelRequest[Any]
    beside: list[Message]
    given: list[tuple[Message, AnyMessage]]
    older: bool

    @classmethod
    def of(cls, request: ModelRequest[Any]) -> Call:
        beside = [] if request.system_message is None else [ours(request.system_message)]
        if told := _schemas(request):
            beside.append(Message("system", told, metadata=_NO_TURN))
        given = cast("list[AnyMessage]", convert_to_messages(request.messages))
        summaries = [m for m in given if _is_summary(m)]
        own = [m for m in summaries if SUMMARIZED.partition(";")[0] in m.text]  # it stands in the memory's own block
        older = len(own) == len(summaries)
        # Earlier turns are sent as memory has them, unless some other part has changed them.
        stored = {id(m) for m in request.state["messages"] if older and _is_turn(m)}
        left_out = {id(m) for m in own} | (stored & {id(m) for m in given[:-_RECENT]})
        return cls(request, beside, [(ours(m), m) for m in given if id(m) not in left_out], older)

    @property
    def messages(self) -> list[Message]:
        return [*self.beside, *(own for own, _ in self.given)]

    def filled(self, context: Context) -> ModelRequest[Any]:
        """The request with the messages of *context*; memory's block at the front stands in the system prompt."""
        theirs = {id(own): m for own, m in self.given}
        known = {*theirs, *map(id, self.beside)}
        made_up = (m for m in context.messages if m.metadata == _NO_TURN and id(m) not in known)
        block = next((m for m in made_up if m.role == "system"), None)
        besides = {id(m) for m in (*self.beside, block)}
        messages: list[Any] = [theirs.get(id(m)) or to_langchain(m) for m in context.messages if id(m) not in besides]
        system = _with_block(self.request.system_message, block.text if block else "")
        return self.request.override(system_message=system, messages=messages)


def ours(message: BaseMessage) -> Message:
    """*message* as ours; what was said by neither user nor model nor tool is marked as no turn."""
    own = from_langchain(message)
    return own if _is_turn(message) else replace(own, id=None, metadata=_NO_TURN)


def recent(messages: Sequence[AnyMessage], *, written: str | None) -> list[Message]:
    """The end of a thread as ours, with the message *written* in it; all of the thread where that one is not at its end."""
    end = messages[-_RECENT:]
    return [ours(m) for m in (end if any(m.id == written for m in end) else messages)]


def _is_turn(message: BaseMessage) -> bool:
    return bool(message.id) and not isinstance(message, SystemMessage | RemoveMessage) and not _is_summary(message)


def _is_summary(message: BaseMessage) -> bool:
    return message.additional_kwargs.get("lc_source") == "summarization"


def _with_block(system: SystemMessage | None, block: str) -> SystemMessage | None:
    """*system* with *block* after it; its own content blocks, which may be marked for a cache, stay as they are."""
    if not block:
        return system
    if system is None:
        return SystemMessage(block, additional_kwargs=_NO_TURN)
    if isinstance(system.content, str):
        return system.model_copy(update={"content": f"{system.content}\n\n{block}"})
    return system.model_copy(update={"content": [*system.content, {"type": "text", "text": block}]})


def _schemas(request: ModelRequest[Any]) -> str:
    """What the model is told about tools and about the form of its answer, as JSON."""
    tools: list[Any] = [t if isinstance(t, dict) else convert_to_openai_tool(t) for t in request.tools]
    form = request.response_format
    if isinstance(form, AutoStrategy):
        form = ToolStrategy(form.schema)
    if isinstance(form, ToolStrategy):
        tools += [spec.json_schema for spec in form.schema_specs]
    elif isinstance(form, ProviderStrategy):
        tools.append(form.schema_spec.json_schema)
    return json.dumps(tools, ensure_ascii=False, default=str) if tools else ""


__all__ = ["SUMMARIZED", "Call", "ours", "recent"]
