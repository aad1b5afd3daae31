"""A Chroma server in place of the folder: the same behaviour, outages that nobody waits for, losses that are filled again."""

import contextlib
import itertools
import json
import sqlite3
import threading
import time
import traceback
import warnings

import chromadb
import numpy as np
import pytest
from chroma_server import ChromaServer, Proxy
from chromadb.api.shared_system_client import SharedSystemClient
from chromadb.config import Settings as ChromaSettings
from conftest import CountingEmbedder, FailingEmbedder, found, index_keys, live_keys, rows, wait_until, without_tiers
from typer.testing import CliRunner

from neuralflow_memory import ConfigError, FolderError, IndexingError, Message, Settings, StorageError, ToolCall, core
from neuralflow_memory.cli import app, doctor
from neuralflow_memory.config import Chroma
from neuralflow_memory.pipeline import index
from neuralflow_memory.storage import chroma
from neuralflow_memory.storage.chroma import ChromaStore
from neuralflow_memory.storage.ledger import schema
from neuralflow_memory.storage.ledger.sqlite import SqliteLedger
from neuralflow_memory.testing import HashingEmbedder

TOKEN = "ck-very-secret"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A server that stays up; tests keep out of each other's way by their collections."""
    server = ChromaServer(tmp_path_factory.mktemp("chroma")).start()
    yield server
    server.kill()


@pytest.fixture
def server(tmp_path):
    """A server of the test's own, not started."""
    own = ChromaServer(tmp_path / "server")
    yield own
    own.kill()


NUMBERS = itertools.count(100)


@pytest.fixture
def collection():
    return f"test-{next(NUMBERS)}"


@pytest.fixture
def proxied(running):
    proxies = []

    def make(**options):
        proxies.append(Proxy(running.url, **options))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def embedded_texts(embedder):
    """What was embedded, but for the indexer's own question whether the embedder works."""
    return [t for t in embedder.texts if t != index._PROBE]


def vanished(url, name="entries"):
    """Make a collection disappear, as somebody else's delete does."""
    client = chromadb.HttpClient(host=url, port=1, settings=ChromaSettings(anonymized_telemetry=False))
    client.delete_collection(name)
    client.close()


# -- the store


@pytest.fixture(params=["embedded", "served"])
def kind(request):
    return request.param


@pytest.fixture
def make_store(kind, tmp_path, running, collection):
    """Opens the same store again and again."""
    ledger = SqliteLedger(tmp_path / "ledger.sqlite3", counter="approx")
    options = Chroma(url=running.url if kind == "served" else None, collection=collection)
    stores = []

    def make(options=options):
        stores.append(ChromaStore(tmp_path / "chroma", options=options, ledger=ledger))
        stores[-1].check()
        return stores[-1]

    yield make
    for store in stores:
        store.close()
    ledger.close()


VECTORS = np.eye(3, 4, dtype=np.float32)


def filled(store):
    store.reset(model_id="m", dimensions=4)
    metadatas = [{"partition": "p", "seq": 1, "name": "Ada"}, {"partition": "p"}, {"partition": "q"}]
    store.upsert(["a", "b", "c"], VECTORS, ["one", "two", "three"], metadatas)
    return store


def test_nearest_of_a_partition_with_their_cosine(make_store):
    """Best first, and nothing of another partition, however near it is."""
    store = filled(make_store())
    (first, best), (second, other) = store.query(VECTORS[0], partition="p", k=5)
    assert (first, second) == ("a", "b")
    assert (best, other) == pytest.approx((1, 0), abs=1e-5)
    assert [key for key, _ in store.query(VECTORS[2], partition="q", k=5)] == ["c"]
    assert store.query(VECTORS[0], partition="nobody", k=5) == []


def test_an_entry_is_replaced_whole(make_store):
    """Vector, document and metadata; what the new metadata lack is gone."""
    store = filled(make_store())
    store.upsert(["a"], VECTORS[1:2], ["new"], [{"partition": "p", "seq": 2}])
    held = store._collection.get(ids=["a"], include=["documents", "metadatas", "embeddings"])
    assert held["documents"] == ["new"]
    assert held["metadatas"] == [{"partition": "p", "seq": 2}]
    assert np.allclose(held["embeddings"][0], VECTORS[1])


