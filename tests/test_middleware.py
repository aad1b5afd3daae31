"""`NeuralFlowMiddleware` in real agents, with a model that answers by a script and keeps what it is shown."""

import asyncio
import json
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import in_threads, wait_until
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ContextEditingMiddleware,
    HumanInTheLoopMiddleware,
    ModelRetryMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
)
from langchain.agents.middleware.context_editing import ClearToolUsesEdit
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, RemoveMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import BaseModel, Field

from neuralflow_memory import BudgetError, ConfigError, Message, ScopeError
from neuralflow_memory.langchain import NeuralFlowMiddleware, from_langchain

SMALL = {"max_context_items": 2, "summarization_threshold": 4}


def answer(messages):
    """Repeats the user's last words."""
    return f"answer to {asked(messages)}"


def asked(messages):
    return [m.text for m in messages if isinstance(m, HumanMessage)][-1]


class Down(Exception):
    """The model is out of reach."""


class Scripted(BaseChatModel):
    """Answers with what *script* makes of the messages: a text, an AIMessage, or an error to raise."""

    script: Any = answer
    shown: list = Field(default_factory=list)

    @property
    def _llm_type(self):
        return "scripted"

    def bind_tools(self, tools, **kwargs):
        return self

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.shown.append(messages)
        said = self.script(messages)
        if isinstance(said, Exception):
            raise said
        said = AIMessage(said) if isinstance(said, str) else said
        return ChatResult(generations=[ChatGeneration(message=said)])

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        said = self._generate(messages).generations[0].message
        words = re.findall(r"\S+\s*", said.text) or [""]
        for n, word in enumerate(words):
            calls = [
                {"name": c["name"], "args": json.dumps(c["args"]), "id": c["id"], "index": i}
                for i, c in enumerate(said.tool_calls)
            ]
            chunk = AIMessageChunk(word, tool_call_chunks=calls if n == len(words) - 1 else [])
            if run_manager is not None:
                run_manager.on_llm_new_token(word, chunk=ChatGenerationChunk(message=chunk))
            yield ChatGenerationChunk(message=chunk)


def call(name, args, id):
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": id}])


def steps(count, name="look", *, done="done", args=None):
    """A script: *count* calls of a tool for each user turn, then the answer."""

    def script(messages):
        run = messages[max(n for n, m in enumerate(messages) if isinstance(m, HumanMessage)) :]
        n = sum(isinstance(m, ToolMessage) for m in run)
        return done if n >= count else call(name, args or {"n": n}, f"call-{len(messages)}-{n}-{time.monotonic_ns()}")

    return script


@tool
def look(n: int) -> str:
    """Look at something."""
    return f"saw {n}"


@pytest.fixture
def memory(opened):
    return opened(embedder={"model": "none"})


def thread(name="t1", **more):
    return {"configurable": {"thread_id": name, **more}}


def agent(middleware, model=None, *, tools=(), before=(), after=(), saver=True, **options):
    options.setdefault("checkpointer", InMemorySaver() if saver else None)
    chain = [*before, middleware, *after]
    return create_agent(model or Scripted(), list(tools), middleware=chain, **options)


def say(graph, text, config=None, *, id=None, **options):
    return graph.invoke({"messages": [HumanMessage(text, id=id)]}, config or thread(), **options)


def transcript(session, view="all"):
    return [(m.role, m.text) for m in session.messages(view=view)]


def texts(messages):
    return [m.text for m in messages]


@dataclass
class Who:
    user_id: str | None = None


# --- recall ---------------------------------------------------------------------------------------------------------


def test_recall_is_in_the_prompt_and_not_in_the_state(memory):
    """What another chat of the user said is quoted before the question; the thread holds only what was said."""
    memory.session("old", user_id="ada").add([Message("user", "My dog is called Biscuit."), Message("assistant", "OK")])
    model = Scripted()
    saver = InMemorySaver()
    graph = agent(NeuralFlowMiddleware(memory), model, checkpointer=saver, context_schema=Who)
    state = say(graph, "What is my dog called?", context=Who("ada"))
    assert "Biscuit" in model.shown[0][0].text
    assert isinstance(model.shown[0][0], HumanMessage)
    assert model.shown[0][-1].text == "What is my dog called?"
    assert texts(state["messages"]) == ["What is my dog called?", "answer to What is my dog called?"]
    assert b"Biscuit" not in pickle.dumps([dict(saver.storage["t1"]), dict(saver.blobs), dict(saver.writes)])
    assert not any("Biscuit" in m.text for m in memory.session("t1", user_id="ada").messages())


def counted(monkeypatch):
    """The queries of every search."""
    from neuralflow_memory.pipeline import assemble

    searches, ranked = [], assemble.ranked

    def counting(parts, scope, query, **options):
        searches.append(query)
        return ranked(parts, scope, query, **options)

    monkeypatch.setattr(assemble, "ranked", counting)
    return searches


@pytest.mark.parametrize("placement", ["end", "start"])
def test_a_tool_loop_searches_once_and_sees_the_hits_in_each_step(opened, placement, monkeypatch):
    """Five tools, six calls of the model, one search; the quoted hit is the same in each prompt, once."""
    memory = opened(embedder={"model": "none"}, context={"hits_placement": placement})
    searches = counted(monkeypatch)
    memory.session("old", user_id="ada").add("The red key opens the cellar.")
    model = Scripted(script=steps(5))
    graph = agent(NeuralFlowMiddleware(memory, user_id="ada"), model, tools=[look])
    say(graph, "Which key opens the cellar?")
    assert len(model.shown) == 6
    assert searches == ["Which key opens the cellar?"]
    for n, shown in enumerate(model.shown):
        whole = "\n".join(texts(shown))
        assert whole.count("The red key opens the cellar.") == 1
        assert [m.text for m in shown if isinstance(m, ToolMessage)] == [f"saw {i}" for i in range(n)]
    say(graph, "And the attic?")
    assert searches[1:] == ["And the attic?"]


def test_an_answer_made_again_knows_what_was_learned_since(memory):
    """What was found for a message is kept for its run, and not for the next one about the same message."""
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory, user_id="ada"), model)
    say(graph, "Which key opens the cellar?")
    memory.session("other", user_id="ada").add("The red key opens the cellar.")
    graph.invoke(None, next(s.config for s in graph.get_state_history(thread()) if s.next == ("model",)))
    assert ["red key" in str(texts(shown)) for shown in model.shown] == [False, True]


