"""What is cold or was deleted by retention, and versions, validity, duplicates, episodes, extraction, snapshots, values."""

import sqlite3
from datetime import timedelta

import pytest
from conftest import SMALL, found, texts

from neuralflow_memory import ArchiveError, Extraction, Finding, MemoryType, Message, NotFound
from neuralflow_memory.config import Retention
from neuralflow_memory.rules.retention import due
from neuralflow_memory.storage.ledger import schema
from neuralflow_memory.testing import ManualClock

TURN = [MemoryType.SHORT_TERM]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def memory(opened, clock):
    return opened(pruning=SMALL, clock=clock)


def count(memory, table, where="1"):
    with memory._core.parts.ledger._db.read() as db:
        return db.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()[0]


def damage(memory):
    """Take the only block away; what brings it back."""
    (path,) = (memory.path / "archive").glob("*.block")
    kept = path.read_bytes()
    path.write_bytes(kept[:-1])
    memory._core.parts.archive._unpacked.clear()
    return lambda: path.write_bytes(kept)


class Reader:
    """Finds what people say they own, and what they love."""

    name = "reader"

    def extract(self, messages):
        return Extraction(tuple(Finding(m.text, (m.id,)) for m in messages if "I have" in m.text))


def talk(chat, turns=12):
    chat.add(
        [Message("user" if n % 2 else "assistant", f"Turn {n}: I have boat {n}", id=f"t{n}") for n in range(turns)]
    )
    chat.memory.flush()


# -- versions


def test_versions_go_along_and_come_back(memory, chat):
    """The history of a cold entry is in its block, and reads the same; restoring a version warms it up."""
    own = chat.remember("Ada lives in Rome", tags=["home"], metadata={"n": 1})
    chat.entries.update(own, content="Ada lives in Oslo", importance=0.9)
    chat.entries.update(own, content="Ada lives in Bergen 🙂", metadata={"n": 3})
    before = chat.entries.history(own)
    assert [e.version for e in before] == [1, 2, 3]
    assert chat.entries.archive([own]) == 1
    assert count(memory, "versions") == 0
    after = chat.entries.history(own)
    assert after[:-1] == before[:-1]
    assert (after[-1].tier, after[-1].content) == ("cold", "Ada lives in Bergen 🙂")
    back = damage(memory)
    with pytest.raises(ArchiveError):
        chat.entries.history(own)
    back()
    restored = chat.entries.restore(own, 1)
    assert (restored.content, restored.version, restored.tier) == ("Ada lives in Rome", 4, "warm")
    assert [e.content[13:] for e in chat.entries.history(own)] == ["Rome", "Oslo", "Bergen 🙂", "Rome"]
    assert count(memory, "versions") == 3


def test_versions_of_what_warms_up_are_where_they_were(memory, chat, clock):
    """Also once it was used and swept, and after an update that changes no word."""
    own = chat.remember("Ada lives in Rome")
    chat.entries.update(own, content="Ada lives in Oslo")
    before = chat.entries.history(own)
    chat.entries.archive([own])
    chat.entries.get(own)
    assert memory.sweep().count("warm") == 1
    assert chat.entries.history(own) == before
    assert count(memory, "versions") == 1
    chat.entries.archive([own])
    chat.entries.update(own, tags=["x"])
    assert [(e.content, e.tags) for e in chat.entries.history(own)] == [
        ("Ada lives in Rome", ()),
        ("Ada lives in Oslo", ()),
        ("Ada lives in Oslo", ("x",)),
    ]
    chat.entries.archive([own])
    chat.entries.delete([own])
    assert count(memory, "versions") == count(memory, "archived") == 0


def test_a_superseded_cold_entry_holds_again_with_its_text(memory, chat):
    """When what stands for it is deleted: it comes back from the archive, and what it was is kept."""
    rome = chat.remember("Ada lives in Rome")
    oslo = chat.remember("Ada lives in Oslo", supersedes=rome)
    assert chat.entries.archive([rome]) == 1
    assert found(chat.search("Ada lives", k=5, as_of="ever"))[0][:10] == "Ada lives "
    assert chat.entries.get(rome).superseded_by == oslo
    chat.entries.delete([oslo])
    again = chat.entries.get(rome)
    assert (again.content, again.tier, again.superseded_by, again.valid_to) == ("Ada lives in Rome", "warm", None, None)
    assert [e.content for e in chat.entries.history(rome)] == ["Ada lives in Rome"] * 3
    assert found(chat.search("Where does Ada live?", k=5)) == ["Ada lives in Rome"]