def test_counts_and_keys(make_store):
    """Of all and of a partition; deleting what is not there is no error."""
    store = filled(make_store())
    assert (store.count(), store.count(partition="p"), store.count(partition="nobody")) == (3, 2, 0)
    store.delete(["a", "unknown"])
    assert sorted(store.keys()) == ["b", "c"]
    many = [f"k{n}" for n in range(700)]
    store.upsert(many, np.ones((700, 4), np.float32), many, [{"partition": "many"}] * 700)
    assert store.count(partition="many") == 700
    store.delete(many)
    assert store.count() == 2


def test_a_store_is_what_it_was_when_it_is_opened_again(make_store):
    """Its model and entries; a reset leaves nothing of them."""
    new = make_store()
    assert new.model_id is None
    filled(new).close()
    store = make_store()
    assert (store.model_id, store.count()) == ("m", 3)
    assert not store.check()
    store.reset(model_id="other", dimensions=2)
    assert (store.model_id, store.keys()) == ("other", [])
    store.upsert(["a"], np.ones((1, 2), np.float32), ["one"], [{"partition": "p"}])
    assert store.count() == 1


def test_another_collection_is_not_the_one_of_the_marks(make_store):
    """Its model is None, so that it is filled anew: it may lack what was indexed elsewhere."""
    filled(make_store()).close()
    other = make_store(Chroma(url=make_store().url, collection="another-one"))
    assert other.model_id is None
    filled(other).close()
    assert make_store().model_id is None


@pytest.mark.parametrize(
    ("vectors", "documents", "metadatas"),
    [
        (np.ones((1, 9), np.float32), ["one"], [{"partition": "p"}]),
        (np.full((1, 4), np.nan, np.float32), ["one"], [{"partition": "p"}]),
        (np.ones((1, 4), np.float32), ["one"], [{"partition": {"a": "dict"}}]),
    ],
)
def test_what_is_wrong_with_an_entry_is_not_the_stores_fault(make_store, vectors, documents, metadatas):
    """A typed error, and the store goes on."""
    store = filled(make_store())
    with pytest.raises(StorageError, match="Chroma failed"):
        store.upsert(["x"], vectors, documents, metadatas)
    assert store.down is None
    assert store.count() == 3


def test_documents_fit_chroma_clouds_limit(make_store, monkeypatch):
    """They are cut between characters; the ledger has the whole text."""
    monkeypatch.setattr(chroma, "_is_cloud", lambda _: True)
    store = filled(make_store())
    store.upsert(["long"], VECTORS[:1], ["é" * 20_000], [{"partition": "p"}])
    assert store._collection.get(ids=["long"])["documents"] == ["é" * 8_192]


# -- a memory


def test_a_memory_on_a_server_is_one_in_a_folder(kind, opened, running, collection):
    """What is added, changed and deleted is indexed, found, and there after opening again; nothing is embedded twice."""
    embedder = CountingEmbedder()
    options = {
        "embedder": embedder,
        "chroma": {"url": running.url if kind == "served" else None, "collection": collection},
    }
    with opened(**options) as memory:
        chat = memory.session("chat", user_id="ada")
        chat.add([Message("user", f"Turn {n} of sailing", id=f"t{n}") for n in range(30)])
        chat.remember("Ada grows apricots in Lisbon")
        memory.session("chat", user_id="bob").add("Apricots of Bob")
        memory.flush()
        chat.entries.update("t3", content="Turn 3 of cooking")
        chat.entries.delete("t4")
        memory.flush()
        assert index_keys(memory) == live_keys(memory)
        stats = memory.stats()
        assert stats["store"] == (running.url if kind == "served" else "embedded")
        assert stats["chroma"] == len(live_keys(memory)) > 30
        assert (stats["store_error"], stats["dirty"], stats["dirty_age"]) == (None, 0, None)
    count = len(embedder.texts)
    memory = opened(**options)
    memory.flush()
    chat = memory.session("chat", user_id="ada")
    assert found(chat.search("apricots in Lisbon", k=1)) == ["Ada grows apricots in Lisbon"]
    memory.reindex()
    assert index_keys(memory) == live_keys(memory)
    assert len(embedder.texts) == count
    assert (memory.path / "chroma").exists() == (kind == "embedded")


