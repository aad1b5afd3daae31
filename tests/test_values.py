"""Keyed values: what is put reads back equal, is found by its texts, expires, and stays in its own tenant or user."""

import asyncio
import gc
import inspect
import itertools
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta
from types import MappingProxyType

import pytest
from conftest import CountingEmbedder, found, in_threads, index_keys, live_keys, rows, without_tiers
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory import AccessDenied, ClosedError, FilterError, InputError, QueryError, StorageFull, open_memory
from neuralflow_memory._failpoints import FAILPOINTS
from neuralflow_memory.testing import HashingEmbedder, ManualClock
from neuralflow_memory.types import Scope
from neuralflow_memory.values import Get, Namespaces, Put, Search, Values

LONE = "half \ud800 a pair"
NOTES = ("notes",)


@pytest.fixture
def values(memory):
    return memory.values(user_id="ada")


@pytest.fixture
def clock():
    return ManualClock()


def keys(results):
    return [v.key for v in results]


def items(memory, table="items"):
    with memory._core.parts.ledger._db.read() as db:
        return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def entries_of(memory, **whose):
    """The texts that values are found by, as entries of any session of the same user."""
    return memory.session("anywhere", **whose).entries.list(filter={"metadata.kind": "value"})


# -- what is put, reads back


def test_what_was_put_reads_back_equal_and_is_the_callers_own(memory, values):
    """Unicode, None, nesting, numbers; later changes of what was given or got reach nobody."""
    given = {"text": "Zoë ✈️ \0 東京", "none": None, "deep": {"list": [1, 2.5, True, {"": []}]}, "big": 10**30, "": ""}
    values.put(NOTES, "k", given)
    first = values.get(NOTES, "k")
    assert first.value == given
    assert (first.namespace, first.key, first.score, first.expires_at) == (NOTES, "k", None, None)
    given["deep"]["list"].append("later")
    first.value["text"] = "changed"
    assert values.get(NOTES, "k").value["deep"]["list"] == [1, 2.5, True, {"": []}]
    assert values.get(NOTES, "k").value["text"] == "Zoë ✈️ \0 東京"
    values.put(NOTES, "proxy", MappingProxyType({"a": MappingProxyType({"b": (1, 2)})}))
    assert values.get(NOTES, "proxy").value == {"a": {"b": [1, 2]}}
    assert values.get(NOTES, "absent") is None
    assert values.get(("other",), "k") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with open_memory(tmp_path_factory.mktemp("values") / "m", embedder="none") as memory:
        yield memory


LABEL = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.text(), st.lists(LABEL, max_size=3))
def test_any_json_object_under_any_name_makes_the_round_trip(shared, value, key, labels):
    """Whatever is in the value, the key and the labels."""
    values = shared.values(user_id="any")
    values.put(tuple(labels), key, value)
    stored = values.get(tuple(labels), key)
    assert stored.value == value
    assert stored.namespace == tuple(labels)
    assert stored.key == key


def test_created_is_kept_and_updated_moves(opened, clock):
    """Until it is deleted; then it is a new one."""
    values = opened(clock=clock).values()
    begun = clock()
    values.put(NOTES, "k", {"n": 1})
    clock.advance(minutes=1)
    values.put(NOTES, "k", {"n": 2})
    stored = values.get(NOTES, "k")
    assert (stored.created_at, stored.updated_at) == (begun, begun + timedelta(minutes=1))
    assert stored.updated_at.tzinfo is not None
    values.delete(NOTES, "k")
    assert values.get(NOTES, "k") is None
    values.delete(NOTES, "k")
    clock.advance(minutes=1)
    values.put(NOTES, "k", {"n": 3})
    assert values.get(NOTES, "k").created_at == begun + timedelta(minutes=2)


def test_values_survive_reopening_and_a_killed_transaction_leaves_nothing(opened, monkeypatch):
    """All of a batch is there, or none of it: the values, their texts, and what search knows of them."""
    with opened() as memory:
        memory.values(user_id="ada").put(NOTES, "k", {"n": 1}, texts=["Sailing on Sunday"])
    memory = opened()
    values = memory.values(user_id="ada")
    assert values.get(NOTES, "k").value == {"n": 1}
    assert keys(values.search(NOTES, "sailing")) == ["k"]
    memory.flush()
    before = rows(memory), items(memory)

    def fail(name):
        if name == "change.applied":
            raise RuntimeError("the plug was pulled")

    assert "change.applied" in FAILPOINTS
    monkeypatch.setattr("neuralflow_memory._failpoints.hook", fail)
    puts = [Put(NOTES, "k", {"n": 2}, ["Trains"]), Put(NOTES, "new", {"n": 3}, ["Tomatoes"])]
    with pytest.raises(RuntimeError, match="plug"):
        values.batch(puts)
    with pytest.raises(RuntimeError, match="plug"):
        values.delete(NOTES, "k")
    monkeypatch.undo()
    assert (rows(memory), items(memory)) == before
    assert values.get(NOTES, "k").value == {"n": 1}
    assert [(v.key, v.score > 0) for v in values.search((), "sailing trains tomatoes")] == [("k", True)]
    values.batch(puts)
    assert [(v.key, v.score > 0) for v in values.search((), "tomatoes")] == [("new", True), ("k", False)]