def test_without_search_nothing_is_looked_for(memory, monkeypatch):
    """search=False leaves out hits, and shows the turns all the same."""
    searches = counted(monkeypatch)
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory, search=False), model)
    say(graph, "one")
    say(graph, "two")
    assert searches == []
    assert texts(model.shown[-1]) == ["one", "answer to one", "two"]


def test_a_model_that_is_asked_again_costs_no_search_and_no_write(memory, monkeypatch):
    """A retry around the middleware calls it again: one search, and each turn stored once."""
    searches = counted(monkeypatch)
    failures = [ValueError("busy"), ValueError("busy")]
    model = Scripted(script=lambda messages: failures.pop() if failures else "fine")
    retry = ModelRetryMiddleware(max_retries=3, initial_delay=0, jitter=False)
    graph = agent(NeuralFlowMiddleware(memory), model, before=[retry])
    say(graph, "hello")
    assert len(model.shown) == 3
    assert searches == ["hello"]
    assert transcript(memory.session("t1")) == [("user", "hello"), ("assistant", "fine")]


# --- the system prompt ----------------------------------------------------------------------------------------------


def with_task(memory, session_id="t1", **who):
    task = memory.session(session_id, **who).task("book a flight")
    task.__enter__()
    task.set("destination", "Oslo")
    return task


def test_content_blocks_of_a_system_prompt_stay_and_the_memory_follows(memory):
    """A cache mark keeps its place; what memory adds is a block after it."""
    with_task(memory)
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    model = Scripted()
    say(agent(NeuralFlowMiddleware(memory), model, system_prompt=SystemMessage(blocks)), "hello")
    system = model.shown[0][0]
    assert isinstance(system, SystemMessage)
    assert system.content[:1] == blocks
    assert "Oslo" in system.content[1]["text"]
    assert len(system.content) == 2
    assert sum(isinstance(m, SystemMessage) for m in model.shown[0]) == 1


def test_a_plain_system_prompt_comes_first_and_none_is_made_one(memory):
    """Text stays text; without a system prompt the tasks are one."""
    with_task(memory)
    plain, none = Scripted(), Scripted()
    say(agent(NeuralFlowMiddleware(memory), plain, system_prompt="Be brief."), "hello")
    assert plain.shown[0][0].content.startswith("Be brief.\n\nTasks:")
    say(agent(NeuralFlowMiddleware(memory), none), "hello")
    assert none.shown[0][0].content.startswith("Tasks:")


def test_without_anything_to_add_the_system_prompt_is_the_agents_own(memory):
    """No empty block, no mark."""
    model, own = Scripted(), SystemMessage("Be brief.")
    say(agent(NeuralFlowMiddleware(memory), model, system_prompt=own), "hello")
    assert model.shown[0] == [own, HumanMessage("hello", id=model.shown[0][1].id)]


# --- writing --------------------------------------------------------------------------------------------------------


def test_a_run_is_written_whole_and_once(memory):
    """User turn, tool calls, results, answer, in order; a second run adds its own."""
    graph = agent(NeuralFlowMiddleware(memory), Scripted(script=steps(2)), tools=[look])
    say(graph, "hello")
    run = [("assistant", ""), ("tool", "saw 0"), ("assistant", ""), ("tool", "saw 1"), ("assistant", "done")]
    assert transcript(memory.session("t1")) == [("user", "hello"), *run]
    say(graph, "again")
    assert transcript(memory.session("t1")) == [("user", "hello"), *run, ("user", "again"), *run]


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream"])
async def test_every_way_to_run_an_agent_reads_and_writes(memory, way):
    """Sync and async, streamed or not."""
    model = Scripted(script=lambda messages: steps(1)(messages) if len(messages) < 4 else answer(messages))
    graph = agent(NeuralFlowMiddleware(memory), model, tools=[look])
    for text in ("one", "two"):
        given = {"messages": [HumanMessage(text)]}
        if way == "invoke":
            graph.invoke(given, thread())
        elif way == "stream":
            list(graph.stream(given, thread(), stream_mode=["messages", "updates", "values"]))
        elif way == "ainvoke":
            await graph.ainvoke(given, thread())
        else:
            [_ async for _ in graph.astream(given, thread(), stream_mode=["messages", "updates", "values"])]
    said = [t for t in transcript(memory.session("t1")) if t[0] != "tool" and t[1]]
    assert said == [("user", "one"), ("assistant", "done"), ("user", "two"), ("assistant", "answer to two")]
    assert texts(model.shown[-1])[0] == "one"


def test_a_failed_run_leaves_what_was_said_and_goes_on(memory):
    """The user turn and the tool's result are there; going on adds the answer, and doubles nothing."""
    broken = [True]

    def script(messages):
        if isinstance(messages[-1], ToolMessage):
            return ValueError("down") if broken else "fine"
        return call("look", {"n": 1}, "c1")

    graph = agent(NeuralFlowMiddleware(memory), Scripted(script=script), tools=[look])
    with pytest.raises(ValueError, match="down"):
        say(graph, "hello")
    started = [("user", "hello"), ("assistant", ""), ("tool", "saw 1")]
    assert transcript(memory.session("t1")) == started
    broken.clear()
    graph.invoke(None, thread())
    assert transcript(memory.session("t1")) == [*started, ("assistant", "fine")]


def test_a_call_that_was_never_run_is_not_sent(memory):
    """The user says something else instead of approving: no provider takes a call without its result."""
    approve = HumanInTheLoopMiddleware(interrupt_on={"look": True})
    model = Scripted(script=lambda messages: call("look", {"n": 0}, "c0") if len(messages) == 1 else "fine")
    graph = agent(NeuralFlowMiddleware(memory), model, tools=[look], after=[approve])
    say(graph, "hello")
    say(graph, "never mind")
    assert texts(model.shown[-1]) == ["hello", "never mind"]


