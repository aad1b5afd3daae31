"""A question that was asked before is not embedded again: kept by hash, bounded, each user's own, gone with what is deleted."""

import random
import sqlite3
import threading
import time
import warnings
from contextlib import closing

import pytest
from conftest import found, in_threads, wait_until

from neuralflow_memory import Message, Session
from neuralflow_memory.errors import StorageError
from neuralflow_memory.pipeline.index import embed_question
from neuralflow_memory.storage.ledger import vectors
from neuralflow_memory.testing import HashingEmbedder


class Asked(HashingEmbedder):
    """Keeps every question that it was asked to embed."""

    def __init__(self, **options):
        super().__init__(**options)
        self.questions = []

    def embed_query(self, text):
        self.questions.append(text)
        return super().embed_query(text)


@pytest.fixture
def embedder():
    return Asked()


@pytest.fixture
def memory(opened, embedder):
    memory = opened(embedder=embedder, context={"cache_size": 0})  # each search needs its question's vector
    for user in ("ada", "bob"):
        memory.session("chat", user_id=user).add([Message("user", "Sailing on Sunday", id="a"), "Tomatoes"])
    memory.flush()
    return memory


def kept(memory):
    """How many questions are kept of each owner, once those that wait in RAM are written down."""
    memory._core.parts.write_questions()
    with memory._core.parts.ledger._db.read() as db:
        return dict(db.execute("SELECT owner, count(*) FROM questions GROUP BY owner"))


def test_a_question_asked_again_is_not_embedded_again(memory, embedder):
    """With the same hits and scores; neither by another session of the user nor for a context."""
    chat = memory.session("chat", user_id="ada")
    first = chat.search("When do I go sailing?")
    assert found(first)[0] == "Sailing on Sunday"
    assert first[0].signals["dense"] > 0
    assert chat.search("When do I go sailing?") == first
    memory.session("another", user_id="ada").search("When do I go sailing?")
    chat.context("When do I go sailing?")
    assert embedder.questions == ["When do I go sailing?"]
    chat.search("When do I go sailing")
    assert len(embedder.questions) == 2


async def test_the_async_twin_asks_the_same_cache(memory, embedder):
    """It is the same method on a worker."""
    chat = memory.session("chat", user_id="ada")
    await chat.asearch("sailing?")
    await chat.asearch("sailing?")
    assert chat.search("sailing?")
    assert embedder.questions == ["sailing?"]


def test_what_was_asked_is_known_after_a_restart(memory, opened, embedder):
    """The vectors are in the ledger."""
    expected = memory.session("chat", user_id="ada").search("sailing?")
    memory.close()
    again = Asked()
    memory = opened(embedder=again)
    assert memory.session("chat", user_id="ada").search("sailing?") == expected
    assert (embedder.questions, again.questions) == (["sailing?"], [])


def test_each_user_asks_for_themselves(memory, embedder):
    """What one asked can't be told from how fast another is answered."""
    for user in ("ada", "bob", None):
        chat = memory.session("chat", user_id=user)
        chat.add("Sailing")
        memory.flush()
        chat.search("sailing?")
    assert embedder.questions == ["sailing?"] * 3
    assert list(kept(memory).values()) == [1, 1, 1]


def test_no_text_of_a_question_is_stored(memory):
    """A hash that is keyed with the folder's secret, and the vector."""
    memory.session("chat", user_id="ada").search("Where is the zanzibarite?")
    path = memory.path
    memory.close()
    stored = b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())
    assert b"Tomatoes" in stored
    assert b"zanzibarite" not in stored.lower()


def replace(chat):
    chat.add(Message("user", "Rowing", id="a"), on_conflict="replace")


def rearrange(chat):
    chat.replace([Message("user", "Rowing", id="a")])


def delete(chat):
    chat.entries.delete("a")


def update(chat):
    chat.entries.update("a", content="Rowing")


@pytest.mark.parametrize("change", [delete, update, replace, rearrange, Session.clear])
def test_what_is_taken_back_takes_its_users_questions_with_it(memory, embedder, change):
    """A question may have been the words of a turn that is to be gone. Other users' are left."""
    ada, bob = (memory.session("chat", user_id=user) for user in ("ada", "bob"))
    ada.search("Sailing on Sunday")
    bob.search("Sailing on Sunday")
    change(ada)
    assert len(kept(memory)) == 1
    ada.remember("Boats")
    memory.flush()
    bob.search("Sailing on Sunday")
    ada.search("Sailing on Sunday")
    assert len(embedder.questions) == 3


