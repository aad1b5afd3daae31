"""A session as LlamaIndex's memory, for chat engines, agents and workflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory.types import BaseMemory
from pydantic import PrivateAttr

from neuralflow_memory import ConfigError, Context, Memory, Message, Session, open_memory

from .messages import MARK, append_injected, from_llama_index, to_llama_index


class NeuralFlowMemory(BaseMemory):
    """One session's memory.

    Its fields (ids, limit, folder) are all that `to_dict` writes. The messages stay in the folder, and `from_dict`,
    `pickle` and a workflow's saved context connect to them again. A memory on ":memory:" has no folder to come back to.

    Args:
        session: The session. Or give `memory` (default: `open_memory(path)`) and the ids.
        memory: The memory that holds the session.
        path: The memory's folder; by default the one of the settings (`NEURALFLOW_PATH`).
        **fields: The fields below.

    Attributes:
        session_id: The session's id; a new one if none is given.
        user_id: The session's user.
        tenant: The tenant of both. `agent_id`: marks who writes.
        path: The memory's folder.
        token_limit: The budget of `get`, in tokens; by default the memory's `budget.total`.
        search: Whether `get` looks for what was said before the recent turns; without, it has the summary and those.
    """

    session_id: str
    user_id: str | None = None
    tenant: str = "default"
    agent_id: str | None = None
    path: str
    token_limit: int | None = None
    search: bool = True
    _session: Session = PrivateAttr()

    def __init__(
        self,
        session: Session | None = None,
        *,
        memory: Memory | None = None,
        path: str | None = None,
        token_limit: int | None = None,
        search: bool = True,
        **fields: Any,
    ) -> None:
        ids = {key: fields[key] for key in ("session_id", "user_id", "tenant", "agent_id") if key in fields}
        if session is None:
            session = (open_memory(path) if memory is None else memory).session(ids.pop("session_id", None), **ids)
        elif memory is not None or path is not None or ids:
            raise ConfigError("give session=, or memory= or path= with ids, not both")
        scope = session.scope
        super().__init__(
            session_id=scope.session_id,
            user_id=scope.user_id,
            tenant=scope.tenant,
            agent_id=scope.agent_id,
            path=str(session.memory.path),
            token_limit=token_limit,
            search=search,
        )
        self._session = session

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex stores it."""
        return "NeuralFlowMemory"

    @classmethod
    def from_defaults(cls, *, chat_history: list[ChatMessage] | None = None, **kwargs: Any) -> Self:
        """Make a memory as LlamaIndex's engines and agents do when they were given none.

        Args:
            chat_history: Becomes the conversation, as by `set`; none or empty leaves the session as it is.
            **kwargs: Arguments of the class; what else a caller passes (`llm`, `tokenizer_fn`) is not needed here.
        """
        known = {"session", "memory", "path", "token_limit", "search", "session_id", "user_id", "tenant", "agent_id"}
        memory = cls(**{key: value for key, value in kwargs.items() if key in known})
        if chat_history:
            memory.set(chat_history)
        return memory

    @property
    def session(self) -> Session:
        """The session behind this memory."""
        return self._session

    @property
    def tokenizer_fn(self) -> Callable[[str], range]:
        """By its length, chat engines learn the size of their prefix, which comes back as `initial_token_count`."""
        return lambda text: range(self._session.memory.count_tokens([Message("system", text)]) if text.strip() else 0)

    def get(self, input: Any = None, initial_token_count: int = 0, **_: Any) -> list[ChatMessage]:
        """What the model is to see: the memory block, then the recent turns; copies.

        Args:
            input: The question that steers the search: text, a message or a `QueryBundle`; by default the newest
                user turn.
            initial_token_count: Tokens of the prompt that are taken already.
        """
        return _messages(self._session.context(**self._request(input, initial_token_count)))

    async def aget(self, input: Any = None, initial_token_count: int = 0, **_: Any) -> list[ChatMessage]:
        """The same as `get`, without blocking the event loop."""
        return _messages(await self._session.acontext(**self._request(input, initial_token_count)))

    def get_all(self) -> list[ChatMessage]:
        """The whole conversation, folded turns too, and nothing but the conversation; copies."""
        return [to_llama_index(message) for message in self._session.messages(view="all")]

    async def aget_all(self) -> list[ChatMessage]:
        """The same as `get_all`, without blocking the event loop."""
        return [to_llama_index(message) for message in await self._session.amessages(view="all")]

    def put(self, message: ChatMessage) -> None:
        """Store a turn."""
        self.put_messages([message])

    async def aput(self, message: ChatMessage) -> None:
        """The same as `put`, without blocking the event loop."""
        await self.aput_messages([message])

    def put_messages(self, messages: list[ChatMessage]) -> None:
        """Store turns, all or none."""
        self._session.add([from_llama_index(message) for message in messages])

    async def aput_messages(self, messages: list[ChatMessage]) -> None:
        """The same as `put_messages`, without blocking the event loop."""
        await self._session.aadd([from_llama_index(message) for message in messages])

    def set(self, messages: list[ChatMessage]) -> None:
        """Make *messages* the conversation that `get` draws on; other turns stay in `get_all` and in search.

        What `get` gave may be handed back: its turns are not written again.
        """
        self._session.replace([from_llama_index(message) for message in messages])

    async def aset(self, messages: list[ChatMessage]) -> None:
        """The same as `set`, without blocking the event loop."""
        await self._session.areplace([from_llama_index(message) for message in messages])

    def reset(self) -> None:
        """Remove the session's messages; what was remembered about the user stays."""
        self._session.clear()

    async def areset(self) -> None:
        """The same as `reset`, without blocking the event loop."""
        await self._session.aclear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return type(self)(self._session, token_limit=self.token_limit, search=self.search)

    def _request(self, query: Any, taken: int) -> dict[str, Any]:
        return {
            "query": _query(query),
            "max_tokens": self.token_limit,
            "reserve_tokens": taken,
            "search": self.search,
            "overflow": "truncate",
        }


def _query(given: Any) -> str | None:
    if isinstance(given, ChatMessage):
        given = from_llama_index(given).text
    text = str(getattr(given, "query_str", given) or "")
    return text if text.strip() else None


def _messages(context: Context) -> list[ChatMessage]:
    """The messages; of the system messages at the front, what the memory adds stands in the last of the host's own."""
    found: list[ChatMessage] = []
    for message in context.messages:
        before = found[-1] if found else None
        if message.role == "system" and MARK in message.metadata and before is not None:
            append_injected(before, message.text)
        else:
            found.append(to_llama_index(message))
    return found


__all__ = ["NeuralFlowMemory"]
