"""LlamaIndex messages to ours and back: equal within LlamaIndex, by meaning from and to other hosts."""

from __future__ import annotations

import json
import math
import mimetypes
from base64 import b64encode
from collections.abc import Mapping
from io import IOBase
from pathlib import Path, PurePath
from typing import Any

from llama_index.core.base.llms.types import (
    AudioBlock,
    BaseContentBlock,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)
from pydantic import AnyUrl, BaseModel

from neuralflow_memory import Message, ToolCall

HOST = "llama_index"
MARK = "neuralflow"
"""Marks what the memory itself put into a prompt, so that an echo of it is never stored as a turn."""
_APPENDED = "appended"
"""The mark of a message of the host's, to which the memory appended a block."""
_BYTES = "neuralflow:bytes"
"""Key of the JSON form of bytes (one character a byte), which providers keep in messages as signatures."""

_ROLES = {"function": "tool", "chatbot": "assistant", "model": "assistant"}


def from_llama_index(message: ChatMessage) -> Message:
    """Convert a LlamaIndex message; the result shares nothing with it.

    `payload` keeps the whole message as JSON. What is not JSON is kept as text, and what has no counterpart in our
    fields as a text block or in the payload alone; both are named in `metadata["unmapped"]`.
    """
    unmapped: list[str] = []
    try:
        kwargs = _plain(message.additional_kwargs, unmapped)
    except RecursionError:  # something in it refers to itself
        kwargs = {str(key): _text(str(value), unmapped) for key, value in message.additional_kwargs.items()}
        unmapped.append("additional_kwargs")
    said = message.blocks
    if kwargs.get(MARK) == _APPENDED:
        del kwargs[MARK]
        said = said[:-1]
    blocks = [_plain(block, unmapped) for block in said]
    data = {"role": message.role.value, "blocks": blocks, "additional_kwargs": kwargs}
    fields = _fields(data, unmapped)
    metadata: dict[str, Any] = {}
    if unmapped:
        metadata["unmapped"] = sorted(set(unmapped))
    if (mark := kwargs.get(MARK)) is not None:
        metadata[MARK] = mark
    named = name if isinstance(name := kwargs.get("name"), str) and name else None
    return Message(**fields, name=named, metadata=metadata, payload={"host": HOST, "message": data})


def to_llama_index(message: Message) -> ChatMessage:
    """Convert one of our messages; the result shares nothing with it.

    A payload of LlamaIndex's is used as long as it says what the message says: text that was redacted, edited or cut
    since then must not come back.
    """
    restored = _restored(message)
    if restored is not None:
        return restored
    kwargs: dict[str, Any] = {}
    if message.name is not None:
        kwargs["name"] = message.name
    if message.tool_call_id is not None:
        kwargs["tool_call_id"] = message.tool_call_id
    if MARK in message.metadata:
        kwargs[MARK] = _plain(message.metadata[MARK], [])
    if isinstance(message.content, str):
        blocks: list[Any] = [TextBlock(text=message.content)] if message.content or not message.tool_calls else []
    else:
        blocks = [_host_block(_plain(block, [])) for block in message.content]
    blocks += [
        ToolCallBlock(tool_call_id=c.id, tool_name=c.name, tool_kwargs=_plain(c.args, [])) for c in message.tool_calls
    ]
    return ChatMessage(role=MessageRole(message.role), blocks=blocks, additional_kwargs=kwargs)


def append_injected(message: ChatMessage, text: str) -> None:
    """Append to *message* what the memory adds to a prompt; `from_llama_index` takes it off again."""
    message.blocks.append(TextBlock(text=text))
    message.additional_kwargs[MARK] = _APPENDED


def _restored(message: Message) -> ChatMessage | None:
    if message.payload is None or message.payload.get("host") != HOST:
        return None
    try:
        data = message.payload["message"]
        if any(getattr(message, name) != value for name, value in _fields(data, []).items()):
            return None
        restored = ChatMessage(role=data["role"], blocks=_revived(data["blocks"]))
        # Set afterwards: as an argument, an "images" entry would be appended to the blocks once more.
        restored.additional_kwargs = _revived(data["additional_kwargs"])
    except (ValueError, TypeError, KeyError, AttributeError):  # a block this version does not know, a file now gone
        return None
    return restored


