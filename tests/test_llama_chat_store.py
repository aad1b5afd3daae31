"""The chat store under LlamaIndex's own `Memory`: its statuses, on turns that stay in the ledger."""

import asyncio
import copy
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.memory import Memory
from llama_index.core.storage.chat_store.base_db import MessageStatus
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import create_async_engine

from neuralflow_memory import ConfigError, ScopeError, open_memory
from neuralflow_memory.llama_index import NeuralFlowChatStore, NeuralFlowMemory

ACTIVE, ARCHIVED = MessageStatus.ACTIVE, MessageStatus.ARCHIVED


@pytest.fixture
def memory(tmp_path, monkeypatch):
    # By the environment, as what a host reads back opens the folder by itself.
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    with open_memory(tmp_path / "memory") as opened:
        yield opened


@pytest.fixture
def store(memory):
    return NeuralFlowChatStore(memory=memory, user_id="ada")


def msgs(*texts):
    return [ChatMessage(text, role="user") for text in texts]


def said(messages):
    return [m.content for m in messages]


async def state(store, key="chat"):
    return {status: said(await store.get_messages(key, status)) for status in (ACTIVE, ARCHIVED, None)}


# --- statuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_it_behaves_as_the_hosts_own_store(store, seed):
    """The same random calls of both give the same messages, counts and keys throughout."""
    rng = random.Random(seed)
    engine = create_async_engine("sqlite+aiosqlite:///:memory:")
    theirs = SQLAlchemyChatStore(table_name="messages", async_engine=engine)
    for n in range(60):
        key, status = rng.choice("ab"), rng.choice([ACTIVE, ACTIVE, ARCHIVED])
        texts = [f"{n}.{i}" for i in range(rng.randint(1, 4))]
        name, arguments = rng.choice(
            [
                ("add_message", (msgs(texts[0])[0], status)),
                ("add_messages", (msgs(*texts), status)),
                ("add_messages", (msgs(*texts), ACTIVE)),
                ("archive_oldest_messages", (rng.randint(0, 3),)),
                ("delete_oldest_messages", (rng.randint(0, 2),)),
                ("get_messages", (status, rng.randint(0, 4), rng.randint(0, 3))),
                ("delete_messages", (status,) if rng.random() < 0.3 else (ARCHIVED,)),
                ("delete_messages", ()) if rng.random() < 0.2 else ("get_messages", (None, 2)),
            ]
        )
        results = [await getattr(each, name)(key, *copy.deepcopy(arguments)) for each in (store, theirs)]
        assert results[0] == results[1], name
        assert await state(store, key) == await state(theirs, key), name
        for count in (ACTIVE, ARCHIVED, None):
            assert await store.count_messages(key, count) == await theirs.count_messages(key, count)
    assert sorted(await store.get_keys()) == sorted(await theirs.get_keys())
    await engine.dispose()


async def test_archived_turns_stay_in_the_session(store, memory):
    """Archiving is a matter of the store: transcript and search know no difference."""
    await store.add_messages("chat", msgs("My cat is called Minka.", "two", "three"))
    assert said(await store.archive_oldest_messages("chat", 2)) == ["My cat is called Minka.", "two"]
    assert await state(store) == {
        ACTIVE: ["three"],
        ARCHIVED: ["My cat is called Minka.", "two"],
        None: ["My cat is called Minka.", "two", "three"],
    }
    session = memory.session("chat", user_id="ada")
    assert [m.text for m in session.messages()] == ["My cat is called Minka.", "two", "three"]
    assert session.search("What is my cat called?", k=1)[0].entry.content == "My cat is called Minka."


async def test_set_keeps_what_is_equal_and_replaces_the_rest(store, memory):
    """Equal messages at the beginning are not written again; replaced ones are shown no more, and not lost."""
    await store.add_messages("chat", msgs("old", "one", "two", "three"))
    await store.archive_oldest_messages("chat", 1)
    await store.set_messages("chat", msgs("one", "2", "3"))
    assert await state(store) == {ACTIVE: ["one", "2", "3"], ARCHIVED: ["old"], None: ["old", "one", "2", "3"]}
    session = memory.session("chat", user_id="ada")
    assert [m.text for m in session.messages()] == ["old", "one", "two", "three", "2", "3"]
    await store.set_messages("chat", await store.get_messages("chat"))
    assert len(session.messages()) == 6
    await store.set_messages("chat", msgs("older"), ARCHIVED)
    await store.set_messages("chat", [])
    assert await state(store) == {ACTIVE: [], ARCHIVED: ["older"], None: ["older"]}
    assert "three" in [hit.entry.content for hit in session.search("three", k=3)]