def test_a_replayed_checkpoint_writes_nothing_twice(memory):
    """Running again from each checkpoint of a finished run leaves one copy of the user turn, and one answer in the window."""
    graph = agent(NeuralFlowMiddleware(memory), Scripted(script=steps(1)), tools=[look])
    say(graph, "hello")
    for snapshot in list(graph.get_state_history(thread())):
        if snapshot.next and snapshot.values.get("messages"):
            graph.invoke(None, snapshot.config)
            window = transcript(memory.session("t1"), "window")
            assert window == [
                ("user", "hello"),
                ("assistant", ""),
                ("tool", "saw 0"),
                ("assistant", "done"),
            ]
    assert transcript(memory.session("t1")).count(("user", "hello")) == 1


@pytest.mark.parametrize("restart", [False, True])
def test_an_interrupted_run_is_whole_after_it_resumed(opened, folder, restart):
    """A tool waits for approval; the user turn is stored at once, the rest on resume, also in a new memory."""
    saver = InMemorySaver()

    def made(memory):
        approve = HumanInTheLoopMiddleware(interrupt_on={"look": True})
        return agent(
            NeuralFlowMiddleware(memory), Scripted(script=steps(1)), tools=[look], after=[approve], checkpointer=saver
        )

    memory = opened(folder, embedder={"model": "none"})
    graph = made(memory)
    assert say(graph, "hello")["__interrupt__"]
    assert transcript(memory.session("t1")) == [("user", "hello")]
    if restart:
        memory.close()
        memory = opened(folder, embedder={"model": "none"})
        graph = made(memory)
    graph.invoke(Command(resume={"decisions": [{"type": "approve"}]}), thread())
    whole = [("user", "hello"), ("assistant", ""), ("tool", "saw 0"), ("assistant", "done")]
    assert transcript(memory.session("t1")) == whole


@pytest.mark.parametrize("decision", ["edit", "reject"])
def test_what_a_human_decided_is_stored_as_the_thread_has_it(memory, decision):
    """An edited or refused call, and the result that tells the model so."""
    approve = HumanInTheLoopMiddleware(interrupt_on={"look": True})
    graph = agent(NeuralFlowMiddleware(memory), Scripted(script=steps(1)), tools=[look], after=[approve])
    say(graph, "hello")
    change = {"edited_action": {"name": "look", "args": {"n": 7}}} if decision == "edit" else {"message": "No."}
    state = graph.invoke(Command(resume={"decisions": [{"type": decision, **change}]}), thread())
    assert [m.text for m in memory.session("t1").messages()] == texts(state["messages"])
    assert [m.id for m in memory.session("t1").messages()] == [m.id for m in state["messages"]]


def test_what_redaction_took_out_is_never_stored(memory):
    """Middleware before this one has its way with the user's message first."""
    redact = PIIMiddleware("email", strategy="redact", apply_to_input=True)
    model = Scripted()
    say(agent(NeuralFlowMiddleware(memory), model, before=[redact]), "I am ada@example.org")
    assert "example.org" not in str(transcript(memory.session("t1")))
    assert "example.org" not in str(texts(model.shown[0]))


# --- scope ----------------------------------------------------------------------------------------------------------


def test_the_user_comes_from_the_runs_context(memory):
    """An attribute, a key, a fixed one, or a function of the runtime; without any, the thread is on its own."""
    graph = agent(NeuralFlowMiddleware(memory), context_schema=Who)
    say(graph, "attribute", context=Who("ada"))
    say(agent(NeuralFlowMiddleware(memory), context_schema=dict), "key", context={"user_id": "bob"})
    say(agent(NeuralFlowMiddleware(memory, user_id="cyd")), "fixed")
    by = NeuralFlowMiddleware(memory, user_id=lambda runtime: runtime.context.user_id.upper())
    say(agent(by, context_schema=Who), "function", context=Who("dee"))
    say(graph, "nobody", context=Who(None))
    found = {user: memory.session("t1", user_id=user).messages()[0].text for user in ("ada", "bob", "cyd", "DEE", None)}
    assert found == {"ada": "attribute", "bob": "key", "cyd": "fixed", "DEE": "function", None: "nobody"}


def test_without_a_thread_there_is_an_error_that_says_what_to_pass(memory):
    """Neither a thread nor a session: nothing is stored anywhere."""
    graph = agent(NeuralFlowMiddleware(memory), saver=False)
    with pytest.raises(ConfigError, match=r"thread_id.*session="):
        graph.invoke({"messages": [HumanMessage("hello")]})
    assert memory.sessions() == []


def test_an_empty_user_is_an_error_and_not_everybody(memory):
    """A bug in who is logged in must not open a chat that all share."""
    graph = agent(NeuralFlowMiddleware(memory), context_schema=Who)
    with pytest.raises(ScopeError):
        say(graph, "hello", context=Who(""))


def test_a_session_is_given_alone(memory):
    """Two answers to whose memory it is are one too many; an unknown tool is named."""
    for options in ({"memory": memory}, {"user_id": "ada"}):
        with pytest.raises(ConfigError):
            NeuralFlowMiddleware(session=memory.session("x"), **options)
    with pytest.raises(ConfigError, match="forget"):
        NeuralFlowMiddleware(memory, tools=["forget"])


def test_a_fixed_session_needs_no_thread_and_no_checkpointer(memory):
    """The session is the history: each run passes the new message only."""
    model = Scripted()
    session = memory.session("fixed", user_id="ada")
    graph = agent(NeuralFlowMiddleware(session=session), model, saver=False)
    for text in ("one", "two", "three"):
        graph.invoke({"messages": [HumanMessage(text)]})
    assert texts(model.shown[-1]) == ["one", "answer to one", "two", "answer to two", "three"]
    assert len(session.messages()) == 6


def test_a_history_sent_again_without_ids_is_stored_once(memory):
    """A front end that passes the whole chat each time, and no checkpointer."""
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory), model, saver=False)
    chat = []
    for n in range(12):
        chat = graph.invoke(
            {"messages": [*({"role": r, "content": c} for r, c in chat), ("user", f"turn {n}")]}, thread()
        )
        chat = [("user" if isinstance(m, HumanMessage) else "assistant", m.text) for m in chat["messages"]]
    assert transcript(memory.session("t1")) == chat
    assert texts(model.shown[-1])[-3:] == ["turn 10", "answer to turn 10", "turn 11"]


