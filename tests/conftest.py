"""Fixtures that more than one file of tests uses, and the embedders that misbehave on purpose."""

import functools
import os
import threading
import time

import pytest
from hypothesis import HealthCheck, settings

import neuralflow_memory.settings as settings_module
from neuralflow_memory import Memory, open_memory
from neuralflow_memory.testing import HashingEmbedder

settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

SMALL = {"max_context_items": 2, "summarization_threshold": 4}
"""Folds after four items, so that short tests cross a fold."""


class CountingEmbedder(HashingEmbedder):
    """Keeps every text that it was asked to embed as a document."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def embed_documents(self, texts):
        self.texts += texts
        return super().embed_documents(texts)


class FailingEmbedder(CountingEmbedder):
    """Raises while `broken` says so for one of the texts."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def embed_documents(self, texts):
        if any(self.broken(t) for t in texts):
            raise RuntimeError("this text can't be embedded")
        return super().embed_documents(texts)


def rows(memory):
    """How many rows each table of the ledger has."""
    names = ("owners", "sessions", "entries", "features", "vectors", "dirty", "tombstones")
    with memory._core.parts.ledger._db.read() as db:
        return {n: db.execute(f"SELECT count(*) FROM {n}").fetchone()[0] for n in names}


def without_tiers(db):
    """Make a ledger's file as it was before entries could be cold."""
    for table in ("blocks", "archived", "uses", "trash"):
        db.execute(f"DROP TABLE {table}")
    db.execute("ALTER TABLE features DROP COLUMN cold")


def index_keys(memory):
    """Every key in Chroma."""
    return set(memory._core.parts.store.keys())


def live_keys(memory):
    """The keys of all live entries with words, of every owner, that belong into the index."""
    with memory._core.parts.ledger._db.read() as db:
        found = db.execute("SELECT key, content FROM entries WHERE codec = 0").fetchall()
    return {key.hex() for key, content in found if content.strip()}


def texts(messages):
    return [m.content for m in messages]


def found(hits):
    return [h.entry.content for h in hits]


def wait_until(condition, *, seconds=30.0):
    """Return when *condition* holds; fail when it never does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail("what was waited for never happened")
        time.sleep(0.002)


def in_threads(*calls):
    """Run every call in a thread of its own; the first error is raised here."""
    errors = []

    def run(call):
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(c,)) for c in calls]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "memory"


@pytest.fixture
def opened(folder):
    """`open_memory` on one folder with the hashing embedder; closed at the end of the test."""
    memories = []

    @functools.wraps(open_memory)
    def open_(path=folder, **options):
        options.setdefault("embedder", HashingEmbedder())
        memories.append(open_memory(path, **options))
        return memories[-1]

    yield open_
    for memory in memories:
        memory.close()


@pytest.fixture
def beside():
    """A second core on the folder of a memory, with RAM, files and locks of its own, as another process has them."""
    memories = []

    def open_(memory, **parts):
        given = dict.fromkeys(("embedder", "reranker", "summarizer", "token_counter", "policy", "clock"))
        given["embedder"] = parts.get("embedder", HashingEmbedder()) if memory._core.parts.embedder else None
        core = settings_module._open(memory.settings, {**given, **parts}, release=lambda: None)
        memories.append(Memory(core, on_close=lambda core: core.close()))
        return memories[-1]

    yield open_
    for memory in memories:
        memory.close()


@pytest.fixture
def memory(opened):
    return opened()


@pytest.fixture
def chat(memory):
    return memory.session("chat", user_id="ada")
