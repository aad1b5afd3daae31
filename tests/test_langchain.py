"""The LangChain adapters inside real LangChain chains, with a model that records what it is shown."""

import asyncio
import subprocess
import sys
import warnings
from typing import Any

import pytest
from langchain_classic.chains import ConversationChain
from langchain_classic.memory import CombinedMemory, ReadOnlySharedMemory
from langchain_core._api.deprecation import suppress_langchain_deprecation_warning
from langchain_core.language_models import SimpleChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import ConfigurableFieldSpec
from langchain_core.runnables.history import RunnableWithMessageHistory
from pydantic import Field

from neuralflow_memory import ConfigError, Message, open_memory
from neuralflow_memory.langchain import (
    NeuralFlowChatMessageHistory,
    NeuralFlowMemory,
    NeuralFlowRetriever,
    from_langchain,
)

pytestmark = pytest.mark.filterwarnings("ignore:The class `ConversationChain`", "ignore:.*RunnableWithMessageHistory")

SMALL = {"max_context_items": 2, "summarization_threshold": 3}
"""Folds after three items, so that short tests cross a fold."""


class Recorder(SimpleChatModel):
    """Answers `answer N`, and keeps what it was shown."""

    shown: list = Field(default_factory=list)
    meanwhile: Any = None

    @property
    def _llm_type(self):
        return "recorder"

    def _call(self, messages, stop=None, run_manager=None, **kwargs):
        self.shown.append(messages)
        if self.meanwhile is not None:
            self.meanwhile()
        return f"answer {len(self.shown)}"


@pytest.fixture
def memory(tmp_path):
    with open_memory(tmp_path / "memory", embedder={"model": "none"}, pruning=SMALL) as opened:
        yield opened


@pytest.fixture
def session(memory):
    return memory.session("chat", user_id="ada")


def transcript(session):
    return [(m.role, m.text) for m in session.messages(view="all")]


# --- NeuralFlowChatMessageHistory -----------------------------------------------------------------------------------


def with_history(memory, model, *, view="context", keyed=False):
    """A chain that keeps its history in *memory*; a new history object for each run, as the host expects."""
    factory = lambda session_id: NeuralFlowChatMessageHistory(memory=memory, session_id=session_id, view=view)
    if not keyed:
        return RunnableWithMessageHistory(model, factory)
    prompt = ChatPromptTemplate([("system", "Be terse."), MessagesPlaceholder("past"), ("human", "{question}")])
    return RunnableWithMessageHistory(
        prompt | model, factory, input_messages_key="question", history_messages_key="past"
    )


CONFIG = {"configurable": {"session_id": "chat"}}
SAID = [turn for n in range(1, 8) for turn in (("user", f"question {n}"), ("assistant", f"answer {n}"))]


@pytest.mark.parametrize("view", ["context", "window", "all"])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_chain_stores_every_turn_once_though_turns_are_folded(memory, view, keyed):
    """The host cuts a run's input by the history's length: no fold within a run may lose or double a turn."""
    chain = with_history(memory, Recorder(), view=view, keyed=keyed)
    for n in range(1, 8):
        chain.invoke({"question": f"question {n}"} if keyed else [HumanMessage(f"question {n}")], CONFIG)
        memory.flush()
    assert transcript(memory.session("chat")) == SAID


@pytest.mark.parametrize("view", ["context", "window", "all"])
async def test_the_async_chain_stores_the_same(memory, view):
    """`ainvoke` and `astream` read and write through the async twins."""
    chain = with_history(memory, Recorder(), view=view)
    for n in range(1, 8):
        question = [HumanMessage(f"question {n}")]
        if n % 2:
            await chain.ainvoke(question, CONFIG)
        else:
            assert "".join([chunk.content async for chunk in chain.astream(question, CONFIG)]) == f"answer {n}"
        await memory.aflush()
    assert transcript(memory.session("chat")) == SAID


@pytest.mark.parametrize("view", ["context", "window", "all"])
async def test_a_history_that_grows_or_folds_within_a_run_loses_nothing(memory, view):
    """While the model answers, someone else writes and the window is folded: both turns of the run are stored, once."""
    session = memory.session("chat")

    def meanwhile():
        session.add([Message("user", "from elsewhere"), Message("assistant", "noted")])
        memory.flush()

    chain = with_history(memory, Recorder(meanwhile=meanwhile), view=view)
    for n in range(1, 5):
        chain.invoke([HumanMessage(f"question {n}")], CONFIG)
    await chain.ainvoke([HumanMessage("question 5")], CONFIG)
    assert [turn for turn in transcript(session) if turn[1] not in ("from elsewhere", "noted")] == SAID[:10]