# -- what is known, and what says the same


def test_cold_knowledge_is_known_when_it_is_said_again(memory, chat):
    """Its id, and nothing is written twice; what is new about it is added, and a use is counted."""
    own = chat.remember("Ada keeps bees", tags=["hobby"])
    other = memory.session("other", user_id="bob")
    bobs = other.remember("Ada keeps bees")
    chat.entries.archive([own])
    assert chat.remember("Ada keeps bees") == own
    assert (chat.entries.get(own).tier, chat.entries.count(within="user")) == ("cold", 1)
    assert other.remember("Ada keeps bees") == bobs
    memory.sweep()
    assert chat.entries.get(own).tier == "warm"
    chat.entries.archive([own])
    assert chat.remember("Ada keeps bees", tags=["garden"], importance=0.9) == own
    now = chat.entries.get(own)
    assert (now.tags, now.importance, now.tier) == (("hobby", "garden"), 0.9, "warm")
    assert chat.entries.history(own)[-2].tags == ("hobby",)


def test_what_was_superseded_or_is_of_another_agent_is_not_known(memory, chat):
    """As when it is warm; and a text that can't be read is written again."""
    own = chat.remember("Ada keeps bees")
    now = chat.remember("Ada keeps goats", supersedes=own)
    chat.entries.archive([own, now])
    assert chat.remember("Ada keeps bees") != own
    assert memory.session("chat", user_id="ada", agent_id="cook").remember("Ada keeps goats") != now
    damage(memory)
    assert chat.remember("Ada keeps goats") != now


def test_a_sweep_merges_what_says_the_same(memory, chat, clock):
    """With its reason, in a dry run as well; cold or warm; and looks again only when something has changed."""
    kept = chat.remember("Ada lives in Oslo now", importance=0.4)
    memory.flush()
    chat.entries.archive([kept])
    gone = chat.remember("ada lives in oslo now!")
    memory.flush()
    plan = memory.sweep(dry_run=True)
    assert [(m.what, m.id, m.rule) for m in plan.moves] == [("merge", gone, "duplicates")]
    assert (plan.done, chat.entries.get(gone).superseded_by) == (0, None)
    report = memory.sweep()
    assert (report.moves, report.done) == (plan.moves, 1)
    assert kept in report.moves[0].reason
    assert "the same words" in str(report)
    assert (chat.entries.get(gone).superseded_by, chat.entries.get(kept).supersedes) == (kept, (gone,))
    memory.flush()
    assert memory.sweep().moves == ()
    notes = "name LIKE 'compared:%'"
    assert count(memory, "meta", notes) == 1
    reads = []
    select = memory._core.parts.ledger.select
    memory._core.parts.ledger.select = lambda *given, **named: reads.append(1) or select(*given, **named)
    memory.sweep()
    assert reads == []
    chat.remember("ADA lives in Oslo now")
    memory.flush()
    assert memory.sweep().count("merge") == 1
    assert reads


def test_consolidating_goes_on_beside_a_damaged_block(memory, chat):
    """What can't be read is left alone."""
    own = chat.remember("Ada keeps bees")
    chat.entries.archive([own])
    chat.remember("Ada plays chess")
    chat.remember("ada plays chess!")
    back = damage(memory)
    assert len(chat.entries.consolidate()) == 1
    assert memory.sweep().damaged
    back()
    assert chat.entries.get(own).content == "Ada keeps bees"


