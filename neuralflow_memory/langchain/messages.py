"""LangChain messages to ours and back: equal within LangChain, by meaning from and to other hosts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    messages_from_dict,
)
from pydantic_core import to_jsonable_python

from neuralflow_memory import Message, ToolCall

HOST = "langchain"
MARK = "neuralflow"
"""Marks what the memory itself put into a prompt, so that an echo of it is never stored as a turn."""

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
}
_OPENAI_ROLE = "__openai_role__"
"""Where LangChain itself notes that a system message is a developer's."""
_SAME_IN_BOTH = {"text", "image", "audio", "video", "file", "text-plain", "reasoning"}
"""LangChain's standard blocks that are ours as they stand."""


def from_langchain(message: BaseMessage) -> Message:
    """Convert a LangChain message; the result shares nothing with it.

    `payload` keeps the whole message as JSON. What is not JSON is kept as text, and what has no counterpart in our
    fields is kept as a text block; both are named in `metadata["unmapped"]`.
    """
    data = {name: _jsonable(value) for name, value in message}
    said = message
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        data = _mended(data)
        said = message.model_copy(update=data)
    unmapped = [name for name, value in message if not _same(data[name], value)]
    payload = {"host": HOST, "message": {"type": message.type, "data": data}}
    fields = _fields(said, unmapped)
    metadata: dict[str, Any] = {}
    if unmapped:
        metadata["unmapped"] = sorted(set(unmapped))
    if (mark := data["additional_kwargs"].get(MARK)) is not None:
        metadata[MARK] = mark
    return Message(**fields, id=said.id or None, name=said.name or None, metadata=metadata, payload=payload)


def to_langchain(message: Message) -> BaseMessage:
    """Convert one of our messages; the result shares nothing with it.

    A payload of LangChain's is used as long as it says what the message says: text that was redacted, edited or cut
    since then must not come back.
    """
    restored = _restored(message)
    if restored is not None:
        return restored
    content = message.content if isinstance(message.content, str) else _jsonable(message.content)
    kwargs: dict[str, Any] = {"content": content, "id": message.id, "name": message.name, "additional_kwargs": {}}
    if MARK in message.metadata:
        kwargs["additional_kwargs"][MARK] = _jsonable(message.metadata[MARK])
    match message.role:
        case "user":
            return HumanMessage(**kwargs)
        case "assistant":
            calls = [{"id": c.id, "name": c.name, "args": _jsonable(c.args)} for c in message.tool_calls]
            return AIMessage(**kwargs, tool_calls=calls)
        case "tool":
            return ToolMessage(**kwargs, tool_call_id=message.tool_call_id)
        case "developer":
            kwargs["additional_kwargs"][_OPENAI_ROLE] = "developer"
    return SystemMessage(**kwargs)


def _restored(message: Message) -> BaseMessage | None:
    if message.payload is None or message.payload.get("host") != HOST:
        return None
    try:
        restored = messages_from_dict([_jsonable(message.payload["message"])])[0]
    except (ValueError, TypeError, KeyError):  # a class that this version of LangChain does not know
        return None
    fields = _fields(restored, [])
    return restored if all(getattr(message, name) == value for name, value in fields.items()) else None


def _fields(message: BaseMessage, unmapped: list[str]) -> dict[str, Any]:
    """What *message* says in our terms, as arguments of `Message`; JSON values only."""
    role = _role(message)
    calls = _tool_calls(message, unmapped) if isinstance(message, AIMessage) else ()
    fields: dict[str, Any] = {"role": role, "content": _content(message, calls, unmapped), "tool_calls": calls}
    if role == "tool":
        fields["tool_call_id"] = getattr(message, "tool_call_id", None) or _unknown_id(message.name, unmapped)
    return fields


def _role(message: BaseMessage) -> str:
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, SystemMessage):
        return "developer" if message.additional_kwargs.get(_OPENAI_ROLE) == "developer" else "system"
    if isinstance(message, ToolMessage | FunctionMessage):
        return "tool"
    return _ROLES.get(message.role.lower(), "user") if isinstance(message, ChatMessage) else "user"