def test_a_streamed_turn_is_stored_once(memory):
    """`stream` ends with one stored answer."""
    chain = with_history(memory, Recorder())
    assert "".join(chunk.content for chunk in chain.stream([HumanMessage("question 1")], CONFIG)) == "answer 1"
    assert transcript(memory.session("chat")) == SAID[:2]


def test_the_model_is_shown_the_turns_before(memory):
    """The second run's prompt holds the first run's turns, in order, before the new one."""
    model = Recorder()
    chain = with_history(memory, model)
    chain.invoke([HumanMessage("question 1")], CONFIG)
    chain.invoke([HumanMessage("question 2")], CONFIG)
    assert [m.content for m in model.shown[1]] == ["question 1", "answer 1", "question 2"]


def test_a_long_history_is_shown_within_the_budget(memory, session):
    """view="context" stays within its tokens, and ends with the newest turns."""
    for n in range(30):
        session.add([Message("user", f"question {n} " + "word " * 40), Message("assistant", f"answer {n}")])
    history = NeuralFlowChatMessageHistory(session, max_tokens=400, reserve_tokens=100)
    messages = history.messages
    assert messages[-1].content == "answer 29"
    assert len(messages) < 60

    assert memory.count_tokens([from_langchain(m) for m in messages]) <= 300


def test_messages_stand_still_until_this_object_writes(session):
    """Another writer's turns show in a new object, or after this one's own write."""
    history = NeuralFlowChatMessageHistory(session, view="all")
    history.add_user_message("one")
    assert len(history.messages) == 1
    NeuralFlowChatMessageHistory(session).add_ai_message("two")
    assert [m.content for m in history.messages] == ["one"]
    history.add_user_message("three")
    assert [m.content for m in history.messages] == ["one", "two", "three"]
    history.clear()
    assert history.messages == []


async def test_async_reads_share_the_snapshot(session):
    """What `aget_messages` returned is what `messages` returns, until something is written."""
    history = NeuralFlowChatMessageHistory(session, view="all")
    assert await history.aget_messages() == []
    session.add("from elsewhere")
    assert history.messages == []
    await history.aadd_messages([HumanMessage("one")])
    assert await history.aget_messages() == history.messages
    assert [m.content for m in history.messages] == ["from elsewhere", "one"]
    await history.aclear()
    assert await history.aget_messages() == []


def test_making_a_history_stores_nothing(memory):
    """The host makes one object per call: that alone leaves no trace."""
    NeuralFlowChatMessageHistory(memory=memory, session_id="looked-at")
    assert [s.session_id for s in memory.sessions()] == []


def test_what_comes_out_can_be_changed_freely(session):
    """A returned message is a copy, and so is the list."""
    history = NeuralFlowChatMessageHistory(session)
    history.add_messages([HumanMessage("one", additional_kwargs={"tags": ["a"]})])
    first = history.messages
    first[0].content = "changed"
    first[0].additional_kwargs["tags"].append("b")
    first.clear()
    assert history.messages == [HumanMessage("one", additional_kwargs={"tags": ["a"]})]
    assert NeuralFlowChatMessageHistory(session).messages == history.messages


def test_equal_turns_in_a_row_are_all_kept(session):
    """Saying the same twice is two turns."""
    history = NeuralFlowChatMessageHistory(session, view="all")
    history.add_messages([HumanMessage("yes"), HumanMessage("yes")])
    history.add_messages([HumanMessage("yes")])
    assert [m.content for m in history.messages] == ["yes", "yes", "yes"]


def test_messages_survive_the_store_unchanged(session):
    """All a message carries comes back: calls, usage, metadata with None, artifact and status."""
    sent = [
        SystemMessage("be brief"),
        HumanMessage(["plain", {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}], name="ada"),
        AIMessage(
            "",
            id="run-1",
            tool_calls=[{"id": "c1", "name": "add", "args": {"a": [1, 2.5, None]}}],
            invalid_tool_calls=[{"id": "c2", "name": "add", "args": "{", "error": "cut off"}],
            usage_metadata={"input_tokens": 3, "output_tokens": 4, "total_tokens": 7},
            response_metadata={"finish_reason": None},
            additional_kwargs={"refusal": None},
        ),
        ToolMessage("3.5", tool_call_id="c1", artifact={"rows": [[1], [2.5]]}, status="error"),
        AIMessage("3.5"),
    ]
    history = NeuralFlowChatMessageHistory(session, view="all")
    history.add_messages(sent)
    assert history.messages == sent


