"""The files that `import` reads, turned into messages one at a time; a wrong line is named, and nothing is guessed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neuralflow_memory.errors import InputError, brief
from neuralflow_memory.types import ROLES, Message, Role, Scope, utc

_LOCOMO_DATE = "%I:%M %p on %d %B, %Y"
_LOCOMO_TURN = timedelta(seconds=20)
_DIA_ID = re.compile(r"D:?(\d+):(\d+)")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and the conversation it belongs to."""

    user_id: str | None
    session_id: str
    message: Message


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the ids of the messages that answer it."""

    question: str
    evidence: tuple[str, ...]
    user_id: str | None = None
    session_id: str | None = None
    category: str | None = None


class _Question(BaseModel):
    """A line of a JSONL file that asks."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(min_length=1)
    evidence: list[str] = Field(min_length=1)
    user_id: str | None = None
    session_id: str | None = None
    category: str | None = None


class _Line(BaseModel):
    """One line of a JSONL file."""

    model_config = ConfigDict(extra="forbid")

    session_id: str
    role: Role
    content: str | list[str | dict[str, Any]] = ""
    user_id: str | None = None
    id: str | None = None
    name: str | None = None
    created_at: datetime | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    tool_call_id: str | None = None


_EXPECTED = {
    **dict.fromkeys(("session_id", "user_id", "id", "name", "tool_call_id"), "text"),
    "role": f"one of {', '.join(ROLES)}",
    "content": "text or a list of blocks",
    "created_at": "a time such as 2026-05-03T10:00:00Z",
    "metadata": "a JSON object",
    "tool_calls": "a list of JSON objects",
    "question": "text",
    "evidence": "a list of ids, at least one",
    "category": "text",
}
"""What each field of a line must be; a test compares the names with `_Line` and `_Question`."""


def read_jsonl(file: Path, *, user_id: str | None = None) -> Iterator[Turn]:
    """Yield the turns of a file with one JSON object a line; blank lines, and questions for `eval`, are skipped.

    A message without an `id` gets one made from its conversation, its content, and how many equal ones stand
    before it, so that importing a file again, also after lines were added to it, adds nothing twice.

    Args:
        file: UTF-8 text.
        user_id: For lines that name no user.

    Raises:
        InputError: A line is not a message; the text names the line and what is wrong with it.
    """
    seen: Counter[bytes] = Counter()
    for number, text in _lines(file):
        if _asks(text):
            continue
        where = f"{file.name}, line {number}"
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            raise InputError(f"{where}: {_problems(error)}", line=number) from None
        try:
            yield _turn(line, user_id=user_id if line.user_id is None else line.user_id, seen=seen)
        except InputError as error:
            raise InputError(f"{where}: {error}", line=number) from None


def read_questions(file: Path) -> Iterator[Asked]:
    """Yield the questions of such a file: lines with a `question` and the ids of its `evidence`.

    Raises:
        InputError: A line that asks is wrong; the text names it.
    """
    for number, text in _lines(file):
        if _asks(text):
            try:
                line = _Question.model_validate_json(text)
            except ValidationError as error:
                raise InputError(f"{file.name}, line {number}: {_problems(error)}", line=number) from None
            yield Asked(line.question, tuple(line.evidence), line.user_id, line.session_id, line.category)


def _asks(text: str) -> bool:
    try:
        line = json.loads(text)
    except ValueError:
        return False
    return isinstance(line, dict) and "question" in line


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    yield number, text
        except UnicodeDecodeError:
            raise InputError(f"{file.name}, after line {number}: not UTF-8 text; convert the file first") from None


def _problems(error: ValidationError) -> str:
    """What is wrong with a line, each field once, in the words of the file and not of the library that checks it."""
    found: dict[str, str] = {}
    for e in error.errors():
        name = str(e["loc"][0]) if e["loc"] else ""
        match e["type"]:
            case "missing":
                problem = f"{name} is missing"
            case "extra_forbidden":
                problem = f"{brief(name)} is not a field of a message; put it into metadata, or mend its name"
            case "json_invalid":
                problem = "not valid JSON: " + re.sub(r"at line \d+ column", "at column", str(e["ctx"]["error"]))
            case _:
                problem = f"{name} must be {_EXPECTED[name]}" if name else "a line must be a JSON object"
        found.setdefault(name, problem)
    return "; ".join(found.values())


