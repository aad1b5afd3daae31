"""The chat that `demo` plays: seven sessions over half a year, and questions whose answers lie months back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import resources

from neuralflow_memory.types import Role


@dataclass(frozen=True, slots=True)
class DemoTurn:
    """One message of the chat."""

    id: str
    role: Role
    text: str
    at: datetime


@dataclass(frozen=True, slots=True)
class DemoSession:
    """One sitting; user and assistant take turns."""

    id: str
    title: str
    turns: tuple[DemoTurn, ...]

    @property
    def exchanges(self) -> list[tuple[DemoTurn, DemoTurn]]:
        """The user's turns, each with its answer."""
        return list(zip(self.turns[::2], self.turns[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the ids of the turns that hold the answer: all of them are needed."""

    text: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """The whole chat. `asked` is when the questions are asked."""

    user_id: str
    sessions: tuple[DemoSession, ...]
    questions: tuple[Question, ...]
    asked: datetime


def bundled_chat() -> Chat:
    """Read the chat that comes with the package."""
    data = json.loads(resources.files(__package__).joinpath("chat.json").read_text(encoding="utf-8"))
    pause = timedelta(seconds=data["seconds_per_turn"])
    sessions = []
    for session in data["sessions"]:
        started = datetime.fromisoformat(session["started"])
        turns = tuple(
            DemoTurn(turn["id"], turn["role"], turn["text"], started + position * pause)
            for position, turn in enumerate(session["turns"])
        )
        sessions.append(DemoSession(session["id"], session["title"], turns))
    questions = tuple(Question(q["text"], tuple(q["evidence"])) for q in data["questions"])
    return Chat(data["user_id"], tuple(sessions), questions, datetime.fromisoformat(data["asked"]))
