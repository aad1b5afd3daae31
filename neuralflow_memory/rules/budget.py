"""What messages cost, and which of them fit: the arithmetic of the token budget.

A message costs its text, its name, its tool calls with their arguments as JSON, an estimate for each part that is not
text, and a fixed overhead. The sum is additive, so that a window's cost is kept up to date instead of counted again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..types import Entry, Message

Count = Callable[[str], int]

MESSAGE_OVERHEAD = 4
"""Tokens around a message: three of framing and its role (OpenAI's chat format; other vendors' are smaller)."""
NAME_OVERHEAD = 1
CALL_OVERHEAD = 4
"""Tokens around one tool call: its braces, keys and quotes."""
REPLY_OVERHEAD = 3
"""Tokens that prime the reply, once a prompt."""
MOST_MARGIN = 4.0
_PRIOR_SPREAD = 0.1  # of a model's token counts over ours, before anything is known
MEDIA_TOKENS = 256
"""Estimate for an image, a sound, a video or a file: what Gemini charges for a small image (258)."""

_MEDIA = frozenset({"image", "image_url", "audio", "input_audio", "video", "file", "document"})


def message_tokens(message: Message, count: Count) -> int:
    """What *message* costs in a prompt, everything counted."""
    total = MESSAGE_OVERHEAD
    if isinstance(message.content, str):
        total += count(message.content) if message.content else 0
    else:
        total += sum(_block_tokens(b, count) for b in message.content)
    if message.name:
        total += NAME_OVERHEAD + count(message.name)
    for call in message.tool_calls:
        total += CALL_OVERHEAD + count(call.id) + count(call.name) + count(_json(call.args))
    if message.tool_call_id:
        total += count(message.tool_call_id)
    return total


def prompt_tokens(messages: Iterable[Message], count: Count) -> int:
    """What *messages* cost together, as a prompt."""
    return REPLY_OVERHEAD + sum(message_tokens(m, count) for m in messages)


def _block_tokens(block: Any, count: Count) -> int:
    if block["type"] == "text":
        return count(str(block.get("text") or ""))
    if block["type"] in _MEDIA:
        return MEDIA_TOKENS
    return count(_json(block))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True)
class Unit:
    """Messages that stand or fall together: one message, or a tool call with all of its results.

    `rows` are indexes into the sequence that was split. `broken` says why a unit can never be sent.
    """

    rows: tuple[int, ...]
    broken: str | None = None


def units(messages: Sequence[Message], *, pending_calls: bool = False) -> list[Unit]:
    """Split *messages* into units, ordered by their first message.

    A call without all of its results, a result without its call, and a second result of one call are broken: a provider
    refuses a prompt that holds one. With *pending_calls* a call at the very end may lack results: they are about to come.
    A result belongs to the newest call of its id that has none yet, so ids may be used again.
    """
    if not any(m.tool_calls or m.role == "tool" for m in messages):
        return [Unit((row,)) for row in range(len(messages))]
    waiting: dict[str, int] = {}
    results: dict[int, dict[str, int]] = {row: {} for row, m in enumerate(messages) if m.tool_calls}
    found: list[Unit] = []
    for row, message in enumerate(messages):
        waiting.update((call.id, row) for call in message.tool_calls)
        if message.role == "tool":
            call_id = message.tool_call_id or ""
            if call_id in waiting:
                results[waiting.pop(call_id)][call_id] = row
            else:
                found.append(Unit((row,), "a tool result whose call is not in the window, or has a result already"))
        elif not message.tool_calls:
            found.append(Unit((row,)))
    for row, answers in results.items():
        own = [call.id for call in messages[row].tool_calls]
        rows = (row, *sorted(answers.values()))
        whole = len(answers) == len(own)
        pending = pending_calls and len(set(own)) == len(own) and rows == tuple(range(row, len(messages)))
        found.append(Unit(rows, None if whole or pending else "a tool call without all of its results"))
    return sorted(found, key=lambda u: u.rows[0])


def pauses(entries: Sequence[Entry], *, seconds: float) -> list[int]:
    """Rows of the entries that were written more than *seconds* after the one before."""
    pairs = pairwise(entries)
    return [row for row, (a, b) in enumerate(pairs, 1) if (b.written_at - a.written_at).total_seconds() > seconds]


def margin(n: int, mean: float, squared: float) -> float:
    """By how much a model's tokens exceed ours at most, from *n* reported ratios; 1.0 or more.

    *mean* and *squared* are the ratios' mean and sum of squared deviations. The result is the upper end of a 95 % prediction
    interval for the next ratio, with a prior spread of a tenth that a few reports outweigh: without reports 1.0, after one
    of 1.0 about 1.28, after twenty equal ones 1.04. It is `MOST_MARGIN` at most.
    """
    if n == 0:
        return 1.0
    spread = math.sqrt((squared + _PRIOR_SPREAD**2) / n)
    return min(max(1.0, mean + 1.96 * spread * math.sqrt(1 + 1 / n)), MOST_MARGIN)


def opening(messages: Sequence[Message]) -> int:
    """How many messages at the front are the host's own instructions."""
    return next((row for row, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))


def items(messages: Sequence[Message]) -> list[int]:
    """Where items start: at each user turn, and at 0 for what stands before the first."""
    starts = [row for row, m in enumerate(messages) if m.role == "user"]
    return starts if not messages or (starts and starts[0] == 0) else [0, *starts]


__all__ = [
    "MEDIA_TOKENS",
    "MESSAGE_OVERHEAD",
    "MOST_MARGIN",
    "REPLY_OVERHEAD",
    "Unit",
    "items",
    "margin",
    "message_tokens",
    "opening",
    "pauses",
    "prompt_tokens",
    "units",
]