def test_what_holds_no_longer_goes_to_the_archive_and_goes_first(opened, clock):
    """Whatever its importance; of too many pieces of knowledge it is the first to go."""
    memory = opened(embedder="none", clock=clock, retention={"max_entries": 2, "retention_days": None})
    chat = memory.session("chat", user_id="ada")
    rome = chat.remember("Ada lives in Rome", importance=0.75)
    chat.remember("Ada lives in Oslo", importance=0.75, supersedes=rome)
    chat.remember("Ada keeps bees", importance=0.5)
    assert [(m.id, m.rule) for m in memory.sweep().moves] == [(rome, "retention.max_entries")]
    other = memory.session("chat", user_id="bob")
    paris = other.remember("Bob lives in Paris", importance=0.95)
    now = other.remember("Bob lives in Lyon", importance=0.95, supersedes=paris)
    for _ in range(9):
        other.entries.get(paris)
        other.entries.get(now)
    clock.advance(days=31)
    moved = {m.id: m for m in memory.sweep().moves}
    assert paris in moved
    assert now not in moved
    assert "holds no longer" in moved[paris].reason


# -- retention


def test_retention_and_what_stands_for_what(opened, clock):
    """What is over goes by itself: the older fact does not hold again; what was merged into it comes back with it."""
    memory = opened(embedder="none", clock=clock, retention={"delete": True, "max_delete_share": 1.0})
    chat = memory.session("chat", user_id="ada")
    rome = chat.remember("Ada lives in Rome", importance=0.9)
    oslo = chat.remember("Ada lives in Oslo", importance=0.3, supersedes=rome)
    clock.advance(days=91)
    report = memory.sweep()
    assert [m.id for m in report.moves if m.what == "delete"] == [oslo]
    assert chat.entries.get(rome).superseded_by == oslo
    assert found(chat.search("Where does Ada live?", k=5)) == []
    memory.undo(report.run)
    assert found(chat.search("Where does Ada live?", k=5)) == ["Ada lives in Oslo"]


@pytest.mark.parametrize("cold", [False, True])
def test_undoing_brings_versions_back(opened, clock, cold):
    """As they were, from the ledger or from the archive."""
    memory = opened(embedder="none", clock=clock, retention={"delete": True, "max_delete_share": 1.0})
    chat = memory.session("chat", user_id="ada")
    own = chat.remember("Ada lives in Rome", importance=0.3)
    chat.entries.update(own, content="Ada lives in Oslo")
    before = chat.entries.history(own)
    if cold:
        chat.entries.archive([own])
    clock.advance(days=91)
    report = memory.sweep()
    assert (report.count("delete"), count(memory, "versions")) == (1, 0)
    memory.undo(report.run)
    after = chat.entries.history(own)
    assert after[:-1] == before[:-1]
    assert (after[-1].content, after[-1].tier) == ("Ada lives in Oslo", "warm")
    assert after[-1].version > before[-1].version


def test_what_goes_with_what_somebody_deletes_is_not_brought_back(opened, clock):
    """What was merged into it says the same: also if retention had deleted that before."""
    memory = opened(embedder="none", clock=clock, retention={"delete": True, "max_delete_share": 1.0})
    chat = memory.session("chat", user_id="ada")
    kept = chat.remember("Ada lives in Oslo now", importance=0.9)
    chat.remember("ada lives in oslo now!", importance=0.3)
    assert len(chat.entries.consolidate()) == 1
    clock.advance(days=91)
    report = memory.sweep()
    assert (report.count("delete"), memory.stats()["discarded"]) == (1, 1)
    chat.entries.delete([kept])
    assert memory.stats()["discarded"] == 0
    with pytest.raises(NotFound):
        memory.undo(report.run)


def test_an_id_that_is_used_again_and_deleted(opened, clock):
    """Takes along what retention had deleted under it."""
    memory = opened(
        embedder="none",
        clock=clock,
        pruning=SMALL,
        retention={"types": {"short_term": {"retention_days": 40}}, "delete": True, "max_delete_share": 1.0},
    )
    chat = memory.session("chat", user_id="ada")
    talk(chat)
    clock.advance(days=41)
    report = memory.sweep()
    assert "t0" in {m.id for m in report.moves}
    chat.add(Message("user", "Something else", id="t0"))
    assert chat.entries.delete(["t0"]) == 1
    assert memory.undo(report.run) == report.count("delete") - 1
    with pytest.raises(NotFound):
        chat.entries.get("t0")