def test_two_of_them_in_one_agent_need_names(memory, opened, tmp_path):
    """One for the team, one for the user; without names the host refuses them."""
    team = NeuralFlowMiddleware(session=memory.session("team"), tools=(), name="team")
    own = NeuralFlowMiddleware(memory, tools=())
    assert (team.name, own.name) == ("team", "NeuralFlowMiddleware")
    say(agent(own, before=[team]), "hello")
    assert len(memory.session("team").messages()) == len(memory.session("t1").messages()) == 2
    with pytest.raises(AssertionError):
        agent(own, before=[NeuralFlowMiddleware(memory)])


def secret(user, n):
    return f"{user}-secret-{n}"


def leaks(model, users):
    """Prompts that hold another user's secrets beside the asker's."""
    for shown in model.shown:
        whole = json.dumps([m.content for m in shown])
        yield sum(f"{user}-secret" in whole for user in users)


def test_users_in_threads_never_see_each_others_text(memory):
    """One middleware, one agent, the same thread id: a hundred turns, interleaved."""
    users = ("ada", "bob", "cyd", "dee")
    model = Scripted(script=steps(1, "search_memory", args={"query": "secret"}))
    graph = agent(NeuralFlowMiddleware(memory), model, context_schema=Who, saver=False)

    def chat(user):
        for n in range(25):
            say(graph, f"{secret(user, n)}: what was my secret?", thread("same"), context=Who(user))

    in_threads(*(lambda user=user: chat(user) for user in users))
    assert set(leaks(model, users)) == {1}
    assert len(model.shown) == 200
    for user in users:
        said = [t for r, t in transcript(memory.session("same", user_id=user)) if r == "user"]
        assert said == [f"{secret(user, n)}: what was my secret?" for n in range(25)]


async def test_users_in_tasks_never_see_each_others_text(memory):
    """The same on one event loop, each user in a thread of their own."""
    users = ("ada", "bob", "cyd", "dee")
    model = Scripted(script=steps(1, "search_memory", args={"query": "secret"}))
    graph = agent(NeuralFlowMiddleware(memory), model, context_schema=Who)

    async def chat(user):
        for n in range(25):
            given = {"messages": [HumanMessage(f"{secret(user, n)}: what was my secret?")]}
            await graph.ainvoke(given, thread(f"of {user}"), context=Who(user))

    await asyncio.gather(*map(chat, users))
    assert set(leaks(model, users)) == {1}
    for user in users:
        assert sum(r == "user" for r, _ in transcript(memory.session(f"of {user}", user_id=user))) == 25


def test_equal_ids_of_different_users_share_nothing(memory):
    """What was found for a message of a run that failed is not there for another user's message of the same id."""
    for user in ("ada", "bob"):
        memory.session("old", user_id=user).add(f"The code of {user} is 4711.")
    model = Scripted(script=lambda messages: Down())
    graph = agent(NeuralFlowMiddleware(memory), model, context_schema=Who, saver=False)
    for user in ("ada", "bob"):
        with pytest.raises(Down):
            say(graph, "What is the code?", id="m1", context=Who(user))
    assert ["code of ada" in str(texts(shown)) for shown in model.shown] == [True, False]
    assert ["code of bob" in str(texts(shown)) for shown in model.shown] == [False, True]


# --- edits ----------------------------------------------------------------------------------------------------------


def before(graph, text, config=None):
    """The configuration of the checkpoint at which *text* had not been said yet."""
    past = [s for s in graph.get_state_history(config or thread()) if not s.next]
    return next(s.config for s in past if text not in texts(s.values.get("messages", [])))


@pytest.mark.parametrize("same_id", [True, False])
@pytest.mark.parametrize("folds", [False, True])
def test_an_edited_user_turn_replaces_what_came_after(opened, same_id, folds):
    """A fork before "two": it and all that followed leave the window and the prompt, and stay in the transcript."""
    memory = opened(
        embedder={"model": "none"}, pruning={"max_context_items": 1, "summarization_threshold": 2} if folds else {}
    )
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory, search=False), model)
    for text in ("one", "two", "three", "four", "five"):
        say(graph, text, id=text)
        memory.flush()
    config = before(graph, "two")
    graph.invoke({"messages": [HumanMessage("TWO", id="two" if same_id else None)]}, config)
    session = memory.session("t1")
    window = transcript(session, "window")
    assert window[-2:] == [("user", "TWO"), ("assistant", "answer to TWO")]
    assert not {"three", "four", "five"} & {text for _, text in window}
    said = [m.text for m in model.shown[-1] if not isinstance(m, SystemMessage)]
    assert said[-1] == "TWO"
    assert not {"three", "four", "five", "two"} & set(said)
    assert {"three", "four", "five"} <= {text for _, text in transcript(session)}
    say(graph, "next")
    assert texts(model.shown[-1])[-1] == "next"
    assert folds or texts(model.shown[-1])[-3:] == ["TWO", "answer to TWO", "next"]


def test_an_answer_made_again_replaces_the_first(memory):
    """The run is repeated from the checkpoint before its answer: one answer in the window, both in the transcript."""
    answers = iter(["first", "second", "third"])
    model = Scripted(script=lambda messages: next(answers))
    graph = agent(NeuralFlowMiddleware(memory), model)
    say(graph, "hello")
    config = next(s.config for s in graph.get_state_history(thread()) if s.next == ("model",))
    graph.invoke(None, config)
    assert transcript(memory.session("t1"), "window") == [("user", "hello"), ("assistant", "second")]
    say(graph, "more")
    assert texts(model.shown[-1]) == ["hello", "second", "more"]


def test_what_is_cut_off_the_threads_front_stays_in_memory(memory):
    """A thread trimmed to its last messages was not edited: the window keeps what the thread forgot."""

    class Trim(AgentMiddleware):
        def before_model(self, state, runtime):
            from langgraph.graph.message import REMOVE_ALL_MESSAGES

            return {"messages": [RemoveMessage(REMOVE_ALL_MESSAGES), *state["messages"][-1:]]}

    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory), model, after=[Trim()])
    for text in ("one", "two", "three"):
        state = say(graph, text)
    assert len(state["messages"]) == 2
    assert texts(model.shown[-1]) == ["one", "answer to one", "two", "answer to two", "three"]


