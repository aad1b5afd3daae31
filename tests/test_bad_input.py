"""Bad input is a typed error that says what to do, and nothing is half written."""

import re
from datetime import datetime

import pytest
from conftest import rows, texts
from langchain_core.messages import HumanMessage
from llama_index.core.llms import ChatMessage

from neuralflow_memory import (
    BudgetError,
    ConfigError,
    EmbeddingError,
    FilterError,
    InputError,
    MessageError,
    NotFound,
    QueryError,
    ScopeError,
    StorageError,
    ToolCall,
)
from neuralflow_memory import Message as M
from neuralflow_memory.sources import read_settings

LONE = "half \ud800 a pair"

BAD_MESSAGES = {
    "empty text": lambda c: c.add(""),
    "blank text": lambda c: c.add([M("user", "fine"), " \n\t"]),
    "no content": lambda c: c.add(M("assistant", [])),
    "not text": lambda c: c.add(M("user", 42)),
    "bytes": lambda c: c.add(M("user", b"hello")),
    "none": lambda c: c.add(None),
    "a number": lambda c: c.add([1]),
    "a dict": lambda c: c.add({"role": "user", "content": "hello"}),
    "a list of dicts": lambda c: c.add([{"role": "user", "content": "hello"}]),
    "unknown role": lambda c: c.add(M("robot", "hello")),
    "empty id": lambda c: c.add(M("user", "hello", id="")),
    "tool without call id": lambda c: c.add(M("tool", "42")),
    "call without name": lambda c: c.add(M("assistant", "", tool_calls=[{"id": "c"}])),
    "call with odd args": lambda c: c.add(M("assistant", "", tool_calls=[ToolCall("c", "f", {"x": object()})])),
    "metadata not json": lambda c: c.add([M("user", "fine"), M("user", "hello", metadata={"x": object()})]),
    "metadata nan": lambda c: c.add(M("user", "hello", metadata={"x": float("nan")})),
    "metadata not a mapping": lambda c: c.add(M("user", "hello", metadata=[1])),
    "payload not json": lambda c: c.add(M("user", "hello", payload={"x": {1, 2}})),
    "block without type": lambda c: c.add(M("user", [{"text": "hello"}])),
    "surrogate in text": lambda c: c.add([M("user", "fine"), M("user", LONE)]),
    "surrogate in name": lambda c: c.add([M("user", "fine"), M("user", "hello", name=LONE)]),
    "surrogate in id": lambda c: c.add(M("user", "hello", id=LONE)),
    "surrogate in metadata": lambda c: c.add([M("user", "fine"), M("user", "hello", metadata={"x": LONE})]),
    "surrogate in a call": lambda c: c.add(M("assistant", "", tool_calls=[ToolCall("c", "f", {"x": LONE})])),
    "surrogate in a block": lambda c: c.add(M("user", [{"type": "text", "text": "hi"}, {"type": "image", "u": LONE}])),
    "surrogate in payload": lambda c: c.add(M("user", "hello", payload={"x": LONE})),
    "nothing to remember": lambda c: c.remember(" "),
    "remember surrogate": lambda c: c.remember(LONE),
    "remember surrogate tag": lambda c: c.remember("fine", tags=[LONE]),
    "remember surrogate category": lambda c: c.remember("fine", category=LONE),
    "remember turn": lambda c: c.remember("fine", type="short_term"),
    "update to nothing": lambda c: c.entries.update("a", content=""),
    "update to none": lambda c: c.entries.update("a", content=None),
    "update surrogate": lambda c: c.entries.update("a", content=LONE),
    "update metadata not json": lambda c: c.entries.update("a", metadata={"x": object()}),
    "replace empty": lambda c: c.replace(["fine", ""]),
    "replace surrogate": lambda c: c.replace(["fine", M("user", "hello", name=LONE)]),
}
BAD_OPTIONS = {
    "conflict": lambda c: c.add("hello", on_conflict="merge"),
    "view": lambda c: c.messages(view="some"),
    "last": lambda c: c.messages(last=-1),
    "last text": lambda c: c.messages(last="2"),
    "replace id twice": lambda c: c.replace([M("user", "x", id="i"), M("user", "y", id="i")]),
    "remember type": lambda c: c.remember("fine", type="gossip"),
    "remember importance": lambda c: c.remember("fine", importance=2),
    "remember importance text": lambda c: c.remember("fine", importance="high"),
    "remember tags": lambda c: c.remember("fine", tags="one"),
    "remember tag": lambda c: c.remember("fine", tags=[1]),
    "remember category": lambda c: c.remember("fine", category=5),
    "remember metadata": lambda c: c.remember("fine", metadata="x"),
    "remember expires": lambda c: c.remember("fine", expires_at="2030-01-01"),
    "update nothing": lambda c: c.entries.update("a"),
    "update unknown": lambda c: c.entries.update("a", role="assistant"),
    "update importance": lambda c: c.entries.update("a", importance=None),
    "update importance nan": lambda c: c.entries.update("a", importance=float("nan")),
    "update tags": lambda c: c.entries.update("a", tags=5),
    "update metadata": lambda c: c.entries.update("a", metadata=None),
    "update expires": lambda c: c.entries.update("a", expires_at="tomorrow"),
    "delete nothing": lambda c: c.entries.delete(),
    "delete both": lambda c: c.entries.delete("a", filter={"role": "user"}),
    "delete number": lambda c: c.entries.delete([5]),
    "delete within": lambda c: c.entries.delete(filter={"role": "user"}, within="sesion"),
    "count within": lambda c: c.entries.count(within="all"),
    "list within": lambda c: c.entries.list(within="agent"),
    "list types": lambda c: c.entries.list(types=["gossip"]),
    "list types text": lambda c: c.entries.list(types="long_term"),
    "list limit": lambda c: c.entries.list(limit=-1),
    "list since": lambda c: c.entries.list(since="yesterday"),
    "get number": lambda c: c.entries.get(5),
    "compact": lambda c: c.compact(max_tokens=-1),
    "compact text": lambda c: c.compact(max_tokens="few"),
    "context max": lambda c: c.context(max_tokens=-1),
    "context max text": lambda c: c.context(max_tokens="many"),
    "context reserve": lambda c: c.context(reserve_tokens=1.5),
    "context overflow": lambda c: c.context(overflow="drop"),
    "context query": lambda c: c.context(5),
}
BAD_QUERIES = {
    "empty": lambda c: c.search(""),
    "blank": lambda c: c.search(" \n"),
    "none": lambda c: c.search(None),
    "too long": lambda c: c.search("x" * 100_000),
    "k zero": lambda c: c.search("x", k=0),
    "k text": lambda c: c.search("x", k="3"),
    "k true": lambda c: c.search("x", k=True),
    "types": lambda c: c.search("x", types=["gossip"]),
    "types text": lambda c: c.search("x", types="long_term"),
    "within": lambda c: c.search("x", within="world"),
    "since": lambda c: c.search("x", since="yesterday"),
    "until": lambda c: c.search("x", until=5),
}


