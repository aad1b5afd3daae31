"""Another embedding model: built beside the old one while everybody goes on, compared, and taken up in one moment."""

import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import CountingEmbedder, index_keys, live_keys, wait_until
from rich.console import Console
from test_many_processes import Other as Process
from typer.testing import CliRunner

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import ConfigError, Message, ModelMismatch, QueryError, open_memory
from neuralflow_memory._failpoints import REINDEXING
from neuralflow_memory.cli import app, render
from neuralflow_memory.pipeline import index
from neuralflow_memory.testing import HashingEmbedder

TOPICS = ("sailing", "tomatoes", "chess", "trains", "bees", "violins", "snow")


class Other(CountingEmbedder):
    """Another model of as many dimensions: what it makes of a text has nothing to do with what the hashing embedder makes."""

    def __init__(self, *, dimensions=64):
        super().__init__()
        self.dimensions = dimensions
        self.model_id = f"other-{dimensions}"
        self.questions = 0

    def embed_documents(self, texts):
        return np.roll(super().embed_documents(texts), 1, axis=1)

    def embed_query(self, text):
        self.questions += 1
        return np.roll(HashingEmbedder.embed_query(self, text), 1)


def filled(memory, *, turns=60):
    """Chats of two users, knowledge, a chat of nobody, and a turn without words."""
    for user in ("ada", "bo"):
        chat = memory.session("chat", user_id=user)
        chat.add(
            [
                message
                for n in range(turns)
                for message in (
                    Message("user", f"What do we know about {TOPICS[n % 7]} in the year {1900 + n}?", id=f"q{n}"),
                    Message("assistant", f"In {1900 + n} there was much {TOPICS[n % 7]} of kind {n % 11}.", id=f"a{n}"),
                )
            ]
        )
        chat.remember(f"{user} likes {TOPICS[3]}")
    memory.session("loose").add(["A chat of nobody about snow", Message("assistant", "Snow is cold.")])
    memory.flush()


def stored(memory):
    """Vectors by entry number, as they stand in the ledger, and the model that they are by."""
    with memory._core.parts.ledger._db.read() as db:
        models = db.execute("SELECT id, name, dimensions FROM models").fetchall()
        rows = db.execute("SELECT no, model, vector FROM vectors").fetchall()
    assert len(models) == 1
    assert {model for _, model, _ in rows} <= {models[0][0]}
    return {abs(number): vector for number, _, vector in rows}, models[0][1]


def right(memory, embedder):
    """Each entry with words has the vector that *embedder* makes of it, in the ledger and in Chroma; nothing else has one."""
    vectors, name = stored(memory)
    assert name == embedder.model_id
    with memory._core.parts.ledger._db.read() as db:
        texts = {no: text for no, text in db.execute("SELECT no, content FROM entries") if text.strip()}
    assert vectors.keys() == texts.keys()
    for number, text in texts.items():
        expected = type(embedder)(dimensions=embedder.dimensions).embed_documents([text])[0]
        np.testing.assert_allclose(np.frombuffer(vectors[number], np.float32), expected, atol=1e-6)
    assert index_keys(memory) == live_keys(memory)
    store = memory._core.parts.store
    assert store.model_id == embedder.model_id
    kept = store._collection.get(include=["embeddings", "documents"])
    made = type(embedder)(dimensions=embedder.dimensions).embed_documents(kept["documents"])
    np.testing.assert_allclose(np.array(kept["embeddings"]), made, atol=1e-5)


def distinct(memory):
    """How many texts there are; what two users said counts for each, since nothing of the one is used for the other."""
    with memory._core.parts.ledger._db.read() as db:
        texts = db.execute("SELECT DISTINCT no >> 32, content FROM entries").fetchall()
    return sum(bool(text.strip()) for _, text in texts)


