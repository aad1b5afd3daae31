"""An open memory: handles, options, statistics, closing, files left behind."""

import os
import sqlite3
import threading
import warnings

import pytest
from conftest import CountingEmbedder, in_threads, texts, wait_until

from neuralflow_memory import ClosedError, ConfigError, Message, open_memory
from neuralflow_memory.config import Settings
from neuralflow_memory.testing import HashingEmbedder


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_what_was_added_is_there_after_reopening(opened, folder):
    """A closed memory opened again shows the same turns, knowledge, window and summary."""
    with opened() as memory:
        chat = memory.session("chat", user_id="ada")
        chat.add(["One", Message("assistant", "Two", metadata={"n": [1, {"x": None}]})])
        chat.remember("Ada sails", tags=["sport"], category="hobby/water", importance=0.9)
        before = chat.messages(), chat.messages(view="window"), chat.entries.list()
    with opened() as memory:
        chat = memory.session("chat", user_id="ada")
        assert (chat.messages(), chat.messages(view="window"), chat.entries.list()) == before


def test_the_same_folder_twice_is_one_core_closed_with_its_last_handle(opened, folder):
    """Each handle sees the other's turns; the folder stays open until both are closed."""
    embedder = HashingEmbedder()
    one, two = opened(embedder=embedder), opened(folder.parent / "x" / ".." / "memory", embedder=embedder)
    one.session("chat").add("Hello")
    assert texts(two.session("chat").messages()) == ["Hello"]
    one.close()
    one.close()
    assert texts(two.session("chat").messages()) == ["Hello"]
    with pytest.raises(ClosedError):
        one.session("chat")
    two.close()
    assert opened(embedder=HashingEmbedder())._core is not two._core


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"budget": {"total": 5000}}, "budget"),
        ({"durability": "power"}, "durability"),
        ({"user_id": "bob"}, "user_id"),
        ({"embedder": HashingEmbedder(dimensions=8)}, "embedder"),
        ({"summarizer": object()}, "summarizer"),
        ({"clock": lambda: None}, "clock"),
    ],
)
def test_other_options_for_an_open_folder_are_named(opened, options, name):
    """Opening it again with different options is a ConfigError that says which."""
    first = HashingEmbedder()
    memory = opened(embedder=first)
    with pytest.raises(ConfigError, match=name):
        opened(**{"embedder": first} | options)
    memory.session("chat").add("The first handle still works")


def test_every_operation_after_close_is_a_closed_error(memory, chat):
    """Nothing hangs, and nothing else is raised."""
    chat.add("Hello")
    memory.close()
    calls = [
        lambda: chat.add("x"),
        chat.messages,
        lambda: chat.search("x"),
        chat.context,
        lambda: chat.remember("x"),
        chat.clear,
        lambda: chat.replace(["x"]),
        chat.compact,
        chat.summary,
        chat.entries.list,
        lambda: chat.entries.delete(filter={"role": "user"}),
        memory.sessions,
        memory.stats,
        memory.flush,
        memory.ready,
        memory.reindex,
        lambda: memory.count_tokens("x"),
        lambda: memory.session("y"),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="open_memory"):
            call()


def test_closing_under_load_raises_closed_errors_only(opened):
    """Threads at work when the memory is closed get ClosedError; what they had acknowledged is there afterwards."""
    memory = opened()
    acknowledged, started = [], threading.Barrier(7)

    def work(own):
        chat = memory.session("chat", user_id="ada")
        started.wait()
        try:
            for n in range(10_000):
                acknowledged.extend(chat.add(f"Turn {own} {n} about sailing"))
                chat.search("sailing")
                chat.context(max_tokens=500)
        except ClosedError:
            pass

    def close():
        started.wait()
        wait_until(lambda: len(acknowledged) > 30)
        memory.close()

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        in_threads(*[lambda own=own: work(own) for own in range(6)], close)
    with opened() as again:
        stored = [m.id for m in again.session("chat", user_id="ada").messages()]
        assert len(set(stored)) == len(stored)
        assert set(acknowledged) <= set(stored)


def test_an_in_memory_folder_is_gone_after_close():
    """ ":memory:" keeps everything a folder has, and leaves nothing."""
    memory = open_memory(":memory:", embedder=HashingEmbedder())
    other = open_memory(":memory:", embedder=HashingEmbedder())
    memory.session("chat").add("Hello")
    assert other.session("chat").messages() == []
    path = memory.path
    assert path.exists()
    memory.close()
    other.close()
    assert not path.exists()


def test_threads_that_come_and_go_leave_no_open_files(memory, chat):
    """A server that starts a thread for each request does not run out of file descriptors."""
    chat.add("Hello")
    memory.flush()
    before = descriptors()
    for _ in range(60):
        in_threads(chat.messages)
    assert descriptors() <= before + 12


def test_closing_leaves_no_open_files_and_no_threads(opened):
    """Whatever a memory opened, it gives back; SQLite's log is folded into the file."""
    opened().close()
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        with opened() as memory:
            memory.session("chat").add("Hello")
            memory.flush()
    assert threading.active_count() <= threads
    assert descriptors() <= before + 2
    assert not (memory.path / "ledger.sqlite3-wal").exists()