def test_turns_deleted_from_memory_do_not_come_back_from_the_thread(memory):
    """The thread still has them; what was written once is not written again."""
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory), model)
    say(graph, "one")
    say(graph, "two")
    memory.session("t1").clear()
    say(graph, "three")
    assert texts(model.shown[-1]) == ["three"]
    assert transcript(memory.session("t1")) == [("user", "three"), ("assistant", "answer to three")]


def test_what_was_edited_in_memory_stays_edited(memory):
    """The thread still has the old words; neither the window nor the prompt goes back to them."""
    model = Scripted(script=lambda messages: "fine")
    graph = agent(NeuralFlowMiddleware(memory), model)
    say(graph, "My code is 4711.", id="h1")
    memory.session("t1").entries.update("h1", content="My code is secret.")
    say(graph, "again")
    assert texts(model.shown[-1]) == ["My code is secret.", "fine", "again"]
    assert transcript(memory.session("t1"), "window")[0] == ("user", "My code is secret.")


def test_a_branch_that_was_left_comes_back_whole(memory):
    """A fork leaves "two" behind; going on from where it was brings it back, and drops the other branch."""
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory), model)
    say(graph, "one")
    say(graph, "two")
    left = graph.get_state(thread()).config
    graph.invoke({"messages": [HumanMessage("other")]}, before(graph, "two"))
    assert texts(model.shown[-1]) == ["one", "answer to one", "other"]
    graph.invoke({"messages": [HumanMessage("three")]}, left)
    assert texts(model.shown[-1]) == ["one", "answer to one", "two", "answer to two", "three"]
    assert len(memory.session("t1").messages()) == 8


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_is_done_to_a_thread_the_window_is_its_end(opened, folder, seed, folds):
    """Runs, failures, forks with new and old ids, replays, folds and new memories, in any order."""
    chance = random.Random(seed)
    options = {"embedder": {"model": "none"}, "pruning": SMALL if folds else {}}
    numbers = iter(range(1, 1000))

    def script(messages):
        n = next(numbers)
        ids = [m.id for m in messages if m.id]
        assert len(ids) == len(set(ids))
        if chance.random() < 0.4:
            calls = [{"name": "look", "args": {"n": n}, "id": f"c{n}-{i}"} for i in range(chance.randint(1, 2))]
            return AIMessage("", tool_calls=calls)
        return Down() if chance.random() < 0.1 else f"reply {n}"

    memory, saver, model = opened(folder, **options), InMemorySaver(), Scripted(script=script)

    def said(snapshot):
        return [(m.id, m.text) for m in snapshot.values.get("messages", [])]

    for step in range(15):
        graph = agent(NeuralFlowMiddleware(memory), model, tools=[look], checkpointer=saver)
        now = said(graph.get_state(thread()))
        past = [s for s in graph.get_state_history(thread()) if said(s) and said(s) == now[: len(said(s))]]
        match chance.choice(["say", "say", "fork", "edit", "replay", "again"]):
            case "fork" | "edit" as how if ended := [s for s in past if not s.next]:
                at = chance.choice(ended)
                later = [i for i, _ in now[len(said(at)) :] if i.startswith("h")] if how == "edit" else []
                new, config = [HumanMessage(f"fork {step}", id=(later or [f"h{step}"])[0])], at.config
            case "replay" if begun := [s for s in past if s.next]:
                new, config = None, chance.choice(begun).config
            case "again":
                memory.close()
                memory = opened(folder, **options)
                continue
            case _:
                new, config = [HumanMessage(f"turn {step}", id=f"h{step}")], thread()
        with suppress(Down):
            graph.invoke(new and {"messages": new}, config)
        window = [(m.id, m.text) for m in memory.session("t1").messages(view="window")]
        now = said(graph.get_state(thread()))
        assert window == now[len(now) - len(window) :]
        assert window
        assert folds or window == now


def test_the_last_turns_deleted_from_memory_do_not_come_back_either(memory):
    """Of a window that is still there in part."""
    model = Scripted(script=lambda messages: "fine")
    graph = agent(NeuralFlowMiddleware(memory), model)
    say(graph, "one")
    answered = say(graph, "two", id="h2")["messages"][-1].id
    memory.session("t1").entries.delete(["h2", answered])
    say(graph, "three")
    assert texts(model.shown[-1]) == ["one", "fine", "three"]
    assert transcript(memory.session("t1"))[2:] == [("user", "three"), ("assistant", "fine")]


def test_a_first_turn_that_was_folded_can_be_edited(opened):
    """A fork before everything, under the same id, when the window begins later: nothing of the old branch is shown."""
    memory = opened(embedder={"model": "none"}, pruning={"max_context_items": 1, "summarization_threshold": 2})
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory, search=False), model)
    for text in ("one", "two", "three", "four"):
        say(graph, text, id=text)
        memory.flush()
    first = list(graph.get_state_history(thread()))[-1].config
    graph.invoke({"messages": [HumanMessage("ONE", id="one")]}, first)
    assert transcript(memory.session("t1"), "window") == [("user", "ONE"), ("assistant", "answer to ONE")]
    assert [m.text for m in model.shown[-1] if not isinstance(m, SystemMessage)] == ["ONE"]


def test_a_turn_that_is_said_again_under_its_id_is_in_the_window_again(memory):
    """It had left the window; the run that repeats it is about it."""
    graph = agent(NeuralFlowMiddleware(memory))
    say(graph, "one", id="one")
    memory.session("t1").replace([])
    first = list(graph.get_state_history(thread()))[-1].config
    graph.invoke({"messages": [HumanMessage("one", id="one")]}, first)
    assert transcript(memory.session("t1"), "window") == [("user", "one"), ("assistant", "answer to one")]


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_pinned_turn_stays_and_brings_back_nothing(memory, trimmed):
    """All but a pinned turn has left the window, as after a long pause: neither fork nor edit."""
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory), model)
    say(graph, "one", id="one")
    say(graph, "two")
    session = memory.session("t1")
    session.pin("one")
    session.replace(session.messages()[:1])
    if trimmed:
        graph.update_state(thread(), {"messages": [RemoveMessage("one")]})
    say(graph, "three")
    assert transcript(session, "window") == [("user", "one"), ("user", "three"), ("assistant", "answer to three")]