# --- the whole way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [64, 24], ids=["as many", "fewer"])
def test_everything_is_embedded_once_and_then_taken_up(opened, folder, dimensions):
    """The new model answers at once, from the ledger's vectors, and opening with it finds nothing left to do."""
    memory = opened()
    filled(memory)
    chat = memory.session("chat", user_id="ada")
    before = chat.search("tomatoes in 1908")
    new, told = Other(dimensions=dimensions), []
    report = memory.reindex(new, progress=lambda done, total: told.append((done, total)))
    assert (report.model, report.previous, report.switched) == (new.model_id, "hashing-64", True)
    assert report.entries == len(live_keys(memory)) == told[-1][0] == told[-1][1]
    embedded = told[: told.index((report.entries, report.entries)) + 1]  # then it is told how far the index is
    assert embedded == sorted(embedded)
    assert len(embedded) > 4
    assert report.embedded == len(new.texts) == distinct(memory)
    right(memory, new)
    stats = memory.stats()
    assert (stats["embedder"], stats["next_embedder"], stats["dirty"]) == (new.model_id, None, 0)
    assert stats["vectors"] == report.entries
    after = chat.search("tomatoes in 1908")
    assert after[0].entry.id == before[0].entry.id == "q8"
    assert after[0].signals["dense"] > 0
    memory.close()
    with pytest.raises(ModelMismatch, match="reindex") as error:
        opened()
    assert (error.value.stored, error.value.given) == (new.model_id, "hashing-64")
    again = Other(dimensions=dimensions)
    memory = opened(embedder=again)
    memory.flush()
    assert again.texts == []
    assert memory.session("chat", user_id="ada").search("tomatoes in 1908")[0].entry.id == before[0].entry.id


def test_back_and_forth(opened):
    """Each way the old vectors go and the new ones come, whatever place theirs was."""
    memory = opened()
    filled(memory, turns=5)
    for embedder in (Other(), HashingEmbedder(dimensions=8), Other(dimensions=16), HashingEmbedder()):
        assert memory.reindex(embedder).switched
        right(memory, embedder)
        memory.session("chat", user_id="ada").add(f"Now with {embedder.model_id}")
        memory.flush()
        right(memory, embedder)


def test_back_without_a_search_in_between(opened):
    """The first model has another number then, which a process that has just written learns as well."""
    memory, first = opened(), HashingEmbedder()
    filled(memory, turns=5)
    chat = memory.session("chat", user_id="ada")
    chat.search("sailing")
    for embedder in (Other(), first):
        chat.add(f"Before {embedder.model_id}")
        assert memory.reindex(embedder).switched
    right(memory, first)
    chat.add("A word about apricots")
    assert chat.search("apricots")[0].signals["dense"] > 0
    assert not memory._core.parts.resident(chat.scope).index.pending.any()
    memory._core.parts.residents.forget()
    assert chat.search("apricots!")[0].signals["dense"] > 0


def test_building_without_switching_changes_nothing(opened):
    """The second call finds all of it there, and embeds only what is new."""
    memory = opened()
    filled(memory)
    chat = memory.session("chat", user_id="ada")
    hits, new = chat.search("chess"), Other()
    report = memory.reindex(new, switch=False)
    assert not report.switched
    assert "not switched" in str(report)
    assert memory.stats()["next_embedder"] == new.model_id
    assert memory.stats()["embedder"] == "hashing-64"
    assert chat.search("chess") == hits
    assert memory.stats()["vectors"] == report.entries
    chat.add("A turn that came later")
    chat.entries.update("q7", content="Something else was asked")
    chat.entries.delete("a9")
    del new.texts[:]
    report = memory.reindex(new)
    assert {"A turn that came later", "Something else was asked"} <= set(new.texts)
    assert 2 <= report.embedded <= len(new.texts) < 8  # with what is made anew when a turn is changed
    right(memory, new)