def test_stats_count_what_is_there(opened):
    """The numbers that people and monitoring read."""
    memory = opened()
    memory.session("a", user_id="ada").add(["One", "Two"])
    memory.session("b").add("Three")
    memory.session("a", user_id="ada").remember("Four")
    memory.flush()
    stats = memory.stats(verify=True)
    expected = {"owners": 2, "sessions": 2, "entries": 4, "vectors": 4, "dirty": 0, "chroma": 4, "parked": []}
    assert {n: stats[n] for n in expected} == expected
    assert stats["embedder"] == "hashing-64"
    assert stats["integrity"] == "ok"
    assert stats["last_error"] is None


def test_sessions_are_listed_per_user_latest_first(opened):
    """A user's sessions are that user's; without one, those that have none."""
    memory = opened(user_id="ada")
    for name, user in [("a", None), ("b", None), ("c", "bob"), ("a", "bob")]:
        memory.session(name, user_id=user).add("Hello")
    memory.session("a").add("Again")
    assert [(s.session_id, s.messages) for s in memory.sessions()] == [("a", 2), ("b", 1)]
    assert [s.session_id for s in memory.sessions(user_id="bob")] == ["a", "c"]
    assert memory.sessions(user_id="carol") == memory.sessions(tenant="other") == []


@pytest.mark.parametrize(("durability", "level"), [("process", 1), ("power", 2)])
def test_durability_sets_how_sqlite_syncs(opened, durability, level):
    """ "power" syncs the log at each commit."""
    db = opened(durability=durability)._core.parts.ledger._db._writer
    assert db.execute("PRAGMA synchronous").fetchone() == (level,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_options_come_from_arguments_then_environment_then_file(opened, tmp_path, monkeypatch):
    """Nearer sources win, option by option."""
    file = tmp_path / "options.toml"
    file.write_text(f'path = "{tmp_path / "m"}"\nuser_id = "file"\n[budget]\ntotal = 6000\nsummary = 500\n')
    monkeypatch.setenv("NEURALFLOW_USER_ID", "environment")
    monkeypatch.setenv("NEURALFLOW_BUDGET__TOTAL", "7000")
    settings = opened(file, budget={"conversation": 4500}).settings
    caps = {"total": 7000, "conversation": 4500, "summary": 500}
    assert settings.budget.model_dump(include=caps.keys()) == caps
    assert settings.user_id == "environment"


def test_ready_settings_are_taken_as_they_are(opened, folder):
    """A Settings object opens the folder it names; arguments change single options of it."""
    settings = Settings(path=folder, user_id="ada")
    assert opened(settings).settings == settings
    assert settings.user_id == "ada"


def test_the_embedding_cache_survives_reopening(opened):
    """What was embedded once is not embedded again by the next process."""
    first, second = CountingEmbedder(), CountingEmbedder()
    with opened(embedder=first) as memory:
        memory.session("chat", user_id="ada").add("Sailing on Sunday")
        memory.flush()
    with opened(embedder=second) as memory:
        memory.session("other", user_id="ada").add("Sailing on Sunday")
        memory.flush()
    assert (first.texts, second.texts) == (["Sailing on Sunday"], [])


def test_another_tokenizer_recounts_what_was_stored(opened):
    """A budget holds by the counter of today, whatever counter the turns were stored under."""

    class Letters:
        name, exact = "letters", True

        def count(self, text):
            return len(text)

    with opened() as memory:
        memory.session("chat").add(["Hello there", Message("assistant", "Good day")])
    with opened(token_counter=Letters()) as memory:
        context = memory.session("chat").context(max_tokens=100, search=False)
        assert context.tokens == memory.count_tokens(context.messages) == 3 + 4 + 11 + 4 + 8


def test_a_file_of_a_first_open_that_was_cut_short_is_no_stranger(opened, folder):
    """A process killed before the tables were made leaves a file with nothing in it: it is taken as new."""
    folder.mkdir()
    db = sqlite3.connect(folder / "ledger.sqlite3")
    db.execute("PRAGMA journal_mode = WAL")
    db.close()
    assert opened().session("chat").add("Hello")


def test_a_relative_folder_stays_where_it_was_when_the_process_moves(tmp_path, monkeypatch):
    """After chdir() into a place with a memory of its own, reads, writes and close() are still those of the first."""
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        with open_memory("memory", embedder=HashingEmbedder()) as memory:
            memory.session("chat").add(f"Said {place}")
            memory.flush()
    monkeypatch.chdir(tmp_path / "here")
    with open_memory("memory", embedder=HashingEmbedder()) as memory:
        chat = memory.session("chat")
        monkeypatch.chdir(tmp_path / "there")
        with memory._core.parts.ledger._db.read():  # so that the next read opens the file anew
            assert texts(chat.messages()) == ["Said here"]
        chat.add("Said from afar")
        memory.flush()
        assert memory.path == tmp_path / "here" / "memory"
    with pytest.raises(ClosedError):
        chat.messages()
    monkeypatch.chdir(tmp_path / "here")
    with open_memory("memory", embedder="none", budget={"total": 9000}) as memory:  # other options: it was closed
        assert texts(memory.session("chat").messages()) == ["Said here", "Said from afar"]
    with open_memory(tmp_path / "there" / "memory", embedder="none") as memory:
        assert texts(memory.session("chat").messages()) == ["Said there"]