def test_without_space_nothing_is_written(memory, values):
    """StorageFull, and the value before is still there."""
    values.put(NOTES, "k", {"n": 1}, texts=["Sailing"])
    memory.flush()
    db = memory._core.parts.ledger._db._writer
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    before = rows(memory), items(memory)
    with pytest.raises(StorageFull):
        values.put(NOTES, "k", {"big": "word " * 100_000}, texts=["Trains"])
    assert (rows(memory), items(memory)) == before
    assert values.get(NOTES, "k").value == {"n": 1}
    db.execute("PRAGMA max_page_count = 1000000")


def test_a_folder_of_an_earlier_version_gets_the_tables(opened):
    """Its entries are as they were."""
    with opened() as memory:
        memory.session("chat", user_id="ada").add("Hello")
        path = memory.path / "ledger.sqlite3"
    with closing(sqlite3.connect(path)) as db:
        without_tiers(db)
        db.execute("DROP TABLE items")
        db.execute("DROP TABLE item_texts")
        db.execute("DROP TABLE changes")
        db.execute("ALTER TABLE owners DROP COLUMN head")
        db.execute("ALTER TABLE features DROP COLUMN called")
        db.execute("ALTER TABLE features RENAME COLUMN traits TO question")
        db.execute("UPDATE features SET question = 0")
        db.execute("UPDATE meta SET value = 'of before' WHERE name = 'lexical'")
        db.execute("PRAGMA user_version = 2")
        db.commit()
    memory = opened()
    memory.values(user_id="ada").put(NOTES, "k", {}, texts=["Sailing"])
    assert keys(memory.values(user_id="ada").search((), "sailing")) == ["k"]
    assert [m.content for m in memory.session("chat", user_id="ada").messages()] == ["Hello"]


# -- wrong input


def deep(levels):
    value = {}
    for _ in range(levels - 1):
        value = {"in": value}
    return value


CIRCLE = {"name": "circle"}
CIRCLE["self"] = CIRCLE

BAD = {
    "a set": (InputError, lambda v: v.put(NOTES, "k", {"x": {1, 2}})),
    "nan": (InputError, lambda v: v.put(NOTES, "k", {"x": float("nan")})),
    "no mapping": (InputError, lambda v: v.put(NOTES, "k", [1])),
    "a key that is no text": (InputError, lambda v: v.put(NOTES, "k", {"a": [{1: "one"}]})),
    "surrogate": (InputError, lambda v: v.put(NOTES, "k", {"x": LONE})),
    "surrogate in a key": (InputError, lambda v: v.put(NOTES, LONE, {})),
    "surrogate in a label": (InputError, lambda v: v.put((LONE,), "k", {})),
    "surrogate in a text": (InputError, lambda v: v.put(NOTES, "k", {}, texts=[LONE])),
    "a circle": (InputError, lambda v: v.put(NOTES, "k", CIRCLE)),
    "too deep": (InputError, lambda v: v.put(NOTES, "k", deep(202))),
    "much too deep": (InputError, lambda v: v.put(NOTES, "k", deep(100_000))),
    "an integer without end": (InputError, lambda v: v.put(NOTES, "k", {"x": 10**5000})),
    "empty label": (InputError, lambda v: v.put(("a", ""), "k", {})),
    "NUL in a label": (InputError, lambda v: v.put(("a\0b",), "k", {})),
    "label no text": (InputError, lambda v: v.put(("a", 1), "k", {})),
    "a namespace that is a text": (InputError, lambda v: v.put("notes", "k", {})),
    "a key no text": (InputError, lambda v: v.get(NOTES, 1)),
    "texts a text": (InputError, lambda v: v.put(NOTES, "k", {}, texts="abc")),
    "texts no texts": (InputError, lambda v: v.put(NOTES, "k", {}, texts=[1])),
    "ttl zero": (InputError, lambda v: v.put(NOTES, "k", {}, ttl=0)),
    "ttl nan": (InputError, lambda v: v.put(NOTES, "k", {}, ttl=float("nan"))),
    "ttl a text": (InputError, lambda v: v.put(NOTES, "k", {}, ttl="soon")),
    "limit": (QueryError, lambda v: v.search(limit=-1)),
    "offset": (QueryError, lambda v: v.search(offset=1.5)),
    "depth": (QueryError, lambda v: v.namespaces(max_depth=-1)),
    "empty query": (QueryError, lambda v: v.search((), " ")),
    "long query": (QueryError, lambda v: v.search((), "x" * 10_001)),
    "operator": (FilterError, lambda v: v.search(filter={"x": {"$like": "y"}})),
    "operator within": (FilterError, lambda v: v.search(filter={"x": [{"y": {"$gt": 1, "z": 2}}]})),
    "operator for a field": (FilterError, lambda v: v.search(filter={"$or": []})),
    "filter no mapping": (InputError, lambda v: v.search(filter=["x"])),
    "filter no json": (InputError, lambda v: v.search(filter={"x": datetime(2026, 1, 1)})),
    "no operation": (InputError, lambda v: v.batch([Put(NOTES, "fine", {}), "drop"])),
    "one wrong among several": (InputError, lambda v: v.batch([Put(NOTES, "fine", {}), Put(NOTES, "k", {"x": {1}})])),
}