def test_moving_to_a_server_and_back(opened, running, collection):
    """Each index is filled from the ledger, without embedding; what was deleted meanwhile is in neither."""
    embedder = CountingEmbedder()
    served = {"url": running.url, "collection": collection}
    for number, options in enumerate(({}, served, {}, served)):
        with opened(embedder=embedder, chroma=options) as memory:
            chat = memory.session("chat", user_id="ada")
            chat.add([Message("user", f"Text {number} {n}", id=f"{number}-{n}") for n in range(3)])
            if number:
                chat.entries.delete(f"{number - 1}-0")
            memory.flush()
            assert index_keys(memory) == live_keys(memory)
    assert len(embedded_texts(embedder)) == 12


def test_an_old_folders_marks_get_an_age(opened):
    """A memory of an earlier version keeps what waits, and says from now on since when."""
    with opened(embedder="none") as memory:
        memory.session("chat").add(["One", "Two"])
        path = memory.path / "ledger.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as db:
        without_tiers(db)
        db.execute("ALTER TABLE dirty DROP COLUMN marked_at")
        db.execute("DROP TABLE changes")
        db.execute("ALTER TABLE owners DROP COLUMN head")
        db.execute(f"PRAGMA user_version = {schema.MIGRATIONS.index(schema._m006_age_of_marks)}")
        db.commit()
    memory = opened(embedder="none")
    assert memory.stats()["dirty"] == 2
    assert 0 <= memory.stats()["dirty_age"] < 60


# -- outages


@pytest.mark.slow
def test_a_memory_opens_while_its_server_is_down(opened, server, tmp_path, monkeypatch):
    """The chat goes on, with vectors; when the server comes, the backlog drains by itself, within seconds."""
    monkeypatch.setattr(index, "BATCH", 20)
    monkeypatch.setattr(core, "BATCH", 20)
    began = time.monotonic()
    memory = opened(chroma={"url": server.url})
    chat = memory.session("chat", user_id="ada")
    chat.add(Message("assistant", "", tool_calls=[ToolCall("c", "book", {})]))  # has no words, and leaves the index
    chat.add([Message("user", f"Turn {n} about hotels", id=f"t{n}") for n in range(70)])
    chat.add("Grandmother grows apricots")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        hits = chat.search("apricots of grandmother")
        assert "hit" in {c.part for c in chat.context("apricots").report}
    assert hits[0].entry.content == "Grandmother grows apricots"
    assert time.monotonic() - began < 20
    wait_until(lambda: rows(memory)["vectors"] == len(live_keys(memory)))  # of the whole backlog, not of one batch
    assert chat.search("apricots of grandmother")[0].signals["dense"] > 0
    with pytest.raises(IndexingError, match=r"can't be used.*nothing is lost"):
        memory.flush()
    stats = memory.stats()
    assert stats["dirty"] >= 71
    assert (stats["parked"], stats["chroma"], stats["store"]) == ([], None, server.url)
    assert "see that the server runs" in stats["store_error"]
    assert 0 <= stats["dirty_age"] < 60
    chat.entries.delete("t5")
    server.start()
    began = time.monotonic()
    wait_until(lambda: memory.stats()["dirty"] == 0)
    assert time.monotonic() - began < 30
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats()["store_error"] is None