def test_a_thread_that_began_without_memory_is_taken_in(memory):
    """The middleware joins an agent whose threads are there already."""
    saver = InMemorySaver()
    plain = create_agent(Scripted(), [], checkpointer=saver)
    for n in range(3):
        say(plain, f"turn {n}")
    model = Scripted()
    say(agent(NeuralFlowMiddleware(memory), model, checkpointer=saver), "turn 3")
    assert [t for _, t in transcript(memory.session("t1"))][::2] == [f"turn {n}" for n in range(4)]
    assert texts(model.shown[0])[0] == "turn 0"


def test_a_chat_begun_elsewhere_goes_on_here(memory):
    """Turns that another host wrote stand before the thread's own, and are no reason to think that it was edited."""
    session = memory.session("t1")
    session.add([Message("user", "from elsewhere"), Message("assistant", "noted")])
    model = Scripted()
    graph = agent(NeuralFlowMiddleware(memory), model)
    say(graph, "one")
    session.add([Message("user", "meanwhile"), Message("assistant", "noted too")])
    say(graph, "two")
    shown = texts(model.shown[-1])
    assert shown == ["from elsewhere", "noted", "one", "answer to one", "meanwhile", "noted too", "two"]


# --- the budget -----------------------------------------------------------------------------------------------------


def cost(memory, shown, tools=()):
    from langchain_core.utils.function_calling import convert_to_openai_tool

    schemas = json.dumps([convert_to_openai_tool(t) for t in tools])
    return memory.count_tokens([*(from_langchain(m) for m in shown), Message("system", schemas)])


@pytest.mark.parametrize("most", [700, 1500, 4000])
def test_no_prompt_is_longer_than_the_budget_and_no_call_is_torn(memory, most):
    """Long questions, long tool results, tasks and hits: the budget holds, the question and each pair stay."""

    @tool
    def read(n: int) -> str:
        """Read a page."""
        return f"page {n} " + "lorem ipsum dolor " * (40 * n)

    with_task(memory, user_id="ada").note("a note " * 60)
    memory.session("old", user_id="ada").add([f"fact {n} about page {n}: " + "word " * 50 for n in range(30)])
    middleware = NeuralFlowMiddleware(memory, user_id="ada", max_tokens=most, reserve_tokens=50)
    calls = iter(range(1, 1000))

    def script(messages):
        n = next(calls)
        return "done" if n % 5 == 0 else call("read", {"n": n % 5}, f"call-{n}")

    model = Scripted(script=script)
    graph = agent(middleware, model, tools=[read], system_prompt="Be brief. " * 10)
    for n in range(8):
        say(graph, f"question {n} about page {n}? " + "please " * (30 * n))
    assert len(model.shown) == 40
    for n, shown in enumerate(model.shown):
        assert cost(memory, shown, [read, *middleware.tools]) <= most - 50
        assert isinstance(shown[0], SystemMessage)
        assert isinstance(shown[1], HumanMessage)
        assert any(m.text.startswith(f"question {n // 5} ") for m in shown)
        waiting = set()
        for message in shown[1:]:
            if isinstance(message, ToolMessage):
                waiting.remove(message.tool_call_id)
                continue
            assert not waiting
            waiting = {c["id"] for c in getattr(message, "tool_calls", ())}
        assert not waiting
        if n % 5:  # what the run has just done is there
            assert isinstance(shown[-1], ToolMessage)


def test_a_question_that_is_too_long_is_cut(memory):
    """Its beginning and its end are sent; the thread and the memory have all of it."""
    model = Scripted(script=lambda messages: "fine")
    text = "begin " + "word " * 5000 + "end?"
    state = say(agent(NeuralFlowMiddleware(memory, max_tokens=1000), model), text)
    assert model.shown[0][-1].text.startswith("begin")
    assert model.shown[0][-1].text.endswith("end?")
    assert cost(memory, model.shown[0]) <= 1000
    assert state["messages"][0].text == memory.session("t1").messages()[0].text == text


def test_tools_and_system_prompt_that_leave_no_room_are_an_error_with_numbers(memory):
    """Rather than a prompt that the provider refuses."""
    graph = agent(NeuralFlowMiddleware(memory, max_tokens=300), system_prompt="word " * 400)
    with pytest.raises(BudgetError, match="max_tokens=300"):
        say(graph, "hello")
    assert transcript(memory.session("t1")) == [("user", "hello")]


def test_the_schema_of_the_answer_counts_too(memory):
    """A structured answer is a tool that the model is told about."""

    class Report(BaseModel):
        """A report."""

        text: str = Field(description="word " * 300)

    done = call("Report", {"text": "fine"}, "r1")
    narrow = {"max_tokens": 600, "tools": ()}
    with pytest.raises(BudgetError):
        say(
            agent(
                NeuralFlowMiddleware(memory, **narrow | {"max_tokens": 250}),
                Scripted(script=lambda _: done),
                response_format=Report,
            ),
            "hello",
        )
    graph = agent(NeuralFlowMiddleware(memory, **narrow), Scripted(script=lambda _: done), response_format=Report)
    assert say(graph, "hello", thread("t2"))["structured_response"].text == "fine"