def test_injected_context_is_never_stored_as_a_turn(memory, session):
    """The summary that a prompt holds is not a turn, even if a chain hands the whole prompt back."""
    for n in range(1, 8):
        session.add([Message("user", f"question {n}"), Message("assistant", f"answer {n}")])
    memory.flush()
    before = transcript(session)
    history = NeuralFlowChatMessageHistory(session)
    injected = [m for m in history.messages if m.additional_kwargs.get("neuralflow")]
    assert injected
    history.add_messages(injected)
    assert transcript(session) == before


def test_the_history_reads_as_text(session):
    """`str` gives the usual transcript."""
    history = NeuralFlowChatMessageHistory(session)
    history.add_user_message("hi")
    history.add_ai_message("hello")
    assert str(history) == "Human: hi\nAI: hello"


def test_two_ways_to_name_the_session_are_refused(memory, session):
    """A session already says which memory and ids it has; so does an unknown view."""
    with pytest.raises(ConfigError, match="not both"):
        NeuralFlowChatMessageHistory(session, memory=memory, session_id="other")
    with pytest.raises(ConfigError, match="view"):
        NeuralFlowChatMessageHistory(session, view="everything")


# --- NeuralFlowMemory -----------------------------------------------------------------------------------------------


def conversation(model, memory):
    with suppress_langchain_deprecation_warning():
        return ConversationChain(llm=model, memory=memory)


def test_a_conversation_chain_remembers(session):
    """LangChain Classic's chain shows the model what was said, under the usual key and prefixes."""
    model = Recorder()
    chain = conversation(model, NeuralFlowMemory(session))
    chain.invoke({"input": "I am Ada."})
    chain.invoke({"input": "Who am I?"})
    assert "Human: I am Ada.\nAI: answer 1" in model.shown[1][0].content
    assert transcript(session) == [
        ("user", "I am Ada."),
        ("assistant", "answer 1"),
        ("user", "Who am I?"),
        ("assistant", "answer 2"),
    ]


async def test_an_async_conversation_chain_remembers(session):
    """`ainvoke` uses the async twins, with the same result."""
    model = Recorder()
    chain = conversation(model, NeuralFlowMemory(session))
    await chain.ainvoke({"input": "I am Ada."})
    await chain.ainvoke({"input": "Who am I?"})
    assert "Human: I am Ada.\nAI: answer 1" in model.shown[1][0].content
    assert len(transcript(session)) == 4
    await chain.memory.aclear()
    assert await chain.memory.aload_memory_variables({}) == {"history": ""}


def test_the_variable_holds_text_or_messages(session):
    """An empty history is an empty text or list; prefixes and key are the caller's."""
    as_text = NeuralFlowMemory(session, memory_key="past", human_prefix="Ada", ai_prefix="Bot")
    as_messages = NeuralFlowMemory(session, return_messages=True)
    assert as_text.load_memory_variables({}) == {"past": ""}
    assert as_messages.load_memory_variables({}) == {"history": []}
    as_text.save_context({"input": "hi"}, {"output": "hello"})
    assert as_text.load_memory_variables({}) == {"past": "Ada: hi\nBot: hello"}
    assert as_messages.load_memory_variables({}) == {"history": [HumanMessage("hi"), AIMessage("hello")]}
    as_text.clear()
    assert as_messages.load_memory_variables({}) == {"history": []}


def test_the_chains_input_steers_the_search(memory, session):
    """A fact that left the prompt long ago is in it again when the question asks for it."""
    session.add([Message("user", "My cat is called Minka."), Message("assistant", "Nice.")])
    for n in range(40):
        session.add([Message("user", f"question {n} about trains " + "word " * 30), Message("assistant", "ok")])
    memory.flush()
    remembers = NeuralFlowMemory(session, max_tokens=600)
    with_question = remembers.load_memory_variables({"input": "What is my cat called?"})["history"]
    assert "Minka" in with_question
    assert "Minka" in asyncio.run(remembers.aload_memory_variables({"input": "What is my cat called?"}))["history"]


def test_history_and_pending_input_fit_the_budget_together(memory, session):
    """The input will be sent too, so its tokens are left free."""
    for n in range(30):
        session.add([Message("user", f"question {n} " + "word " * 20), Message("assistant", "ok")])
    question = "why " * 150

    remembers = NeuralFlowMemory(session, max_tokens=500, return_messages=True)
    shown = remembers.load_memory_variables({"input": question})["history"]
    assert memory.count_tokens([from_langchain(m) for m in shown] + [Message("user", question)]) <= 500
    assert shown