def test_what_was_on_hold_when_the_process_ended_is_indexed_by_the_next(opened, server, running, collection):
    """Whether its server is back, it moved to another, or into the folder."""
    for options in ({"url": running.url, "collection": collection}, {}):
        with opened(chroma={"url": server.url}) as memory:
            memory.session("chat").add([f"Turn {n} {options}" for n in range(3)])
            with pytest.raises(IndexingError):
                memory.flush()
        with opened(chroma=options) as memory:
            memory.flush()
            assert index_keys(memory) == live_keys(memory)
            assert memory.stats()["dirty"] == 0


@pytest.mark.slow
def test_an_outage_under_load(opened, server, monkeypatch):
    """Killed and started again while two chats write and search: no call fails or waits, and nothing is lost."""
    memory = opened(chroma={"url": server.start().url})
    stop, slowest, failures, turns = threading.Event(), [0.0], [], {"ada": [], "bob": []}

    def timed(call, *args):
        began = time.monotonic()
        try:
            call(*args)
        except Exception as error:
            failures.append(error)
        slowest[0] = max(slowest[0], time.monotonic() - began)

    def talk(user):
        chat = memory.session("chat", user_id=user)
        for n in itertools.count():
            timed(chat.add, Message("user", f"Turn {n} of {user} on sailing", id=f"t{n}"))
            turns[user].append(f"t{n}")
            if n % 5 == 0:
                timed(chat.search, f"turn {n}")
            if n % 7 == 6:
                timed(chat.entries.delete, f"t{n - 3}")
                turns[user].remove(f"t{n - 3}")
            if stop.wait(0.005):
                return

    threads = [threading.Thread(target=talk, args=(user,)) for user in ("ada", "bob")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        server.kill()
        wait_until(lambda: memory.stats()["store_error"] is not None)
        wait_until(lambda: memory.stats()["dirty"] > 100)
        waiting = memory.stats()["dirty"]
        server.start()
        wait_until(lambda: memory.stats()["dirty"] < waiting / 4)
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert slowest[0] < 5  # it would wait for the server for longer, whatever else the machine has to do
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    for user, ids in turns.items():
        assert [m.id for m in memory.session("chat", user_id=user).messages()] == ids
    assert memory.stats()["parked"] == []


@pytest.mark.slow
def test_a_server_with_an_empty_folder_is_filled_without_embedding(opened, server, tmp_path, monkeypatch):
    """After an outage, and where the loss is only seen when nothing is written; deleted entries stay away."""
    monkeypatch.setattr(core, "_LONGEST_PAUSE", 0.2)
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder, chroma={"url": server.start().url})
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"Turn {n}", id=f"t{n}") for n in range(300)])
    chat.entries.delete("t7")
    memory.flush()
    texts = embedded_texts(embedder)
    for number in range(2):
        server.kill()
        if number:
            chat.add("Said while it was down")
            texts.append("Said while it was down")
            with pytest.raises(IndexingError):
                memory.flush()
        server.start(tmp_path / f"empty {number}")
        wait_until(lambda: memory.stats()["chroma"] == len(live_keys(memory)) > 290)
        memory.flush()
        assert index_keys(memory) == live_keys(memory)
    assert sorted(embedded_texts(embedder)) == sorted(texts)


