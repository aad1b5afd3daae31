"""Every change of an entry keeps what it was before: read it, go back to it, and delete it for good."""

from datetime import timedelta

import pytest
from conftest import found, in_threads

from neuralflow_memory import InputError, Message, NotFound, _failpoints
from neuralflow_memory.storage.ledger.versions import MOST
from neuralflow_memory.testing import ManualClock


def kept(memory):
    """How many earlier versions the ledger holds."""
    with memory._core.parts.ledger._db.read() as db:
        return db.execute("SELECT count(*) FROM versions").fetchone()[0]


def on_disk(memory, word):
    """Whether any file of the ledger holds *word*."""
    memory._core.parts.ledger._db._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return any(word.encode() in p.read_bytes() for p in memory.path.glob("ledger*"))


def test_every_change_keeps_the_version_before(opened):
    """What was changed stands there as it was, with its own times; the last one is what it is now."""
    clock = ManualClock()
    chat = opened(clock=clock).session("chat", user_id="ada")
    own = chat.remember("The code is 4711", tags=["door"], metadata={"floor": 2})
    clock.advance(seconds=60)
    chat.entries.update(own, content="The code is 4712")
    clock.advance(seconds=60)
    now = chat.entries.update(own, tags=["door", "cellar"], importance=0.9)
    first, second, third = chat.entries.history(own)
    assert [e.version for e in (first, second, third)] == [1, 2, 3]
    assert [e.content for e in (first, second, third)] == ["The code is 4711", "The code is 4712", "The code is 4712"]
    assert (first.tags, first.metadata) == (("door",), {"floor": 2})
    assert second.updated_at - first.updated_at == timedelta(seconds=60)
    assert third == now == chat.entries.get(own)
    assert chat.entries.history(first.key) == [first, second, third]


def test_what_never_changed_has_one_version(chat):
    """And one that isn't there raises, also for somebody else's user."""
    (turn,) = chat.add("Hello there")
    assert chat.entries.history(turn) == [chat.entries.get(turn)]
    with pytest.raises(NotFound):
        chat.entries.history("nothing")
    stranger = chat.memory.session("chat", user_id="bob")
    with pytest.raises(NotFound):
        stranger.entries.history(chat.entries.get(turn).key)


def test_a_replaced_turn_keeps_what_was_said(chat):
    """By `add` with on_conflict="replace", and by `replace` of the window."""
    chat.add([Message("user", "I live in Rome", id="t"), Message("assistant", "Noted", id="a")])
    chat.add(Message("user", "I live in Bern", id="t"), on_conflict="replace")
    chat.replace([Message("user", "I live in Oslo", id="t"), Message("assistant", "Noted", id="a")])
    assert [e.content for e in chat.entries.history("t")] == ["I live in Rome", "I live in Bern", "I live in Oslo"]
    assert [e.version for e in chat.entries.history("a")] == [1]


def test_restore_writes_a_new_version(opened):
    """As it was then, found by its words again; nothing is lost on the way."""
    memory = opened()
    chat = memory.session("chat", user_id="ada")
    own = chat.remember("Ada keeps bees", tags=["hobby"], category="garden")
    chat.entries.update(own, content="Ada keeps wasps", tags=[], category=None, metadata={"sure": False})
    back = chat.entries.restore(own, 1)
    assert (back.version, back.content, back.tags, back.category, back.metadata) == (
        3,
        "Ada keeps bees",
        ("hobby",),
        "garden",
        {},
    )
    assert [e.content for e in chat.entries.history(own)] == ["Ada keeps bees", "Ada keeps wasps", "Ada keeps bees"]
    assert found(chat.search("bees")) == ["Ada keeps bees"]
    assert back.tokens == chat.entries.history(own)[0].tokens
    memory.flush()
    assert memory.stats()["dirty"] == 0


