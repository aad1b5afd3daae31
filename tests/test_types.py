"""Shortcuts that are there for speed give what the long way gives."""

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta

import pytest

from neuralflow_memory import Entry, MemoryType, Message, Scope, ToolCall
from neuralflow_memory.types import changed

NOW = datetime(2026, 5, 3, tzinfo=UTC)
ENTRY = Entry(
    id="a",
    key="0" * 32,
    type=MemoryType.SHORT_TERM,
    content="I sail to Oslo.",
    scope=Scope(user_id="ada", session_id="chat"),
    seq=1,
    created_at=NOW,
    written_at=NOW,
    updated_at=NOW,
    role="user",
)


@pytest.mark.parametrize(
    "new",
    [
        {},
        {"number": 7, "seq": 3, "version": 2, "position": None},
        {"metadata": {"a": 1}, "tags": ("b",), "valid_to": NOW + timedelta(days=1), "pinned": True},
        {field.name: object() for field in fields(Entry)},
    ],
)
def test_an_entry_is_changed_as_dataclasses_would(new):
    """Every field is that of the entry, or the new one; the entry itself stays as it was."""
    before = replace(ENTRY)
    made = changed(ENTRY, **new)
    assert made is not ENTRY
    assert type(made) is Entry
    assert made == replace(ENTRY, **new)
    assert before == ENTRY


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"name": "Ada", "metadata": {"mood": "merry"}, "payload": {"raw": 1}},
        {"content": "", "tool_calls": (ToolCall("c", "book", {"to": "Oslo"}),), "role": "assistant"},
        {"content": "", "role": "tool", "tool_call_id": "c"},
        {"content": "[image]", "blocks": ({"type": "image", "url": "x"},)},
        {"role": None, "type": MemoryType.EPISODIC},
        {"role": None, "content": "", "type": MemoryType.EPISODIC},
    ],
)
def test_an_entry_reads_as_a_message_that_would_pass_every_check(given):
    """Though none is made again; and what may be changed in it is the caller's own, where it is empty."""
    message = replace(ENTRY, **given).message
    checked = Message(**{field.name: getattr(message, field.name) for field in fields(Message)})
    assert message == checked
    assert {name: type(getattr(message, name)) for name in ("role", "content", "tool_calls")} == {
        name: type(getattr(checked, name)) for name in ("role", "content", "tool_calls")
    }
    assert given.get("metadata") or message.metadata is not replace(ENTRY, **given).message.metadata
