"""LlamaIndex's chat engines on our memory, beyond the plain chat: other engines, other questions, many callers."""

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole, ToolCallBlock
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    MultiModalCondensePlusContextChatEngine,
    MultiModalContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from neuralflow_memory import Message, open_memory
from neuralflow_memory.llama_index import NeuralFlowMemory


@pytest.fixture
def memory(tmp_path, monkeypatch):
    # By the environment, as an engine that makes its own memory opens the folder of the settings.
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    monkeypatch.setenv("NEURALFLOW_PATH", str(tmp_path / "memory"))
    with open_memory() as opened:
        yield opened


@pytest.fixture
def session(memory):
    return memory.session("chat", user_id="ada")


@pytest.fixture
def buffer(session):
    return NeuralFlowMemory(session)


class Script:
    """Answers `answer N`; keeps what the model was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, messages, **kwargs):
        self.shown.append(copy.deepcopy(list(messages)))
        return ChatMessage(f"answer {len(self.shown)}", role="assistant")


def scripted():
    script = Script()
    return script, MockFunctionCallingLLM(response_generator=script, is_chat_model=True)


def said(messages):
    return [(m.role.value, m.content) for m in messages]


def turns(*texts):
    return [("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]


class Library(BaseRetriever):
    """Finds the same passage for everything, and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def _retrieve(self, query_bundle):
        self.asked.append(query_bundle.query_str)
        return [NodeWithScore(node=TextNode(text="Graz lies on the Mur."), score=1.0)]


class Oracle(CustomQueryEngine):
    """Repeats the question, in whatever way it is asked to."""

    streaming: bool = False

    def custom_query(self, query_str):
        if self.streaming:
            return StreamingResponse(iter([query_str, "!"]))
        return Response(f"{query_str}!")

    async def acustom_query(self, query_str):
        if not self.streaming:
            return Response(f"{query_str}!")

        async def tokens():
            yield query_str
            yield "!"

        return AsyncStreamingResponse(tokens())


# --- engines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["chat", "achat", "stream_chat", "astream_chat"])
async def test_the_engine_that_condenses_questions_remembers(buffer, way):
    """The first question is put as it is; the second is rewritten from the stored history. Each turn is stored once."""
    script, llm = scripted()
    engine = CondenseQuestionChatEngine.from_defaults(Oracle(streaming="stream" in way), llm=llm, memory=buffer)
    for question in ("Where is Graz?", "And Wien?"):
        if way == "chat":
            engine.chat(question)
        elif way == "achat":
            await engine.achat(question)
        elif way == "stream_chat":
            list(engine.stream_chat(question).response_gen)
        else:
            answer = await engine.astream_chat(question)
            assert [token async for token in answer.async_response_gen()][-1] == "!"
    assert said(buffer.get_all()) == turns("Where is Graz?", "Where is Graz?!", "And Wien?", "answer 1!")
    condensed = script.shown[0][0].content
    assert "Where is Graz?!" in condensed
    assert "And Wien?" in condensed


def test_the_engine_that_condenses_and_searches_does_both_from_memory(buffer):
    """Condensing, not skipped: the history goes into the new question and into the prompt that answers it."""
    script, llm = scripted()
    library = Library()
    engine = CondensePlusContextChatEngine.from_defaults(retriever=library, llm=llm, memory=buffer, skip_condense=False)
    engine.chat("Where is Graz?")
    engine.chat("And Wien?")
    assert "Where is Graz?" in library.asked[-1]  # this model repeats the prompt that asks it to condense
    assert ("user", "Where is Graz?") in said(script.shown[-1])
    assert said(buffer.get_all()) == turns("Where is Graz?", "answer 1", "And Wien?", "answer 2")


@pytest.mark.parametrize("kind", [MultiModalContextChatEngine, MultiModalCondensePlusContextChatEngine])
@pytest.mark.parametrize("question", ["And Wien?", QueryBundle("And Wien?")], ids=["text", "bundle"])
def test_the_engines_for_images_remember(buffer, kind, question):
    """They look into the memory with a text or a bundle, and store question and answer once."""
    script, llm = scripted()
    engine = kind.from_defaults(retriever=Library(), multi_modal_llm=llm, memory=buffer)
    engine.chat("Where is Graz?")
    engine.chat(question)
    assert said(script.shown[-1])[1:3] == turns("Where is Graz?", "answer 1")
    assert said(buffer.get_all()) == turns("Where is Graz?", "answer 1", str(question), "answer 2")