def test_restoring_a_turn_gives_the_window_its_words(chat):
    """The transcript and the prompt say what it was."""
    chat.add([Message("user", "Meet at nine", id="t"), Message("assistant", "Fine", id="a")])
    chat.entries.update("t", content="Meet at ten")
    chat.entries.restore("t", 1)
    for view in ("all", "window"):
        assert [m.content for m in chat.messages(view=view)] == ["Meet at nine", "Fine"]
    assert "Meet at nine" in [m.content for m in chat.context(search=False).messages]


def test_a_version_that_is_not_there_changes_nothing(chat):
    """Neither does the one that it is."""
    own = chat.remember("Ada keeps bees")
    for wrong, error in ((2, NotFound), (0, NotFound), ("1", InputError), (True, InputError)):
        with pytest.raises(error):
            chat.entries.restore(own, wrong)
    assert chat.entries.restore(own, 1).version == 1
    assert len(chat.entries.history(own)) == 1


def test_the_newest_hundred_versions_are_kept(chat):
    """Of each entry; the oldest go first."""
    own = chat.remember("Count 0")
    for n in range(1, MOST + 6):
        chat.entries.update(own, metadata={"n": n})
    versions = [e.version for e in chat.entries.history(own)]
    assert versions == list(range(6, MOST + 7))
    assert kept(chat.memory) == MOST


def test_deleting_an_entry_deletes_what_it_was(opened):
    """From the tables and from the bytes of the file."""
    memory = opened(embedder="none")
    chat = memory.session("chat", user_id="ada")
    own = chat.remember("the zyzzyva password")
    chat.entries.update(own, content="the other password")
    chat.add(Message("user", "xylograph", id="t"))
    chat.add(Message("user", "woodcut", id="t"), on_conflict="replace")
    assert kept(memory) == 2
    assert on_disk(memory, "zyzzyva")
    chat.entries.delete(own)
    chat.clear()
    assert kept(memory) == 0
    assert not on_disk(memory, "zyzzyva")
    assert not on_disk(memory, "xylograph")
    with pytest.raises(NotFound):
        chat.entries.history(own)


@pytest.mark.parametrize("point", ["change.applied", "change.committed"])
def test_a_crash_leaves_a_change_with_its_version_or_neither(opened, monkeypatch, point):
    """Whatever point it is killed at; reopened, history and entry agree."""
    chat = opened().session("chat", user_id="ada")
    own = chat.remember("Ada keeps bees")

    def killed(name):
        if name == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(_failpoints, "hook", killed)
    with pytest.raises(KeyboardInterrupt):
        chat.entries.update(own, content="Ada keeps wasps")
    monkeypatch.setattr(_failpoints, "hook", None)
    contents = [e.content for e in chat.entries.history(own)]
    assert contents == ["Ada keeps bees", "Ada keeps wasps"][: 1 if point == "change.applied" else 2]
    assert found(chat.search("keeps")) == contents[-1:]


def test_changes_at_once_are_all_kept(chat):
    """Each is a version of its own, whoever was first."""
    own = chat.remember("Count")
    in_threads(*(lambda n=n: chat.entries.update(own, metadata={"n": n}) for n in range(8)))
    assert [e.version for e in chat.entries.history(own)] == list(range(1, 10))
    assert {e.metadata["n"] for e in chat.entries.history(own)[1:]} == set(range(8))


def test_running_summaries_and_tasks_keep_no_versions(opened):
    """They change with every fold and every step."""
    memory = opened(pruning={"max_context_items": 2, "summarization_threshold": 4})
    chat = memory.session("chat", user_id="ada")
    for n in range(12):
        chat.add([f"Question {n} about boats", Message("assistant", f"Answer {n}")])
        memory.flush()
    assert chat.summary()
    with chat.task("trip") as task:
        for n in range(5):
            task.set("n", n)
    assert kept(memory) == 0


async def test_history_and_restore_have_async_twins(chat):
    """They do the same."""
    own = await chat.aremember("Ada keeps bees")
    await chat.entries.aupdate(own, content="Ada keeps wasps")
    assert (await chat.entries.arestore(own, 1)).content == "Ada keeps bees"
    assert len(await chat.entries.ahistory(own)) == 3