def test_a_collection_that_vanishes_between_two_batches_is_filled_again(opened, running, collection):
    """Somebody deletes it while the server is up: the next write brings all of it back."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder, chroma={"url": running.url, "collection": collection})
    chat = memory.session("chat")
    chat.add(["One", "Two"])
    memory.flush()
    vanished(running.url, collection)
    assert "does not exist" in memory.stats()["store_error"]
    chat.add("Three")
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert embedded_texts(embedder) == ["One", "Two", "Three"]


def test_what_was_lost_while_the_memory_was_closed_is_there_after_a_flush(opened, running, collection, monkeypatch):
    """However long it takes to find out: nothing is marked before."""
    options = {"url": running.url, "collection": collection}
    with opened(chroma=options) as memory:
        memory.session("chat").add(["One", "Two"])
        memory.flush()
    vanished(running.url, collection)
    check = ChromaStore.check
    monkeypatch.setattr(ChromaStore, "check", lambda store: time.sleep(0.3) or check(store))
    memory = opened(chroma=options)
    assert memory.stats()["dirty"] == 0
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats()["chroma"] == 2


def test_a_collection_that_vanishes_within_a_batch_is_filled_again(opened, running, collection, monkeypatch):
    """Between looking and writing."""
    memory = opened(chroma={"url": running.url, "collection": collection})
    chat = memory.session("chat")
    chat.add(["One", "Two"])
    memory.flush()
    store = memory._core.parts.store
    upsert = store.upsert

    def late(*args):
        monkeypatch.setattr(store, "upsert", upsert)
        vanished(running.url, collection)
        upsert(*args)

    monkeypatch.setattr(store, "upsert", late)
    chat.add("Three")
    wait_until(lambda: memory.stats()["dirty"] == 0 and memory.stats()["chroma"] == 3)
    assert index_keys(memory) == live_keys(memory)


def test_a_server_that_hangs_holds_nobody_up(opened, server, monkeypatch):
    """Who asks it waits a short time at most, and not at all once it has failed some times; then it answers again."""
    monkeypatch.setattr(chroma, "_TIMEOUT", (1.0, 1.0, 1.0, 1.0))
    monkeypatch.setattr(chroma, "_CALLERS_TIMEOUT", dict.fromkeys(chroma._CALLERS_TIMEOUT, 0.4))
    memory = opened(chroma={"url": server.start().url})
    chat = memory.session("chat", user_id="ada")
    chat.add([f"Turn {n} about apricots" for n in range(10)])
    memory.flush()
    store, partition = memory._core.parts.store, memory._core.parts.ledger.partition(chat.scope)
    vector = memory._core.parts.embedder.embed_query("turn 7 about apricots")
    assert len(store.query(vector, partition=partition, k=3)) == 3
    server.freeze()
    began = time.monotonic()
    failures = []
    for _ in range(4):
        with pytest.raises(StorageError) as caught:
            store.query(vector, partition=partition, k=3)
        failures.append(str(caught.value))
    assert "left alone" in failures[-1]
    assert all("timed out" in failure or "left alone" in failure for failure in failures)
    assert memory.stats()["chroma"] is None
    chat.add("One more")
    assert time.monotonic() - began < 20, "somebody waited for more than the time limits"
    wait_until(lambda: store.down is not None)
    with pytest.raises(StorageError, match=r"see that the server runs|timed out"):
        store.query(vector, partition=partition, k=3)
    server.thaw()
    wait_until(lambda: memory.stats()["dirty"] == 0)
    assert len(store.query(vector, partition=partition, k=3)) == 3  # at once: the pause of the breaker is over, too


def test_a_gateway_that_fails_parks_nothing(opened, proxied, collection):
    """502 is an outage like any other."""
    proxy = proxied()
    memory = opened(chroma={"url": proxy.url, "collection": collection})
    chat = memory.session("chat")
    chat.add("One")
    memory.flush()
    proxy.fails = True
    chat.add([f"Turn {n}" for n in range(5)])
    with pytest.raises(IndexingError, match="Bad Gateway"):
        memory.flush()
    assert memory.stats()["parked"] == []
    proxy.fails = False
    memory.flush()
    assert index_keys(memory) == live_keys(memory)


def test_a_batch_that_is_too_long_for_a_proxy_goes_in_pieces(opened, proxied, collection, monkeypatch):
    """413 is about what was sent: entry by entry it fits, and the one that does not is parked."""
    monkeypatch.setattr(index, "_FIRST_DELAY", 0.01)
    proxy = proxied()
    memory = opened(chroma={"url": proxy.url, "collection": collection})
    chat = memory.session("chat")
    chat.add("One")
    memory.flush()
    proxy.longest = 4_000
    chat.add([*(f"Turn {n}" for n in range(20)), "long " * 2_000])
    memory.flush()
    stats = memory.stats()
    assert (stats["chroma"], stats["parked_count"], stats["store_error"]) == (21, 1, None)
    assert "Too Large" in stats["parked"][0]["error"]


def test_poison_beside_an_outage_is_parked_in_the_end(opened, server, monkeypatch):
    """An entry that can't be embedded holds up nothing else once the server is back."""
    monkeypatch.setattr(index, "_FIRST_DELAY", 0.01)
    memory = opened(embedder=FailingEmbedder(lambda t: t == "poison"), chroma={"url": server.url})
    memory.session("chat").add(["poison", "Sailing", "Tomatoes"])
    with pytest.raises(IndexingError):
        memory.flush()
    server.start()
    memory.flush()
    assert [p["attempts"] for p in memory.stats()["parked"]] == [index.MOST_ATTEMPTS]
    assert len(index_keys(memory)) == 2


