"""Where the hosts' own memories lose something: each case is played to the peer's real class, and then to ours.

A peer that was mended in the installed version skips its half; ours has to hold whatever they do.
"""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest
import tiktoken
from conftest import found, wait_until
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.messages.utils import count_tokens_approximately
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.memory import FactExtractionMemoryBlock, Memory
from sqlalchemy.ext.asyncio import create_async_engine

from neuralflow_memory import Message
from neuralflow_memory.langchain import from_langchain
from neuralflow_memory.llama_index import NeuralFlowMemory, from_llama_index
from neuralflow_memory.testing import HashingEmbedder, ManualClock


def mended(what):
    pytest.skip(f"the installed version {what}")


class Writer:
    """A summarizer that keeps what it was given, and fails as long as it is told to."""

    name = "writer"

    def __init__(self, *, fails=False):
        self.fails, self.read = fails, []

    def summarize(self, messages, *, previous, max_tokens):
        self.read += [m.text for m in messages]
        if self.fails:
            raise RuntimeError("429 Too Many Requests")
        return "They exchanged codes."


# --- compaction that silently destroys history ----------------------------------------------------------------------

PLACES = ("cellar", "attic", "garage", "office", "boat", "garden shed", "hotel", "gym", "library", "studio")
OWNERS = (
    "Ada",
    "Otto",
    "Maria",
    "Zuse",
    "Grace",
    "Alan",
    "Emmy",
    "Kurt",
    "Lise",
    "Max",
    "Rosa",
    "Carl",
    "Olga",
    "Hans",
)
LOCKERS = [(place, owner) for owner in OWNERS for place in PLACES]
"""A hundred and forty things to know, each with a code of its own."""


def code(n):
    return f"{1000 + n * 37}"


def fact(n):
    place, owner = LOCKERS[n]
    return (
        f"Please note that the locker of {owner} in the {place} opens with code {code(n)}. I looked it up on the sheet by "
        "the door this morning, since the one who used to keep them has left the company, and nobody else wrote them down."
    )


TOLD = [
    m
    for n in range(len(LOCKERS))
    for m in (HumanMessage(fact(n)), AIMessage("I have noted it, and will keep it in mind."))
]


def summarization(**options):
    return SummarizationMiddleware(FakeListChatModel(responses=["They exchanged codes."]), **options)


def facts_in(texts):
    """Which of the facts stand in any of *texts*."""
    joined = "\n".join(texts)
    return {n for n in range(len(LOCKERS)) if code(n) in joined}


def test_langchain_summarizes_without_having_read_what_it_discards():
    """Most of the facts that its middleware evicts are shown to nobody."""
    shown = []

    def summarizer(messages):
        shown.extend(m.text for m in messages)
        return "They exchanged codes."

    middleware = summarization(trigger=("messages", 50), summarizer=summarizer)
    after = middleware.before_model({"messages": list(TOLD)}, None)["messages"]
    evicted = facts_in(m.text for m in TOLD) - facts_in(m.content for m in after[1:])
    if len(facts_in(shown) & evicted) > 0.5 * len(evicted):
        mended("shows its summarizer what it evicts")
    assert len(evicted) > 120


def test_every_evicted_fact_is_read_and_kept_or_pinned_or_found(opened):
    """The same chat: the summarizer reads each turn that leaves the window, and each fact is there afterwards."""
    writer = Writer()
    memory = opened(embedder=HashingEmbedder(dimensions=256), summarizer=writer, clock=ManualClock())
    chat = memory.session("chat", user_id="ada")
    for message in TOLD:
        chat.add(from_langchain(message))
    memory.flush()
    window = facts_in(m.text for m in chat.messages(view="window"))
    evicted = set(range(len(LOCKERS))) - window
    assert len(evicted) > 100
    assert facts_in(writer.read) >= evicted
    held = facts_in([chat.summary()])
    for n in evicted - held:
        place, owner = LOCKERS[n]
        hits = chat.search(f"Which code opens the locker of {owner} in the {place}?", k=10)
        assert facts_in(found(hits)) >= {n}, "neither kept nor pinned nor found"
    assert len(held & evicted) >= 3, "pinned beside a summary that says nothing"


