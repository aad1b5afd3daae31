"""The LlamaIndex adapter inside real engines, agents and workflows, with a scripted model that records what it sees."""

import asyncio
import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.memory.types import BaseMemory
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.workflow import Context, JsonSerializer
from scripted_llm import scripted

from neuralflow_memory import BudgetError, ConfigError, open_memory
from neuralflow_memory.llama_index import NeuralFlowMemory, from_llama_index


@pytest.fixture
def memory(tmp_path, monkeypatch):
    # By the environment, as a host that reopens the folder by itself reads it too.
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    with open_memory(tmp_path / "memory") as opened:
        yield opened


@pytest.fixture
def session(memory):
    return memory.session("chat", user_id="ada")


@pytest.fixture
def buffer(session):
    return NeuralFlowMemory(session)


def said(messages):
    return [(m.role.value, m.content) for m in messages]


def turns(*texts):
    return [("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]


# --- engines --------------------------------------------------------------------------------------------------------


class Library(BaseRetriever):
    """Finds the same passage for everything."""

    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=TextNode(text="Graz lies on the Mur."), score=1.0)]


ENGINES = {
    "simple": lambda llm, memory: SimpleChatEngine.from_defaults(llm=llm, memory=memory, system_prompt="Be terse."),
    "context": lambda llm, memory: ContextChatEngine.from_defaults(retriever=Library(), llm=llm, memory=memory),
    "condense_plus_context": lambda llm, memory: CondensePlusContextChatEngine.from_defaults(
        retriever=Library(), llm=llm, memory=memory, skip_condense=True
    ),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_a_chat_engine_remembers(buffer, kind):
    """The second question is put to the model behind the first turn, and both turns are stored once."""
    script, llm = scripted()
    engine = ENGINES[kind](llm, buffer)
    engine.chat("Where is Graz?")
    engine.chat("And Wien?")
    assert ("user", "Where is Graz?") in said(script.shown[-1])
    assert ("assistant", "answer 1") in said(script.shown[-1])
    assert said(engine.chat_history) == turns("Where is Graz?", "answer 1", "And Wien?", "answer 2")
    engine.reset()
    assert engine.chat_history == []


@pytest.mark.parametrize("kind", ENGINES)
async def test_an_async_chat_engine_remembers(buffer, kind):
    """`achat` goes through the async twins."""
    script, llm = scripted()
    engine = ENGINES[kind](llm, buffer)
    await engine.achat("Where is Graz?")
    await engine.achat("And Wien?")
    assert ("assistant", "answer 1") in said(script.shown[-1])
    assert said(await buffer.aget_all()) == turns("Where is Graz?", "answer 1", "And Wien?", "answer 2")


@pytest.mark.parametrize("kind", ENGINES)
def test_a_streamed_answer_is_stored_once(buffer, kind):
    """The engine writes from a thread of its own while the caller reads."""
    _, llm = scripted()
    response = ENGINES[kind](llm, buffer).stream_chat("Where is Graz?")
    assert "".join(response.response_gen) == "answer 1"
    assert said(buffer.get_all()) == turns("Where is Graz?", "answer 1")


@pytest.mark.parametrize("kind", ENGINES)
async def test_an_async_streamed_answer_is_stored_once(buffer, kind):
    """The same from a task on the event loop."""
    _, llm = scripted(stream=True)
    response = await ENGINES[kind](llm, buffer).astream_chat("Where is Graz?")
    assert "".join([token async for token in response.async_response_gen()]) == "answer 1"
    assert said(await buffer.aget_all()) == turns("Where is Graz?", "answer 1")


def test_a_given_history_becomes_the_conversation(buffer):
    """`chat(..., chat_history=...)` goes on from there."""
    script, llm = scripted()
    past = [ChatMessage("I am Ada."), ChatMessage("Hello Ada.", role="assistant")]
    SimpleChatEngine.from_defaults(llm=llm, memory=buffer).chat("Who am I?", chat_history=past)
    assert said(script.shown[0]) == turns("I am Ada.", "Hello Ada.", "Who am I?")


def test_the_prompts_prefix_counts_against_the_budget(session):
    """The engine's system prompt takes its tokens from the history's."""
    buffer = NeuralFlowMemory(session, token_limit=300)
    for n in range(20):
        buffer.put_messages([ChatMessage(f"question {n} " + "word " * 20), ChatMessage("ok", role="assistant")])
    script, llm = scripted()
    prompt = "rule " * 150
    SimpleChatEngine.from_defaults(llm=llm, memory=buffer, system_prompt=prompt).chat("and now?")
    shown = [from_llama_index(m) for m in script.shown[0]]
    assert shown[0].text == prompt
    assert shown[-1].text == "and now?"
    assert session.memory.count_tokens(shown[1:]) <= 150


# --- agents ---------------------------------------------------------------------------------------------------------


def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


def calls(*cities):
    blocks = [ToolCallBlock(tool_call_id=f"c-{c}", tool_name="weather", tool_kwargs={"city": c}) for c in cities]
    return ChatMessage(role="assistant", blocks=blocks)


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_agents_calls_and_results_are_remembered(buffer, session, streaming):
    """Parallel calls, their results and the answer are stored in order, and shown to the next run."""
    script, llm = scripted(calls("Graz", "Wien"), "Rain in both.", "Take an umbrella.", stream=streaming)
    agent = FunctionAgent(tools=[weather], llm=llm, system_prompt="Be terse.", streaming=streaming)
    await agent.run("Weather in Graz and Wien?", memory=buffer)
    stored = session.messages()
    assert [m.role for m in stored] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [c.args for c in stored[1].tool_calls] == [{"city": "Graz"}, {"city": "Wien"}]
    assert {m.tool_call_id: m.text for m in stored[2:4]} == {"c-Graz": "rain in Graz", "c-Wien": "rain in Wien"}

    await agent.run("So what?", memory=buffer)
    shown = script.shown[-1]
    assert [m.role.value for m in shown] == ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    assert shown[3].additional_kwargs["tool_call_id"] in {"c-Graz", "c-Wien"}


async def test_an_agents_state_prompt_is_not_stored(buffer):
    """The host writes its state into the messages it was given; the stored turn stays what the user said."""
    script, llm = scripted("Hello.")
    agent = FunctionAgent(tools=[weather], llm=llm, initial_state={"mood": "good"}, streaming=False)
    await agent.run("Hi!", memory=buffer)
    assert "mood" in script.shown[0][-1].content
    assert said(buffer.get_all()) == turns("Hi!", "Hello.")


async def test_a_saved_workflow_context_finds_its_memory_again(buffer):
    """A context written as JSON and read back goes on with the same conversation."""
    script, llm = scripted("Hello Ada.", "You are Ada.")
    agent = FunctionAgent(tools=[weather], llm=llm, streaming=False)
    context = Context(agent)
    await agent.run("I am Ada.", ctx=context, memory=buffer)
    saved = json.loads(json.dumps(context.to_dict(serializer=JsonSerializer())))
    again = FunctionAgent(tools=[weather], llm=llm, streaming=False)
    await again.run("Who am I?", ctx=Context.from_dict(again, saved, serializer=JsonSerializer()))
    assert said(script.shown[-1]) == turns("I am Ada.", "Hello Ada.", "Who am I?")
    assert said(buffer.get_all()) == turns("I am Ada.", "Hello Ada.", "Who am I?", "You are Ada.")


# --- the memory itself ----------------------------------------------------------------------------------------------


def test_get_need_not_search(session):
    """With `search=False` nothing is quoted from before the recent turns."""
    other = session.memory.session("old", user_id=session.user_id)
    other.add(["The spare key hangs behind the blue door.", "And then we spoke of something else."])
    for search in (True, False):
        buffer = NeuralFlowMemory(session, search=search)
        assert ("spare key hangs" in str(buffer.get("Where does the spare key hang?"))) == search


ROUND_TRIPS = {
    "to_dict": lambda m: NeuralFlowMemory.from_dict(json.loads(json.dumps(m.to_dict()))),
    "to_json": lambda m: NeuralFlowMemory.from_json(m.to_json()),
    "model_dump": lambda m: NeuralFlowMemory.model_validate(m.model_dump()),
    "model_dump_json": lambda m: NeuralFlowMemory.model_validate_json(m.model_dump_json()),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", ROUND_TRIPS)
def test_a_copy_is_connected_to_the_same_conversation(session, how):
    """Ids, limit and folder are all that travels: what one puts, the other gets, under the same limits."""
    buffer = NeuralFlowMemory(session, token_limit=1234, search=False)
    buffer.put(ChatMessage("hi"))
    again = ROUND_TRIPS[how](buffer)
    assert again.model_dump() == buffer.model_dump()
    assert type(again) is NeuralFlowMemory
    assert (again.token_limit, again.search) == (1234, False)
    again.put(ChatMessage("hello", role="assistant"))
    assert said(buffer.get_all()) == turns("hi", "hello")


@pytest.mark.parametrize("how", [how for how in ROUND_TRIPS if how != "deepcopy"])
def test_a_copy_joins_a_memory_that_was_opened_with_options(tmp_path, how):
    """Within a process the folder is open already: reconnecting to it takes no options, and needs none."""
    with open_memory(tmp_path / "other", embedder="none", budget={"total": 4321}) as memory:
        buffer = NeuralFlowMemory(memory=memory, session_id="chat")
        buffer.put(ChatMessage("hi"))
        assert said(ROUND_TRIPS[how](buffer).get_all()) == turns("hi")


def test_what_is_written_holds_no_messages_and_is_not_changed(buffer):
    """The dictionary is small, pure JSON, and reading from it leaves it as it was."""
    buffer.put(ChatMessage("a secret"))
    data = buffer.to_dict()
    assert "secret" not in json.dumps(data)
    before = copy.deepcopy(data)
    NeuralFlowMemory.from_dict(data)
    assert data == before
    assert data["class_name"] == NeuralFlowMemory.class_name() == "NeuralFlowMemory"


def test_hosts_may_pass_what_they_like_to_from_defaults(memory):
    """Engines pass a history and a limit, agents a model; each gets a session of its own."""
    _, llm = scripted()
    past = [ChatMessage("hi"), ChatMessage("hello", role="assistant")]
    one = NeuralFlowMemory.from_defaults(memory=memory, llm=llm, chat_history=past, token_limit=500, made_up=1)
    other = NeuralFlowMemory.from_defaults(memory=memory, llm=llm, chat_history=[])
    assert said(one.get()) == turns("hi", "hello")
    assert one.token_limit == 500
    assert other.get_all() == []
    assert isinstance(one, BaseMemory)


def test_an_empty_given_history_leaves_a_chat_alone(memory, session):
    """An engine made anew over an old session starts where it ended."""
    session.add("from yesterday")
    assert said(NeuralFlowMemory.from_defaults(session=session, chat_history=[]).get()) == turns("from yesterday")


def test_with_nothing_given_the_settings_decide(tmp_path, monkeypatch):
    """What a host builds by itself opens the folder named by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEURALFLOW_PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    buffer = NeuralFlowMemory.from_defaults()
    try:
        buffer.put(ChatMessage("hi"))
        assert buffer.path == str(tmp_path / "elsewhere")
        with open_memory(tmp_path / "elsewhere") as memory:
            assert memory.session(buffer.session_id).messages()[0].text == "hi"
    finally:
        buffer.session.memory.close()


def test_two_ways_to_name_the_session_are_refused(memory, session):
    """A session already says which memory and ids it has."""
    with pytest.raises(ConfigError, match="not both"):
        NeuralFlowMemory(session, memory=memory, session_id="other")


def test_an_empty_memory_is_not_taken_for_none(buffer):
    """Hosts write `memory or default`: an empty one must be true."""
    assert bool(buffer)
    assert not hasattr(buffer, "__len__")


@pytest.mark.parametrize(
    "question",
    ["What is my cat called?", ChatMessage("What is my cat called?"), QueryBundle("What is my cat called?")],
    ids=["text", "message", "bundle"],
)
async def test_the_question_steers_the_search(session, question):
    """Whatever form the host gives it: a fact from long ago is in the prompt when it is asked for."""
    buffer = NeuralFlowMemory(session, token_limit=600)
    buffer.put_messages([ChatMessage("My cat is called Minka."), ChatMessage("Nice.", role="assistant")])
    for n in range(40):
        buffer.put_messages([ChatMessage(f"train {n} " + "word " * 30), ChatMessage("ok", role="assistant")])
    await session.memory.aflush()
    assert "Minka" in " ".join(m.content for m in buffer.get(input=question))
    assert "Minka" in " ".join(m.content for m in await buffer.aget(question, some_host_argument=1))


def test_without_room_the_newest_question_is_still_there(session):
    """Where the prefix eats nearly all of the limit, what is left goes to the last user turn."""
    buffer = NeuralFlowMemory(session, token_limit=100)
    buffer.put_messages([ChatMessage("one"), ChatMessage("two", role="assistant"), ChatMessage("three")])
    for taken in (85, 90):
        assert said(buffer.get(initial_token_count=taken)) == [("user", "three")]


def test_a_prefix_over_the_limit_is_told_with_the_numbers(session):
    """Where the prefix alone exceeds the limit nothing could be sent within it: the error says how much is missing."""
    buffer = NeuralFlowMemory(session, token_limit=100)
    buffer.put(ChatMessage("three"))
    with pytest.raises(BudgetError, match="reserve_tokens=5000"):
        buffer.get(initial_token_count=5000)


def test_what_comes_out_can_be_changed_freely(buffer):
    """Engines and agents write into what they put and get; the store keeps what was said."""
    message = ChatMessage(blocks=[TextBlock(text="hi"), ImageBlock(url="https://example.org/a.png")])
    buffer.put(message)
    message.blocks[0].text = "changed"
    for read in (buffer.get, buffer.get_all):
        got = read()[0]
        got.blocks[0].text = "Current state: ..."
        got.blocks.clear()
        got.additional_kwargs["session_id"] = "x"
        assert read()[0].blocks[0].text == "hi"
        assert len(read()[0].blocks) == 2
        assert read()[0].additional_kwargs == {}


async def test_set_keeps_what_was_there_and_reset_ends_it(buffer):
    """`set` is what `get` gives from then on; handing back what was got changes nothing; `reset` leaves nothing."""
    buffer.put_messages([ChatMessage("one"), ChatMessage("two", role="assistant")])
    buffer.set(buffer.get())
    assert said(buffer.get()) == said(buffer.get_all()) == turns("one", "two")
    await buffer.aset([ChatMessage("fresh")])
    assert said(await buffer.aget()) == turns("fresh")
    await buffer.areset()
    assert buffer.get_all() == buffer.get() == []
    buffer.put(ChatMessage("again"))
    buffer.reset()
    assert await buffer.aget_all() == []


def test_messages_survive_the_store_unchanged(buffer):
    """Calls, media, signatures in bytes, empty content: all come back equal."""
    sent = [
        ChatMessage(role="user", blocks=[TextBlock(text="東京?"), ImageBlock(image=b"\x89PNG\r\n\x1a\n" + b"\0" * 16)]),
        calls("東京"),
        ChatMessage("晴れ", role="tool", additional_kwargs={"tool_call_id": "c-東京", "note": None}),
        ChatMessage(role="assistant", blocks=[], additional_kwargs={"thought_signatures": [None, b"\xff\x00"]}),
    ]
    buffer.put_messages(sent)
    assert buffer.get_all() == sent


def test_four_threads_lose_nothing(buffer):
    """The sync half may be used from any thread."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: buffer.put(ChatMessage(f"turn {n}")), range(40)))
    assert sorted(m.content for m in buffer.get_all()) == sorted(f"turn {n}" for n in range(40))


def test_concurrent_tasks_and_successive_loops_lose_nothing(buffer):
    """Nothing is bound to an event loop; twenty tasks at a time, three loops in a row, and sync calls inside one."""

    async def turn(loop):
        await asyncio.gather(*(buffer.aput(ChatMessage(f"{loop}.{n}")) for n in range(20)))
        return len(buffer.get_all())

    assert [asyncio.run(turn(loop)) for loop in range(3)] == [20, 40, 60]