@pytest.mark.parametrize(("error", "call"), BAD.values(), ids=BAD)
def test_wrong_input_is_a_typed_error_and_nothing_is_written(memory, values, error, call):
    """Every one of them a ValueError, as Python's own."""
    before = rows(memory), items(memory)
    with pytest.raises(error) as told:
        call(values)
    assert isinstance(told.value, ValueError)
    assert (rows(memory), items(memory)) == before


def test_what_is_unusual_but_right_is_kept(values):
    """200 levels, a million characters, an odd key, the root namespace, a time to live beyond all calendars."""
    for n, value in enumerate([deep(201), {"text": "x" * 1_000_000}]):
        values.put((), str(n), value, ttl=1e300)
        assert values.get((), str(n)).value == value
    values.put(("*", "a.b", "%_", " ", "\x1f", "\x01", "\U0010ffff"), "\0 ", {"n": 1}, ttl=10**400)
    assert values.get(["*", "a.b", "%_", " ", "\x1f", "\x01", "\U0010ffff"], "\0 ").value == {"n": 1}
    values.put(NOTES, "", {"n": 2})
    assert values.get(NOTES, "").value == {"n": 2}


# -- batches


def test_reads_of_a_batch_see_what_was_there_before_and_the_last_put_wins(values):
    """Results stand in the order of the operations."""
    values.put(NOTES, "a", {"n": 1})
    ops = [
        Put(NOTES, "a", {"n": 2}),
        Get(NOTES, "a"),
        Put(NOTES, "b", {"n": 1}),
        Put(NOTES, "b", {"n": 2}),
        Search(NOTES),
        Put(NOTES, "c", {"n": 1}),
        Put(NOTES, "c", None),
        Namespaces(),
        Put(("other",), "d", None),
        Get(("other",), "d"),
    ]
    results = values.batch(ops)
    assert [r for n, r in enumerate(results) if n not in (1, 4, 7)] == [None] * 7
    assert results[1].value == {"n": 1}
    assert keys(results[4]) == ["a"]
    assert results[7] == [NOTES]
    assert {v.key: v.value["n"] for v in values.search()} == {"a": 2, "b": 2}
    assert values.batch([]) == []


# -- search without a query


def test_a_prefix_means_whole_labels(values):
    """Neither a longer label, nor another case, nor a wildcard of any database."""
    for n, namespace in enumerate([("a",), ("a", "b"), ("ab",), ("A",), ("a-corp",), ("a_",), ("a%",), ("b", "a"), ()]):
        values.put(namespace, str(n), {})
    assert sorted(keys(values.search(("a",)))) == ["0", "1"]
    assert keys(values.search(("a", "b"))) == ["1"]
    assert keys(values.search(("A",))) == ["3"]
    assert keys(values.search(("a_",))) == ["5"]
    assert keys(values.search(("a%",))) == ["6"]
    assert keys(values.search(("%",))) == keys(values.search(("*",))) == keys(values.search(("a", "*"))) == []
    assert len(values.search()) == 9


NUMBERS = itertools.count()
LABELS = st.lists(st.sampled_from(["a", "b", "ab", "A", "\x01", "\x7f", "é", "\U0010ffff", ".", "*"]), max_size=3).map(
    tuple
)


@given(st.sets(LABELS, min_size=1, max_size=8), LABELS, LABELS, st.integers(0, 3))
def test_prefixes_suffixes_and_depths_are_those_of_tuples(shared, namespaces, prefix, suffix, depth):
    """Whatever stands in the labels."""
    values = shared.values(user_id=f"user {next(NUMBERS)}")
    values.batch([Put(ns, "k", {}) for ns in namespaces])
    assert {v.namespace for v in values.search(prefix, limit=100)} == {
        n for n in namespaces if n[: len(prefix)] == prefix
    }

    def begins(namespace, pattern):
        return len(namespace) >= len(pattern) and all(
            p in ("*", label) for p, label in zip(pattern, namespace, strict=False)
        )

    wanted = [n for n in namespaces if begins(n, prefix) and begins(n[::-1], suffix[::-1])]
    assert values.namespaces(prefix=prefix, suffix=suffix) == sorted(wanted)
    assert values.namespaces(prefix=prefix, suffix=suffix, max_depth=depth) == sorted({n[:depth] for n in wanted})


def test_without_a_query_what_changed_last_comes_first_page_by_page(opened, clock):
    """Each exactly once; a read changes no place."""
    values = opened(clock=clock).values()
    for n in range(25):
        clock.advance(seconds=1)
        values.put((str(n % 3),), str(n), {"n": n, "even": n % 2 == 0}, ttl=60)
    clock.advance(seconds=1)
    values.put(("0",), "3", {"n": 3, "even": False})
    values.get(("1",), "1")
    order = ["3", *(str(n) for n in reversed(range(25)) if n != 3)]
    assert keys(values.search()) == order[:10]
    assert keys(values.search(limit=100)) == order
    assert [k for at in range(0, 30, 7) for k in keys(values.search(limit=7, offset=at))] == order
    even = [k for k in order if int(k) % 2 == 0]
    assert [k for at in range(0, 16, 4) for k in keys(values.search(limit=4, offset=at, filter={"even": True}))] == even
    assert values.search(limit=0) == values.search(offset=10**30) == []
    assert len(values.search(limit=10**30)) == 25
    assert all(v.score is None for v in values.search())