def _turn(line: _Line, *, user_id: str | None, seen: Counter[bytes]) -> Turn:
    Scope(user_id=user_id, session_id=line.session_id)
    message = Message(
        line.role,
        line.content,  # type: ignore[arg-type]  # plain strings among the blocks become text blocks
        id=line.id or _stable_id(line, user_id=user_id, seen=seen),
        name=line.name,
        tool_calls=line.tool_calls,  # type: ignore[arg-type]  # mappings become ToolCalls
        tool_call_id=line.tool_call_id,
        created_at=line.created_at,
        metadata=line.metadata,
    )
    return Turn(user_id, line.session_id, message)


def _stable_id(line: _Line, *, user_id: str | None, seen: Counter[bytes]) -> str:
    said = json.dumps([user_id, line.model_dump(mode="json", exclude={"id", "user_id"})], sort_keys=True)
    digest = hashlib.blake2b(said.encode(), digest_size=12).digest()
    seen[digest] += 1
    return f"import-{digest.hex()}-{seen[digest]}"


def read_locomo(file: Path, *, user_id: str | None = None) -> Iterator[Turn]:
    """Yield the turns of a file in the LoCoMo data set's format (Maharana et al., 2024).

    A sample becomes a user (`sample_id`), each of its sessions a session. The first speaker takes the role of the user, the
    other the assistant's; turns are dated 20 seconds apart from the session's time on, which is taken as UTC.

    Args:
        file: A JSON array of samples, or one sample.
        user_id: The user of all samples, in place of their ids.

    Raises:
        InputError: The file is not of that shape; the text names the sample and the session.
    """
    yield from _samples(file, lambda sample: _sample(sample, user_id=user_id))


def read_locomo_questions(file: Path) -> Iterator[Asked]:
    """Yield the questions of a LoCoMo file that name turns as their evidence, without those that have no answer (5)."""
    yield from _samples(file, _asked)


def _asked(sample: dict[str, Any]) -> Iterator[Asked]:
    sample_id = str(sample["sample_id"])
    there = {
        turn["dia_id"] for name, turns in sample["conversation"].items() if isinstance(turns, list) for turn in turns
    }
    for question in sample.get("qa", ()):
        named = [
            f"D{int(a)}:{int(b)}" for text in question.get("evidence") or () for a, b in _DIA_ID.findall(str(text))
        ]
        evidence = tuple(f"{sample_id}/{dia_id}" for dia_id in dict.fromkeys(named) if dia_id in there)
        if evidence and str(question.get("category")) != "5":
            yield Asked(question["question"], evidence, sample_id, None, str(question.get("category")))


def _samples(file: Path, read: Callable[[Any], Iterator[T]]) -> Iterator[T]:
    try:
        samples = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file.name}: not JSON: {error}") from None
    for number, sample in enumerate(samples if isinstance(samples, list) else [samples], 1):
        where = f"{file.name}, sample {number}"
        try:
            yield from read(sample)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except KeyError as error:
            raise InputError(f"{where}: {error} is missing") from None
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(f"{where}: not in LoCoMo's format: {error}") from None


def _sample(sample: dict[str, Any], *, user_id: str | None) -> Iterator[Turn]:
    sample_id, conversation = str(sample["sample_id"]), sample["conversation"]
    names = sorted((n for n in conversation if re.fullmatch(r"session_\d+", n)), key=lambda n: int(n[8:]))
    first: str | None = None
    for name in names:
        started = utc(datetime.strptime(conversation[f"{name}_date_time"].strip(), _LOCOMO_DATE))  # noqa: DTZ007
        for position, turn in enumerate(conversation[name]):
            first = first or turn["speaker"]
            message = Message(
                "user" if turn["speaker"] == first else "assistant",
                _locomo_text(turn),
                id=f"{sample_id}/{turn['dia_id']}",
                name=turn["speaker"],
                created_at=started + position * _LOCOMO_TURN,
                metadata={"dia_id": turn["dia_id"]},
            )
            yield Turn(user_id or sample_id, f"{sample_id}-{name}", message)


def _locomo_text(turn: dict[str, Any]) -> str:
    caption = turn.get("blip_caption")
    return (turn.get("text") or "") + (f" [shares a photo: {caption}]" if caption else "")


Reader = Callable[..., Iterator[Turn]]
READERS: dict[str, Reader] = {"jsonl": read_jsonl, "locomo": read_locomo}
QUESTIONS: dict[str, Callable[[Path], Iterator[Asked]]] = {"jsonl": read_questions, "locomo": read_locomo_questions}