def extracted(opened, clock, **keep):
    options = {"types": {"short_term": {"retention_days": 40}}, "delete": True, "max_delete_share": 1.0, **keep}
    memory = opened(embedder="none", clock=clock, pruning=SMALL, extractor=Reader(), retention=options)
    chat = memory.session("chat", user_id="ada")
    talk(chat)
    chat.compact(max_tokens=20)
    memory.flush()
    chat.extract()
    facts = {e.content: e for e in chat.entries.list(types=[MemoryType.LONG_TERM])}
    assert "Turn 0: I have boat 0" in facts
    return memory, chat, facts


def test_facts_outlive_the_turns_that_retention_deletes(opened, clock):
    """They are why the turns may go. Once the turns can't be brought back, the facts stand by themselves."""
    memory, chat, facts = extracted(opened, clock)
    clock.advance(days=41)
    report = memory.sweep()
    assert "t0" in {m.id for m in report.moves if m.what == "delete"}
    assert {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])} == set(facts)
    assert memory.undo(report.run) > 0
    chat.entries.delete(["t0"])
    assert "Turn 0: I have boat 0" not in {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])}
    memory.sweep()
    clock.advance(days=8)
    memory.sweep()
    assert {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])} == set(facts) - {
        "Turn 0: I have boat 0"
    }
    assert count(memory, "derivations", "source NOT IN (SELECT no FROM entries)") == 0


def test_somebody_who_deletes_a_turn_that_retention_had_deleted(opened, clock):
    """Takes the facts along that were found in it; so does clear()."""
    memory, chat, facts = extracted(opened, clock)
    clock.advance(days=41)
    memory.sweep()
    with pytest.raises(NotFound):
        chat.entries.get("t0")
    assert chat.entries.delete(["t0"]) == 1
    assert {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])} == set(facts) - {
        "Turn 0: I have boat 0"
    }
    chat.clear()
    assert chat.entries.list(types=[MemoryType.LONG_TERM]) == []
    assert memory.stats()["discarded"] == 0


def test_a_fact_that_retention_deleted_goes_with_its_turns(opened, clock):
    """Somebody deletes the turn that it was found in: it can't be brought back. The others can."""
    memory, chat, facts = extracted(opened, clock, types={}, retention_days=40, keep_importance=1.0)
    clock.advance(days=41)
    report = memory.sweep()
    assert report.count("delete") == len(facts) > 1
    chat.entries.delete(["t0"])
    assert memory.undo(report.run) == len(facts) - 1
    back = {e.content: e for e in chat.entries.list(types=[MemoryType.LONG_TERM])}
    assert back.keys() == facts.keys() - {"Turn 0: I have boat 0"}
    chat.entries.delete(["t1"])
    assert "Turn 1: I have boat 1" not in {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])}


def test_expired_values_go_with_a_sweep(opened, clock):
    """Of users and of none, with what they are found by; a dry run counts them."""
    memory = opened(embedder="none", clock=clock)
    values = memory.values(user_id="ada")
    values.put(("a",), "k", {"text": "tulips"}, texts=["tulips"], ttl=5)
    values.put(("a",), "l", {"text": "roses"})
    memory.values().put(("b",), "k", {"x": 1}, ttl=5)
    clock.advance(seconds=301)
    plan = memory.sweep(dry_run=True)
    assert (plan.expired, count(memory, "items")) == (2, 3)
    report = memory.sweep()
    assert (report.expired, count(memory, "items")) == (2, 1)
    assert "2 keyed values had expired" in str(report)
    assert memory.sweep().expired == 0


@pytest.mark.parametrize("delete", [False, True])
def test_entries_that_have_expired(opened, clock, delete):
    """Archived, or deleted where retention deletes; with the reason."""
    memory = opened(embedder="none", clock=clock, retention={"delete": delete, "max_delete_share": 1.0})
    chat = memory.session("chat", user_id="ada")
    own = chat.remember("The offer stands", importance=1.0, expires_at=clock() + timedelta(days=1))
    assert memory.sweep().moves == ()
    clock.advance(days=2)
    (move,) = memory.sweep().moves
    assert (move.what, move.id, move.rule) == ("delete" if delete else "archive", own, "expires_at")


# -- episodes, extraction, snapshots