def _fields(data: Mapping[str, Any], unmapped: list[str]) -> dict[str, Any]:
    """What a message, given as its stored JSON, says in our terms, as arguments of `Message`."""
    role = _ROLES.get(data["role"], data["role"])
    kwargs = data["additional_kwargs"]
    calls = _tool_calls(data["blocks"], kwargs, unmapped) if role == "assistant" else ()
    said = [block for block in data["blocks"] if role != "assistant" or block["block_type"] != "tool_call"]
    parts = [part for block in said for part in _neutral_blocks(block, unmapped)]
    plain = not parts or (len(parts) == 1 and set(parts[0]) == {"type", "text"})
    content = "".join(part["text"] for part in parts) if plain else tuple(parts)
    fields: dict[str, Any] = {"role": role, "content": content, "tool_calls": calls}
    if role == "tool":
        given = kwargs.get("tool_call_id")
        fields["tool_call_id"] = str(given) if given else _unknown_id(kwargs.get("name"), unmapped)
    return fields


def _tool_calls(blocks: Any, kwargs: Mapping[str, Any], unmapped: list[str]) -> tuple[ToolCall, ...]:
    raw = [b for b in blocks if b["block_type"] == "tool_call"]
    known = {b["tool_call_id"] for b in raw}
    listed = kwargs.get("tool_calls")
    legacy = kwargs.get("function_call")
    for call in listed if isinstance(listed, list) else [legacy] if isinstance(legacy, Mapping) else []:
        if not isinstance(call, Mapping):
            unmapped.append("tool_calls")
        elif call.get("id") is None or call["id"] not in known:
            # OpenAI nests name and arguments under "function"; others put them beside the id, under these names.
            inner = call["function"] if isinstance(call.get("function"), Mapping) else call
            args: Any = next((inner[key] for key in ("arguments", "args", "input") if key in inner), {})
            raw.append({"tool_call_id": call.get("id"), "tool_name": inner.get("name"), "tool_kwargs": args})
    return tuple(
        ToolCall(
            str(call["tool_call_id"] or _unknown_id(call["tool_name"], unmapped)),
            str(call["tool_name"] or "unknown"),
            _arguments(call["tool_kwargs"], unmapped),
        )
        for call in raw
    )


def _arguments(given: Any, unmapped: list[str]) -> Mapping[str, Any]:
    try:
        parsed = json.loads(given or "{}") if isinstance(given, str) else given
    except ValueError:
        parsed = given
    if isinstance(parsed, Mapping):
        return parsed
    unmapped.append("tool_kwargs")
    return {"input": parsed}


def _unknown_id(name: Any, unmapped: list[str]) -> str:
    # The same for a call and its result, so that they still belong together.
    unmapped.append("tool_call_id")
    return f"unknown:{name or ''}"


def _neutral_blocks(block: Mapping[str, Any], unmapped: list[str]) -> list[dict[str, Any]]:
    """A stored LlamaIndex block as ours: LangChain's standard shapes."""
    match block["block_type"]:
        case "text":
            return [{"type": "text", "text": block["text"]}]
        case "image":
            return [_media("image", block, "image", mime=block["image_mimetype"], keep=("detail",))]
        case "audio":
            mime = mimetypes.guess_type(f"x.{block['format']}")[0] if block["format"] else None
            return [_media("audio", block, "audio", mime=mime, keep=("format",))]
        case "video":
            return [_media("video", block, "video", mime=block["video_mimetype"], keep=("detail", "fps"))]
        case "document":
            return [_media("file", block, "data", mime=block["document_mimetype"], keep=("title",))]
        case "thinking":
            extras = dict(block["additional_information"])
            if block["num_tokens"] is not None:
                extras["num_tokens"] = block["num_tokens"]
            reasoning = {"type": "reasoning", "reasoning": block["content"] or ""}
            return [{**reasoning, "extras": extras} if extras else reasoning]
        case "cache":
            unmapped.append("cache")  # a hint to one provider, nothing that was said
            return []
        case "citable" | "citation" as kind:
            unmapped.append(kind)
            nested = block["content"] if kind == "citable" else [block["cited_content"]]
            source = {k: block[k] for k in ("title", "source", "additional_location_info") if k in block}
            parts = [part for inner in nested for part in _neutral_blocks(inner, unmapped)]
            return [{**part, "extras": {**part.get("extras", {}), **source}} for part in parts]
        case kind:
            unmapped.append(str(kind))
            return [{"type": "text", "text": json.dumps(block, ensure_ascii=False)}]