# --- beside other middleware ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_langchains_summaries_are_shown_and_never_stored(memory, first):
    """The thread is shortened by a summary of its own: it stands for the turns it replaced, and memory keeps them."""
    model = Scripted()
    shorten = SummarizationMiddleware(
        model, trigger=("messages", 6), keep=("messages", 2), summarizer=lambda messages: "THEIR SUMMARY"
    )
    where = {"before" if first else "after": [shorten]}
    graph = agent(NeuralFlowMiddleware(memory, search=False), model, **where)
    for n in range(8):
        say(graph, f"turn {n}")
    assert "THEIR SUMMARY" in texts(model.shown[-1])[0]
    assert sum("THEIR SUMMARY" in text for text in texts(model.shown[-1])) == 1
    assert "turn 0" not in texts(model.shown[-1])
    assert texts(model.shown[-1])[-1] == "turn 7"
    said = [
        t for pair in ((("user", f"turn {n}"), ("assistant", f"answer to turn {n}")) for n in range(8)) for t in pair
    ]
    assert transcript(memory.session("t1")) == said
    assert len(memory.session("t1").messages(view="window")) == 16


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_memorys_own_summary_shortens_the_thread_without_a_model(memory, way):
    """`summarize` folds what leaves the thread; the summary stands in the memory's block, once, and no turn is lost."""
    model = Scripted()
    middleware = NeuralFlowMiddleware(memory, search=False)
    shorten = SummarizationMiddleware(
        model, trigger=("messages", 6), keep=("messages", 2), summarizer=middleware.summarize
    )
    graph = agent(middleware, model, before=[shorten], system_prompt="Be brief.")
    facts = ["The code is 4711.", "I fly to Oslo on 3 May.", "My dog is called Biscuit.", "I never eat peanuts."]
    for text in (*facts, "hello", "hello again", "What is the code?"):
        given = {"messages": [HumanMessage(text)]}
        state = graph.invoke(given, thread()) if way == "invoke" else await graph.ainvoke(given, thread())
    assert len(state["messages"]) < 8
    summaries = [m for m in state["messages"] if m.additional_kwargs.get("lc_source")]
    assert "4711" in summaries[0].text
    shown = texts(model.shown[-1])
    assert shown[0].startswith("Be brief.")
    assert "4711" in shown[0]
    assert sum(t.count("4711") for t in shown) == 1
    assert len(memory.session("t1").messages()) == 14


def test_a_summary_in_the_middle_of_a_long_run_does_not_lose_the_question(memory):
    """LangChain's summary may swallow the user turn that the run is about; memory still has it."""
    model = Scripted(
        script=lambda m: (
            "done" if len(stored(memory)) > 22 else call("look", {"n": len(stored(memory))}, f"c{len(stored(memory))}")
        )
    )
    shorten = SummarizationMiddleware(
        model, trigger=("messages", 8), keep=("messages", 2), summarizer=lambda messages: "THEIR SUMMARY"
    )
    graph = agent(NeuralFlowMiddleware(memory), model, tools=[look], before=[shorten])
    say(graph, "the question")
    for shown in model.shown:
        assert "the question" in texts(shown)
    roles = [m.role for m in stored(memory)]
    assert roles == ["user", *["assistant", "tool"] * ((len(roles) - 2) // 2), "assistant"]


def stored(memory):
    return memory.session("t1").messages()


def test_what_other_middleware_puts_into_a_request_stays_in_its_place(memory):
    """A reminder after the question, without an id, and a system message of the thread's own."""

    class Remind(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            return handler(request.override(messages=[*request.messages, {"role": "user", "content": "Mind the gap."}]))

    model = Scripted(script=lambda messages: "fine")
    graph = agent(NeuralFlowMiddleware(memory), model, before=[Remind()])
    graph.invoke({"messages": [SystemMessage("Speak Latin."), HumanMessage("one")]}, thread())
    say(graph, "two")
    assert texts(model.shown[0]) == ["Speak Latin.", "one", "Mind the gap."]
    assert texts(model.shown[1])[-2:] == ["two", "Mind the gap."]
    assert texts(model.shown[1])[0] == "Speak Latin."
    assert "Mind the gap." not in str(transcript(memory.session("t1")))


def test_tool_results_that_other_middleware_cleared_stay_cleared(memory):
    """Context editing around this middleware has the last word on what is long."""
    edit = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=10, keep=1, placeholder="[cleared]")])
    model = Scripted(script=steps(3))
    graph = agent(NeuralFlowMiddleware(memory), model, tools=[look], before=[edit])
    say(graph, "hello " * 10)
    assert [m.text for m in model.shown[-1] if isinstance(m, ToolMessage)] == ["[cleared]", "[cleared]", "saw 2"]
    assert ("tool", "saw 0") in transcript(memory.session("t1"))


def test_a_thread_longer_than_what_is_converted_is_whole(memory, monkeypatch):
    """Only its end is converted each time: what began without memory is taken in, older turns are sent, cleared ones cleared."""
    monkeypatch.setattr("neuralflow_memory.langchain.requests._RECENT", 4)
    saver, plain, model = InMemorySaver(), Scripted(script=steps(1)), Scripted(script=steps(1))
    say(create_agent(plain, [look], checkpointer=saver), "turn 0")
    edit = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=10, keep=1, placeholder="[cleared]")])
    graph = agent(NeuralFlowMiddleware(memory), model, tools=[look], before=[edit], checkpointer=saver)
    for n in range(1, 4):
        state = say(graph, f"turn {n} " + "hello " * 10, id=f"h{n}")
    assert [m.text for m in memory.session("t1").messages()] == texts(state["messages"])
    cleared = ["[cleared]" if isinstance(m, ToolMessage) else m.text for m in state["messages"]]
    assert texts(model.shown[-1]) == [*cleared[:-2], "saw 0"]
    graph.invoke({"messages": [HumanMessage("other", id="h2")]}, before(graph, state["messages"][8].text))
    assert texts(model.shown[-1])[-3:] == ["other", "", "saw 0"]
    assert len(memory.session("t1").messages(view="window")) == 12


# --- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_the_agent_remembers_and_searches_for_its_user(memory, way):
    """What one user's agent remembers is found in their next thread, and by nobody else."""
    script = lambda m: "Noted." if isinstance(m[-1], ToolMessage) else call("remember", {"text": "Likes tea."}, "c1")
    find = lambda m: m[-1].text if isinstance(m[-1], ToolMessage) else call("search_memory", {"query": "tea"}, "c2")
    middleware = NeuralFlowMiddleware(memory, search=False)
    assert [t.name for t in middleware.tools] == ["remember", "search_memory"]
    told, asks = (agent(middleware, Scripted(script=s), context_schema=Who) for s in (script, find))

    async def run(graph, config, user):
        given = {"messages": [HumanMessage("go")]}
        if way == "invoke":
            return graph.invoke(given, config, context=Who(user))["messages"][-1].text
        return (await graph.ainvoke(given, config, context=Who(user)))["messages"][-1].text

    assert await run(told, thread("a"), "ada") == "Noted."
    assert "Likes tea." in await run(asks, thread("b"), "ada")
    assert await run(asks, thread("c"), "bob") == "Nothing was found."