def test_episodes_of_cold_turns(memory, chat):
    """What has not changed opens no block; what has to be written reads them."""
    talk(chat)
    chat.compact(max_tokens=20)
    first = chat.episodes(by="session")
    assert chat.entries.archive([f"t{n}" for n in range(6)]) == 6
    opened_before = memory._core.parts.archive.opened
    back = damage(memory)
    assert chat.episodes(by="session") == first
    assert memory._core.parts.archive.opened == opened_before
    chat.add(Message("user", "One more", id="more"))
    with pytest.raises(ArchiveError):
        chat.episodes(by="session")
    back()
    (again,) = chat.episodes(by="session")
    assert again.sources[:6] == tuple(f"t{n}" for n in range(6))
    assert again.version == 2


def test_facts_are_found_in_cold_turns(opened, clock):
    """Those of a damaged block are looked through once it is back."""
    memory = opened(embedder="none", clock=clock, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    talk(chat)
    chat.compact(max_tokens=20)
    assert chat.entries.archive([f"t{n}" for n in range(4)]) == 4
    back = damage(memory)
    memory.close()
    memory = opened(embedder="none", clock=clock, pruning=SMALL, extractor=Reader())
    chat = memory.session("chat", user_id="ada")
    memory.flush()
    chat.extract()
    assert "Turn 0: I have boat 0" not in {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])}
    assert memory.stats()["extractor_failures"] == 0
    back()
    chat.extract()
    fact = {e.content: e for e in chat.entries.list(types=[MemoryType.LONG_TERM])}["Turn 0: I have boat 0"]
    chat.entries.delete(fact.sources)
    assert fact.id not in {e.id for e in chat.entries.list(types=[MemoryType.LONG_TERM])}


def test_a_snapshot_holds_cold_turns_of_the_window(opened, clock):
    """They were put back into it; restoring finds them as they are."""
    memory = opened(embedder="none", clock=clock)
    chat = memory.session("chat", user_id="ada")
    talk(chat)
    everything = chat.messages()
    chat.replace(everything[8:])
    assert chat.entries.archive([f"t{n}" for n in range(8)]) == 8
    chat.replace(everything)
    assert chat.entries.count(filter={"tier": "cold"}) == 8
    assert chat.messages(view="window") == everything
    taken = chat.snapshot()
    assert [t["content"] for t in taken["window"]] == texts(everything)
    chat.replace([])
    chat.restore(taken)
    assert texts(chat.messages(view="window")) == texts(everything)
    assert (chat.entries.count(), chat.entries.count(filter={"tier": "cold"})) == (12, 8)
    elsewhere = opened(embedder="none", clock=clock, path=memory.path.parent / "other").session("chat", user_id="ada")
    elsewhere.restore(taken)
    assert texts(elsewhere.messages()) == texts(everything)


# -- folders from before


@pytest.mark.parametrize("version", [7, 8, 9, 10, 11])
def test_steps_that_came_in_another_order(opened, folder, version):
    """Whatever a folder had of them, it gets the rest, and keeps what is in it."""
    memory = opened(embedder="none")
    chat = memory.session("chat", user_id="ada")
    chat.remember("Ada keeps bees")
    memory.close()
    db = sqlite3.connect(folder / "ledger.sqlite3")
    for table in ("blocks", "archived", "uses", "trash"):
        db.execute(f"DROP TABLE {table}")
    db.execute("ALTER TABLE features DROP COLUMN cold")
    db.execute(f"PRAGMA user_version = {version}")
    db.commit()
    db.close()
    memory = opened(embedder="none")
    chat = memory.session("chat", user_id="ada")
    (entry,) = chat.entries.list()
    assert chat.entries.archive([entry.id]) == 1
    assert chat.entries.get(entry.id).content == "Ada keeps bees"
    with memory._core.parts.ledger._db.read() as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)


def test_rules_know_what_holds_no_longer():
    """Of equals in importance, too."""
    from test_retention import NOW, standing

    given = [standing(1, importance=0.2), standing(2, importance=0.7, ended=1), standing(3, importance=0.7, ended=-1)]
    assert [d.standing.number for d in due(given, Retention(max_entries=2), _cold(), now=NOW)] == [2]


def _cold():
    from neuralflow_memory.config import Cold

    return Cold()