def test_a_third_model_in_between_starts_anew(opened):
    """What was begun with another one and never taken up is cleared away, at once or by going back."""
    memory = opened()
    filled(memory, turns=5)
    memory.reindex(Other(), switch=False)
    third = HashingEmbedder(dimensions=8)
    memory.reindex(third, switch=False)
    assert memory.stats()["next_embedder"] == "hashing-8"
    memory.reindex(third)
    right(memory, third)


def test_the_model_in_use_is_nothing_to_do(opened):
    """A call again after the switch, perhaps one that was cut short there, reports it and embeds nothing."""
    memory = opened()
    filled(memory, turns=5)
    new = Other()
    memory.reindex(new)
    del new.texts[:]
    report = memory.reindex(Other())
    assert (report.switched, report.previous, report.embedded) == (True, None, 0)
    assert memory.reindex() == report.__class__(new.model_id, None, report.entries)
    assert new.texts == []


def test_an_empty_memory_switches_too(opened):
    """There is nothing to embed, and what comes later is embedded by the new model."""
    memory = opened()
    assert memory.reindex(Other()).entries == 0
    memory.session("chat").add("Hello there")
    memory.flush()
    right(memory, Other())


def test_the_same_process_may_not_mix_handles(opened):
    """Opened once more with the model before: the usual error; with the new one: the same memory."""
    first, new = HashingEmbedder(), Other()
    memory = opened(embedder=first)
    memory.session("chat").add("Hello there")
    memory.reindex(new)
    with pytest.raises(ConfigError, match="embedder"):
        opened(embedder=first)
    assert opened(embedder=new).stats()["embedder"] == new.model_id


def test_a_model_by_name(opened, folder, monkeypatch):
    """A name makes what opening with that name would make, and settings say so afterwards."""
    made = []

    def embedder(settings):
        made.append(settings.embedder.model)
        return {"none": None}.get(settings.embedder.model, Other())

    monkeypatch.setattr("neuralflow_memory.settings._embedder", embedder)
    memory = opened()
    memory.session("chat").add("Hello there")
    with pytest.raises(ConfigError, match="none"):
        memory.reindex("none")
    memory.reindex("acme/other")
    assert made == ["none", "acme/other"]
    assert memory.settings.embedder.model == "acme/other"
    assert open_memory(folder, embedder="acme/other").stats()["embedder"] == "other-64"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.reindex(object()), ConfigError),
        (lambda m: m.reindex(Other(), samples=-1), QueryError),
        (lambda m: m.reindex(Other(), samples=[""]), QueryError),
        (lambda m: m.reindex(Other(), samples=[(m.session("x"), 7)]), QueryError),
    ],
)
def test_bad_input_changes_nothing(opened, call, error):
    """And says what would be right."""
    memory = opened()
    memory.session("chat").add("Hello there")
    memory.flush()
    with pytest.raises(error):
        call(memory)
    assert memory.stats()["next_embedder"] is None
    right(memory, HashingEmbedder())


def test_without_a_model_there_is_nothing_to_go_on_with(opened):
    """The error says that the folder is to be opened with the new one."""
    memory = opened(embedder="none")
    memory.session("chat").add("Hello there")
    with pytest.raises(ConfigError, match="embedder="):
        memory.reindex(Other())


# --- the report -----------------------------------------------------------------------------------------------------


class Blind(HashingEmbedder):
    """A model that sees nothing: every text is the same."""

    model_id = "blind"

    def __init__(self):
        super().__init__(dimensions=8)
        self.model_id = "blind"

    def embed_documents(self, texts):
        return np.ones((len(texts), 8), np.float32)

    def embed_query(self, text):
        return np.ones(8, np.float32)


def test_the_report_tells_a_good_model_from_a_blind_one(opened):
    """The same hits with a model that means the same; fewer, and fewer answers, with one that tells nothing apart."""
    memory = opened()
    filled(memory)
    same = memory.reindex(Other(), switch=False)
    assert same.overlap > 0.95  # but for ties
    assert len(same.samples) == 50
    assert same.answered_before == pytest.approx(same.answered_after, abs=0.05)
    assert same.answered_before > 0.5
    blind = memory.reindex(Blind(), switch=False)
    assert blind.overlap < 0.9
    assert blind.answered_before == same.answered_before
    assert blind.answered_after <= blind.answered_before
    worst = min(blind.samples, key=lambda s: s[1])
    assert worst[0] in str(blind)
    assert f"{blind.overlap:.0%}" in str(blind)
    assert memory.reindex(Other(), switch=False, samples=0).overlap is None