def test_what_a_search_quoted_is_not_remembered_as_said(memory):
    """The tool's result is shown for the run, and neither stored nor found: no echo of an echo."""
    memory.session("old", user_id="ada").add("The red key opens the cellar.")
    model = Scripted(script=steps(1, "search_memory", args={"query": "cellar key"}))
    graph = agent(NeuralFlowMiddleware(memory, user_id="ada", search=False), model)
    say(graph, "Which one?")
    assert "red key" in model.shown[-1][-1].text
    say(graph, "Sure?")
    session = memory.session("t1", user_id="ada")
    assert not any("red key" in m.text for m in session.messages())
    assert [h.entry.scope.session_id for h in session.search("red key cellar", types=["short_term"])][:1] == ["old"]
    pairs = [m for m in model.shown[-1] if isinstance(m, ToolMessage)]
    assert "red key" not in pairs[0].text
    assert "red key" in pairs[-1].text


def test_what_a_search_quoted_counts_in_the_budget(memory):
    """Though it is not stored, the model is shown it."""
    memory.session("old", user_id="ada").add([f"The red key {n} opens " + f"cellar {n} " * 60 for n in range(6)])
    model = Scripted(script=steps(1, "search_memory", args={"query": "cellar key"}))
    middleware = NeuralFlowMiddleware(memory, user_id="ada", max_tokens=1600, search=False)
    graph = agent(middleware, model)
    for n in range(6):
        say(graph, f"question {n} " + "please " * 80)
    assert "red key" in model.shown[-1][-1].text
    assert max(cost(memory, shown, middleware.tools) for shown in model.shown) <= 1600


def test_a_tools_bad_input_is_told_to_the_model(memory):
    """An empty query is the model's mistake, and not the end of the run."""
    model = Scripted(script=steps(1, "search_memory", args={"query": " "}))
    say(agent(NeuralFlowMiddleware(memory), model), "hello")
    assert model.shown[-1][-1].status == "error"


def test_without_tools_the_agent_gets_none(memory):
    """tools=() adds nothing."""
    assert NeuralFlowMiddleware(memory, tools=()).tools == []


# --- the stream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_a_summary_written_meanwhile_is_not_in_the_users_stream(opened, way):
    """A LangChain model writes the summary while the agent's model answers; nobody sees its tokens."""
    summarizing = threading.Event()

    def summarize(messages):
        summarizing.set()
        return "INTERNAL summary"

    memory = opened(embedder={"model": "none"}, pruning=SMALL, summarizer=Scripted(script=summarize))

    def script(messages):
        if "turn 4" in texts(messages):
            wait_until(summarizing.is_set)
            memory.flush()
        return answer(messages)

    graph = agent(NeuralFlowMiddleware(memory), Scripted(script=script))
    events = []
    for n in range(5):
        given = {"messages": [HumanMessage(f"turn {n}")]}
        modes = ["messages", "updates", "values", "custom", "debug"]
        if way == "stream":
            events += graph.stream(given, thread(), stream_mode=modes)
        else:
            events += [e async for e in graph.astream(given, thread(), stream_mode=modes)]
    assert "INTERNAL" in memory.session("t1").summary()
    assert "turn 4" in repr(events)
    assert "INTERNAL" not in repr(events)


async def test_the_event_loop_is_free_while_memory_is_read_and_written(memory, monkeypatch):
    """However slow the folder is, other tasks go on."""
    from neuralflow_memory.pipeline import prompts, threads

    for module, name in ((threads, "update"), (prompts, "prompt")):
        quick = getattr(module, name)

        def slow(*args, quick=quick, **options):
            time.sleep(0.2)
            return quick(*args, **options)

        monkeypatch.setattr(module, name, slow)
    graph = agent(NeuralFlowMiddleware(memory))
    run = asyncio.create_task(graph.ainvoke({"messages": [HumanMessage("hello")]}, thread()))
    longest, last = 0.0, time.perf_counter()
    while not run.done():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert (await run)["messages"][-1].text == "answer to hello"
    assert longest < 0.15


# --- a new process --------------------------------------------------------------------------------------------------

CHILD = """
import pickle, sys
sys.path.insert(0, {tests!r})
from test_middleware import *
from neuralflow_memory import open_memory

memory = open_memory({folder!r}, embedder={{"model": "none"}})
saver = InMemorySaver()
if {resume}:
    with open({file!r}, "rb") as f:
        for name, value in pickle.load(f).items():
            getattr(saver, name).update(value)
model = Scripted(script=steps(1))
approve = HumanInTheLoopMiddleware(interrupt_on={{"look": True}})
graph = agent(NeuralFlowMiddleware(memory), model, tools=[look], after=[approve], checkpointer=saver)
if {resume}:
    graph.invoke(Command(resume={{"decisions": [{{"type": "approve"}}]}}), thread())
    print([m.text for m in model.shown[-1]])
else:
    memory.session("other").add("unrelated")
    say(graph, "My code is 4711.")
    plain = {{"blobs": dict(saver.blobs), "writes": {{k: dict(v) for k, v in saver.writes.items()}},
              "storage": {{t: {{n: dict(c) for n, c in s.items()}} for t, s in saver.storage.items()}}}}
    with open({file!r}, "wb") as f:
        pickle.dump(plain, f)
    os._exit(9)
"""


def test_a_run_interrupted_in_a_process_that_died_goes_on_in_another(folder, tmp_path, opened):
    """The first process is killed while a human is asked; the second resumes, and memory has the whole run."""
    options = {"tests": os.path.dirname(__file__), "folder": str(folder), "file": str(tmp_path / "saved")}
    first = subprocess.run(
        [sys.executable, "-c", CHILD.format(resume=False, **options)], capture_output=True, text=True
    )
    assert first.returncode == 9, first.stderr
    second = subprocess.run(
        [sys.executable, "-c", CHILD.format(resume=True, **options)], capture_output=True, text=True
    )
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == "['My code is 4711.', '', 'saw 0']"
    whole = [("user", "My code is 4711."), ("assistant", ""), ("tool", "saw 0"), ("assistant", "done")]
    assert transcript(opened(folder, embedder={"model": "none"}).session("t1")) == whole
