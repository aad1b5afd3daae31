"""Memory for LangChain's agents: recall into each call of the model, each turn written down once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, NotRequired, cast

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import PrivateStateAttr
    from langgraph.runtime import Runtime, get_runtime
except ImportError as error:
    from neuralflow_memory import MissingDependency

    raise MissingDependency("langchain", "langgraph", "Memory for LangChain agents") from error
from langchain_core.messages import AnyMessage

from neuralflow_memory import ConfigError, Memory, Session, Thread, open_memory

from .requests import SUMMARIZED, Call, ours, recent
from .tools import ToolName, memory_tools

Scoped = Callable[[Runtime[Any]], str | None]


class _State(AgentState[Any]):
    neuralflow_written: NotRequired[Annotated[dict[str, str], PrivateStateAttr]]
    """Id of the thread's newest message that was written down, by the middleware's name."""


class NeuralFlowMiddleware(AgentMiddleware[_State, Any, Any]):
    """Memory for `create_agent`.

    Before each call of the model, what is new in the thread is written down. The model is then shown the open tasks and
    the running summary (after the system prompt), what search finds for the user's question (before the question) and the
    recent turns, within the token budget, the system prompt and the tools counted. Nothing of this enters the thread's state.

    One object serves any number of users and threads at once, sync and async: it keeps no state of a run.

    The thread's id is the session's id. A user message that is edited, and turns that are gone from the thread because it
    was forked at an earlier checkpoint, leave the session's window, too; they stay in the transcript and in search. Messages
    that were merely cut off the thread's front (trimmed or summarized) stay in memory.

    Put it after middleware that changes messages in `before_model` (redaction), so that what they leave is what is stored.

    Args:
        memory: The memory; by default `open_memory()`.
        session: One session for every run, instead of one for each thread.
        user_id: Whose threads they are, or a function of the runtime that says so. By default the `user_id` of the run's
            context (an attribute or a key); without one, each thread is a chat of its own that no other one sees.
        max_tokens: The budget of a prompt, in tokens; by default the memory's `budget.total`.
        reserve_tokens: Room in it for what other parts add after this one; the answer's, too, where the model counts it.
        search: Whether to look for what has to do with the user's message, once for each.
        tools: Those that the agent gets: "remember" writes for good, "search_memory" looks for more.
        name: Tells several of these apart in one agent.

    Raises:
        ConfigError: `session` was given with `memory` or `user_id`, or an unknown tool. At run time: neither `session` nor a
            thread id was given.
        BudgetError: At run time: the system prompt and the tools leave no room in `max_tokens`.
    """

    state_schema = _State

    def __init__(
        self,
        memory: Memory | None = None,
        *,
        session: Session | None = None,
        user_id: str | Scoped | None = None,
        max_tokens: int | None = None,
        reserve_tokens: int = 0,
        search: bool = True,
        tools: Sequence[ToolName] = ("remember", "search_memory"),
        name: str | None = None,
    ) -> None:
        super().__init__()
        if session is not None and (memory is not None or user_id is not None):
            raise ConfigError("give session=, or memory= with user_id=, not both")
        self._session = session
        self._memory = open_memory() if memory is None and session is None else memory
        self._user_id = user_id
        self._prompt: dict[str, Any] = {"max_tokens": max_tokens, "reserve_tokens": reserve_tokens, "search": search}
        self._name = name or type(self).__name__
        self.tools = memory_tools(self.session, tools)

    @property
    def name(self) -> str:
        """What the agent's graph calls this middleware."""
        return self._name

    def session(self, runtime: Runtime[Any]) -> Session:
        """The session of a run; *runtime* is that of a node, of middleware or of a tool.

        Raises:
            ConfigError: The run has no thread id.
            ScopeError: An id is not a usable one.
        """
        if self._session is not None:
            return self._session
        thread = _thread_of(runtime)
        if thread is None:
            raise ConfigError(
                "the run has no thread id to keep its conversation under: pass "
                'config={"configurable": {"thread_id": ...}}, or give the middleware session='
            )
        assert self._memory is not None
        user = self._user_id(runtime) if callable(self._user_id) else self._user_id
        return self._memory.session(thread, user_id=_user_of(runtime) if self._user_id is None else user)

    def _thread(self, runtime: Runtime[Any]) -> Thread:
        return self.session(runtime).thread(_thread_of(runtime))

    def before_model(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Write down what is new in the thread."""
        return self._noted(state, self._thread(runtime).update(**self._list(state)))

    async def abefore_model(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same as `before_model`, without blocking the event loop."""
        return self._noted(state, await self._thread(runtime).aupdate(**self._list(state)))

    def after_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Write down the rest of the run."""
        return self.before_model(state, runtime)

    async def aafter_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same as `after_agent`, without blocking the event loop."""
        return await self.abefore_model(state, runtime)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Show the model what memory has for it. Whatever tries again calls it again: then there is nothing to write."""
        thread, call = self._thread(request.runtime), Call.of(request)
        thread.update(**self._list(cast("_State", request.state)))  # a run may go on from right before this call
        return handler(call.filled(thread.prompt(call.messages, older=call.older, **self._prompt)))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """The same as `wrap_model_call`, without blocking the event loop."""
        thread, call = self._thread(request.runtime), Call.of(request)
        await thread.aupdate(**self._list(cast("_State", request.state)))
        return await handler(call.filled(await thread.aprompt(call.messages, older=call.older, **self._prompt)))

    def summarize(self, messages: list[AnyMessage]) -> str:
        """The memory's summary of *messages*, for LangChain's `SummarizationMiddleware(..., summarizer=this.summarize)`.

        They are folded into the session's running summary, which is what is returned; without an LLM, too.
        """
        summary = self._thread(get_runtime()).fold([ours(m) for m in messages])
        return f"{SUMMARIZED}\n\n{summary}" if summary else SUMMARIZED.replace("; in short:", ".")

    def _list(self, state: _State) -> dict[str, Any]:
        written = state.get("neuralflow_written", {}).get(self.name)
        return {"messages": recent(state["messages"], written=written), "written": written}

    def _noted(self, state: _State, newest: str | None) -> dict[str, Any] | None:
        written = state.get("neuralflow_written", {})
        same = newest is None or newest == written.get(self.name)
        return None if same else {"neuralflow_written": {**written, self.name: newest}}


def _thread_of(runtime: Runtime[Any]) -> str | None:
    info = runtime.execution_info
    return None if info is None or info.thread_id is None else str(info.thread_id)  # savers take numbers, too


def _user_of(runtime: Runtime[Any]) -> str | None:
    context = runtime.context
    return context.get("user_id") if isinstance(context, Mapping) else getattr(context, "user_id", None)


__all__ = ["NeuralFlowMiddleware"]