def test_samples_of_ones_own(opened):
    """A question is asked where it is said, or of who has the most; none is taken from the chats then."""
    memory = opened()
    filled(memory)
    memory.session("big", user_id="carl").add([f"Carl says {n} things" for n in range(200)])
    report = memory.reindex(
        Blind(), switch=False, samples=["Carl says 7", (memory.session("chat", user_id="bo"), "What of the bees?")]
    )
    assert [question for question, _ in report.samples] == ["Carl says 7", "What of the bees?"]
    assert report.answered_before is None
    assert report.overlap == pytest.approx(sum(share for _, share in report.samples) / 2)


def test_a_model_that_can_not_be_asked_any_more_is_no_hindrance(opened):
    """The service behind the old one was switched off: nothing is compared, and the new one is taken up."""
    old, new = HashingEmbedder(), Other()
    memory = opened(embedder=old)
    filled(memory, turns=5)

    def gone(_):
        raise RuntimeError("410 Gone")

    old.embed_query = gone
    with pytest.warns(RuntimeWarning, match="without comparing.*410"):
        report = memory.reindex(new)
    assert (report.overlap, report.switched) == (None, True)
    right(memory, new)


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_new_model_that_fails_leaves_the_old_one_in_use(opened):
    """What it raises is raised; mended, it goes on with what is missing."""
    memory = opened()
    filled(memory)
    new = Other()
    calls, embed = [], new.embed_documents

    def fails(texts):
        calls.append(len(texts))
        if len(calls) > 2:
            raise RuntimeError("out of quota")
        return embed(texts)

    new.embed_documents = fails
    with pytest.raises(RuntimeError, match="out of quota"):
        memory.reindex(new)
    assert memory.stats()["embedder"] == "hashing-64"
    assert memory.session("chat", user_id="ada").search("chess")[0].signals["dense"] > 0
    right_before = len(new.texts)
    assert right_before == sum(calls[:2])
    del new.embed_documents
    memory.reindex(new)
    assert len(new.texts) == distinct(memory)
    right(memory, new)