def _tool_calls(message: AIMessage, unmapped: list[str]) -> tuple[ToolCall, ...]:
    raw: list[Any] = list(message.tool_calls)
    if not raw and isinstance(message.content, list):
        raw = [b for b in message.content if isinstance(b, dict) and b.get("type") == "tool_call"]
    legacy = message.additional_kwargs.get("function_call")
    if not raw and isinstance(legacy, dict):
        raw = [{"name": legacy.get("name"), "args": _parsed(legacy.get("arguments"))}]
    return tuple(
        ToolCall(
            call.get("id") or _unknown_id(call.get("name"), unmapped),
            call.get("name") or "unknown",
            _jsonable(args if isinstance(args := call.get("args"), Mapping) else {"input": args}),
        )
        for call in raw
    )


def _unknown_id(name: str | None, unmapped: list[str]) -> str:
    # The same for a call and its result, so that they still belong together.
    unmapped.append("tool_call_id")
    return f"unknown:{name or ''}"


def _content(
    message: BaseMessage, calls: tuple[ToolCall, ...], unmapped: list[str]
) -> str | tuple[dict[str, Any], ...]:
    invalid = [{"type": "invalid_tool_call", **c} for c in getattr(message, "invalid_tool_calls", ())]
    if isinstance(message.content, str) and not invalid:
        return message.content
    call_ids = {call.id for call in calls}
    seen = {block.get("id") for block in invalid}
    blocks = [b for b in _standard_blocks(message) if b.get("type") != "invalid_tool_call" or b.get("id") not in seen]
    return tuple(
        neutral for block in blocks + invalid if (neutral := _neutral_block(block, call_ids, unmapped)) is not None
    )


def _standard_blocks(message: BaseMessage) -> list[dict[str, Any]]:
    try:
        blocks = _jsonable(message.content_blocks)
    except Exception:  # a provider's block that LangChain's own translators choke on is still content
        content = [message.content] if isinstance(message.content, str) else message.content
        blocks = [{"type": "text", "text": b} if isinstance(b, str) else _jsonable(b) for b in content]
    return [block for block in blocks if isinstance(block, dict)]


def _neutral_block(block: dict[str, Any], call_ids: set[str], unmapped: list[str]) -> dict[str, Any] | None:
    native = block["value"] if block.get("type") == "non_standard" and isinstance(block.get("value"), dict) else block
    kind = native.get("type")
    if kind in {"tool_call", "tool_use", "tool_call_chunk", "function_call"} and _call_id(native) in call_ids:
        return None
    if block.get("type") not in _SAME_IN_BOTH:
        unmapped.append(str(kind or "block"))
        return {"type": "text", "text": json.dumps(native, ensure_ascii=False)}
    if str(block.get("id", "")).startswith("lc_"):  # made up by LangChain anew on every read
        return {key: value for key, value in block.items() if key != "id"}
    return block


def _call_id(native: dict[str, Any]) -> str | None:
    return native.get("call_id") or native.get("id")


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _jsonable(value: Any, *, deeper: bool = True) -> Any:
    """A deep copy of *value* in JSON values; what is none becomes its text."""
    try:
        return to_jsonable_python(value, fallback=str, bytes_mode="base64", inf_nan_mode="constants")
    except (ValueError, RecursionError):  # something in it refers to itself, or is no text that can be written
        if deeper and isinstance(value, Mapping):
            return {str(key): _jsonable(item, deeper=False) for key, item in value.items()}
        return str(value)


def _mended(data: dict[str, Any]) -> dict[str, Any]:
    """*data* without what no JSON text carries: halves of surrogate pairs are joined or replaced, infinities named."""
    text = json.dumps(data, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    mended: dict[str, Any] = json.loads(text, parse_constant=str)
    return mended


def _same(copy: Any, value: Any) -> bool:
    try:
        return bool(copy == value)
    except Exception:  # arrays and frames refuse to be a truth
        return False


__all__ = ["HOST", "MARK", "from_langchain", "to_langchain"]