def test_several_inputs_need_a_name_for_the_question(session):
    """Saving is the host's own rule and error; loading just has no question."""
    remembers = NeuralFlowMemory(session)
    inputs = {"question": "hi", "context": "none"}
    assert remembers.load_memory_variables(inputs) == {"history": ""}
    with pytest.raises(ValueError, match="One input key expected"):
        remembers.save_context(inputs, {"output": "hello"})
    NeuralFlowMemory(session, input_key="question", output_key="answer").save_context(
        inputs, {"answer": "hello", "source_documents": []}
    )
    assert transcript(session) == [("user", "hi"), ("assistant", "hello")]


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (AIMessage("hello"), "hello"),
        ([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "hel\nlo"),
        ({"answer": 42}, '{"answer": 42}'),
        (42, "42"),
    ],
)
def test_outputs_of_any_kind_are_saved_as_text(session, output, text):
    """Chains return messages, blocks and numbers; none of them may lose the turn."""
    NeuralFlowMemory(session).save_context({"input": [HumanMessage("hi")]}, {"output": output})
    assert transcript(session) == [("user", "hi"), ("assistant", text)]


async def test_async_save_is_the_same(session):
    """`asave_context` stores the same two turns."""
    await NeuralFlowMemory(session).asave_context({"input": "hi"}, {"output": AIMessage("hello")})
    assert transcript(session) == [("user", "hi"), ("assistant", "hello")]


def test_memories_without_ids_never_share_a_session(memory):
    """Two chains made from one memory, and none named: two conversations."""
    one, other = NeuralFlowMemory(memory=memory), NeuralFlowMemory(memory=memory)
    one.save_context({"input": "secret"}, {"output": "ok"})
    assert other.load_memory_variables({}) == {"history": ""}


def test_our_classes_warn_of_nothing(session):
    """The host deprecates its own default history; ours never makes one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        NeuralFlowMemory(session).save_context({"input": "hi"}, {"output": "hello"})
        NeuralFlowChatMessageHistory(session).add_user_message("hi")
        NeuralFlowRetriever(session=session)


def test_it_works_inside_the_hosts_wrappers(session):
    """`CombinedMemory` and `ReadOnlySharedMemory` load without a question."""
    remembers = NeuralFlowMemory(session)
    remembers.save_context({"input": "hi"}, {"output": "hello"})
    assert ReadOnlySharedMemory(memory=remembers).load_memory_variables({}) == {"history": "Human: hi\nAI: hello"}
    assert CombinedMemory(memories=[remembers]).load_memory_variables({})["history"] == "Human: hi\nAI: hello"


# --- NeuralFlowRetriever --------------------------------------------------------------------------------------------


@pytest.fixture
def retriever(memory, session):
    session.add([Message("user", "My cat is called Minka.", name="ada"), Message("assistant", "The cat likes trains.")])
    session.add([Message("user", "The train left at nine."), Message("assistant", "A cat and a hat.")])
    memory.session("other", user_id="bob").add([Message("user", "Bob's cat is called Felix.")])
    return NeuralFlowRetriever(session=session)


async def test_a_retriever_finds_what_was_said(retriever):
    """Documents carry text, key, score and who said it when; sync and async alike."""
    found = retriever.invoke("What is my cat called?")
    best = found[0]
    assert best.page_content == "My cat is called Minka."
    assert best.id == best.metadata["key"]
    assert 0 < best.metadata["score"] <= 1
    facts = {key: best.metadata[key] for key in ("type", "role", "name", "session_id")}
    assert facts == {"type": "short_term", "role": "user", "name": "ada", "session_id": "chat"}
    assert best.metadata["created_at"].endswith("+00:00")
    assert [d.id for d in await retriever.ainvoke("What is my cat called?")] == [d.id for d in found]


def test_a_retriever_never_finds_another_users_words(retriever):
    """Bob's cat stays Bob's."""
    assert not any("Felix" in d.page_content for d in retriever.invoke("cat called Felix"))


def test_k_is_a_field_and_an_argument(memory, session, retriever):
    """`invoke(q, k=1)` overrides the field."""
    assert len(retriever.invoke("cat")) > 2
    assert len(retriever.invoke("cat", k=1)) == 1
    assert len(NeuralFlowRetriever(session=session, k=2).invoke("cat")) == 2


def test_filters_and_types_narrow_the_search(session, retriever):
    """A filter over entry fields, and kinds of memory."""
    session.remember("Ada prefers cats to dogs.")
    told = NeuralFlowRetriever(session=session, types=["long_term"]).invoke("cat")
    assert [d.page_content for d in told] == ["Ada prefers cats to dogs."]
    named = NeuralFlowRetriever(session=session, filter={"name": "ada"}).invoke("cat")
    assert [d.page_content for d in named] == ["My cat is called Minka."]
    here = NeuralFlowRetriever(session=session, within="session").invoke("cat")
    assert {d.metadata["session_id"] for d in here} == {"chat"}


def test_only_the_part_in_use_is_loaded():
    """The history needs langchain-core alone: LangChain Classic is loaded by its memory, and by nothing else."""
    code = (
        "import sys; from neuralflow_memory.langchain import NeuralFlowChatMessageHistory;"
        "assert 'langchain_classic' not in sys.modules;"
        "from neuralflow_memory.langchain import NeuralFlowMemory; assert 'langchain_classic' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_in_a_text_nothing_from_memory_reads_as_said_by_the_user(opened):
    """As messages, what search finds is of the user's role; as text it stands behind "System:"."""
    memory = opened()
    memory.session("before", user_id="ada").add("My dog is called Zuse")
    chat = memory.session("now", user_id="ada")
    chat.add(["Hello", Message("assistant", "Good morning")])
    text = NeuralFlowMemory(chat).load_memory_variables({"input": "What is my dog called?"})["history"]
    assert "System: From memory" in text
    assert "Human: Hello" in text
    assert text.count("Human:") == 1


