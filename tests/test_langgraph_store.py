"""`NeuralFlowStore` keeps LangGraph's contract, agrees with its InMemoryStore, and serves real graphs and agents."""

import asyncio
import itertools
import subprocess
import sys
import textwrap
from datetime import timedelta
from types import MappingProxyType

import pytest
from conftest import CountingEmbedder, in_threads, wait_until
from hypothesis import given
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.tools import ToolRuntime, tool
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    Item,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchItem,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore
from typing_extensions import TypedDict

from neuralflow_memory import ConfigError, FilterError, InputError, open_memory
from neuralflow_memory.langchain import NeuralFlowStore
from neuralflow_memory.testing import ManualClock

NOTES = ("notes",)


@pytest.fixture
def store(memory):
    return NeuralFlowStore(memory, user_id="ada")


@pytest.fixture
def clock():
    return ManualClock()


def keys(found):
    return [item.key for item in found]


# -- the contract, line by line


def test_results_stand_in_the_order_of_the_operations(store):
    """Item or None, list of SearchItem, None for a put, list of tuples; reads see the state before the writes."""
    store.put(NOTES, "a", {"n": 1})
    ops = [
        PutOp(NOTES, "a", {"n": 2}),
        GetOp(NOTES, "a"),
        PutOp(NOTES, "b", {"n": 1}),
        SearchOp(NOTES),
        PutOp(NOTES, "b", {"n": 2}),
        ListNamespacesOp(),
        GetOp(NOTES, "b"),
        PutOp(NOTES, "absent", None),
    ]
    done = store.batch(iter(ops))
    assert [type(r) for r in done] == [type(None), Item, type(None), list, type(None), list, type(None), type(None)]
    assert done[1].value == {"n": 1}
    assert [(type(i), i.value, i.score) for i in done[3]] == [(SearchItem, {"n": 1}, None)]
    assert done[5] == [NOTES]
    assert {i.key: i.value["n"] for i in store.search(())} == {"a": 2, "b": 2}
    assert store.batch([]) == []


async def test_the_async_half_does_the_same(store):
    """Through the core's own twins."""
    await store.aput(NOTES, "a", {"text": "Sailing on Sunday"})
    assert (await store.aget(NOTES, "a")).value == {"text": "Sailing on Sunday"}
    assert keys(await store.asearch((), query="sailing")) == ["a"]
    assert await store.alist_namespaces(prefix=NOTES) == [NOTES]
    results = await store.abatch([PutOp(NOTES, "a", None), GetOp(NOTES, "a")])
    assert results[1].key == "a"
    await store.adelete(NOTES, "a")
    assert await store.aget(NOTES, "a") is None


LABELS = ["", "a.b", "a\0b", 5, None]


@pytest.mark.parametrize("label", LABELS)
async def test_every_operation_of_a_batch_has_its_namespace_checked(store, label):
    """As the methods do it, and nothing of the batch is done."""
    pattern = MatchCondition("suffix", ("x", label))
    ops = [
        GetOp(("x", label), "k"),
        PutOp(("x", label), "k", {}),
        PutOp(("x", label), "k", None),
        SearchOp((label,)),
        ListNamespacesOp((pattern,)),
    ]
    for op in ops:
        with pytest.raises(InvalidNamespaceError):
            store.batch([PutOp(NOTES, "fine", {}), op])
        with pytest.raises(InvalidNamespaceError):
            await store.abatch([PutOp(NOTES, "fine", {}), op])
    assert store.search(()) == []


def test_put_refuses_the_root_and_langgraphs_own(store):
    """An empty namespace, and the root label `langgraph`."""
    for namespace in ((), ("langgraph", "x")):
        with pytest.raises(InvalidNamespaceError):
            store.put(namespace, "k", {})