def test_a_question_under_way_does_not_come_back_after_an_erasure(memory, embedder):
    """It is kept by compare-and-set on the epoch that an erasure moves on."""
    parts, scope = memory._core.parts, memory.session("chat", user_id="ada").scope

    def erased(text):
        with parts.ledger._db.lock, parts.ledger._db.write() as db:
            db.execute("UPDATE owners SET erase_epoch = erase_epoch + 1")
        return Asked.embed_query(embedder, text)

    embedder.embed_query = erased
    embed_question(parts, scope, "sailing?", dimensions=64)
    assert kept(memory) == {}
    del embedder.embed_query
    embed_question(parts, scope, "sailing?", dimensions=64)
    assert list(kept(memory).values()) == [1]


@pytest.mark.parametrize("change", [delete, update, replace, rearrange, Session.clear])
def test_a_question_under_way_does_not_come_back_after_a_deletion(memory, embedder, change):
    """Nor does one that still waits in RAM to be written down, when another process takes something back."""
    parts, chat = memory._core.parts, memory.session("chat", user_id="ada")

    def taken_back(text):
        change(chat)
        return Asked.embed_query(embedder, text)

    embedder.embed_query = taken_back
    embed_question(parts, chat.scope, "sailing?", dimensions=64)
    assert kept(memory) == {}
    del embedder.embed_query
    chat.add(Message("user", "Sailing again", id="b"))
    embed_question(parts, chat.scope, "sailing?", dimensions=64)
    with parts.ledger._db.lock, parts.ledger._db.write() as db:
        vectors.forget_questions(db, parts.ledger.owner(chat.scope))
    embed_question(parts, chat.scope, "sailing?", dimensions=64)
    assert embedder.questions == ["sailing?"] * 3
    assert list(kept(memory).values()) == [1]


def test_a_question_under_way_does_not_come_back_after_a_restore(memory, embedder, tmp_path):
    """Nor do those of the copy: what was deleted since stays deleted, and so do its words."""
    chat = memory.session("chat", user_id="ada")
    chat.search("Tomatoes")
    memory.flush()
    memory.backup(tmp_path / "copy")
    chat.entries.delete("a")
    parts, deleted = memory._core.parts, list(embedder.questions)
    assert kept(memory) == {}
    embed_question(parts, chat.scope, "Sailing on Sunday", dimensions=64)
    with parts._guard:
        waiting = dict(parts._asked)
    memory.restore(tmp_path / "copy")
    parts._asked.update(waiting)  # as if it had not been written down before
    assert kept(memory) == {}
    embed_question(parts, chat.scope, "Sailing on Sunday", dimensions=64)
    assert embedder.questions == [*deleted, *["Sailing on Sunday"] * 2]


def test_a_keyed_value_takes_its_users_questions_with_it(memory):
    """When it is deleted, and when it is put anew."""
    chat, values = memory.session("chat", user_id="ada"), memory.values(user_id="ada")
    for n, change in enumerate(
        [
            lambda: values.put(("notes",), "k", {"v": 2}, texts=["Pears"]),
            lambda: values.delete(("notes",), "k"),
        ]
    ):
        values.put(("notes",), "k", {"v": 1}, texts=["Apples"])
        chat.search(f"Apples {n}")
        assert len(kept(memory)) == 1
        change()
        assert kept(memory) == {}


def test_no_search_waits_to_write_down_what_it_asked(memory, embedder):
    """Many are written down at once, soon, and sooner where there are very many."""
    chat = memory.session("chat", user_id="ada")
    with memory._core.parts.ledger._db.lock:  # as a long write would hold it
        for n in range(300):
            chat.search(f"sailing {n}")
    wait_until(lambda: not memory._core.parts._asked)
    assert list(kept(memory).values()) == [vectors.QUESTIONS]
    embedder.questions.clear()
    chat.search("sailing 299")
    assert embedder.questions == []