@pytest.mark.parametrize("when", ["sync", "async"])
async def test_a_turn_that_can_not_be_stored_is_not_lost_in_silence(memory, caplog, when):
    """The host swallows the error after it has answered: it is logged and counted all the same, and the next turn is stored."""
    chain = with_history(memory, Recorder())
    writer = memory._core.parts.ledger._db._writer
    writer.execute("PRAGMA query_only = ON")
    answer = await chain.ainvoke("Hello", CONFIG) if when == "async" else chain.invoke("Hello", CONFIG)
    assert answer.content == "answer 1"
    writer.execute("PRAGMA query_only = OFF")
    assert memory.stats()["failed_writes"] == 1
    assert "adding" in memory.stats()["last_error"]
    assert any(r.name.startswith("neuralflow_memory") and "not stored" in r.getMessage() for r in caplog.records)
    chain.invoke("Again", CONFIG)
    assert transcript(memory.session("chat")) == [("user", "Again"), ("assistant", "answer 2")]


def test_what_search_finds_may_have_a_variable_of_its_own(memory, session):
    """`recall_key` takes the quotes out of the history, in text and as messages; without a find it is empty."""
    session.add("I am allergic to peanuts.")
    other = memory.session("other", user_id=session.user_id)
    other.add(["Hello", Message("assistant", "Hi")])
    recalling = NeuralFlowMemory(other, recall_key="recalled", input_key="input")
    assert recalling.memory_variables == ["history", "recalled"]
    found = recalling.load_memory_variables({"input": "What am I allergic to?"})
    assert "peanuts" in found["recalled"]
    assert found["history"] == "Human: Hello\nAI: Hi"
    recalling.return_messages = True
    found = recalling.load_memory_variables({"input": "What am I allergic to?"})
    assert [m.content for m in found["history"]] == ["Hello", "Hi"]
    assert "peanuts" in found["recalled"]


class Echo(SimpleChatModel):
    """Repeats who is speaking, and keeps what it was shown with each prompt."""

    shown: list = Field(default_factory=list)

    @property
    def _llm_type(self):
        return "echo"

    def _call(self, messages, stop=None, run_manager=None, **kwargs):
        self.shown.append([m.text for m in messages])
        return f"Heard {messages[-1].text}"


async def test_one_chain_serves_two_users_at_once(memory):
    """A hundred turns, interleaved, half of them from threads and half from tasks: nobody is shown another's words."""
    model = Echo()

    def history(user_id, session_id):
        return NeuralFlowChatMessageHistory(memory=memory, session_id=session_id, user_id=user_id)

    fields = [ConfigurableFieldSpec(id=name, annotation=str) for name in ("user_id", "session_id")]
    chain = RunnableWithMessageHistory(model, history, history_factory_config=fields)

    def config(user):
        return {"configurable": {"user_id": user, "session_id": "chat"}}

    async def task(user):
        for n in range(25):
            await chain.ainvoke([HumanMessage(f"{user} in a task {n}")], config(user))

    def thread(user):
        for n in range(25):
            chain.invoke([HumanMessage(f"{user} in a thread {n}")], config(user))

    users = ("ada", "bob")
    await asyncio.gather(*map(task, users), *(asyncio.to_thread(thread, user) for user in users))
    assert len(model.shown) == 100
    for shown in model.shown:
        user = shown[-1].split()[0]
        assert not any(other in text for text in shown for other in users if other != user)
    assert [len(memory.session("chat", user_id=user).messages()) for user in users] == [100, 100]