async def test_deleted_is_gone(store, memory):
    """By place, by age, by status, and all with everything that was replaced."""
    await store.add_messages("chat", msgs(*"abcdef"))
    assert (await store.delete_message("chat", 1)).content == "b"
    for nowhere in (-1, 5, 99):
        assert await store.delete_message("chat", nowhere) is None
    assert said(await store.delete_oldest_messages("chat", 1)) == ["a"]
    await store.archive_oldest_messages("chat", 2)
    await store.get_messages("chat")
    await store.delete_messages("chat", ARCHIVED)
    assert await state(store) == {ACTIVE: ["e", "f"], ARCHIVED: [], None: ["e", "f"]}
    await store.set_messages("chat", msgs("g"))
    await store.delete_messages("chat")
    assert memory.session("chat", user_id="ada").messages() == []
    assert await store.get_keys() == []
    assert await store.archive_oldest_messages("chat", 3) == []


async def test_folding_takes_nothing_from_the_active_messages(tmp_path):
    """The memory's own window is folded as ever; what is active, only the host decides."""
    options = {"embedder": "none", "pruning": {"summarization_threshold": 4, "max_context_items": 2}}
    with open_memory(tmp_path / "memory", **options) as memory:
        store = NeuralFlowChatStore(memory=memory)
        texts = [f"turn {n}" for n in range(30)]
        for text in texts:
            await store.add_message("chat", ChatMessage(text))
        await memory.aflush()
        assert len(memory.session("chat").messages(view="window")) < 10
        assert said(await store.get_messages("chat")) == texts
        assert said(await store.archive_oldest_messages("chat", 25)) == texts[:25]


async def test_statuses_survive_the_process(tmp_path):
    """They are in the folder, not in the object."""
    with open_memory(tmp_path / "memory", embedder="none") as memory:
        store = NeuralFlowChatStore(memory=memory)
        await store.add_messages("chat", msgs("a", "b", "c"))
        await store.archive_oldest_messages("chat", 1)
        await store.set_messages("chat", msgs("b", "d"))
    with open_memory(tmp_path / "memory", embedder="none") as memory:
        assert await state(NeuralFlowChatStore(memory=memory)) == {
            ACTIVE: ["b", "d"],
            ARCHIVED: ["a"],
            None: ["a", "b", "d"],
        }


async def test_messages_come_back_equal_and_as_copies(store):
    """`Memory` writes its blocks into messages it got: the store keeps what was said."""
    sent = [
        ChatMessage(role="user", blocks=[TextBlock(text="東京?"), ImageBlock(url="https://example.org/a.png")]),
        ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_call_id="c", tool_name="w", tool_kwargs={"x": None})]),
        ChatMessage("sun", role="tool", additional_kwargs={"tool_call_id": "c"}),
        ChatMessage(role="assistant", blocks=[]),
    ]
    await store.add_messages("chat", sent)
    got = await store.get_messages("chat")
    assert got == sent
    got[0].blocks = [TextBlock(text="changed")]
    got[2].additional_kwargs["session_id"] = "x"
    sent[0].blocks[0].text = "changed"
    again = await store.get_messages("chat")
    assert again[0].blocks[0].text == "東京?"
    assert again[2].additional_kwargs == {"tool_call_id": "c"}


# --- under LlamaIndex's Memory --------------------------------------------------------------------------------------


def test_the_hosts_memory_runs_on_it(store, memory):
    """From `from_defaults` with a history, through an engine, to archiving and reset."""
    host = Memory.from_defaults("chat", chat_history=msgs("I am Ada."), token_limit=200, chat_store=store)
    engine = SimpleChatEngine.from_defaults(llm=MockLLM(), memory=host)
    for n in range(12):
        engine.chat(f"question {n} " + "word " * 10)
    everything = [m.content for m in host.get_all()]
    active = said(asyncio.run(store.get_messages("chat")))
    assert everything[0] == "I am Ada."
    assert len(everything) == 25
    assert 0 < len(active) < 25
    assert everything[-len(active) :] == active
    assert [m.text for m in memory.session("chat", user_id="ada").messages()] == everything
    engine.reset()
    assert host.get_all() == []


async def test_a_chat_goes_on_in_the_other_memory(store, memory):
    """What `Memory` wrote, `NeuralFlowMemory` of the same session remembers, and the other way round."""
    host = Memory.from_defaults("chat", token_limit=1000, chat_store=store)
    await host.aput(ChatMessage("I am Ada."))
    ours = NeuralFlowMemory(memory.session("chat", user_id="ada"))
    await ours.aput(ChatMessage("Hello Ada.", role="assistant"))
    assert said(await ours.aget()) == said(await host.aget()) == ["I am Ada.", "Hello Ada."]


# --- many at once ---------------------------------------------------------------------------------------------------