def test_a_prefix_means_whole_labels_and_the_empty_one_everything(store):
    """("tenant", "acme") is no prefix of ("tenant", "acme-corp"); no wildcards, and case counts."""
    names = [("tenant", "acme"), ("tenant", "acme-corp"), ("tenant", "acme", "x"), ("tenant", "ACME"), ("tenant%",)]
    for namespace in names:
        store.put(namespace, "k", {"text": "Sailing"})
    for query in (None, "sailing"):
        assert {i.namespace for i in store.search(("tenant", "acme"), query=query)} == {names[0], names[2]}
        assert {i.namespace for i in store.search((), query=query)} == set(names)
        for prefix in (
            ("tenant", "acm"),
            ("ten",),
            ("%",),
            ("tenant", "*"),
            ("tenant", "acme_corp"),
            ("tenant", "Acme"),
        ):
            assert store.search(prefix, query=query) == []


def test_namespaces_are_listed_sorted_cut_and_matched_by_segment(store):
    """`*` stands for one label in prefix or suffix; limit and offset come last, 100 by default."""
    names = [
        ("a", "b", "c"),
        ("a", "b", "d", "e"),
        ("a", "b", "d", "i"),
        ("a", "b", "f"),
        ("a", "c", "f"),
        ("b", "x", "f"),
    ]
    for namespace in names:
        store.put(namespace, "k", {})
    assert store.list_namespaces() == names
    assert store.list_namespaces(prefix=("a", "b"), max_depth=3) == [("a", "b", "c"), ("a", "b", "d"), ("a", "b", "f")]
    assert store.list_namespaces(suffix=("f",)) == names[3:]
    assert store.list_namespaces(prefix=("a", "*", "f")) == names[3:5]
    assert store.list_namespaces(prefix=("*", "x")) == names[5:]
    assert store.list_namespaces(suffix=("d", "*")) == names[1:3]
    assert store.list_namespaces(prefix=("a",), suffix=("f",), limit=1, offset=1) == [("a", "c", "f")]
    conditions = (
        MatchCondition("prefix", ("a",)),
        MatchCondition("prefix", ("*", "c")),
        MatchCondition("suffix", ("f",)),
    )
    assert store.batch([ListNamespacesOp(conditions)]) == [[("a", "c", "f")]]
    with pytest.raises(ValueError, match="infix"):
        store.batch([ListNamespacesOp((MatchCondition("infix", ("a",)),))])
    for n in range(120):
        store.put(("many", str(n)), "k", {})
    assert len(store.list_namespaces()) == 100


def test_filters_compare_values_and_know_their_operators(store):
    """What is missing compares as false, not with an error; an unknown operator is a ValueError."""
    store.put(NOTES, "a", {"n": 1, "tags": ["x", {"y": 1}], "deep": {"p": 1, "q": None}})
    store.put(NOTES, "b", {"n": 2, "color": "red"})
    store.put(NOTES, "c", {"text": "no number"})
    for query in (None, "number"):
        find = lambda wanted, query=query: sorted(keys(store.search(NOTES, filter=wanted, query=query)))
        assert find({"n": 1}) == find({"n": {"$eq": 1}}) == find({"n": {"$lt": 2}}) == ["a"]
        assert find({"n": {"$gte": 1}}) == find({"n": {"$gt": 0.5, "$lte": 2}}) == ["a", "b"]
        assert find({"n": {"$ne": 1}}) == ["b", "c"]
        assert find({"n": {"$gt": 0}, "color": "red"}) == ["b"]
        assert find({"deep": {"p": 1}}) == find({"tags": ["x", {"y": {"$gte": 1}}]}) == ["a"]
        assert find({"tags": ["x"]}) == find({"color": {"$gt": 1}}) == []
    with pytest.raises(ValueError, match=r"\$like") as told:
        store.search(NOTES, filter={"n": {"$like": 1}})
    assert isinstance(told.value, FilterError)