def tool_loop(rounds):
    """A request, and an agent that reads one long page after the other."""
    yield HumanMessage("Find out which page names the captain of the blue boat.")
    for n in range(rounds):
        yield AIMessage("", tool_calls=[{"id": f"c{n}", "name": "read", "args": {"page": n}}])
        yield ToolMessage(f"Page {n}. " + "Nothing but water and birds. " * 150, tool_call_id=f"c{n}")


def test_langchain_forgets_the_request_in_a_long_tool_loop():
    """Its middleware replaces the request by a sentence that says it was too long, and asks no model."""
    calls = []
    middleware = summarization(trigger=("messages", 20), keep=("messages", 4), summarizer=calls.append)
    after = middleware.before_model({"messages": list(tool_loop(20))}, None)["messages"]
    if calls or "captain" in str(after):
        mended("summarizes a tool loop without a request in its tail")
    assert "too long to summarize" in after[1].content


def test_the_request_stays_in_a_long_tool_loop(opened):
    """However long the loop, the prompt begins with what was asked, and holds whole calls within its budget."""
    memory = opened(embedder="none", summarizer=Writer(), clock=ManualClock())
    chat = memory.session("chat")
    for message in tool_loop(20):
        chat.add(from_langchain(message))
        memory.flush()
        context = chat.context(max_tokens=4000, pending_calls=True, overflow="truncate")
        said = [m for m in context.messages if m.id is not None]
        assert said[0].text == "Find out which page names the captain of the blue boat."
        assert memory.count_tokens(context.messages) <= 4000
    assert len(whole(context.messages)) >= 3


def test_langchain_fails_the_chat_when_its_summarizer_fails():
    """The model's error ends the agent's turn."""

    def failing(_):
        raise RuntimeError("429 Too Many Requests")

    middleware = summarization(trigger=("messages", 50), summarizer=failing)
    with pytest.raises(RuntimeError, match="429"):
        middleware.before_model({"messages": list(TOLD)}, None)


def test_a_failing_summarizer_delays_and_loses_nothing(opened):
    """While the model hangs, and then fails, the chat goes on; each turn stays in the window or in a plainer summary."""
    hangs, asked = threading.Event(), threading.Event()

    class Hanging(Writer):
        def summarize(self, messages, *, previous, max_tokens):
            asked.set()
            hangs.wait(60)
            return super().summarize(messages, previous=previous, max_tokens=max_tokens)

    memory = opened(embedder="none", summarizer=Hanging(fails=True), clock=ManualClock())
    chat = memory.session("chat", user_id="ada")
    told = TOLD[:120]
    try:
        for message in told:
            chat.add(from_langchain(message))
            if asked.is_set():
                assert chat.context().messages
        assert asked.wait(30)
        assert len(chat.messages(view="window")) == len(chat.messages()) == len(told), "nothing left before a summary"
    finally:
        hangs.set()
    memory.flush()
    assert "429" in memory.stats()["last_error"]
    assert chat.summary()
    window = {m.id for m in chat.messages(view="window")}
    covered = {i for e in chat.entries.list(types=["episodic"]) for i in e.sources}
    assert {m.id for m in chat.messages()} <= window | covered
    assert facts_in([m.text for m in chat.messages()]) == set(range(60))


# --- tool calls without their results, and results without their calls ----------------------------------------------

PARALLEL = [
    HumanMessage("What is the weather in Berlin and in Rome?"),
    AIMessage("", tool_calls=[{"id": "a", "name": "weather", "args": {"city": "Berlin"}}]),
    AIMessage("", tool_calls=[{"id": "b", "name": "weather", "args": {"city": "Rome"}}]),
    ToolMessage("Rain. " * 20, tool_call_id="a"),
    ToolMessage("Sun. " * 20, tool_call_id="b"),
    AIMessage("Rain in Berlin, sun in Rome."),
    HumanMessage("And tomorrow?"),
]