MADE = {
    "simple": lambda llm, **options: SimpleChatEngine.from_defaults(llm=llm, **options),
    "context": lambda llm, **options: ContextChatEngine.from_defaults(retriever=Library(), llm=llm, **options),
    "condense_question": lambda llm, **options: CondenseQuestionChatEngine.from_defaults(Oracle(), llm=llm, **options),
}


@pytest.mark.parametrize("kind", ["simple", "condense_question"])
def test_an_engine_makes_its_own_memory_of_the_class(memory, kind):
    """`memory_cls=NeuralFlowMemory` with a history: it opens the folder of the settings, with the model's limit."""
    _, llm = scripted()
    past = [ChatMessage("I am Ada."), ChatMessage("Hello Ada.", role="assistant")]
    engine = MADE[kind](llm, memory_cls=NeuralFlowMemory, chat_history=past)
    engine.chat("Who am I?")
    assert said(engine.chat_history)[:3] == turns("I am Ada.", "Hello Ada.", "Who am I?")
    assert engine._memory.token_limit == llm.metadata.context_window - 256
    assert [info.messages for info in memory.sessions()] == [4]
    engine._memory.session.memory.close()


@pytest.mark.parametrize("kind", MADE)
def test_an_empty_memory_is_used_and_not_replaced(buffer, kind):
    """`memory or default` keeps ours, though nothing is in it yet."""
    _, llm = scripted()
    engine = MADE[kind](llm, memory=buffer)
    assert engine._memory is buffer
    engine.chat("hi")
    assert buffer.get_all()[0].content == "hi"


def test_a_question_may_be_a_bundle(buffer):
    """Engines hand on what they were given: the query of a bundle steers the search."""
    _, llm = scripted()
    engine = ContextChatEngine.from_defaults(retriever=Library(), llm=llm, memory=buffer)
    engine.chat("My cat is called Minka.")
    bundle = QueryBundle("What is my cat called?")
    for question in (bundle, ChatMessage("What is my cat called?"), "What is my cat called?", "", None, 7):
        assert buffer.get(input=question)[0].content == "My cat is called Minka."


def test_the_size_of_a_prefix_is_counted_as_the_memory_counts(memory, buffer):
    """What an engine computes with `tokenizer_fn` is what the memory takes off its budget."""
    text = "Be terse, and rather silent. 静かに。"
    assert len(buffer.tokenizer_fn(text)) == memory.count_tokens([Message("system", text)])
    assert len(buffer.tokenizer_fn("")) == len(buffer.tokenizer_fn("  ")) == 0


@pytest.mark.parametrize("taken", [0, 100, 180, 190])
def test_the_budget_holds_beside_any_prefix_that_leaves_room(session, taken):
    """Never more than the limit less the prefix, and the newest user turn always, cut if need be."""
    buffer = NeuralFlowMemory(session, token_limit=200)
    for n in range(20):
        buffer.put_messages([ChatMessage(f"question {n} " + "word " * 20), ChatMessage("ok", role="assistant")])
    buffer.put(ChatMessage("newest " * 30))
    shown = buffer.get(initial_token_count=taken)
    assert shown[-1].role == "user"
    assert shown[-1].content.startswith("new")
    assert session.memory.count_tokens([Message(m.role.value, m.content) for m in shown]) <= 200 - taken


# --- what is shown --------------------------------------------------------------------------------------------------


def test_the_first_message_after_the_instructions_is_the_users(session):
    """Whatever the conversation begins with, and whatever was found: nothing of an assistant's or a tool's comes first."""
    buffer = NeuralFlowMemory(session, token_limit=300)
    call = ToolCallBlock(tool_call_id="c", tool_name="weather", tool_kwargs={"city": "Graz"})
    result = ChatMessage("rain", role="tool", additional_kwargs={"tool_call_id": "c"})
    buffer.put_messages([ChatMessage("Hello, I am here to help.", role="assistant"), result])
    for n in range(20):
        asked = ChatMessage(f"weather {n}? " + "please " * 10)
        buffer.put_messages(
            [asked, ChatMessage(role="assistant", blocks=[call]), result, ChatMessage("Rain.", role="assistant")]
        )
        shown = buffer.get(input="What is the weather in Graz?")
        first = next(m for m in shown if m.role != "system")
        assert first.role == "user"
        for place, message in enumerate(shown):
            if message.role == "tool":
                assert any(isinstance(b, ToolCallBlock) for b in shown[place - 1].blocks)