def unchanged(memory, call, error):
    chat = memory.session("chat", user_id="ada")
    chat.add([M("user", "Hello", id="a"), M("assistant", "Hi", id="b")])
    memory.flush()
    before = rows(memory), chat.messages(), chat.messages(view="window"), chat.entries.list()
    with pytest.raises(error) as raised:
        call(chat)
    assert len(str(raised.value)) > 20, "the error says what to do"
    assert isinstance(raised.value, ValueError)
    assert (rows(memory), chat.messages(), chat.messages(view="window"), chat.entries.list()) == before
    chat.add("Goes on")
    assert texts(chat.messages(view="window")) == ["Hello", "Hi", "Goes on"]


@pytest.mark.parametrize("call", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_message_that_cannot_be_stored_is_refused_whole(memory, call):
    """MessageError; of a batch, nothing is written."""
    unchanged(memory, call, MessageError)


@pytest.mark.parametrize("call", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_wrong_option_is_an_input_error(memory, call):
    """Whatever is wrong with it, nothing is written, and no default is taken instead."""
    unchanged(memory, call, InputError)


@pytest.mark.parametrize("call", BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_a_wrong_query_is_a_query_error(memory, call):
    """And it says which part of it."""
    unchanged(memory, call, QueryError)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.search("x", filter={"role": {"$like": "u"}}),
        lambda c: c.entries.list(filter={"role": {"$in": "user"}}),
        lambda c: c.entries.delete(filter=["role"]),
        lambda c: c.entries.count(filter={"$or": {}}),
    ],
)
def test_a_wrong_filter_is_a_filter_error(memory, call):
    """An operator that is not in the language, or used wrongly."""
    unchanged(memory, call, FilterError)


def test_half_a_surrogate_pair_can_be_asked_for(chat):
    """A question is not stored; what is left of it is searched."""
    chat.add("Half a loaf")
    assert [h.entry.content for h in chat.search(LONE)] == ["Half a loaf"]


@pytest.mark.parametrize(
    "ids",
    [{"user_id": ""}, {"user_id": 5}, {"tenant": ""}, {"user_id": "a\0b"}, {"user_id": LONE}, {"agent_id": "x" * 513}],
)
def test_ids_that_make_no_scope_are_a_scope_error(memory, ids):
    """At the latest when something is done with them."""
    with pytest.raises(ScopeError):
        memory.session("chat", **ids).add("Hello")
    assert memory.stats()["entries"] == 0


def test_unusual_but_valid_input_makes_the_round_trip(memory):
    """NUL, emoji, right-to-left, a lone combining mark, special tokens, 1 MB, odd ids."""
    chat = memory.session("chat \U0001f600/../x", user_id="ü\u202e")
    given = [
        "a \0 b",
        "\U0001f600",
        "שלום",
        "\u0301",
        "<|endoftext|>",
        "x" * 1_000_000,
        "word " * 200_000,
        "'; DROP TABLE",
    ]
    ids = chat.add([M("user", t, id=f"{n} \0 {'🙂' * n}") for n, t in enumerate(given)])
    memory.flush()
    assert texts(chat.messages()) == given
    assert [m.id for m in chat.messages()] == ids
    assert memory.stats()["parked"] == []
    assert memory.stats()["dirty"] == 0
    assert chat.context(max_tokens=500, overflow="truncate").tokens <= 500


def test_a_turn_that_is_too_long_for_the_budget_says_the_numbers(chat):
    """BudgetError; overflow='truncate' cuts it instead."""
    chat.add("word " * 300)
    with pytest.raises(BudgetError, match="truncate") as error:
        chat.context(max_tokens=100)
    assert error.value.needed > error.value.available == 100
    with pytest.raises(BudgetError):
        chat.context(max_tokens=5, overflow="truncate")
    assert chat.context(max_tokens=100, overflow="truncate").tokens <= 100
    with pytest.raises(BudgetError):
        chat.context(max_tokens=1000, reserve_tokens=999)


def test_dates_at_the_ends_of_the_calendar_are_fine(chat):
    """Year 1 and year 9999 are stored, found and shown."""
    chat.add([M("user", "Early", created_at=datetime(1, 1, 1)), M("user", "Late", created_at=datetime(9999, 12, 31))])
    assert [m.created_at.year for m in chat.messages()] == [1, 9999]
    assert len(chat.search("early late")) == 2
    assert [h.entry.content for h in chat.search("early late", until="2000-01-01")] == ["Early"]


# -- embedders


class Returns:
    def __init__(self, answer):
        self.answer = answer

    def embed_documents(self, texts):
        return self.answer(texts)

    def embed_query(self, text):
        return [1.0, 2.0]


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: [],
        lambda _: None,
        lambda texts: [[1.0, 2.0]] * (len(texts) + 1),
        lambda _: [["a", "b"]],
        lambda texts: [[]] * len(texts),
        lambda texts: [[float("inf"), 0.0]] * len(texts),
    ],
    ids=["nothing", "none", "too many", "text", "no numbers", "infinite"],
)
def test_an_embedder_that_returns_nonsense_breaks_no_chat(opened, answer):
    """flush() says so; what was added is stored, and found by its words."""
    memory = opened(embedder=Returns(answer))
    chat = memory.session("chat")
    chat.add("Sailing")
    with pytest.raises(StorageError, match="embedder"):
        memory.flush()
    with pytest.warns(RuntimeWarning):
        assert len(chat.search("sailing")) == 1
    assert EmbeddingError.__name__ in memory.stats()["last_error"]