def whole(messages):
    """The ids of the calls of *messages*; fails if one lacks its result, or a result its call before it."""
    called, answered = [], []
    for message in messages:
        called += [c.id for c in message.tool_calls]
        if message.role == "tool":
            assert message.tool_call_id in called, "a result without its call"
            answered.append(message.tool_call_id)
    assert set(called) - set(answered) <= {c.id for c in messages[-1].tool_calls}, "a call without its result"
    assert len(answered) == len(set(answered))
    return called


def test_langchain_keeps_results_whose_calls_it_discards():
    """Where its cut falls among the results of two calls, one call that fits is enough for it."""
    middleware = summarization(trigger=("messages", 5), keep=("messages", 4))
    kept = middleware.before_model({"messages": list(PARALLEL)}, None)["messages"][2:]
    calls = {c["id"] for m in kept if isinstance(m, AIMessage) for c in m.tool_calls}
    orphans = {m.tool_call_id for m in kept if isinstance(m, ToolMessage)} - calls
    if not orphans:
        mended("keeps no result without its call")
    assert orphans == {"a"}


def test_calls_and_results_stay_whole_in_every_budget(opened):
    """The same messages, whatever the budget and whether they were folded: all of a call or nothing of it."""
    memory = opened(embedder="none", clock=ManualClock())
    chat = memory.session("chat")
    chat.add([from_langchain(m) for m in PARALLEL])
    sizes = set()
    for max_tokens in range(10, 260):
        context = chat.context(max_tokens=max_tokens)
        sizes.add(len(whole(context.messages)))
        assert [m.text for m in context.messages if m.role == "user"][-1] == "And tomorrow?"
        assert memory.count_tokens(context.messages) <= max_tokens
    assert {0, 2} <= sizes
    chat.compact(max_tokens=0)
    assert whole(chat.messages(view="window")) == []
    assert "a" in whole(chat.messages())


# --- wrong token counts ---------------------------------------------------------------------------------------------

ARGS = {"text": "word " * 5000}
WRITE = [
    ChatMessage(role="user", content="Write it down."),
    ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_call_id="a", tool_name="write", tool_kwargs=ARGS)]),
    ChatMessage(role="tool", content="Done.", additional_kwargs={"tool_call_id": "a"}),
    ChatMessage(role="assistant", content="It is written down."),
    ChatMessage(role="user", content="Thanks. What next?"),
]


@pytest.fixture(scope="module")
def size():
    """Tokens of a text by tiktoken itself."""
    from neuralflow_memory.models.tokens import token_counter

    token_counter("cl100k_base")  # which finds the encoding's file without a network
    encoding = tiktoken.get_encoding("cl100k_base")
    return lambda text: len(encoding.encode_ordinary(text))


@asynccontextmanager
async def their_memory(**options):
    """LlamaIndex's own memory of a session, whose database is closed while its event loop runs."""
    engine = create_async_engine("sqlite+aiosqlite:///:memory:")
    try:
        yield Memory.from_defaults(session_id="chat", async_engine=engine, **options)
    finally:
        await engine.dispose()


def test_llama_index_counts_a_tool_call_as_nothing(size):
    """A call with 5,000 words goes through its memory of 1,000 tokens."""

    async def kept():
        async with their_memory(token_limit=1000, token_flush_size=100) as memory:
            await memory.aput_messages(WRITE)
            return await memory.aget()

    sent = [b for m in asyncio.run(kept()) for b in m.blocks if isinstance(b, ToolCallBlock)]
    if not sent:
        mended("counts tool calls")
    assert size(sent[0].tool_kwargs["text"]) >= 5000


def test_a_tool_call_is_counted(opened, size):
    """The same messages through our memory: what `get` returns is within the limit, and the call's words are counted."""
    wide = {"budget": {"conversation": 20_000}, "pruning": {"max_context_tokens": 20_000}}
    memory = opened(embedder="none", clock=ManualClock(), **wide)
    buffer = NeuralFlowMemory(memory.session("chat"), token_limit=1000)
    buffer.put_messages(WRITE)
    got = buffer.get()
    assert got[-1].content == "Thanks. What next?"
    assert sum(size(str(m.content)) + size(str([b.model_dump() for b in m.blocks])) for m in got) < 1000
    assert memory.count_tokens([from_llama_index(WRITE[1])]) > size(ARGS["text"]) >= 5000
    assert len(buffer.get_all()) == len(WRITE)
    assert len(NeuralFlowMemory(memory.session("chat"), token_limit=20_000).get()) == len(WRITE)