def test_a_filter_finds_what_few_have_among_many(values):
    """It looks on until the limit is filled."""
    values.batch([Put(("n", str(n % 7)), str(n), {"n": n, "rare": n % 500 == 0}, ["thing"]) for n in range(2500)])
    assert sorted(map(int, keys(values.search(("n",), filter={"rare": True})))) == [0, 500, 1000, 1500, 2000]
    assert len(values.search((), "thing", filter={"rare": True}, limit=4)) == 4
    assert len(values.search((), "thing", filter={"rare": True}, offset=4)) == 1


VALUE = {
    "s": "b",
    "n": 5,
    "f": 2.5,
    "t": True,
    "none": None,
    "l": [1, {"x": 2}],
    "d": {"a": 1, "b": {"c": "z"}},
    "q": "10",
}

FILTERS = [
    ({}, True),
    ({"s": "b"}, True),
    ({"s": "b", "n": 4}, False),
    ({"n": 5.0}, True),
    ({"none": None}, True),
    ({"absent": None}, True),
    ({"absent": 1}, False),
    ({"l": [1, {"x": 2}]}, True),
    ({"l": (1, {"x": {"$gt": 1}})}, True),
    ({"l": [1]}, False),
    ({"d": {"a": 1}}, True),
    ({"d": {"b": {"c": "z"}}}, True),
    ({"d": {"b": {"c": {"$ne": "z"}}}}, False),
    ({"s": {"a": 1}}, False),
    ({"d": {}}, True),
    ({"n": {"$eq": 5}}, True),
    ({"n": {"$ne": 5}}, False),
    ({"absent": {"$ne": 5}}, True),
    ({"n": {"$gt": 4, "$lt": 6}}, True),
    ({"n": {"$gte": 5, "$lte": 5}}, True),
    ({"n": {"$gt": 5}}, False),
    ({"f": {"$gte": 2}}, True),
    ({"n": {"$gt": 10**400}}, False),
    ({"n": {"$gt": "4"}}, True),
    ({"q": {"$gt": "9"}}, True),
    ({"s": {"$gt": "a"}}, True),
    ({"s": {"$lt": 1}}, False),
    ({"d": {"$eq": {"a": 1, "b": {"c": "z"}}}}, True),
    ({"d": {"$eq": {"$odd": 1}}}, False),
    *(({name: {op: 1}}, False) for name in ("absent", "none", "l", "d") for op in ("$gt", "$gte", "$lt", "$lte")),
]


@pytest.mark.parametrize(("filter", "matches"), FILTERS, ids=lambda x: str(x)[:60])
def test_the_language_of_filters(shared, filter, matches):
    """A comparison with what is missing, or has no order with it, is false; never an error."""
    values = shared.values(user_id="filters")
    values.put((), "k", VALUE)
    assert bool(values.search(filter=filter)) == matches


# -- search with a query


def test_the_best_text_of_a_value_counts(values):
    """Best first, 0..1; then what has a text that says nothing of it, at 0; then what has none."""
    values.put(NOTES, "plain", {"text": "sailing"})
    values.put(NOTES, "many", {}, texts=["Tomatoes ripen", "Sailing on Sunday", "Sailing on Sunday", " "])
    values.put(
        NOTES, "one", {}, texts=["On Sunday the grandmother went sailing with three other people, and it rained"]
    )
    values.put(NOTES, "other", {}, texts=["Invoices"])
    hits = values.search(NOTES, "sailing on Sunday")
    assert keys(hits) == ["many", "one", "other", "plain"]
    assert 1 >= hits[0].score > hits[1].score > hits[2].score == 0
    assert hits[3].score is None
    assert [keys(values.search(NOTES, "sailing on Sunday", limit=1, offset=n)) for n in range(5)] == [
        *([k] for k in ("many", "one", "other", "plain")),
        [],
    ]