def test_limit_and_offset_apply_after_the_filter(memory, store):
    """The default limit is 10."""
    store.batch([PutOp(NOTES, str(n), {"n": n, "text": f"number {n}"}) for n in range(300)])
    memory.flush()
    assert len(store.search(NOTES)) == len(store.search(NOTES, query="number")) == 10
    for query in (None, "number 290"):
        pages = [
            store.search(NOTES, query=query, filter={"n": {"$gte": 280}}, limit=8, offset=at) for at in (0, 8, 16, 24)
        ]
        assert [len(page) for page in pages] == [8, 8, 4, 0]
        assert sorted(i.value["n"] for page in pages for i in page) == list(range(280, 300))
    assert keys(store.search(NOTES, query="number 290", limit=1)) == ["290"]


def test_search_scores_by_the_best_field_and_fills_up(memory):
    """0..1, best first; what has no vector comes last, without a score; an empty query is none."""
    store = NeuralFlowStore(memory, index={"fields": ["text", "parts[*].text"]})
    store.put(NOTES, "parts", {"parts": [{"text": "Tomatoes"}, {"text": "Sailing on Sunday"}]})
    store.put(NOTES, "text", {"text": "On Sunday grandmother went sailing with three other people, and it rained"})
    store.put(NOTES, "hidden", {"text": "Sailing on Sunday"}, index=False)
    store.put(NOTES, "other", {"other": "Sailing on Sunday"})
    store.put(NOTES, "named", {"other": "Invoices", "text": "Sailing on Sunday"}, index=["other"])
    found = store.search(NOTES, query="sailing on Sunday")
    assert keys(found)[:3] == ["parts", "text", "named"]
    assert set(keys(found)[3:]) == {"hidden", "other"}
    assert 1 >= found[0].score > found[1].score > found[2].score == 0.0
    assert [i.score for i in found[3:]] == [None, None]
    assert store.get(NOTES, "hidden").value == {"text": "Sailing on Sunday"}
    for query in (None, "", "  "):
        assert {i.score for i in store.search(NOTES, query=query)} == {None}


