"""A session as LangChain's chat message history, for `RunnableWithMessageHistory` and LangChain Classic."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage

from neuralflow_memory import ConfigError, Memory, Message, Session, open_memory
from neuralflow_memory.errors import brief

from .messages import from_langchain, to_langchain

View = Literal["context", "window", "all"]
_log = logging.getLogger(__name__)


class NeuralFlowChatMessageHistory(BaseChatMessageHistory):
    """One session's messages.

    The constructor does no I/O, so a factory may make a new object for each run, and should: `messages` is read once
    per object and then stands still until `add_messages` or `clear`. `RunnableWithMessageHistory` cuts a run's input by
    the length of `messages`; if that moved within the run, turns would be lost or stored twice.

    Args:
        session: The session. Or give `memory` (default: `open_memory()`) and the ids.
        memory: The memory that holds the session.
        session_id: The session's id; a new one if none is given.
        user_id: The session's user.
        view: What `messages` is. "context": what fits the budget, the running summary first. "window": the turns not
            yet folded into the summary. "all": the whole transcript, whatever its size.
        max_tokens: The budget of view="context", in tokens; by default the memory's `budget.total`.
        reserve_tokens: Room that view="context" leaves for what the chain adds: its prompt, the pending input.
    """

    def __init__(
        self,
        session: Session | None = None,
        *,
        memory: Memory | None = None,
        session_id: str | None = None,
        user_id: str | None = None,
        view: View = "context",
        max_tokens: int | None = None,
        reserve_tokens: int = 0,
    ) -> None:
        super().__init__()
        if view not in ("context", "window", "all"):
            raise ConfigError(f"view is 'context', 'window' or 'all', not {view!r}")
        self.session = _session(session, memory, session_id, user_id)
        self._view = view
        self._budget = {"max_tokens": max_tokens, "reserve_tokens": reserve_tokens}
        self._snapshot: Sequence[Message] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.session!r}, view={self._view!r})"

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # the host declares an attribute, and reads it
        """The messages as of this object's first read, last `add_messages` or `clear`; copies."""
        if self._snapshot is None:
            self._snapshot = self._read()
        return [to_langchain(message) for message in self._snapshot]

    async def aget_messages(self) -> list[BaseMessage]:
        """The same as `messages`, without blocking the event loop."""
        if self._snapshot is None:
            self._snapshot = await self._aread()
        return [to_langchain(message) for message in self._snapshot]

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Store *messages* at once, all or none.

        Raises:
            ConflictError: An id is taken by other content; nothing was stored.
            StorageError: They could not be written. `RunnableWithMessageHistory` swallows this after it has answered, so it is
                logged, too, and `Memory.stats()` counts it as `failed_writes`.
        """
        with _told():
            self.session.add([from_langchain(message) for message in messages])
        self._snapshot = None

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """The same as `add_messages`, without blocking the event loop."""
        with _told():
            await self.session.aadd([from_langchain(message) for message in messages])
        self._snapshot = None

    def clear(self) -> None:
        """Remove the session's messages; what was remembered about the user stays."""
        self.session.clear()
        self._snapshot = None

    async def aclear(self) -> None:
        """The same as `clear`, without blocking the event loop."""
        await self.session.aclear()
        self._snapshot = None

    def _read(self) -> Sequence[Message]:
        if self._view == "context":
            return self.session.context(**self._context_options()).messages
        return self.session.messages(view=self._view)

    async def _aread(self) -> Sequence[Message]:
        if self._view == "context":
            return (await self.session.acontext(**self._context_options())).messages
        return await self.session.amessages(view=self._view)

    def _context_options(self) -> dict[str, Any]:
        # No search: the history does not know the question; what it would find belongs to the turn before.
        return {"search": False, "overflow": "truncate", "pending_calls": True, **self._budget}


@contextmanager
def _told() -> Iterator[None]:
    """Around a write whose error the host may swallow."""
    try:
        yield
    except Exception:
        _log.exception("A turn was not stored")
        raise


def _session(session: Session | None, memory: Memory | None, session_id: str | None, user_id: str | None) -> Session:
    for name, given, kind in (("session", session, Session), ("memory", memory, Memory)):
        if given is not None and not isinstance(given, kind):
            raise ConfigError(
                f"{name}= takes a {kind.__name__}, not {brief(given)}: memory.session(id), open_memory(folder)"
            )
    if session is None:
        return (open_memory() if memory is None else memory).session(session_id, user_id=user_id)
    if memory is not None or session_id is not None or user_id is not None:
        raise ConfigError("give session=, or memory= with session_id= and user_id=, not both")
    return session


__all__ = ["NeuralFlowChatMessageHistory", "View"]