def test_texts_that_stay_are_not_embedded_again(opened):
    """A put replaces what has changed, a delete removes all of it: in the ledger, in RAM and in Chroma."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder)
    values = memory.values(user_id="ada")
    values.put(NOTES, "k", {"n": 1}, texts=["Sailing", "Trains"])
    memory.flush()
    assert sorted(embedder.texts) == ["Sailing", "Trains"]
    numbers = {e.content: e.number for e in entries_of(memory, user_id="ada")}
    values.put(NOTES, "k", {"n": 2}, texts=["Trains", "Sailing"])
    values.put(NOTES, "k", {"n": 3}, texts=["Sailing", "Tomatoes"])
    memory.flush()
    assert sorted(embedder.texts) == ["Sailing", "Tomatoes", "Trains"]
    left = {e.content: e.number for e in entries_of(memory, user_id="ada")}
    assert left.keys() == {"Sailing", "Tomatoes"}
    assert left["Sailing"] == numbers["Sailing"]
    assert values.search((), "trains")[0].score == 0
    assert values.search((), "tomatoes")[0].score > 0
    assert index_keys(memory) == live_keys(memory)
    values.put(NOTES, "k", {"n": 4})
    assert values.search((), "tomatoes")[0].score is None
    values.put(NOTES, "k", {"n": 5}, texts=["Sailing"])
    values.delete(NOTES, "k")
    memory.flush()
    assert entries_of(memory, user_id="ada") == []
    assert index_keys(memory) == live_keys(memory) == set()
    assert values.search((), "sailing") == []
    assert rows(memory)["tombstones"] == 5  # of four texts and the value
    assert rows(memory)["features"] == rows(memory)["vectors"] == items(memory, "item_texts") == 0


def test_what_a_users_values_say_is_knowledge_of_the_user(memory, values):
    """Any session of that user finds it, and its metadata says where it is from; clear() keeps it."""
    values.put(("preferences", "travel"), "seat", {"seat": "aisle"}, texts=["Ada likes aisle seats"])
    chat = memory.session("chat", user_id="ada")
    chat.add("Book me a flight")
    hit = chat.search("aisle seats")[0]
    assert hit.entry.content == "Ada likes aisle seats"
    assert dict(hit.entry.metadata) == {"kind": "value", "namespace": ["preferences", "travel"], "key": "seat"}
    assert (hit.entry.type, hit.entry.provenance) == ("long_term", "told")
    assert any("aisle seats" in m.content for m in chat.context("aisle seats").messages)
    chat.clear()
    assert found(chat.search("aisle seats")) == ["Ada likes aisle seats"]
    assert values.search((), "aisle seats")[0].key == "seat"
    assert chat.search("flight") == []


def test_other_knowledge_and_other_namespaces_move_no_score(tmp_path):
    """What lies under a prefix is ranked as if it were alone."""

    def scores(folder, *, crowded):
        with open_memory(folder, embedder=HashingEmbedder(), clock=ManualClock()) as memory:
            values = memory.values(tenant="acme")
            for n in range(20):
                values.put(("users", "ada"), str(n), {}, texts=[f"Ada sails to harbour {n} in the {n % 3} wind"])
                if crowded:
                    values.put(("users", "bob"), str(n), {}, texts=[f"Bob sails to harbour {n} with wind wind"] * 2)
            memory.flush()
            return [(v.key, round(v.score, 5)) for v in values.search(("users", "ada"), "harbour 7 wind", limit=20)]

    assert scores(tmp_path / "alone", crowded=False) == scores(tmp_path / "crowded", crowded=True)


def test_what_is_put_during_a_search_comes_from_no_other_namespace(opened):
    """Between reading what lies under the prefix and ranking it, a model may take its time."""

    class Slow(HashingEmbedder):
        meanwhile = staticmethod(lambda: None)

        def embed_query(self, text):
            self.meanwhile()
            return super().embed_query(text)

    embedder = Slow()
    values = opened(embedder=embedder).values()
    values.put(("a",), "k", {}, texts=["Sailing on Sunday"])
    embedder.meanwhile = lambda: values.put(("b",), "new", {}, texts=["Sailing on Sunday"])
    assert keys(values.search(("a",), "sailing on Sunday")) == ["k"]
    embedder.meanwhile = lambda: values.delete(("a",), "k")
    assert values.search(("a",), "on Sunday sailing") == []


def test_what_is_in_ram_is_what_a_reader_of_the_ledger_sees(memory, values):
    """After puts, other puts and deletes: the same scores once it was read anew."""
    for n in range(30):
        values.put((str(n % 3),), str(n), {}, texts=[f"Sailing to harbour {n}", f"Wind {n % 5}"])
    values.search((), "wind")
    for n in range(0, 30, 2):
        values.put((str(n % 3),), str(n), {}, texts=[f"Wind {n % 5}", f"Trains {n}"])
    for n in range(0, 30, 5):
        values.delete((str(n % 3),), str(n))
    memory.flush()
    queries = ["sailing 7", "trains 4 wind", "harbour"]
    chat = memory.session("chat", user_id="ada")

    def answers():
        own = [[(v.key, round(v.score, 5)) for v in values.search((), q, limit=30)] for q in queries]
        return own, [[(h.entry.key, round(h.score, 5)) for h in chat.search(q, k=60)] for q in queries]

    before = answers()
    memory._core.parts.residents.forget()
    assert answers() == before


def test_a_text_deleted_or_changed_as_an_entry_leaves_the_value(memory, values):
    """It is found by what is left, and by the new text; a put makes it whole."""
    chat = memory.session("chat", user_id="ada")
    texts = ["Sailing on Sunday", "Trains on Monday"]
    values.put(NOTES, "k", {"n": 1}, texts=texts)
    by_text = {e.content: e.key for e in entries_of(memory, user_id="ada")}
    assert chat.entries.delete(by_text[texts[0]]) == 1
    chat.entries.update(by_text[texts[1]], content="Tomatoes ripen")
    assert values.get(NOTES, "k").value == {"n": 1}
    assert [values.search((), q)[0].score > 0 for q in ("sailing", "trains", "tomatoes")] == [False, False, True]
    values.put(NOTES, "k", {"n": 2}, texts=texts)
    assert [values.search((), q)[0].score > 0 for q in ("sailing", "trains", "tomatoes")] == [True, True, False]
    assert sorted(e.content for e in entries_of(memory, user_id="ada")) == texts
    chat.entries.update(entries_of(memory, user_id="ada")[0].key, content=texts[1])
    values.put(NOTES, "k", {"n": 2}, texts=texts)
    assert sorted(e.content for e in entries_of(memory, user_id="ada")) == texts


def test_what_calls_itself_a_value_is_none(memory, values):
    """Knowledge with such metadata is no way into a namespace."""
    values.put(NOTES, "k", {"n": 1})
    about = {"kind": "value", "namespace": ["notes"], "key": "k"}
    memory.session("chat", user_id="ada").remember("Sailing on Sunday", metadata=about)
    assert [(v.key, v.score) for v in values.search((), "sailing")] == [("k", None)]
    values.delete(NOTES, "k")
    assert found(memory.session("chat", user_id="ada").search("sailing")) == ["Sailing on Sunday"]


def test_without_an_embedder_values_are_found_by_their_words(opened):
    """As everything is."""
    values = opened(embedder="none").values()
    values.put(NOTES, "a", {}, texts=["Sailing on Sunday"])
    values.put(NOTES, "b", {}, texts=["Tomatoes ripen"])
    assert [(v.key, v.score > 0) for v in values.search((), "sail")] == [("a", True), ("b", False)]


def test_values_are_found_after_their_index_was_lost(opened, folder):
    """reindex() makes it from the ledger, embedding nothing again; the same for a tenant's own."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder)
    for values in (memory.values(user_id="ada"), memory.values()):
        values.put(NOTES, "k", {}, texts=["Sailing on Sunday"])
    memory.flush()
    memory.reindex()
    assert index_keys(memory) == live_keys(memory)
    assert len(index_keys(memory)) == len(embedder.texts) == 2
    memory.close()
    assert keys(opened(embedder=embedder).values().search((), "sunday")) == ["k"]