def test_what_is_indexed_by_default_is_the_whole_value(opened):
    """As JSON, keys sorted; unchanged texts are not embedded again, and what has gone is not found."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder)
    store = NeuralFlowStore(memory)
    store.put(NOTES, "k", {"b": "Sailing", "a": MappingProxyType({"x": "Zoë"})})
    memory.flush()
    assert embedder.texts == ['{"a": {"x": "Zoë"}, "b": "Sailing"}']
    store.put(NOTES, "k", {"a": {"x": "Zoë"}, "b": "Sailing"})
    memory.flush()
    assert len(embedder.texts) == 1
    store.put(NOTES, "k", {"b": "Trains"})
    assert store.search(NOTES, query="sailing")[0].score == 0
    assert store.search(NOTES, query="trains")[0].score > 0
    store.delete(NOTES, "k")
    assert store.search((), query="trains") == []


def test_values_are_json_and_read_back_equal(store):
    """Any mapping is taken; what is no JSON is a ValueError."""
    value = {"text": "Zoë ✈️ 東京", "none": None, "nested": [{"a": [1, 2.5, False]}]}
    store.put(NOTES, "k", MappingProxyType(value))
    item = store.get(NOTES, "k")
    assert item.value == value
    assert type(item.value) is dict
    assert Item(**item.dict()) == item
    item.value["text"] = "changed"
    assert store.get(NOTES, "k").value == value
    for wrong in ({"x": {1}}, {"x": float("inf")}, {"x": object()}):
        with pytest.raises(InputError):
            store.put(NOTES, "wrong", wrong)
        with pytest.raises(InputError):
            store.put(NOTES, "wrong", wrong, index=False)
    assert store.get(NOTES, "wrong") is None
    store.put(NOTES, 5, {"n": 5})
    assert store.get(NOTES, "5").value == {"n": 5}


def test_created_is_kept_over_updates(opened, clock):
    """In UTC, with its zone."""
    store = NeuralFlowStore(opened(clock=clock))
    store.put(NOTES, "k", {"n": 1})
    begun = clock()
    clock.advance(minutes=1)
    store.put(NOTES, "k", {"n": 2})
    item = store.get(NOTES, "k")
    assert (item.created_at, item.updated_at) == (begun, begun + timedelta(minutes=1))
    assert item.created_at.utcoffset() == timedelta(0)


def test_a_store_is_true_and_a_basestore(store):
    """`store=other.store or self.store` takes it, though it is empty."""
    assert store
    assert isinstance(store, BaseStore)
    assert not hasattr(store, "__len__")
    assert repr(store) == "NeuralFlowStore(Values(tenant='default', user_id='ada'), fields=['$'])"


# -- time to live


def test_time_to_live_is_in_minutes_and_refreshed_by_get_and_search(opened, clock):
    """By the store's default, by the configuration, or as the call says."""
    memory = opened(clock=clock)
    store = NeuralFlowStore(memory, ttl={"default_ttl": 10})
    careless = NeuralFlowStore(memory, ttl={"refresh_on_read": False})
    assert store.supports_ttl
    for key in ("get", "search", "query", "unread", "careless"):
        store.put((key,), "k", {"text": "Sailing"})
    store.put(("for ever",), "k", {}, ttl=None)
    store.put(("short",), "k", {}, ttl=0.5)
    for _ in range(3):
        clock.advance(minutes=9)
        assert store.get(("get",), "k") is not None
        assert len(store.search(("search",))) == 1
        assert len(store.search(("query",), query="sailing")) == 1
        store.get(("unread",), "k", refresh_ttl=False)
        careless.get(("careless",), "k")
        careless.search(("careless",))
        careless.search(("careless",), query="sailing")
    assert store.list_namespaces() == [("for ever",), ("get",), ("query",), ("search",)]
    assert len(store.search((), query="sailing", refresh_ttl=False)) == 4
    clock.advance(minutes=11)
    assert store.get(("get",), "k") is None
    assert store.list_namespaces() == [("for ever",)]


def test_a_sweep_removes_what_has_expired(opened, clock):
    """At once, or by the sweeper that was started."""
    memory = opened(clock=clock, embedder="none")
    store = NeuralFlowStore(memory, ttl={"default_ttl": 1, "sweep_interval_minutes": 1})
    store.put(NOTES, "a", {"n": 1})
    clock.advance(minutes=1)
    assert store.sweep_ttl() == 1
    assert store.sweep_ttl() == 0
    store.put(NOTES, "b", {"n": 1})
    clock.advance(minutes=1)
    assert memory.stats()["entries"] == 1
    sweeper = store.start_ttl_sweeper(0.0001)
    assert store.start_ttl_sweeper(0.0001) is sweeper
    wait_until(lambda: memory.stats()["entries"] == 0)
    assert store.stop_ttl_sweeper(timeout=30)
    assert sweeper.result(timeout=0) is None
    assert store.stop_ttl_sweeper()


def test_a_sweeper_ends_with_its_memory_and_tells_what_went_wrong(opened, monkeypatch):
    """It can be started again; stopping tells whether it has ended."""
    memory = opened(embedder="none")
    store = NeuralFlowStore(memory)
    assert store.stop_ttl_sweeper()
    slow = store.start_ttl_sweeper()
    assert store.stop_ttl_sweeper(timeout=30)
    assert slow.done()
    monkeypatch.setattr(store, "sweep_ttl", lambda: 1 / 0)
    assert isinstance(store.start_ttl_sweeper(0.0001).exception(timeout=30), ZeroDivisionError)
    monkeypatch.undo()
    last = store.start_ttl_sweeper(0.0001)
    memory.close()
    assert last.result(timeout=30) is None


# -- against InMemoryStore