async def test_each_message_is_archived_once(store):
    """Twenty tasks that archive the oldest three never take the same one twice, whichever object they use."""
    await store.add_messages("chat", msgs(*map(str, range(60))))
    other = copy.deepcopy(store)
    taken = await asyncio.gather(*((store, other)[n % 2].archive_oldest_messages("chat", 3) for n in range(20)))
    assert sorted(int(m.content) for batch in taken for m in batch) == list(range(60))
    assert [len(batch) for batch in taken] == [3] * 20
    assert await store.count_messages("chat", ACTIVE) == 0


def test_threads_and_successive_loops_lose_nothing(store):
    """Nothing is bound to an event loop."""

    async def turns(loop):
        await asyncio.gather(*(store.add_message("chat", ChatMessage(f"{loop}.{n}")) for n in range(10)))
        await store.archive_oldest_messages("chat", 5)
        return await store.count_messages("chat", None)

    assert [asyncio.run(turns(loop)) for loop in range(3)] == [10, 20, 30]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: asyncio.run(turns(n)), range(3, 7)))
    assert asyncio.run(store.count_messages("chat", None)) == 70
    assert asyncio.run(store.count_messages("chat", ARCHIVED)) == 35


async def test_interleaved_users_never_see_each_other(memory):
    """A hundred turns of two keys through one store, from tasks and threads at once."""
    store = NeuralFlowChatStore(memory=memory)

    async def turn(n):
        key = ("ada", "bob")[n % 2]
        await store.add_message(key, ChatMessage(f"{key} says {n}"))
        if n % 10 < 2:
            await store.archive_oldest_messages(key, 2)
        return key, said(await store.get_messages(key, status=None))

    with ThreadPoolExecutor(4) as pool:
        threads = [asyncio.wrap_future(pool.submit(lambda n: asyncio.run(turn(n)), n)) for n in range(50)]
        seen = await asyncio.gather(*threads, *(turn(n) for n in range(50, 100)))
    for key, texts in seen:
        assert texts
        assert all(text.startswith(key) for text in texts)
    for key in ("ada", "bob"):
        assert await store.count_messages(key, None) == 50
        hits = memory.session(key).search("says", k=100)
        assert len(hits) == 50
        assert all(hit.entry.content.startswith(key) for hit in hits)


async def test_users_of_one_name_for_a_chat_have_a_chat_each(memory):
    """The key is a session of the store's user."""
    ada, bob = (NeuralFlowChatStore(memory=memory, user_id=user) for user in ("ada", "bob"))
    await ada.add_message("chat", ChatMessage("mine"))
    assert await bob.get_messages("chat", None) == []
    assert (await ada.get_keys(), await bob.get_keys()) == (["chat"], [])
    await bob.delete_messages("chat")
    assert said(await ada.get_messages("chat")) == ["mine"]


async def test_reading_what_is_active_costs_nothing_for_what_is_archived(store, memory):
    """After the first look the archived turns are not read again."""
    await store.add_messages("chat", msgs(*map(str, range(300))))
    await store.archive_oldest_messages("chat", 295)
    await store.get_messages("chat")
    parts = memory._ready_parts()
    read, select = [], parts.ledger.select

    def counted(*arguments, **options):
        for entry in select(*arguments, **options):
            read.append(entry)
            yield entry

    parts.ledger.select = counted
    try:
        assert len(await store.get_messages("chat")) == 5
    finally:
        del parts.ledger.select
    assert len(read) == 5


# --- fields ---------------------------------------------------------------------------------------------------------


ROUND_TRIPS = {
    "model_dump": lambda s: NeuralFlowChatStore.model_validate(s.model_dump()),
    "model_dump_json": lambda s: NeuralFlowChatStore.model_validate_json(s.model_dump_json()),
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", ROUND_TRIPS)
async def test_a_copy_is_connected_to_the_same_messages(memory, how):
    """All that is written are plain fields, without anybody's text."""
    store = NeuralFlowChatStore(memory=memory, user_id="ada", tenant="acme", agent_id="clerk")
    await store.add_message("chat", ChatMessage("a secret"))
    again = ROUND_TRIPS[how](store)
    assert again.model_dump() == store.model_dump()
    assert "secret" not in json.dumps(store.model_dump())
    assert said(await again.get_messages("chat")) == ["a secret"]
    assert NeuralFlowChatStore.class_name() == "NeuralFlowChatStore"


def test_wrong_fields_and_keys_are_refused(memory, store):
    """Misspelt options and ids that can't be stored are told."""
    for fields, error in [
        ({"user": "ada"}, ValidationError),
        ({"tenant": ""}, ScopeError),
        ({"path": "x"}, ConfigError),
    ]:
        with pytest.raises(error):
            NeuralFlowChatStore(memory=memory, **fields)
    with pytest.raises(ScopeError, match="session_id"):
        asyncio.run(store.add_message("", ChatMessage("hi")))