def _media(
    kind: str, block: Mapping[str, Any], field: str, *, mime: str | None, keep: tuple[str, ...]
) -> dict[str, Any]:
    neutral: dict[str, Any] = {"type": kind}
    if block[field]:
        neutral["base64"] = block[field][_BYTES]
    elif block["url"]:
        neutral["url"] = block["url"]
    elif block["path"]:
        neutral["url"] = Path(block["path"]).absolute().as_uri()
    if mime:
        neutral["mime_type"] = mime
    if extras := {key: block[key] for key in keep if block[key] is not None}:
        neutral["extras"] = extras
    return neutral


def _host_block(block: dict[str, Any]) -> Any:
    """One of our blocks as LlamaIndex's; as text where it has none."""
    extras: dict[str, Any] = block["extras"] if isinstance(block.get("extras"), dict) else {}
    mime = block.get("mime_type")
    try:
        raw = block["base64"].encode() if "base64" in block else None
        source = {"url": block.get("url")} if raw is None else {}
        match block["type"]:
            case "text" | "text-plain" if isinstance(block.get("text"), str):
                return TextBlock(text=block["text"])
            case "reasoning":
                tokens = extras.pop("num_tokens", None)
                return ThinkingBlock(content=block.get("reasoning"), num_tokens=tokens, additional_information=extras)
            case "image" if raw or source.get("url"):
                return ImageBlock(image=raw, image_mimetype=mime, detail=extras.get("detail"), **source)
            case "audio" if raw or source.get("url"):
                suffix = extras.get("format") or (mimetypes.guess_extension(mime or "") or "").removeprefix(".")
                return AudioBlock(audio=raw, format=suffix or None, **source)
            case "video" if raw or source.get("url"):
                more = {key: extras.get(key) for key in ("detail", "fps")}
                return VideoBlock(video=raw, video_mimetype=mime, **more, **source)
            case "file" if raw or source.get("url"):
                title = extras.get("title") or extras.get("filename")
                return DocumentBlock(data=raw, document_mimetype=mime, title=title, **source)
    except (ValueError, TypeError, AttributeError):  # fields LlamaIndex does not take
        pass
    return TextBlock(text=json.dumps(block, ensure_ascii=False))


def _plain(value: Any, lost: list[str]) -> Any:
    """A deep copy of *value* in JSON values; bytes keep their value, what is no JSON becomes text and is named in *lost*."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str):
        return _text(value, lost)
    if isinstance(value, BaseContentBlock):
        return {name: _plain_field(field, lost) for name, field in value}
    if isinstance(value, bytes):
        return {_BYTES: value.decode("latin-1")}
    if type(value) not in (dict, list) or any(not isinstance(key, str) for key in value if isinstance(value, dict)):
        lost.append(type(value).__name__)
    if isinstance(value, BaseModel):
        return {name: _plain(field, lost) for name, field in value}
    if isinstance(value, Mapping):
        return {_text(str(key), lost): _plain(field, lost) for key, field in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, lost) for item in value]
    return str(value)


def _text(value: str, lost: list[str]) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs: models produce them, and no encoding carries them
        lost.append("surrogates")
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return str.__str__(value)


def _plain_field(value: Any, lost: list[str]) -> Any:
    if isinstance(value, AnyUrl | PurePath):
        return str(value)
    if not isinstance(value, IOBase):
        return _plain(value, lost)
    try:
        at = value.tell()
        value.seek(0)
        raw = value.read()
        value.seek(at)
    except (OSError, ValueError):  # closed, or can be read only once: not by us
        lost.append(type(value).__name__)
        return None
    return {_BYTES: b64encode(raw).decode("ascii")}


def _revived(value: Any) -> Any:
    """The reverse of `_plain`, for bytes; a deep copy."""
    if isinstance(value, Mapping):
        if set(value) == {_BYTES}:
            return value[_BYTES].encode("latin-1")
        return {key: _revived(field) for key, field in value.items()}
    if isinstance(value, list | tuple):
        return [_revived(item) for item in value]
    return value


__all__ = ["HOST", "MARK", "append_injected", "from_llama_index", "to_llama_index"]