NUMBERS = itertools.count()
NAMESPACES = st.lists(st.sampled_from(["a", "b", "ab", "A"]), min_size=1, max_size=3).map(tuple)
PREFIXES = st.lists(st.sampled_from(["a", "b", "ab", "A"]), max_size=2).map(tuple)
PATTERNS = st.lists(st.sampled_from(["a", "b", "ab", "*"]), min_size=1, max_size=2).map(tuple)
KEYS = st.sampled_from(["k", "l", "K", ""])
LEAF = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["x", "y", "1"])
TREE = st.recursive(
    LEAF, lambda t: st.lists(t, max_size=2) | st.dictionaries(st.sampled_from("pq"), t, max_size=2), max_leaves=4
)
VALUES = st.fixed_dictionaries({"n": st.integers(-3, 3) | st.floats(-3, 3)}, optional={"p": TREE, "q": TREE})
COMPARED = st.dictionaries(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), st.integers(-3, 3), min_size=1, max_size=2)
EQUALITY = st.dictionaries(st.sampled_from(["$eq", "$ne"]), TREE, min_size=1)
CONDITION = st.recursive(
    LEAF | EQUALITY,
    lambda t: st.lists(t, max_size=2) | st.dictionaries(st.sampled_from("pq"), t, max_size=2),
    max_leaves=4,
)
FILTERS = st.fixed_dictionaries(
    {}, optional={"n": COMPARED | EQUALITY | st.integers(-3, 3), "p": CONDITION, "q": CONDITION}
)


# Every value has a number under n: comparing what is missing raises in InMemoryStore.
def op(kind, *arguments):
    return st.tuples(*arguments).map(lambda given: kind(*given))