def test_langchain_counts_chinese_by_a_fraction(size):
    """Four characters a token is far from what a Chinese text takes; ours is what tiktoken says."""
    text = "记忆会随着时间慢慢淡去，我们在东京见面吧。" * 50
    if count_tokens_approximately([HumanMessage(text)]) > 0.6 * size(text):
        mended("counts Chinese")
    assert count_tokens_approximately([HumanMessage(text)]) < 0.5 * size(text)


def test_chinese_is_counted_as_it_is(memory, size):
    """By tiktoken, with what stands around the message."""
    text = "记忆会随着时间慢慢淡去，我们在东京见面吧。" * 50
    assert memory.count_tokens(text) == size(text) + 4 + 3


# --- memory that is lost when a model fails -------------------------------------------------------------------------

SECRETS = [f"The code of locker {n} is {code(n)}. " + "It is written on the sheet by the door. " * 5 for n in range(40)]


class Extractor:
    """Plays a model that refuses the first time, and keeps what it is shown."""

    def __init__(self):
        self.shown, self.calls = [], 0

    def __call__(self, messages, **_):
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("429 Too Many Requests")
        self.shown += [m.content or "" for m in messages]
        return ChatMessage(role="assistant", content="<facts><fact>There are lockers.</fact></facts>")


def test_llama_index_never_offers_again_what_a_block_failed_to_process():
    """Messages are archived before its blocks see them: one refusal, and those facts are gone from its memory."""
    extractor = Extractor()
    llm = MockFunctionCallingLLM(response_generator=extractor, is_chat_model=True)
    block = FactExtractionMemoryBlock(name="facts", llm=llm)

    async def chat():
        refused = 0
        async with their_memory(token_limit=800, token_flush_size=200, memory_blocks=[block]) as memory:
            for secret in SECRETS:
                for message in (
                    ChatMessage(role="user", content=secret),
                    ChatMessage(role="assistant", content="Noted."),
                ):
                    try:
                        await memory.aput(message)
                    except RuntimeError:
                        refused += 1
            return refused, [m.content for m in await memory.aget()]

    refused, active = asyncio.run(chat())
    assert refused == 1
    assert extractor.calls > 3
    if any(code(0) in text for text in [*extractor.shown, *active]):
        mended("offers again what failed")
    again = FactExtractionMemoryBlock(name="facts", llm=llm)
    assert again.facts == [], "what was extracted lives in the object only"


@pytest.mark.parametrize("restart", [False, True], ids=["later", "after a restart"])
def test_what_a_model_failed_to_read_is_offered_again(opened, restart):
    """The turns of a failed fold are read again once the model is back; until then a plainer summary speaks for them."""
    clock = ManualClock()
    writer = Writer(fails=True)
    options = {"embedder": "none", "clock": clock, "pruning": {"max_context_tokens": 1000}}
    memory = opened(summarizer=writer, **options)
    chat = memory.session("chat", user_id="ada")
    for secret in SECRETS:
        chat.add([secret, Message("assistant", "Noted.")])
    memory.flush()
    folded = [m.text for m in chat.messages()][: -len(chat.messages(view="window"))]
    assert facts_in(folded) >= set(range(10))
    assert facts_in([chat.summary()]), "written without the model"
    if restart:
        memory.close()
        writer = Writer()
        memory = opened(summarizer=writer, **options)
        chat = memory.session("chat", user_id="ada")
    writer.fails, writer.read = False, []
    clock.advance(hours=0.5)
    chat.add("Is anybody there?")
    memory.flush()
    wait_until(lambda: not any(e.metadata["plain"] for e in chat.entries.list(types=["episodic"])))
    assert facts_in(writer.read) >= facts_in(folded)
    assert "They exchanged codes." in chat.summary()
    assert facts_in(m.text for m in chat.messages()) == set(range(40))
    for n in range(10):
        assert facts_in(found(chat.search(f"code of locker {n}", k=10))) >= {n}