def test_what_memory_adds_is_not_remembered(session):
    """Put back what was got, as agents do with their history: quotes and summaries are not taken for turns."""
    buffer = NeuralFlowMemory(session, token_limit=600)
    buffer.put_messages([ChatMessage("You are terse.", role="system"), ChatMessage("My cat is called Minka.")])
    for n in range(40):
        buffer.put_messages([ChatMessage(f"train {n} " + "word " * 30), ChatMessage("ok", role="assistant")])
    session.memory.flush()
    before = buffer.get_all()
    shown = buffer.get(input="What is my cat called?")
    assert len(shown) < len(before)
    assert "Minka" in " ".join(m.content for m in shown)
    buffer.set(shown)
    assert buffer.get_all() == before
    assert buffer.get()[0].content.startswith("You are terse.")


def test_turns_that_are_set_again_are_recognised_in_order(buffer, session):
    """What repeats turns of the window is not written again; from the first that is new, all is."""
    buffer.put_messages([ChatMessage(text) for text in ("one", "two", "three")])
    for given in (["two", "three"], ["three", "one", "two"], []):
        buffer.set([ChatMessage(text) for text in given])
        assert [m.text for m in session.messages(view="window")] == given
    assert [m.content for m in buffer.get_all()] == ["one", "two", "three", "one", "two"]


def test_instructions_and_what_memory_adds_to_them_are_one_system_message(session):
    """Some models take one system message, at the front: the task stands in the same as the host's own rules."""
    buffer = NeuralFlowMemory(session)
    buffer.put_messages([ChatMessage("You are terse.", role="system"), ChatMessage("Book a flight.")])
    with session.task("book flight") as task:
        task.note("prefers an aisle seat")
        shown = buffer.get()
        assert [m.role.value for m in shown] == ["system", "user"]
        assert shown[0].content.startswith("You are terse.")
        assert "aisle seat" in shown[0].content
        buffer.set(shown)
        assert said(buffer.get_all()) == [("system", "You are terse."), ("user", "Book a flight.")]


@pytest.mark.parametrize("role", MessageRole)
def test_every_role_is_stored_and_shown(buffer, role):
    """Also those that only some providers know; content may be missing."""
    buffer.put_messages([ChatMessage("hi"), ChatMessage("said", role=role), ChatMessage(role=role, blocks=[])])
    assert [m.role for m in buffer.get_all()] == ["user", role, role]
    assert isinstance(buffer.get(), list)
    assert buffer.get()[0].role in ("user", "system", "developer")


# --- many callers ---------------------------------------------------------------------------------------------------


def test_engines_of_many_people_share_a_memory(memory):
    """A hundred turns of ten people from threads and from tasks on loops of their own: nobody is shown another's words."""
    script, llm = scripted()
    people = [f"person {n} here" for n in range(10)]

    def engine(person):
        buffer = NeuralFlowMemory(memory.session("chat", user_id=person))
        return SimpleChatEngine.from_defaults(llm=llm, memory=buffer)

    def in_a_thread(person):
        for n in range(5):
            engine(person).chat(f"{person} says {n}")

    async def in_tasks():
        async def talk(person):
            for n in range(5, 10):
                await engine(person).achat(f"{person} says {n}")

        await asyncio.gather(*map(talk, people))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(in_a_thread, people))
    asyncio.run(in_tasks())
    assert len(script.shown) == 100
    for shown in script.shown:
        assert len({p for p in people for m in shown if m.role == "user" and p in m.content}) == 1
    for person in people:
        stored = memory.session("chat", user_id=person).messages()
        assert [m.text for m in stored if m.role == "user"] == [f"{person} says {n}" for n in range(10)]
        assert len(stored) == 20