def test_only_the_newest_are_kept(memory, embedder, monkeypatch):
    """The oldest makes room, and one user's do not push out another's."""
    monkeypatch.setattr(vectors, "QUESTIONS", 8)
    memory.session("chat", user_id="bob").search("sailing 0")
    chat = memory.session("chat", user_id="ada")
    for n in range(20):
        chat.search(f"sailing {n}")
    assert sorted(kept(memory).values()) == [1, 8]
    embedder.questions.clear()
    for n in (12, 19, 15):
        chat.search(f"sailing {n}")
    assert embedder.questions == []
    chat.search("sailing 11")
    memory.session("chat", user_id="bob").search("sailing 0")
    assert embedder.questions == ["sailing 11"]
    assert sorted(kept(memory).values()) == [1, 8]
    chat.search("sailing 12")
    assert embedder.questions == ["sailing 11", "sailing 12"]


def test_another_model_embeds_questions_anew(memory, opened, folder, monkeypatch):
    """A vector belongs to its model; those of a model that is given up go with its documents' vectors."""
    memory.session("chat", user_id="ada").search("sailing?")
    memory.close()
    new = Asked(dimensions=32)
    monkeypatch.setattr("neuralflow_memory.settings._embedder", lambda _: new)
    memory = opened(embedder={"on_change": "reindex"})
    assert kept(memory) == {}
    memory.flush()
    for _ in range(2):
        memory.session("chat", user_id="ada").search("sailing?")
    assert new.questions == ["sailing?"]


def test_a_wrong_vector_is_not_kept(memory, embedder):
    """One that is refused today must not answer tomorrow."""
    chat = memory.session("chat", user_id="ada")
    embedder.embed_query = HashingEmbedder(dimensions=32).embed_query
    with pytest.warns(RuntimeWarning, match="by words alone.* 32 .* 64"):
        assert found(chat.search("sailing"))[0] == "Sailing on Sunday"
    embedder.embed_query = lambda _: [float("nan")] * 64
    with pytest.warns(RuntimeWarning, match="by words alone.*finite"):
        chat.search("sailing")
    assert kept(memory) == {}
    del embedder.embed_query
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert chat.search("sailing")[0].signals["dense"] > 0


# --- a ledger that can't be written to ------------------------------------------------------------------------------


def test_a_ledger_that_somebody_has_locked_does_not_hold_up_a_search(memory, embedder):
    """A copy being made, say. The question is kept afterwards, and writers are as patient as before."""
    chat, file = memory.session("chat", user_id="ada"), memory.path / "ledger.sqlite3"
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert chat.search("sailing?")[0].signals["dense"] > 0
        assert time.monotonic() - began < 5  # writers are far more patient
        later = threading.Timer(0.3, other.execute, ["COMMIT"])
        later.start()
        chat.add("Written when it was free again")
        later.join()
    assert list(kept(memory).values()) == [1]
    chat.search("sailing?")
    assert len(embedder.questions) == 1


def test_a_ledger_that_takes_nothing_does_not_fail_a_search(memory, embedder):
    """Neither a full disk nor a file that became read-only."""
    chat = memory.session("chat", user_id="ada")
    writer = memory._core.parts.ledger._db._writer
    writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError):
        chat.add("Not written")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert found(chat.search("sailing?"))[0] == "Sailing on Sunday"
    assert kept(memory) == {}
    writer.execute("PRAGMA query_only = OFF")
    chat.search("sailing?")
    assert len(embedder.questions) == 1
    assert list(kept(memory).values()) == [1]


def test_many_threads_ask_beside_writers(memory, embedder):
    """Nothing is lost or mixed up: each answer has the vector of its own question."""
    parts, chat = memory._core.parts, memory.session("chat", user_id="ada")
    plain, rng = HashingEmbedder(), random.Random(5)
    asked = [f"question {rng.randrange(12)}" for _ in range(120)]

    def ask(texts):
        for text in texts:
            assert embed_question(parts, chat.scope, text, dimensions=64) == pytest.approx(
                plain.embed_query(text), abs=1e-6
            )

    in_threads(
        *[lambda n=n: ask(asked[n::4]) for n in range(4)], lambda: [chat.add(f"Turn {n} of many") for n in range(60)]
    )
    assert list(kept(memory).values()) == [len(set(asked))]
    embedder.questions.clear()
    ask(asked)
    assert embedder.questions == []