# -- time to live


def test_a_value_expires_and_is_never_shown(opened, clock):
    """Not by get, search, namespaces or any session's search, swept or not; sweep() removes it with its texts."""
    memory = opened(clock=clock)
    values = memory.values(user_id="ada")
    values.put(NOTES, "short", {}, texts=["Sailing"], ttl=10)
    values.put(("other",), "long", {}, texts=["Sailing far"], ttl=100)
    values.put(("for ever",), "k", {}, texts=["Sailing for ever"])
    assert values.get(NOTES, "short").expires_at == clock() + timedelta(minutes=10)
    chat = memory.session("chat", user_id="ada")
    assert len(chat.search("sailing")) == 3
    clock.advance(minutes=10)
    assert values.get(NOTES, "short") is None
    assert sorted(keys(values.search())) == sorted(keys(values.search((), "sailing"))) == ["k", "long"]
    assert values.namespaces() == [("for ever",), ("other",)]
    assert sorted(found(chat.search("sailing"))) == ["Sailing far", "Sailing for ever"]
    assert items(memory) == 2  # the reads above let others live anew, and swept


def test_sweep_removes_all_that_has_expired_of_this_scope(opened, clock):
    """However many; the texts go with it, tombstones stay."""
    memory = opened(clock=clock, embedder="none")
    values, others = memory.values(user_id="ada"), memory.values(user_id="bob")
    values.batch([Put((str(n % 9),), str(n), {}, [f"Text {n}"], ttl=1) for n in range(250)])
    values.put(NOTES, "k", {}, texts=["Stays"])
    others.put(NOTES, "k", {}, ttl=1)
    assert values.sweep() == 0
    clock.advance(minutes=1)
    assert values.namespaces() == [NOTES]
    assert items(memory) == 252
    assert values.sweep() == 250
    assert values.sweep() == 0
    assert items(memory) == 2
    assert [e.content for e in entries_of(memory, user_id="ada")] == ["Stays"]
    assert others.sweep() == 1
    assert memory.values(user_id="nobody").sweep() == 0


def test_a_put_sweeps_a_little(opened, clock):
    """So that without any sweeper what has expired goes, and no put takes long."""
    memory = opened(clock=clock, embedder="none")
    values = memory.values()
    values.batch([Put(NOTES, str(n), {}, ttl=1) for n in range(150)])
    clock.advance(minutes=1)
    values.put(NOTES, "new", {})
    assert items(memory) == 51
    values.put(NOTES, "new", {})
    assert items(memory) == 1


def test_reads_with_refresh_let_a_value_live_on(opened, clock):
    """Its texts, too; without refresh it goes when it was to go, and one that has gone does not come back."""
    memory = opened(clock=clock)
    values = memory.values(user_id="ada")
    chat = memory.session("chat", user_id="ada")
    for key in ("get", "search", "query", "never"):
        values.put((key,), key, {}, texts=[f"Sailing {key}"], ttl=10)
    chat.search("sailing")  # so that search has it in RAM
    for _ in range(3):
        clock.advance(minutes=9)
        assert values.get(("get",), "get") is not None
        assert keys(values.search(("search",))) == ["search"]
        assert keys(values.search(("query",), "sailing")) == ["query"]
        values.get(("never",), "never", refresh=False)
        values.search(("never",), refresh=False)
        values.search(("never",), "sailing", refresh=False)
    assert sorted(keys(values.search((), refresh=False))) == ["get", "query", "search"]
    assert len(chat.search("sailing")) == 3
    soon = clock() + timedelta(minutes=10)
    lives = {e.metadata["key"]: e.expires_at for e in entries_of(memory, user_id="ada") if e.expires_at > clock()}
    assert lives == {"get": soon, "search": soon, "query": soon}
    memory._core.parts.residents.forget()  # the same from the ledger
    assert len(chat.search("sailing")) == 3
    assert values.get(("never",), "never") is None
    clock.advance(minutes=10)
    assert values.search() == []
    assert chat.search("sailing") == []


