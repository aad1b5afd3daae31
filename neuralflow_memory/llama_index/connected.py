"""What LlamaIndex objects that serve many sessions have in common: the memory behind them, and whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr

from neuralflow_memory import ConfigError, Entry, Memory, MemoryType, NotFound, Session, open_memory

STATUS = "chat_store"
"""Key of a turn's metadata that says what became of it in a chat store; there it is active if this is missing."""
_MOST_PLACES = 10_000


class Connected(BaseModel):
    """Fields that say where to find the memory again, which is all that is written as JSON or pickled."""

    model_config = ConfigDict(extra="forbid")

    user_id: str | None = None
    tenant: str = "default"
    agent_id: str | None = None
    path: str
    _memory: Memory = PrivateAttr()
    _places: dict[str, str] = PrivateAttr(default_factory=dict)
    """By session a turn that need not be read again, nor what came before it: reading costs what is new, not all."""

    def __init__(self, *, memory: Memory | None = None, path: str | None = None, **fields: Any) -> None:
        if memory is not None and path is not None:
            raise ConfigError("give memory= or path=, not both")
        memory = open_memory(path) if memory is None else memory
        ids = {name: fields.pop(name, None) for name in ("user_id", "tenant", "agent_id")}
        scope = memory.session(**ids).scope
        super().__init__(
            path=str(memory.path), user_id=scope.user_id, tenant=scope.tenant, agent_id=scope.agent_id, **fields
        )
        self._memory = memory

    def _session(self, session_id: str) -> Session:
        return self._memory.session(session_id, user_id=self.user_id, tenant=self.tenant, agent_id=self.agent_id)

    def _turns_after_place(self, session: Session, *, filter: Mapping[str, Any] | None = None) -> list[Entry]:
        try:
            return turns(session, filter=filter, after=self._places.get(session.session_id))
        except NotFound:  # it was deleted
            return turns(session, filter=filter)

    def _move_place(self, session: Session, entry: Entry) -> None:
        if len(self._places) >= _MOST_PLACES:
            self._places.clear()
        self._places[session.session_id] = entry.key

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).model_validate, (self.model_dump(),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        fields = self.model_dump(exclude={"path"})
        return type(self)(memory=self._memory, **fields)


def turns(session: Session, *, filter: Mapping[str, Any] | None = None, after: str | None = None) -> list[Entry]:
    """The session's turns in order."""
    return session.entries.list(types=[MemoryType.SHORT_TERM], within="session", filter=filter, after=after)


__all__ = ["STATUS", "Connected", "turns"]