def test_a_text_that_can_not_be_embedded_is_left_to_the_indexer(opened):
    """It is one of many: the others are taken up, and it is found by its words."""
    memory = opened()
    filled(memory, turns=5)
    chat = memory.session("chat", user_id="ada")
    chat.add("A poisonous word")
    new = Other()
    embed = new.embed_documents

    def fails(texts):
        if any("poison" in text for text in texts):
            raise RuntimeError("bad text")
        return embed(texts)

    new.embed_documents = fails
    report = memory.reindex(new)
    assert (report.failed, report.switched) == (1, True)
    assert "1 could not be" in str(report)
    assert memory.stats()["parked_count"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert "A poisonous word" in [h.entry.content for h in chat.search("poisonous")]
    del new.embed_documents
    memory.reindex()
    right(memory, new)


def test_vectors_of_another_length_are_another_model(opened):
    """A model that changes its mind under one name is refused, and nothing of it is taken up."""
    memory = opened()
    filled(memory, turns=5)
    memory.reindex(Other(), switch=False)
    memory.session("chat", user_id="ada").add("One more")
    liar = Other(dimensions=32)
    liar.model_id = "other-64"
    with pytest.raises(Exception, match="32 numbers, and gave 64"):
        memory.reindex(liar)
    assert memory.stats()["embedder"] == "hashing-64"


@pytest.mark.parametrize("place", ["reindex.applied", "reindex.committed"])
def test_an_error_at_the_switch_leaves_one_model_or_the_other(opened, monkeypatch, place):
    """Not a mixture: what answers, and what the ledger holds, is of one."""
    memory = opened()
    filled(memory, turns=8)
    chat = memory.session("chat", user_id="ada")
    chat.search("chess")

    def fails(name):
        if name == place:
            raise KeyboardInterrupt

    monkeypatch.setattr(failpoints, "hook", fails)
    with pytest.raises(KeyboardInterrupt):
        memory.reindex(Other())
    monkeypatch.setattr(failpoints, "hook", None)
    expected = Other() if place == "reindex.committed" else HashingEmbedder()
    assert memory.stats()["embedder"] == expected.model_id
    assert chat.search("chess")[0].signals["dense"] > 0
    assert memory.reindex(Other()).switched
    right(memory, Other())


# --- beside others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [64, 24], ids=["as many", "fewer"])
def test_search_and_writing_go_on_all_the_while(opened, dimensions):
    """No search fails, is without vectors or ranks by a mixture of both; what is written, edited or deleted is caught up."""
    memory = opened()
    filled(memory, turns=60)
    new = Other(dimensions=dimensions)
    slow = new.embed_documents

    def slowly(texts):
        time.sleep(0.05)
        return slow(texts)

    new.embed_documents = slowly
    over, errors, searches, written = threading.Event(), [], [], []
    asked = [f"What do we know about {TOPICS[n % 7]} in the year {1900 + n}?" for n in range(60)]
    chat = memory.session("chat", user_id="ada")
    expected = [chat.search(question, k=5) for question in asked]

    def searching(user):
        chat = memory.session("chat", user_id=user)
        n = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            while not over.is_set():
                n = (n + 37) % 60
                hits = chat.search(asked[n], k=5)
                assert asked[n] in [h.entry.content for h in hits]
                if dimensions == 64:  # cosines are the same by both models, and any others by a mixture
                    own, then = (next(h for h in some if h.entry.content == asked[n]) for some in (hits, expected[n]))
                    assert own.signals["dense"] == pytest.approx(then.signals["dense"], abs=0.002)
                else:
                    assert "dense" in hits[0].signals
                searches.append(time.monotonic())

    def writing():
        chat = memory.session("live", user_id="carl")
        while not over.is_set():
            n = len(written)
            chat.add(Message("user", f"Live turn {n} about {TOPICS[n % 7]}", id=f"l{n}"))
            if n % 5 == 4:
                chat.entries.update(f"l{n - 1}", content=f"Edited turn {n - 1}")
            if n % 5 == 3:
                chat.entries.delete(f"l{n - 2}")
            written.append(n)
            time.sleep(0.005)

    def guarded(call, *given):
        try:
            call(*given)
        except BaseException as error:
            errors.append(error)
            over.set()

    threads = [
        threading.Thread(target=guarded, args=given) for given in ((searching, "ada"), (searching, "bo"), (writing,))
    ]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    wait_until(lambda: (len(searches) > 10 and len(written) > 10) or errors)
    memory.reindex(new)
    ended = time.monotonic()
    wait_until(lambda: (searches and searches[-1] > ended + 0.1) or errors)
    over.set()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert sum(began < at < ended for at in searches) > 5
    assert len(written) > 10
    assert memory.stats()["search_without_vectors"] == 0
    memory.flush()
    right(memory, new)
    live = {m.id: m.content for m in memory.session("live", user_id="carl").messages()}
    assert len(live) == len(written) - len([n for n in written if n % 5 == 3])
    assert len(new.texts) < memory.stats()["entries"] + len(written)  # each once, and what was edited


def test_a_search_that_has_begun_is_not_answered_by_a_mixture(opened):
    """The switch falls between the question's vector and the comparison: the question is embedded once more."""
    old, new = HashingEmbedder(), Other()
    memory = opened(embedder=old)
    filled(memory, turns=20)
    chat = memory.session("chat", user_id="ada")
    expected = chat.search("violins in 1905")
    embed = old.embed_query

    def switches(text):
        old.embed_query = embed
        vector = embed(text)
        memory.reindex(new, samples=0)
        memory.session("chat", user_id="ada").search("anything")  # what is in RAM is of the new model now
        return vector

    old.embed_query = switches
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hits = chat.search("violins in the 1905")
    assert new.questions == 2
    assert hits[0].entry.id == expected[0].entry.id
    assert hits[0].signals["dense"] == pytest.approx(expected[0].signals["dense"], abs=0.05)


def test_a_core_with_the_old_model_searches_by_words_and_says_so(opened, beside):
    """It never compares with the new vectors, lets the other one index, and may take the new model up itself."""
    first = opened()
    filled(first, turns=10)
    second = beside(first)
    theirs = second.session("chat", user_id="ada")
    assert theirs.search("chess")[0].signals["dense"] > 0
    new = Other()
    report = second.reindex(new, samples=3)  # by one that does not index for all
    assert report.switched
    wait_until(lambda: second.stats()["indexer"] == os.getpid() and second._core._lock.held)
    second.flush()
    right(second, new)
    chat = first.session("chat", user_id="ada")
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="by words alone.*'other-64'.*open it again"):
            hits = chat.search("chess in 1902")
        assert "1902" in hits[0].entry.content
        assert "dense" not in hits[0].signals
    assert first.stats()["search_without_vectors"] >= 2
    chat.add("Written by the one with the old model")
    wait_until(lambda: second.stats()["dirty"] == 0)
    right(second, new)
    with pytest.raises(ModelMismatch, match="open it again"):
        first.reindex(HashingEmbedder(dimensions=8))
    assert first.reindex(Other()).previous is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first.session("chat", user_id="ada").search("chess in 1902")[0].signals["dense"] > 0