def test_a_read_that_can_write_nothing_still_reads(memory, values, monkeypatch):
    """The value then goes when it was to go; stats() tells why."""
    values.put(NOTES, "k", {"n": 1}, ttl=10)
    expires = values.get(NOTES, "k", refresh=False).expires_at

    def full(name):
        raise StorageFull("no space left", path="x")

    monkeypatch.setattr("neuralflow_memory._failpoints.hook", full)
    assert values.get(NOTES, "k").value == {"n": 1}
    with pytest.raises(StorageFull):
        values.put(NOTES, "k", {"n": 2})
    monkeypatch.undo()
    assert "no space left" in memory.stats()["last_error"]
    assert values.get(NOTES, "k", refresh=False).expires_at == expires


def test_a_put_that_was_overtaken_is_not_older_than_its_value(opened, clock):
    """Clocks are read before the transaction."""
    values = opened(clock=clock).values()
    values.put(NOTES, "k", {"n": 1})
    clock.advance(minutes=-5)
    values.put(NOTES, "k", {"n": 2})
    stored = values.get(NOTES, "k")
    assert (stored.value, stored.updated_at) == ({"n": 2}, stored.created_at)


def test_a_put_gives_its_own_time_to_live(opened, clock):
    """Also to texts that stay: longer, shorter, none, or again."""
    memory = opened(clock=clock, embedder="none")
    values = memory.values(user_id="ada")
    chat = memory.session("chat", user_id="ada")
    for ttl, later in ((10, False), (None, True), (20, False), (100, True)):
        values.put(NOTES, "k", {"ttl": ttl}, texts=["Sailing"], ttl=ttl)
        assert len(chat.search("sailing")) == 1
        clock.advance(minutes=50)
        assert bool(chat.search("sailing")) == later
        assert (values.get(NOTES, "k", refresh=False) is not None) == later
    clock.advance(minutes=100)
    values.put(NOTES, "k", {"again": True}, texts=["Sailing"])
    again = values.get(NOTES, "k")
    assert again.created_at == again.updated_at == clock()
    assert len(chat.search("sailing")) == 1


# -- scopes

SCOPES = [
    {},
    {"user_id": "ada"},
    {"user_id": "bob"},
    {"tenant": "acme"},
    {"tenant": "acme-corp"},
    {"tenant": "acme", "user_id": "ada"},
    {"tenant": "ada"},
    {"user_id": "null"},
    {"user_id": "None"},
    {"user_id": "default"},
    {"user_id": '", null'},
]


def test_no_two_scopes_share_anything(memory):
    """Not by get, search, query, namespaces, delete or sweep; not with a session of whatever name either."""
    for n, scope in enumerate(SCOPES):
        memory.values(**scope).put(("a",), "k", {"n": n}, texts=[f"Sailing {n}"])
    for n, scope in enumerate(SCOPES):
        values = memory.values(**scope)
        assert values.get(("a",), "k").value == {"n": n}
        assert [v.value["n"] for v in values.search()] == [v.value["n"] for v in values.search((), "sailing")] == [n]
    memory.values().delete(("a",), "k")
    memory.values().put(("only",), "k", {})
    for n, scope in enumerate(SCOPES[1:], start=1):
        assert memory.values(**scope).namespaces() == [("a",)]
        assert memory.values(**scope).get(("a",), "k").value == {"n": n}


@pytest.mark.parametrize("tenant", [None, "acme"])
def test_what_a_tenants_values_say_is_in_nobodys_search(memory, tenant):
    """Neither a user's nor a userless session's, whatever it is called; and it is no session itself."""
    values = memory.values(tenant=tenant)
    values.put(NOTES, "k", {}, texts=["Sailing on Sunday"])
    for session in ("chat", "null", "None", "-", '", null', "[]", tenant or "default"):
        for user in (None, "ada"):
            chat = memory.session(session, user_id=user, tenant=tenant)
            chat.add("Hello")
            assert "Sailing on Sunday" not in found(chat.search("sailing on Sunday"))
            assert "Sailing on Sunday" not in [e.content for e in chat.entries.list()]
    assert "" not in {s.session_id for s in memory.sessions(tenant=tenant)}
    assert keys(values.search((), "sailing")) == ["k"]


def test_the_default_user_is_taken_as_for_sessions(opened):
    """values() of a memory that was opened for a user are that user's."""
    memory = opened(user_id="ada")
    memory.values().put(NOTES, "k", {"n": 1})
    assert memory.values(user_id="ada").get(NOTES, "k").value == {"n": 1}
    assert repr(memory.values()) == "Values(tenant='default', user_id='ada')"