def test_deletions_reach_a_server_without_an_embedder(opened, running, collection):
    """What an earlier run indexed leaves the server, too."""
    options = {"url": running.url, "collection": collection}
    with opened(chroma=options) as memory:
        memory.session("chat").add([Message("user", "One", id="a"), Message("user", "Two", id="b")])
        memory.flush()
    memory = opened(embedder="none", chroma=options)
    memory.session("chat").entries.delete("a")
    memory.flush()
    assert memory.stats()["chroma"] == 1


def test_closing_does_not_wait_for_a_server(opened, server):
    """A memory whose server is down closes at once, and what waits is there next time."""
    memory = opened(chroma={"url": server.url})
    memory.session("chat").add("One")
    began = time.monotonic()
    memory.close()
    assert time.monotonic() - began < 20
    assert opened(chroma={"url": server.url}).stats()["dirty"] == 1


# -- whose it is


def test_another_memorys_collection_is_refused_and_left_alone(opened, running, collection, tmp_path):
    """With a typed error that says what to do; with a collection of its own it works."""
    options = {"url": running.url, "collection": collection}
    first = opened(chroma=options)
    first.session("chat").add(["One", "Two"])
    first.flush()
    second = opened(tmp_path / "second", chroma=options)
    second.session("chat").add("Three")
    for call in (second.flush, second.flush):
        with pytest.raises(IndexingError, match=r"belongs to another memory.*chroma\.collection") as error:
            call()
        assert isinstance(error.value.__cause__, FolderError)
    with pytest.raises(StorageError, match="belongs to another memory"):
        second.reindex()
    assert "belongs to another memory" in second.stats()["store_error"]
    assert found(second.session("chat").search("Three")) == ["Three"]
    second.close()
    first.session("chat").add("Four")
    first.flush()
    assert index_keys(first) == live_keys(first)
    second = opened(tmp_path / "second", chroma={**options, "collection": collection + "-2"})
    second.flush()
    assert index_keys(second) == live_keys(second)


def test_a_strangers_collection_is_refused(opened, running, collection):
    """One that was not made by this package is nobody's to fill."""
    client = chromadb.HttpClient(host=running.url, port=1, settings=ChromaSettings(anonymized_telemetry=False))
    held = client.create_collection(collection, embedding_function=None)
    held.add(ids=["theirs"], embeddings=[[1.0, 2.0]])
    memory = opened(chroma={"url": running.url, "collection": collection})
    memory.session("chat").add("One")
    with pytest.raises(IndexingError, match="belongs to another memory"):
        memory.flush()
    assert held.get()["ids"] == ["theirs"]
    client.close()


def test_a_collection_that_became_anothers_is_not_reset(opened, server, tmp_path):
    """A server lost its data, and another memory was there first."""
    first = opened(chroma={"url": server.start().url})
    first.session("chat").add("One")
    first.flush()
    server.kill()
    with pytest.raises(IndexingError):
        first.session("chat").add("More")
        first.flush()
    first.close()
    server.start(tmp_path / "empty")
    second = opened(tmp_path / "second", chroma={"url": server.url})
    second.session("chat").add("Two")
    second.flush()
    first = opened(chroma={"url": server.url})
    with pytest.raises(IndexingError, match="belongs to another memory"):
        first.flush()
    assert index_keys(second) == live_keys(second)