def test_errors_are_what_a_python_programmer_would_catch(chat):
    """Each typed error is also the builtin."""
    with pytest.raises(LookupError):
        chat.entries.get("nope")
    with pytest.raises(NotFound) as error:
        chat.entries.get("nope")
    assert error.value.id == "nope"


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (HumanMessage("hello"), "neuralflow_memory.langchain.from_langchain"),
        (ChatMessage(role="user", content="hello"), "neuralflow_memory.llama_index.from_llama_index"),
        ({"role": "user", "content": "hello"}, r"Message\(role, content\)"),
    ],
    ids=["langchain", "llama_index", "mapping"],
)
def test_a_hosts_message_is_refused_with_the_way_to_convert_it(chat, message, advice):
    """In a list, as a host holds its messages."""
    with pytest.raises(MessageError, match=advice):
        chat.add([message])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"budgt": {"total": 4000}}, "budgt: there is no such option; did you mean 'budget'?"),
        ({"budget": {"totals": 4000}}, "budget.totals: there is no such option; did you mean 'total'?"),
        ({"tasks": {"x": 1}}, "tasks.x: there is no such option, but completed_max_age, open_max_age"),
    ],
)
def test_an_unknown_option_is_told_the_nearest(options, advice):
    """Wherever the settings come from."""
    with pytest.raises(ConfigError, match=re.escape(advice)):
        read_settings(**options)