def test_a_principal_may_do_what_the_policy_says(opened):
    """By default what carries its own user id; each kind of operation is asked about before anything is done."""
    asked = []

    class Policy:
        def allows(self, principal, action, scope):
            asked.append((principal, action, scope.owner))
            return action == "read"

    memory = opened()
    memory.values(user_id="ada", principal="ada").put(NOTES, "k", {"n": 1})
    for stranger in (memory.values(user_id="ada", principal="eve"), memory.values(principal="ada")):
        for call in (
            lambda v: v.get(NOTES, "k"),
            lambda v: v.put(NOTES, "k", {}),
            lambda v: v.delete(NOTES, "k"),
            Values.sweep,
        ):
            with pytest.raises(AccessDenied):
                call(stranger)
    memory.close()
    values = opened(policy=Policy()).values(tenant="acme", principal="eve")
    assert values.search() == []
    for call, action in (
        (lambda: values.batch([Get(NOTES, "k"), Put(NOTES, "k", {})]), "write"),
        (values.sweep, "delete"),
    ):
        with pytest.raises(AccessDenied):
            call()
        assert asked[-1] == ("eve", action, ("acme", None, None))
    with pytest.raises(AccessDenied):
        values.delete(NOTES, "k")


def test_the_tenants_own_scope_is_no_users_and_no_sessions():
    """Its owner holds neither."""
    assert Scope("acme").owner == ("acme", None, None)
    assert len({Scope("acme").owner, Scope("acme", "None").owner, Scope("acme", None, "None").owner}) == 3


# -- threads, loops, size


def test_threads_lose_no_put(memory, values):
    """Eight at a time, on keys of their own and on a common one."""

    def work(n):
        for i in range(25):
            values.put((str(n),), str(i), {"n": i}, texts=[f"Thread {n} text {i}"])
            values.put(("common",), "k", {"n": n}, texts=[f"Common {n}"])
            assert values.get((str(n),), str(i)).value == {"n": i}
            values.search((), "common", limit=3)

    in_threads(*(lambda n=n: work(n) for n in range(8)))
    assert len(values.search(limit=1000)) == 201
    memory.flush()
    assert len(entries_of(memory, user_id="ada")) == 201
    assert index_keys(memory) == live_keys(memory)
    winner = values.get(("common",), "k").value["n"]
    assert [e.content for e in entries_of(memory, user_id="ada") if "Common" in e.content] == [f"Common {winner}"]


@pytest.mark.parametrize("name", [n for n, m in vars(Values).items() if inspect.isfunction(m) and n[0] not in "_a"])
def test_every_operation_has_an_async_twin(name):
    """The same parameters, and a coroutine."""
    twin = getattr(Values, f"a{name}")
    assert inspect.iscoroutinefunction(twin)
    assert inspect.signature(twin).parameters == inspect.signature(getattr(Values, name)).parameters


def test_the_twins_do_the_same_from_one_event_loop_after_another(memory, values):
    """Tasks side by side; nothing is bound to the loop that came first."""

    async def work(n):
        await asyncio.gather(*(values.aput(("loop", str(n)), str(i), {"n": i}, texts=[f"Text {i}"]) for i in range(20)))
        assert len(await values.asearch(("loop", str(n)), "text 7", limit=50)) == 20
        assert (await values.aget(("loop", str(n)), "7")).value == {"n": 7}
        await values.adelete(("loop", str(n)), "7")
        assert await values.abatch([Get(("loop", str(n)), "7")]) == [None]
        assert ("loop", str(n)) in await values.anamespaces()
        assert await values.asweep() == 0

    for n in range(3):
        asyncio.run(work(n))
    gc.collect()
    assert len(values.search(limit=100)) == 57


def test_a_closed_memory_says_so(opened):
    """As everything does."""
    memory = opened()
    values = memory.values()
    memory.close()
    for call in (lambda: values.get(NOTES, "k"), lambda: values.put(NOTES, "k", {}), values.sweep, memory.values):
        with pytest.raises(ClosedError):
            call()


def test_one_value_is_read_written_and_listed_by_the_index(memory, values):
    """No statement of a get, a put or a listing of namespaces scans the table."""
    values.batch([Put(("n", str(n % 5)), str(n), {}) for n in range(300)])
    ledger = memory._core.parts.ledger
    statements = []
    with ledger._db.read() as db:
        db.set_trace_callback(statements.append)
    with ledger._db.lock:  # to set it while another thread writes would be a deadlock, in C
        ledger._db._writer.set_trace_callback(statements.append)
    values.get(("n", "1"), "1")
    values.put(("n", "1"), "1", {"n": 1}, texts=["Sailing"], ttl=1)
    values.put(("n", "1"), "1", {"n": 1}, texts=["Sailing", "Trains"], ttl=1)
    values.get(("n", "1"), "1")
    values.delete(("n", "1"), "2")
    assert len(values.namespaces(prefix=("n",))) == 5
    with ledger._db.lock:
        ledger._db._writer.set_trace_callback(None)
    with ledger._db.read() as db:
        db.set_trace_callback(None)
        about = [s for s in statements if "item" in s]
        plans = [row[3] for s in about for row in db.execute(f"EXPLAIN QUERY PLAN {s}")]
    assert any("SEARCH items USING PRIMARY KEY" in p for p in plans)
    assert any("items_expiring" in p for p in plans)
    assert [p for p in plans if "SCAN item" in p or "TEMP B-TREE" in p] == []