# -- who may


@pytest.mark.parametrize(
    ("header", "value"), [("Authorization", f"Bearer {TOKEN}"), ("X-Chroma-Token", TOKEN)], ids=["bearer", "chroma"]
)
def test_the_token_is_sent_with_every_request(opened, proxied, collection, header, value):
    """In the header that proxies know and in the one that Chroma has; without it there is no entry."""
    proxy = proxied(allows=lambda headers: headers.get(header) == value)
    memory = opened(chroma={"url": proxy.url, "collection": collection, "token": TOKEN})
    memory.session("chat").add("One")
    memory.flush()
    assert memory.stats()["chroma"] == 1
    assert all(headers[header] == value for headers in proxy.headers)


def test_chroma_cloud_gets_its_own_header_only():
    """And tells tenant and database by the token."""
    made = []

    class Recorder:
        def __init__(self, **options):
            made.append(options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chroma, "_Client", Recorder)
        chroma._connected(Chroma(url="https://api.trychroma.com", token=TOKEN), "https://api.trychroma.com")
        chroma._connected(Chroma(url="https://example.org:99/x", token=TOKEN), "https://example.org:99/x")
    cloud, own = (options["settings"] for options in made)
    assert cloud.chroma_server_headers == {"X-Chroma-Token": TOKEN}
    assert own.chroma_server_headers == {"X-Chroma-Token": TOKEN, "Authorization": f"Bearer {TOKEN}"}
    assert cloud.chroma_overwrite_singleton_tenant_database_access_from_auth
    assert not own.chroma_overwrite_singleton_tenant_database_access_from_auth


def test_a_wrong_token_is_told_and_never_shown(opened, proxied, collection, monkeypatch):
    """Not in errors, their causes, stats or reprs, even where the proxy repeats it."""
    proxy = proxied(allows=lambda headers: False)
    memory = opened(chroma={"url": proxy.url, "collection": collection, "token": TOKEN})
    memory.session("chat").add("One")
    with pytest.raises(IndexingError, match=r"no entry with Bearer \*\*\*.*token") as error:
        memory.flush()
    told = "".join(traceback.format_exception(error.value))
    shown = [told, repr(memory.settings), repr(memory), json.dumps(memory.stats(), default=str)]
    assert not any(TOKEN in text for text in shown)


def test_tenant_and_database(opened, running, collection, tmp_path):
    """Memories with one collection's name in two databases have nothing to do with each other; a missing one is named."""
    settings = ChromaSettings(
        chroma_api_impl="chromadb.api.fastapi.FastAPI",
        chroma_server_host="127.0.0.1",
        chroma_server_http_port=running.port,
    )
    admin = chromadb.AdminClient(settings)
    admin.create_tenant("team")
    admin.create_database("chats", "team")
    options = {"url": running.url, "collection": collection}
    opened(chroma=options).session("chat").add(["One", "Two"])
    other = opened(tmp_path / "other", chroma={**options, "tenant": "team", "database": "chats"})
    other.session("chat").add("Three")
    other.flush()
    assert other.stats()["chroma"] == 1
    other.close()
    for name in ("tenant", "database"):
        missing = opened(tmp_path / "other", chroma={**options, "tenant": "team", "database": "chats", name: "nowhere"})
        with pytest.raises(IndexingError, match="nowhere"):
            missing.session("chat").add(f"Four {name}")
            missing.flush()
        missing.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "127.0.0.1:8000"},
        {"url": "ftp://host"},
        {"url": "http://"},
        {"url": "http://host:port"},
        {"url": f"http://ada:{TOKEN}@host"},
        {"url": f"http://host/?token={TOKEN}"},
        {"token": f"{TOKEN}\n"},
        {"token": ""},
        {"token": TOKEN + "é"},
        {"collection": "x"},
        {"collection": "user:42"},
        {"database": ""},
    ],
    ids=str,
)
def test_wrong_options_are_named_without_secrets(opened, wrong):
    """When the memory is opened, not in the background."""
    with pytest.raises(ConfigError, match=f"chroma.{next(iter(wrong))}") as error:
        opened(chroma=wrong)
    assert TOKEN not in str(error.value)


