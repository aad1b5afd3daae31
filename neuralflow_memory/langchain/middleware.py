"""Memory for LangChain's agents: recall into each call of the model, each turn written down once."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NotRequired, cast

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
    from langchain.agents.middleware.types import PrivateStateAttr
    from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
    from langgraph.runtime import Runtime, get_runtime
except ImportError as error:
    from neuralflow_memory import MissingDependency

    raise MissingDependency("langchain", "langgraph", "Memory for LangChain agents") from error
from langchain_core.messages import (
    AnyMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    convert_to_messages,
)
from langchain_core.utils.function_calling import convert_to_openai_tool

from neuralflow_memory import BudgetError, ConfigError, Context, Entry, Memory, Message, NotFound, Session, open_memory
from neuralflow_memory._offload import Workers, offload

from .messages import MARK, from_langchain, to_langchain
from .tools import RECALLED, ToolName, memory_tools

_THREAD = "thread_id"
"""The metadata of a turn that names the thread it was written from."""
_MADE_UP = "context"
_NOT_REPEATED = "(what was found in memory is not repeated here)"
_SUMMARIZED = "The conversation is kept in memory; in short:"
"""Begins what `NeuralFlowMiddleware.summarize` returns, so that the middleware knows it again."""
_MOST_RECALLS = 1024

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
        self._plan = _Plan(name or type(self).__name__, max_tokens, reserve_tokens, search, _Recalls())
        self.tools = memory_tools(self.session, tools)

    @property
    def name(self) -> str:
        """What the agent's graph calls this middleware."""
        return self._plan.name

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

    def _run(self, runtime: Runtime[Any]) -> _Run:
        return _Run(self.session(runtime), _thread_of(runtime), self._plan)

    def before_model(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Write down what is new in the thread."""
        return self._run(runtime).write(state)

    async def abefore_model(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same as `before_model`, without blocking the event loop."""
        return await self._run(runtime).awrite(state)

    def after_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Write down the rest of the run."""
        return self._run(runtime).write(state, over=True)

    async def aafter_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """The same as `after_agent`, without blocking the event loop."""
        return await self._run(runtime).awrite(state, over=True)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Show the model what memory has for it.

        Whatever tries again calls it again: it stores no turn, and what a fork left of the window it sets right once.
        """
        return handler(self._run(request.runtime).prompt(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """The same as `wrap_model_call`, without blocking the event loop."""
        return await handler(await self._run(request.runtime).aprompt(request))

    def summarize(self, messages: list[AnyMessage]) -> str:
        """The memory's summary of *messages*, for LangChain's `SummarizationMiddleware(..., summarizer=this.summarize)`.

        They are folded into the session's running summary, which is what is returned; without an LLM, too.
        """
        run = self._run(get_runtime())
        return run.summarize(messages)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The options of a middleware, and what was found for the questions under way."""

    name: str
    max_tokens: int | None
    reserve_tokens: int
    search: bool
    recalls: _Recalls


class _Recalls:
    """What was found for a user message, by the message: a run calls its model many times, and searches once."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> str | None:
        with self._lock:
            return self._found.get(key)

    def put(self, key: tuple[Any, ...], text: str) -> None:
        with self._lock:
            self._found[key] = text
            if len(self._found) > _MOST_RECALLS:
                self._found.popitem(last=False)

    def drop(self, key: tuple[Any, ...]) -> None:
        with self._lock:
            self._found.pop(key, None)


@dataclass(frozen=True, slots=True)
class _Branch:
    """How a session's window goes on: the turns that stay, and the thread's messages after them.

    `forked`: turns are gone, or return from a branch that was left; else the messages are only to be added.
    """

    kept: Sequence[Message]
    fresh: Sequence[BaseMessage]
    forked: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's view of its session."""

    session: Session
    thread: str | None
    plan: _Plan

    @property
    def _workers(self) -> Workers:
        return self.session._workers

    # -- writing

    def write(self, state: _State, *, over: bool = False) -> dict[str, Any] | None:
        """Bring the session up to the thread: new messages, and what was edited or is gone since it was forked."""
        messages = state["messages"]
        window = self.session.messages(view="window")
        branch = self._branch(state, window)
        given = {m.id: m for m in messages}
        known = [(m, given[m.id]) for m in branch.kept if m.id in given]
        changed = {ours.id: self._stored(m) for ours, m in known if not self._same(ours, m)}
        fresh = [self._stored(m) for m in branch.fresh]
        if branch.forked:
            self.session.replace([*(changed.get(m.id, m) for m in branch.kept), *fresh])
        elif fresh or changed:
            self.session.add([*changed.values(), *fresh], on_conflict="replace")
        if over and (asked := next((m.id for m in reversed(messages) if isinstance(m, HumanMessage)), None)):
            self.plan.recalls.drop((self.session.scope, asked))
        written = state.get("neuralflow_written", {})
        newest = next((m.id for m in reversed(messages) if _is_turn(m)), None)
        if newest is None or newest == written.get(self.plan.name):
            return None
        return {"neuralflow_written": {**written, self.plan.name: newest}}

    def _branch(self, state: _State, window: Sequence[Message]) -> _Branch:
        """What the thread's messages are to the window.

        Turns that this thread had at the window's end, and has no more, are gone: it was forked before them. What is gone
        before a turn that is still there was cut off to make the thread shorter, and is not meant.
        """
        messages = state["messages"]
        rows = {m.id: row for row, m in enumerate(window)}
        places = reversed(range(len(messages)))
        met = (
            p for p in places if (row := rows.get(messages[p].id)) is not None and self._same(window[row], messages[p])
        )
        last = next(met, -1)
        later = [m for m in messages[last + 1 :] if _is_turn(m)]
        cursor = state.get("neuralflow_written", {}).get(self.plan.name)
        old = next((n for n, m in enumerate(later, 1) if m.id == cursor), 0)  # written before, and not in the window
        there = [m for m in later[:old] if self._entry(m.id) is not None]  # the others were deleted from memory
        asked = next((m.id for m in reversed(later[old:]) if isinstance(m, HumanMessage)), None)
        again = asked is not None and asked not in rows and self._entry(asked) is not None  # said in another branch
        if last < 0 and not there and not again:
            start = 0 if old or not window else self._sent_again(window, later)
            return _Branch(window, later[max(old, start) :], forked=False)
        # What was folded was folded before what is still there, but for what is pinned.
        anchored = last >= 0 and not (there and self._is_pinned(messages[last].id))
        end = rows[messages[last].id] + 1 if last >= 0 else 0
        ids = {m.id for m in messages}
        gone = {m.id for m in window[end:] if self._is_ours(m) and m.id not in ids}
        if not anchored:
            gone = {i for i in gone if not self._is_pinned(i)}
            start = max((n for n, m in enumerate(there) if isinstance(m, HumanMessage)), default=0)
            there = there[start:] if gone else []
        fresh = [*there, *later[old:]]
        forked = bool(gone or there or again)
        left = gone | {m.id for m in fresh} if forked else gone
        return _Branch([m for m in window if m.id not in left], fresh, forked=forked)

    def _same(self, ours: Message, message: BaseMessage) -> bool:
        """Whether a turn of the window is what the thread has; what was edited in the memory stays as it was edited."""
        return ours.payload is None or _says(ours, self._stored(message))

    def _is_ours(self, message: Message) -> bool:
        return self.thread is not None and message.metadata.get(_THREAD) == self.thread

    def _entry(self, id: str | None) -> Entry | None:
        try:
            return self.session.entries.get(id or "")
        except NotFound:
            return None

    def _is_pinned(self, id: str | None) -> bool:
        entry = self._entry(id)
        return entry is not None and entry.pinned

    def _sent_again(self, window: Sequence[Message], said: Sequence[BaseMessage]) -> int:
        """How many messages at the front of *said* are the window's, sent again without their ids."""
        recent = [self._stored(m) for m in said[-len(window) - 8 :]]
        before = len(said) - len(recent)
        for end in range(len(recent) - 1, 0, -1):
            size = min(end, len(window))
            pairs = zip(window[len(window) - size :], recent[end - size : end], strict=True)
            if size and (size == len(window) or before + end == size) and all(_says(a, b) for a, b in pairs):
                return before + end
        return 0

    def _stored(self, message: BaseMessage) -> Message:
        """*message* as it is written down."""
        ours = from_langchain(message)
        metadata = dict(ours.metadata)
        if metadata.pop(MARK, None) == RECALLED:
            ours = replace(ours, content=_NOT_REPEATED, payload=None)
        return replace(ours, metadata=metadata if self.thread is None else metadata | {_THREAD: self.thread})

    # -- reading

    def prompt(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        """*request* with what memory has for it, within the budget."""
        window = self.session.messages(view="window")
        state = cast("_State", request.state)
        if self._branch(state, window).forked:  # a run that goes on from a checkpoint right before its model call
            self.write(state)
            window = self.session.messages(view="window")
        asked = next((row for row in reversed(range(len(window))) if window[row].role == "user"), None)
        if asked is None:
            return request
        thread = _Thread.of(convert_to_messages(request.messages), window, asked=asked)
        added = [from_langchain(m) for _, m in thread.added]
        if request.system_message is not None:
            added.append(from_langchain(request.system_message))
        schemas = _schemas(request)
        if schemas:
            added.append(Message("system", schemas))
        count = self.session.memory.count_tokens
        reserve = self.plan.reserve_tokens + (count(added) if added else 0)
        before = {m.id: m for m in state["messages"]}
        for given in thread.turns.values():
            ours = thread.window[given.id]
            if given is not before.get(given.id) or (given.id in thread.run and ours.text == _NOT_REPEATED):
                reserve += max(0, count([from_langchain(given)]) - count([ours]))
        context, hits = self._context(thread, reserve=reserve)
        front = next((m.text for m in context.messages if _is_block(m) and m.role == "system"), "")
        end = next((m.text for m in context.messages if _is_block(m) and m.role == "user"), "")
        if hits and self.session.memory.settings.context.hits_placement == "start":
            front = f"{front}\n\n{hits}" if front else hits
        elif hits:
            end = f"{end}\n\n{hits}" if end else hits
        turns = [m for m in context.messages if not _is_block(m)]
        messages = thread.laid([(m.id, self._shown(m, thread, before)) for m in turns], end=end)
        return request.override(system_message=_with_block(request.system_message, front), messages=messages)

    aprompt = offload(prompt)
    awrite = offload(write)

    def _context(self, thread: _Thread, *, reserve: int) -> tuple[Context, str]:
        """What memory shows, and, unless it is in there already, what was found when this user message was new."""
        options: dict[str, Any] = {"max_tokens": self.plan.max_tokens, "overflow": "truncate"}
        key = (self.session.scope, thread.asked)
        hits = self.plan.recalls.get(key)
        if self.plan.search and hits is None:
            context = self.session.context(reserve_tokens=reserve, **options)
            self.plan.recalls.put(key, _hits(context))
            return context, ""
        if hits:
            room = self.session.memory.count_tokens([Message("user", hits)])
            try:
                context = self.session.context(reserve_tokens=reserve + room, search=False, **options)
            except BudgetError:
                hits = ""
            else:
                sent = {m.id: m for m in context.messages}
                if all(own_id in sent and _says(sent[own_id], m) for own_id, m in thread.run.items()):
                    return context, hits
        # What the run has done so far is needed more than what was found for it.
        return self.session.context(reserve_tokens=reserve, search=False, **options), ""

    def _shown(self, message: Message, thread: _Thread, before: Mapping[str | None, BaseMessage]) -> BaseMessage:
        """A turn as the model gets it: as the request has it, unless it was cut to fit, or edited in the memory."""
        given = thread.turns.get(message.id)
        if given is None:
            return to_langchain(message)
        if given is not before.get(message.id):  # some other part has changed it, perhaps to something shorter
            count = self.session.memory.count_tokens
            whole = _says(message, thread.window[message.id]) or count([from_langchain(given)]) <= count([message])
        else:
            whole = _says(message, self._stored(given))
        repeated = message.text != _NOT_REPEATED or message.id in thread.run
        return given if whole and repeated else to_langchain(message)

    def summarize(self, messages: Sequence[BaseMessage]) -> str:
        """Fold *messages* into the running summary, and return it."""
        turns = [self._stored(m) for m in messages if _is_turn(m)]
        self.session.add(turns, on_conflict="ignore")
        ids = {m.id for m in turns}
        kept = [m for m in self.session.messages(view="window") if m.id not in ids]
        self.session.compact(max_tokens=self.session.memory.count_tokens(kept))
        summary = self.session.summary()
        return f"{_SUMMARIZED}\n\n{summary}" if summary else _SUMMARIZED.replace("; in short:", ".")


@dataclass(frozen=True, slots=True)
class _Thread:
    """What a request's messages are to the session's window.

    Attributes:
        window: The window's turns, by id.
        turns: The request's messages that are turns of the window, by id.
        run: The window's turns after the newest user turn, by id.
        asked: The id of that user turn.
        added: The other messages, which some other part has put there, each after the turn of this id.
        only: If a summary that is not ours stands for the turns that are not in the request: the ids of those to send.
    """

    window: dict[str | None, Message]
    turns: dict[str | None, BaseMessage]
    run: dict[str | None, Message]
    asked: str | None
    added: list[tuple[str | None, BaseMessage]]
    only: set[str | None] | None

    @classmethod
    def of(cls, given: Sequence[BaseMessage], window: Sequence[Message], *, asked: int) -> _Thread:
        by_id: dict[str | None, Message] = {m.id: m for m in window}
        last = max((place for place, m in enumerate(given) if m.id in by_id), default=-1)
        turns: dict[str | None, BaseMessage] = {}
        added: list[tuple[str | None, BaseMessage]] = []
        summed = False
        after: str | None = None
        for place, message in enumerate(given):
            if message.id in by_id:
                turns[message.id] = message
                after = message.id
            elif _is_summary(message) and _SUMMARIZED.partition(";")[0] in message.text:
                continue  # it stands in the memory's own block
            elif place > last or not _is_turn(message):
                added.append((after, message))
                summed = summed or _is_summary(message)
        only = {*turns, *(m.id for m in window[asked:])} if summed else None
        return cls(by_id, turns, {m.id: m for m in window[asked + 1 :]}, window[asked].id, added, only)

    def laid(self, turns: Sequence[tuple[str | None, BaseMessage]], *, end: str) -> list[AnyMessage]:
        """The prompt's messages: *turns*, the block *end* before the newest user turn, and the others in their places."""
        laid: list[Any] = [m for after, m in self.added if after is None]
        for own_id, message in turns:
            if self.only is not None and own_id not in self.only:
                continue
            if own_id == self.asked and end:
                laid.append(HumanMessage(end, additional_kwargs={MARK: _MADE_UP}))
            laid.append(message)
            laid += [m for after, m in self.added if after == own_id]
        return laid


def _is_turn(message: BaseMessage) -> bool:
    """Whether a thread's message is one that was said, by a user, a model or a tool."""
    made_up = message.additional_kwargs.get(MARK) == _MADE_UP or _is_summary(message)
    return bool(message.id) and not isinstance(message, SystemMessage | RemoveMessage) and not made_up


def _is_summary(message: BaseMessage) -> bool:
    return message.additional_kwargs.get("lc_source") == "summarization"


def _is_block(message: Message) -> bool:
    return message.metadata.get(MARK) == _MADE_UP


def _says(one: Message, other: Message) -> bool:
    """Whether two messages say the same."""
    names = ("role", "content", "name", "tool_calls", "tool_call_id")
    return all(getattr(one, n) == getattr(other, n) for n in names)


def _hits(context: Context) -> str:
    """The section of a context that quotes what search found: the last one of its block."""
    if not any(c.part == "hit" and c.included for c in context.report):
        return ""
    return [m.text for m in context.messages if _is_block(m)][-1].rpartition("\n\n")[2]


def _with_block(system: SystemMessage | None, block: str) -> SystemMessage | None:
    """*system* with *block* after it; its own content blocks, which may be marked for a cache, stay as they are."""
    if not block:
        return system
    if system is None:
        return SystemMessage(block, additional_kwargs={MARK: _MADE_UP})
    if isinstance(system.content, str):
        return system.model_copy(update={"content": f"{system.content}\n\n{block}"})
    return system.model_copy(update={"content": [*system.content, {"type": "text", "text": block}]})


def _schemas(request: ModelRequest[Any]) -> str:
    """What the model is told about tools and about the form of its answer, as JSON."""
    tools: list[Any] = [t if isinstance(t, dict) else convert_to_openai_tool(t) for t in request.tools]
    form = request.response_format
    if isinstance(form, AutoStrategy):
        form = ToolStrategy(form.schema)
    if isinstance(form, ToolStrategy):
        tools += [spec.json_schema for spec in form.schema_specs]
    elif isinstance(form, ProviderStrategy):
        tools.append(form.schema_spec.json_schema)
    return json.dumps(tools, ensure_ascii=False, default=str) if tools else ""


def _thread_of(runtime: Runtime[Any]) -> str | None:
    info = runtime.execution_info
    return None if info is None or info.thread_id is None else str(info.thread_id)  # savers take numbers, too


def _user_of(runtime: Runtime[Any]) -> str | None:
    context = runtime.context
    return context.get("user_id") if isinstance(context, Mapping) else getattr(context, "user_id", None)


__all__ = ["NeuralFlowMiddleware"]