CONDITIONS = st.lists(op(MatchCondition, st.sampled_from(["prefix", "suffix"]), PATTERNS), max_size=2).map(tuple)
OPS = st.one_of(
    op(PutOp, NAMESPACES, KEYS, VALUES, st.sampled_from([False, None])),
    op(PutOp, NAMESPACES, KEYS, st.none()),
    op(GetOp, NAMESPACES, KEYS),
    op(SearchOp, PREFIXES, st.none() | FILTERS, st.just(1000)),
    op(ListNamespacesOp, CONDITIONS, st.none() | st.integers(0, 3), st.integers(0, 5), st.integers(0, 2)),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with open_memory(tmp_path_factory.mktemp("store") / "m", embedder="none") as memory:
        yield memory


def plain(item):
    return (item.namespace, item.key, repr(item.value))


def expected(model, op):
    """What InMemoryStore answers; it also lists namespaces that were read or emptied, so those are taken away first."""
    if isinstance(op, ListNamespacesOp):
        full = InMemoryStore()
        full.batch([PutOp(i.namespace, i.key, i.value) for i in model.search((), limit=1000)])
        return full.batch([op])[0]
    result = model.batch([op])[0]
    return sorted(map(plain, result)) if isinstance(op, SearchOp) else result and plain(result)


@given(st.lists(st.lists(OPS, min_size=1, max_size=4), max_size=8))
def test_it_answers_as_the_in_memory_store(shared, batches):
    """Put, get, delete, search without a query and list_namespaces, one by one and in batches; the order is our own."""
    store, model = NeuralFlowStore(shared, user_id=f"user {next(NUMBERS)}"), InMemoryStore()
    for ops in batches:
        reads = [op for op in ops if not isinstance(op, PutOp)]
        wanted = [expected(model, op) for op in reads]
        given = [r for op, r in zip(ops, store.batch(ops), strict=True) if not isinstance(op, PutOp)]
        shown = [
            sorted(map(plain, r))
            if isinstance(op, SearchOp)
            else r
            if isinstance(op, ListNamespacesOp)
            else r and plain(r)
            for op, r in zip(reads, given, strict=True)
        ]
        assert shown == wanted
        model.batch([op for op in ops if isinstance(op, PutOp)])
    assert sorted(map(plain, store.search((), limit=1000))) == sorted(map(plain, model.search((), limit=1000)))


# -- scopes


def test_tenants_and_users_never_see_each_others_items(memory):
    """Namespaces live inside one tenant, or one user of it."""
    ids = [{}, {"tenant": "acme"}, {"tenant": "acme-corp"}, {"user_id": "ada"}, {"user_id": "ada", "tenant": "acme"}]
    stores = [NeuralFlowStore(memory, **i) for i in ids]
    for n, store in enumerate(stores):
        store.put(("memories",), "k", {"text": f"Sailing {n}"})
        store.put(("own", str(n)), "k", {"text": "Sailing"})
    for n, store in enumerate(stores):
        assert store.get(("memories",), "k").value == {"text": f"Sailing {n}"}
        assert store.list_namespaces() == [("memories",), ("own", str(n))]
        assert len(store.search(())) == len(store.search((), query="sailing")) == 2
    stores[0].delete(("memories",), "k")
    assert [s.get(("memories",), "k") is None for s in stores] == [True, False, False, False, False]


def test_a_users_chat_finds_what_the_users_store_holds(memory):
    """And a tenant's store is in nobody's search."""
    NeuralFlowStore(memory, user_id="ada").put(NOTES, "k", {"text": "Ada sails"}, index=["text"])
    NeuralFlowStore(memory).put(NOTES, "k", {"text": "Everybody sails"}, index=["text"])
    assert [h.entry.content for h in memory.session("chat", user_id="ada").search("sails")] == ["Ada sails"]
    assert memory.session("chat").search("sails") == []


# -- made wrong


def test_options_that_make_no_store_are_named(memory):
    """ConfigError says what to pass."""
    with pytest.raises(ConfigError, match="open_memory"):
        NeuralFlowStore(memory, index={"dims": 3, "embed": lambda texts: [[0.0] * 3 for _ in texts]})
    values = memory.values(user_id="ada")
    with pytest.raises(ConfigError, match="not both"):
        NeuralFlowStore(memory, values=values)
    with pytest.raises(ConfigError, match="not both"):
        NeuralFlowStore(values=values, user_id="ada")
    with pytest.raises(ConfigError, match="Memory"):
        NeuralFlowStore("folder")
    NeuralFlowStore(values=values).put(NOTES, "k", {"n": 1})
    assert NeuralFlowStore(memory, user_id="ada", index={"dims": 3}).get(NOTES, "k").value == {"n": 1}
    with pytest.raises(ValueError, match="drop table"):
        NeuralFlowStore(memory).batch(["drop table"])


def test_without_a_memory_it_opens_the_one_of_the_environment(tmp_path, monkeypatch):
    """As the other adapters do."""
    monkeypatch.setenv("NEURALFLOW_PATH", str(tmp_path / "m"))
    with open_memory(embedder="none") as memory:
        monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
        NeuralFlowStore(user_id="ada").put(NOTES, "k", {"n": 1})
        assert memory.values(user_id="ada").get(NOTES, "k").value == {"n": 1}


def test_without_langgraph_the_pip_line_is_told():
    """And the rest of the adapters is there."""
    code = """
        import sys
        sys.modules["langgraph"] = None
        from neuralflow_memory import MissingDependency
        from neuralflow_memory.langchain import NeuralFlowRetriever
        try:
            from neuralflow_memory.langchain import NeuralFlowStore
        except MissingDependency as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert "pip install 'neuralflow-memory[langgraph]'" in done.stdout, done.stderr


# -- threads, loops, reopening


def test_it_serves_threads_and_one_event_loop_after_another(store):
    """Nothing is lost, and nothing is bound to a loop."""

    async def work(n):
        await asyncio.gather(*(store.aput(("loop", str(n)), str(i), {"n": i}) for i in range(20)))
        assert len(await store.asearch(("loop", str(n)), query="n 7", limit=50)) == 20

    in_threads(*(lambda n=n: asyncio.run(work(n)) for n in range(4)))
    asyncio.run(work(4))
    asyncio.run(work(5))

    def put(n):
        for i in range(20):
            store.put(("thread", str(n)), str(i), {"n": i})

    in_threads(*(lambda n=n: put(n) for n in range(6)))
    assert len(store.search((), limit=1000)) == 240
    assert len(store.list_namespaces()) == 12


async def test_the_synchronous_half_works_inside_a_loop(store):
    """Without a deadlock."""
    store.put(NOTES, "k", {"n": 1})
    assert store.get(NOTES, "k").value == (await store.aget(NOTES, "k")).value


def test_what_was_put_is_there_after_reopening(opened):
    """And found."""
    with opened() as memory:
        NeuralFlowStore(memory).put(NOTES, "k", {"text": "Sailing on Sunday"})
    store = NeuralFlowStore(opened())
    assert store.get(NOTES, "k").value == {"text": "Sailing on Sunday"}
    assert store.search((), query="sailing")[0].score > 0


# -- in real graphs


class State(TypedDict, total=False):
    said: str
    recalled: list[str]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_graphs_nodes_use_it(store, mode):
    """One run writes, another, in another thread of conversation, reads."""

    def remember(state: State, runtime: Runtime):
        if "said" in state:
            runtime.store.put(("memories",), state["said"][:5], {"text": state["said"]})
        return {}

    def recall(state: State, runtime: Runtime):
        return {
            "recalled": [i.value["text"] for i in runtime.store.search(("memories",), query="boats to sail", limit=1)]
        }

    async def aremember(state: State, runtime: Runtime):
        if "said" in state:
            await runtime.store.aput(("memories",), state["said"][:5], {"text": state["said"]})
        return {}

    async def arecall(state: State, runtime: Runtime):
        found = await runtime.store.asearch(("memories",), query="boats to sail", limit=1)
        return {"recalled": [i.value["text"] for i in found]}

    graph = StateGraph(State)
    graph.add_node("remember", remember if mode == "sync" else aremember)
    graph.add_node("recall", recall if mode == "sync" else arecall)
    graph.add_edge(START, "remember")
    graph.add_edge("remember", "recall")
    graph.add_edge("recall", END)
    app = graph.compile(store=store)
    run = app.invoke if mode == "sync" else lambda state: asyncio.run(app.ainvoke(state))
    run({"said": "Ada has two boats"})
    run({"said": "Tomatoes ripen slowly"})
    assert run({})["recalled"] == ["Ada has two boats"]


class Scripted(GenericFakeChatModel):
    """Says what it was given to say, tool calls too."""

    def bind_tools(self, tools, **kwargs):
        return self


@tool
def remember(text: str, runtime: ToolRuntime) -> str:
    """Keep a text."""
    runtime.store.put(("memories",), "1", {"text": text})
    return "kept"


@tool
def recall(query: str, runtime: ToolRuntime) -> str:
    """Find a text."""
    return runtime.store.search(("memories",), query=query)[0].value["text"]


def call(name, **args):
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": f"call-{name}"}])


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_agents_tools_use_it(store, mode):
    """`create_agent(store=...)`, one run after the other."""

    def run(*script):
        agent = create_agent(Scripted(messages=iter(script)), [remember, recall], store=store)
        given = {"messages": [("user", "Hello")]}
        done = agent.invoke(given) if mode == "sync" else asyncio.run(agent.ainvoke(given))
        return [m.content for m in done["messages"] if m.type == "tool"]

    assert run(call("remember", text="Ada has two boats"), AIMessage("I keep that")) == ["kept"]
    assert run(call("recall", query="boats"), AIMessage("Two")) == ["Ada has two boats"]
    assert store.get(("memories",), "1").value == {"text": "Ada has two boats"}