def test_options_come_from_the_environment(monkeypatch):
    """The token, too, and it is not shown."""
    from neuralflow_memory.sources import read_settings

    monkeypatch.setenv("NEURALFLOW_CHROMA__URL", "https://example.org/")
    monkeypatch.setenv("NEURALFLOW_CHROMA__TOKEN", TOKEN)
    settings = read_settings()
    assert settings.chroma.url == "https://example.org"
    assert settings.chroma.token.get_secret_value() == TOKEN
    assert TOKEN not in repr(settings) + str(settings.model_dump())
    assert settings != Settings()


# -- doctor and stats


@pytest.fixture
def diagnosed(monkeypatch, tmp_path):
    """What `doctor` finds in a folder whose server is at *url*, and its exit code."""

    def run(folder, url):
        monkeypatch.setenv("NEURALFLOW_CHROMA__URL", url)
        monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
        result = CliRunner().invoke(app, ["doctor", "--json", "--path", str(folder)])
        return {f["name"]: f for f in json.loads(result.stdout)}, result.exit_code

    return run


def test_doctor_says_what_waits_and_what_to_do(opened, server, folder, diagnosed):
    """A server that is down is wrong, with the backlog and its age; one that answers is fine."""
    with opened(chroma={"url": server.url}) as memory:
        memory.session("chat").add(["One", "Two"])
    findings, code = diagnosed(folder, server.url)
    assert code == 1
    assert findings["vector index"]["level"] == "wrong"
    assert server.url in findings["vector index"]["detail"]
    assert "see that the server runs" in findings["vector index"]["detail"]
    assert findings["to be indexed"]["detail"].startswith("2 entries wait, the oldest for 0:0")
    server.start()
    with opened(chroma={"url": server.url}) as memory:
        memory.flush()
    findings, code = diagnosed(folder, server.url)
    assert code == 0
    assert findings["vector index"]["level"] == "ok"
    assert findings["vector index"]["detail"] == f"{server.url}: 2 entries"


def test_doctor_notices_an_index_that_lacks_entries(opened, running, collection):
    """As after a server was set back to an earlier copy; reindex() mends it."""
    memory = opened(embedder=HashingEmbedder(), chroma={"url": running.url, "collection": collection})
    memory.session("chat").add(["One", "Two"])
    memory.flush()
    memory._core.parts.store.delete(list(index_keys(memory))[:1])
    facts = memory.stats(verify=True)
    assert [f.level for f in doctor.state(facts) if f.name == "vector index"] == ["ok", "note"]
    memory.reindex()
    facts = memory.stats(verify=True)
    assert [f.level for f in doctor.state(facts) if f.name == "vector index"] == ["ok"]


def test_doctor_points_at_an_index_that_is_left_behind(opened, running, collection, folder):
    """After a move to a server, the folder's own holds what is deleted from now on."""
    with opened() as memory:
        memory.session("chat").add("One")
        memory.flush()
    memory = opened(chroma={"url": running.url, "collection": collection})
    memory.flush()
    notes = [f.detail for f in doctor.state(memory.stats(verify=True)) if f.level == "note"]
    assert [detail for detail in notes if str(folder / "chroma") in detail]


def test_failed_connections_leave_nothing_behind(opened, running, collection):
    """A missing database that is asked for again and again costs no memory, nor does opening and closing."""
    known = SharedSystemClient._identifier_to_system
    before = len(known)
    for database, error in (("nowhere", StorageError), ("default_database", None)):
        store = ChromaStore("", options=Chroma(url=running.url, collection=collection, database=database))
        for _ in range(3):
            with contextlib.nullcontext() if error is None else pytest.raises(error, match=database):
                store.check()
        store.close()
    assert len(known) == before
