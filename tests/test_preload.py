"""When the embedding model is loaded, and where: in the background, or at its first use; never on an event loop."""

import asyncio
import threading

import pytest
from conftest import found, wait_until

from neuralflow_memory import Settings, aopen_memory
from neuralflow_memory.testing import HashingEmbedder


class Lazy(HashingEmbedder):
    """Loads at its first use at the latest, and keeps in which threads it was loaded and used."""

    def __init__(self):
        super().__init__()
        self.loaded = []
        self.used = set()

    def load(self):
        if not self.loaded:
            self.loaded.append(threading.current_thread())

    def embed_documents(self, texts):
        self.load()
        self.used.add(threading.current_thread())
        return super().embed_documents(texts)

    def embed_query(self, text):
        self.load()
        self.used.add(threading.current_thread())
        return super().embed_query(text)


@pytest.fixture
def embedder():
    return Lazy()


def test_the_model_is_loaded_when_the_memory_is_opened(opened, embedder):
    """Unasked, and in a thread of its own."""
    memory = opened(embedder=embedder)
    memory.ready()
    (thread,) = embedder.loaded
    assert thread.name == "neuralflow-indexer"


def test_preload_off_loads_nothing_until_it_is_needed(opened, embedder, folder):
    """Not by opening, nor by waiting, reading or an empty search; then by the batch that the background embeds."""
    memory = opened(Settings(path=folder, embedder={"preload": False}), embedder=embedder)
    memory.ready()
    chat = memory.session("chat", user_id="ada")
    assert (chat.search("sailing"), chat.messages()) == ([], [])
    memory.flush()
    assert embedder.loaded == []
    chat.add("Sailing on Sunday")
    memory.flush()
    assert [thread.name for thread in embedder.loaded] == ["neuralflow-indexer"]


def test_preload_off_loads_for_a_search_that_comes_first(opened, embedder, folder):
    """What is embedded already waits for no one, and the question is what needs the model."""
    with opened() as memory:
        memory.session("chat", user_id="ada").add("Sailing on Sunday")
        memory.flush()
    memory = opened(Settings(path=folder, embedder={"preload": False}), embedder=embedder)
    hits = memory.session("chat", user_id="ada").search("sailing")
    assert hits[0].signals["dense"] > 0
    assert len(embedder.loaded) == 1


def test_a_variable_turns_it_off(opened, embedder, monkeypatch):
    """As any other option."""
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__PRELOAD", "false")
    assert not opened(embedder=embedder).settings.embedder.preload
    assert embedder.loaded == []


@pytest.mark.parametrize("preload", [True, False])
async def test_the_event_loop_never_loads_or_embeds(preload, embedder, folder):
    """Every async verb that needs the model uses it in a worker."""
    settings = Settings(path=folder, embedder={"preload": preload})
    async with await aopen_memory(settings, embedder=embedder) as memory:
        assert len(embedder.loaded) == preload
        chat = memory.session("chat", user_id="ada")
        await chat.aadd(["Sailing on Sunday", "Tomatoes"])
        assert found(await chat.asearch("sailing"))[0] == "Sailing on Sunday"
        await chat.acontext("When do I go sailing?")
        values = memory.values(user_id="ada")
        await values.aput(("notes",), "k", {}, texts=["Boats"])
        await values.asearch((), "boats")
        await memory.areindex()
        await asyncio.to_thread(wait_until, lambda: memory.stats()["dirty"] == 0)
    assert len(embedder.loaded) == 1
    assert embedder.used
    assert threading.current_thread() not in {*embedder.loaded, *embedder.used}
