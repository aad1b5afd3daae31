"""A turn is written down before its text is analysed: nobody sees an entry without what its text tells."""

import os
import signal
import subprocess
import sys
import textwrap
from datetime import timedelta

import pytest
from conftest import found, wait_until

from neuralflow_memory import Message, core, open_memory
from neuralflow_memory.errors import StorageFull
from neuralflow_memory.protocols import WORDS
from neuralflow_memory.rules.analysis import recorded
from neuralflow_memory.rules.importance import worth_keeping
from neuralflow_memory.rules.traits import traits
from neuralflow_memory.testing import ManualClock

FACT = "My sister Ida moved to Graz on 4 May 2023."
WORTH = worth_keeping(FACT, traits=traits(FACT), role="user")


@pytest.fixture
def late(monkeypatch):
    """The background leaves texts alone until somebody waits for it."""
    monkeypatch.setattr(core, "_KEEPING_PAUSE", 3600.0)


def left(memory):
    """How many entries and features in the file show that their text was not analysed."""
    with memory._core.parts.ledger._db.read() as db:
        features, judged = db.execute(  # at one moment
            "SELECT (SELECT count(*) FROM features WHERE words < 0), (SELECT count(*) FROM entries WHERE importance < 0)"
        ).fetchone()
    assert features == judged
    return features


def whole(memory, chat):
    """What the ledger tells search of the user's entries, and what it should tell."""
    ledger = memory._core.parts.ledger
    told = ledger.features(ledger.owner(chat.scope))
    session = {feature[0]: feature[1] for feature in told}
    entries = ledger.by_numbers(chat.scope, list(session)).values()
    return told, [recorded(e).feature(session=session[e.number]) for e in entries]


def test_a_turn_is_analysed_soon_after_it_was_written(memory, chat):
    chat.add([FACT, "Thanks!"])
    wait_until(lambda: left(memory) == 0)
    told, wanted = whole(memory, chat)
    assert told == wanted
    assert {feature[WORDS] for feature in told} == {10, 1}


def test_nobody_sees_the_difference(late, memory, chat):
    """Entries, filters, search and exports before it was done are those of after."""
    first, second = chat.add([FACT, "Thanks!"])
    assert left(memory) == 2

    def all_that_is_seen():
        return (
            [chat.entries.get(i) for i in (first, second)],
            found(chat.search("Ida in Graz")),
            found(chat.search("Ida", filter={"importance": {"$gte": 0.4}})),
            whole(memory, chat)[0],
        )

    before = all_that_is_seen()
    assert left(memory) == 2
    assert before[0][0].importance == WORTH
    assert before[1][0] == FACT
    assert before[2] == [FACT]
    memory.flush()
    assert left(memory) == 0
    assert all_that_is_seen() == before


def test_what_was_searched_before_is_found_with_what_came_since(late, chat):
    """RAM takes in what is not analysed yet."""
    chat.add("The boat is called Nils.")
    assert found(chat.search("boat")) == ["The boat is called Nils."]
    chat.add("The boat has 14 sails.")
    assert set(found(chat.search("boat"))) == {"The boat is called Nils.", "The boat has 14 sails."}


def test_it_is_not_analysed_as_what_it_was_before(late, memory, chat):
    """A text that is replaced while the old one is being analysed."""
    chat.add(Message("user", FACT, id="t"))
    ledger = memory._core.parts.ledger
    old = [recorded(e) for e in ledger.unanalysed(limit=10)]
    chat.add(Message("user", "Sorry, I meant Linz.", id="t"), on_conflict="replace")
    ledger.analysed(old)
    assert left(memory) == 1
    memory.flush()
    told, wanted = whole(memory, chat)
    assert told == wanted
    assert [e.importance for e in chat.entries.history("t")] == [WORTH, chat.entries.get("t").importance]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_is_deleted_before_it_was_analysed_is_ranked_by_nobody(late, chat):
    """RAM may hold it for a moment, as something without words."""
    chat.add(["The boat is called Nils.", "The harbour is full."])
    assert len(chat.search("boat")) == 2
    chat.add(Message("user", "The boat has 14 sails.", id="t"))
    chat.entries.delete("t")
    assert len(chat.search("boat sails")) == 2


def test_what_could_not_be_analysed_is_tried_again(memory, chat, monkeypatch):
    """Whoever waits for it is told, and nothing is lost."""
    ledger = memory._core.parts.ledger

    def full(_):
        raise StorageFull("no space left", path="here")

    with monkeypatch.context() as broken:
        broken.setattr(type(ledger), "analysed", lambda self, records: full(records))
        chat.add(FACT)
        wait_until(lambda: "analysing: StorageFull" in (memory.stats()["last_error"] or ""))
        with pytest.raises(StorageFull):
            memory.flush()
        assert found(chat.search("Ida")) == [FACT]
    wait_until(lambda: left(memory) == 0)


def test_an_importance_that_was_set_stays(late, memory, chat):
    chat.add(Message("user", "Thanks!", id="t"))
    chat.entries.update("t", importance=0.9)
    memory.flush()
    assert chat.entries.get("t").importance == 0.9


def test_a_sweep_judges_by_it(late, opened):
    """What is worth keeping is kept, though nobody has noted yet that it is."""
    clock = ManualClock()
    turns = {"short_term": {"retention_days": 10}}
    kept = {"keep_importance": WORTH, "delete": True, "max_delete_share": 1.0, "types": turns}
    memory = opened(clock=clock, retention=kept)
    chat = memory.session("c", user_id="ada")
    chat.add([Message("user", FACT, id="fact"), Message("user", "Thanks!", id="thanks")])
    chat.replace([Message("user", "Begin anew.", id="new")])
    assert left(memory) == 3
    clock.now += timedelta(days=20)
    standings = memory._core.parts.ledger.standings(memory._core.parts.ledger.owner(chat.scope))
    assert [s.importance for s in standings] == [e.importance for e in chat.entries.list()]
    memory.sweep()
    assert [e.id for e in chat.entries.list()] == ["fact", "new"]


def test_what_is_archived_by_hand_is_analysed_first(late, memory, chat):
    chat.add([Message("user", FACT, id="t")])
    chat.replace([Message("user", "Begin anew.", id="new")])
    assert chat.entries.archive("t") == 1
    assert left(memory) == 0
    entry = chat.entries.get("t")
    assert (entry.tier, entry.content, entry.importance) == ("cold", FACT, WORTH)


_WRITE = textwrap.dedent(
    """
    import os, signal, sys
    import neuralflow_memory.core as core
    from neuralflow_memory import open_memory
    core._KEEPING_PAUSE = 3600.0
    memory = open_memory(sys.argv[1], embedder="none")
    memory.session("c", user_id="ada").add([sys.argv[2]] * 3)
    os.kill(os.getpid(), signal.SIGKILL)
    """
)


def test_a_killed_process_leaves_it_to_the_next(folder):
    done = subprocess.run([sys.executable, "-c", _WRITE, str(folder), FACT], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    with open_memory(folder, embedder="none") as memory:
        wait_until(lambda: left(memory) == 0)
        chat = memory.session("c", user_id="ada")
        told, wanted = whole(memory, chat)
        assert told == wanted
        assert len(told) == 3
        assert found(chat.search("Graz"))[0] == FACT