def test_another_process_goes_on_by_words_until_it_opens_again(opened, folder):
    """It had the index: it searches and writes all the while, and gives the index up to the one with the new model."""
    opened().close()
    other = Process(folder)
    try:
        memory, new = opened(), Other()
        filled(memory, turns=10)
        asked = "[(h.entry.id, h.signals.get('dense', 0) > 0) for h in chat.search('What do we know about chess in the year 1902?', k=3)]"
        assert ("q2", True) in other.ask(asked)
        assert memory.stats()["indexer"] == other.pid
        memory.reindex(new, switch=False)
        assert ("q2", True) in other.ask(asked)
        other.ask("chat.add('Written by the other one')")
        assert memory.reindex(new).switched
        assert ("q2", False) in other.ask(asked)
        assert other.ask("memory.stats()['search_without_vectors']") > 0
        other.ask("chat.add('Written by it afterwards')")
        memory.flush()
        assert memory.stats()["indexer"] == os.getpid()
        right(memory, new)
    finally:
        other.close()


def test_two_at_once_embed_everything_once(opened, beside):
    """The second waits for the first, and finds it done."""
    first = opened()
    filled(first, turns=20)
    second, embedders, reports = beside(first), [Other(), Other()], []
    threads = [
        threading.Thread(target=lambda m=m, e=e: reports.append(m.reindex(e, samples=0)))
        for m, e in zip((first, second), embedders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [r.switched for r in reports] == [True, True]
    assert sum(len(e.texts) for e in embedders) == distinct(first)
    right(first if first._core._lock.held else second, Other())


def test_a_backup_of_the_middle_goes_on_where_it_was(opened, tmp_path):
    """Restored elsewhere, it is in use by the old model, and the new one has only the rest to embed."""
    memory = opened()
    filled(memory, turns=10)
    memory.reindex(Other(), switch=False)
    memory.backup(tmp_path / "saved")
    with open_memory(tmp_path / "elsewhere", embedder=HashingEmbedder()) as other:
        other.restore(tmp_path / "saved")
        assert other.session("chat", user_id="ada").search("chess")[0].signals["dense"] > 0
        new = Other()
        other.reindex(new)
        assert new.texts == []
        right(other, new)


def test_taking_it_up_on_opening_keeps_what_was_built(opened, folder, monkeypatch):
    """on_change='reindex' with the model that was being built embeds only what is missing."""
    memory = opened()
    filled(memory, turns=10)
    memory.reindex(Other(), switch=False)
    memory.session("chat", user_id="ada").add("One more")
    memory.flush()
    memory.close()
    new = Other()
    monkeypatch.setattr("neuralflow_memory.settings._embedder", lambda _: new)
    with open_memory(folder, embedder={"on_change": "reindex"}) as memory:
        memory.flush()
        assert new.texts == ["One more"]
        right(memory, new)


def test_deleted_vectors_of_both_models_go(opened, folder):
    """Also while the new ones are being built: no bytes of either stay in the file."""
    memory = opened()
    filled(memory, turns=5)
    new = Other()
    memory.reindex(new, switch=False)
    chat = memory.session("chat", user_id="ada")
    text = chat.entries.get("q3").content
    gone = [e.embed_documents([text])[0].astype(np.float32).tobytes() for e in (HashingEmbedder(), new)]
    memory.session("chat", user_id="bo").entries.delete("q3")  # who said the same
    chat.entries.delete("q3")
    memory.flush()
    memory.close()
    with closing(sqlite3.connect(folder / "ledger.sqlite3")) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = (folder / "ledger.sqlite3").read_bytes()
    assert [vector in data for vector in gone] == [False, False]


def test_it_returns_when_the_index_has_all_however_late_it_begins(opened, monkeypatch):
    """Marks that are older than the index stay as old as they are."""
    memory = opened()
    filled(memory, turns=130)
    memory.flush()
    fit = index._fit_store

    def late(parts, *, dimensions):
        if parts.store.model_id != parts.model_id:
            time.sleep(1.2)  # marks know seconds
        fit(parts, dimensions=dimensions)

    monkeypatch.setattr(index, "_fit_store", late)
    memory.reindex(Other(), samples=2)
    assert index_keys(memory) == live_keys(memory)


# --- crashes --------------------------------------------------------------------------------------------------------

CHILD = """
    import os, signal, sys
    import neuralflow_memory._failpoints as failpoints
    from neuralflow_memory import open_memory
    from test_reindex import Other
    from neuralflow_memory.testing import HashingEmbedder
    folder, place, passing = sys.argv[1], sys.argv[2], int(sys.argv[3])
    left = [passing]

    def hook(name):
        if name == place:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    memory = open_memory(folder, embedder=HashingEmbedder())
    failpoints.hook = hook
    memory.reindex(Other(), samples=2)
    memory.close()
    print("done")
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder that the crashes are tried on."""
    folder = tmp_path_factory.mktemp("original") / "memory"
    with open_memory(folder, embedder=HashingEmbedder()) as memory:
        filled(memory, turns=130)
    return folder


@pytest.mark.parametrize(("place", "passing"), [(name, 1) for name in REINDEXING] + [("reindex.saved", 6)])
def test_a_crash_anywhere_goes_on_where_it_was(original, tmp_path, place, passing):
    """Nothing is lost, nothing that was kept is embedded again, and one of the two models is in use."""
    folder = tmp_path / "memory"
    shutil.copytree(original, folder)
    told = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), place, str(passing)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(told, capture_output=True, text=True, timeout=60, env=env)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    switched = place in ("reindex.committed", "reindex.cleared")
    with closing(sqlite3.connect(folder / "ledger.sqlite3")) as db:
        models = dict(db.execute("SELECT name, id FROM models ORDER BY id"))
        had = 0
        if "other-64" in models:
            had = db.execute("SELECT count(*) FROM vectors WHERE model = ?", (models["other-64"],)).fetchone()[0]
        entries = db.execute("SELECT count(*) FROM features WHERE words > 0").fetchone()[0]
    assert next(iter(models)) == ("other-64" if switched else "hashing-64")
    if place != "reindex.embedded":
        assert had > 0
    new = Other()
    with suppress(ModelMismatch):
        memory = open_memory(folder, embedder=new if switched else HashingEmbedder())
    chat = memory.session("chat", user_id="ada")
    assert chat.search("chess in 1902")[0].signals["dense"] > 0
    assert memory.reindex(new, samples=2).switched
    assert 0 <= entries - had - len(new.texts) <= 4  # summaries that read alike are one text
    assert len(chat.messages()) == 260
    right(memory, new)
    assert memory.stats(verify=True)["integrity"] == "ok"
    memory.close()


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(folder, monkeypatch):
    """Run a command on a folder whose models are hashes: "other-24" is that of 24 dimensions."""

    def embedder(settings):
        name = settings.embedder.model
        return Other(dimensions=int(name[6:])) if name.startswith("other-") else HashingEmbedder()

    monkeypatch.setattr("neuralflow_memory.settings._embedder", embedder)

    def run_(*arguments, code=0, model=None):
        monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", model or "hashing")
        done = CliRunner().invoke(app, [*arguments, "--path", str(folder)])
        assert done.exit_code == code, done.output
        return done

    return run_


def test_the_command_builds_compares_and_switches(opened, run):
    """First looked at, then taken up; afterwards the old model is refused with what to do, and the new one works."""
    with opened() as memory:
        filled(memory, turns=10)
    said = run("reindex", "--model", "other-24", "--compare-only").stdout
    assert "hashing-64 -> other-24" in said
    assert "not switched" in said
    report = json.loads(run("reindex", "--model", "other-24", "--samples", "4", "--json").stdout)
    assert (report["switched"], report["embedded"], len(report["samples"])) == (True, 0, 4)
    assert "reindex" in run("search", "chess", "--user", "ada", code=1).output
    assert "chess" in run("search", "chess", "--user", "ada", model="other-24").stdout
    assert "other-24: " in run("reindex", model="other-24").stdout
    assert "NEURALFLOW_EMBEDDER__MODEL=other-8" in run("reindex", "--model", "other-8", model="other-24").stdout
    with opened(embedder=Other(dimensions=8)) as memory:
        right(memory, Other(dimensions=8))


def test_the_command_shows_how_far_it_is(opened, run, monkeypatch):
    """A bar for embedding, then one for the index; without another model the second alone."""
    with opened() as memory:
        filled(memory, turns=10)
    out = io.StringIO()
    monkeypatch.setattr(render, "err", lambda: Console(file=out, force_terminal=True, width=100))
    run("reindex", "--model", "other-24")
    assert re.findall(r"embedding|indexing", out.getvalue())[0] == "embedding"
    assert "indexing" in out.getvalue()
    out.seek(out.truncate(0))
    run("reindex", model="other-24")
    assert "embedding" not in out.getvalue()
    assert "indexing" in out.getvalue()
    run("reindex", "--compare-only", code=2)


def test_an_interrupted_command_says_how_to_go_on(opened, run, monkeypatch):
    """Ctrl-C while it embeds: run again, it embeds the rest only."""
    with opened() as memory:
        filled(memory, turns=60)
    saved = []

    def interrupts(name):
        saved.append(name)
        if saved.count("reindex.saved") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(failpoints, "hook", interrupts)
    assert "run it again" in run("reindex", "--model", "other-24", code=130).output
    monkeypatch.setattr(failpoints, "hook", None)
    report = json.loads(run("reindex", "--model", "other-24", "--json").stdout)
    assert report["embedded"] <= report["entries"] - 128 + 2


async def test_the_async_twin(opened):
    """The same from an event loop, which goes on meanwhile."""
    memory = opened()
    filled(memory, turns=10)
    assert (await memory.areindex(Other(), samples=3)).switched
    right(memory, Other())
