"""How long entries are kept, and how many: the rules by themselves, and what a sweep makes of them."""

import pytest
from conftest import SMALL, index_keys, live_keys
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory import ConfigError, MemoryType, Message, NotFound
from neuralflow_memory.config import Cold, Keep, Retention, Tiers
from neuralflow_memory.protocols import Standing
from neuralflow_memory.rules.retention import due, policy
from neuralflow_memory.rules.tiering import DAY, cooled, faded, warmed
from neuralflow_memory.testing import ManualClock

NOW = 1000 * DAY


def standing(number=1, *, idle=0.0, archived=None, expires=None, ended=None, exempt=None, uses=0.0, **other):
    """An entry that was used so many days ago, archived, superseded and to expire as many days ago."""
    return Standing(
        number,
        f"e{number}",
        None,
        other.pop("type", MemoryType.LONG_TERM),
        exempt,
        other.pop("importance", 0.5),
        other.pop("tags", ()),
        NOW - int(idle * DAY),
        uses,
        None if expires is None else NOW - int(expires * DAY),
        None if ended is None else NOW - int(ended * DAY),
        None if archived is None else NOW - int(archived * DAY),
        other.pop("version", 1),
    )


def judged(standings, retention=None, archive=None):
    """What is due of *standings*, by number: whether it is deleted, and by which rule."""
    found = due(standings, retention or Retention(), archive or Cold(), now=NOW)
    return {d.standing.number: (d.delete, d.rule) for d in found}


# -- tiers


@pytest.mark.parametrize(
    ("idle", "uses", "importance", "expected"),
    [
        (29, 0, 0.5, None),
        (31, 0, 0.5, "tiers.warm_tier_max_age_days"),
        (31, 8, 0.5, "archive.after_days"),  # used, and of little importance
        (31, 8, 0.7, None),
        (59, 8, 0.9, None),
        (61, 8, 0.9, "tiers.warm_tier_max_age_days"),  # 8 uses count 1.95 now
        (31, 1, 0.9, "tiers.warm_tier_max_age_days"),
    ],
)
def test_what_becomes_cold(idle, uses, importance, expected):
    """By age since the last use, how often it was used before, and importance."""
    found = cooled(standing(idle=idle, uses=uses, importance=importance), Tiers(), Cold(), now=NOW)
    assert (found and found[0]) == expected


def test_uses_fade():
    """Half with every so many days."""
    assert faded(standing(idle=0, uses=8), now=NOW, days=30) == 8
    assert faded(standing(idle=90, uses=8), now=NOW, days=30) == 1


def test_none_means_never():
    """Each of the two ways to become cold can be switched off."""
    old = standing(idle=900)
    tiers, archive = Tiers(warm_tier_max_age_days=None), Cold(after_days=None)
    assert cooled(old, tiers, archive, now=NOW) is None
    assert cooled(old, tiers, Cold(), now=NOW)[0] == "archive.after_days"
    assert cooled(old, Tiers(), archive, now=NOW)[0] == "tiers.warm_tier_max_age_days"


def test_what_comes_back():
    """What was used since it became cold; not what was used before."""
    assert warmed(standing(idle=5, archived=5, uses=1)) is not None
    assert warmed(standing(idle=1, archived=5, uses=1)) is not None
    assert warmed(standing(idle=5, archived=5)) is None
    assert warmed(standing(idle=9, archived=5, uses=1)) is None


# -- rules of retention


def test_knowledge_has_rules_and_turns_have_none():
    """By default."""
    assert policy(standing(), Retention()).retention_days == 90
    assert policy(standing(type=MemoryType.EPISODIC), Retention()).max_entries == 10_000
    assert policy(standing(type=MemoryType.SHORT_TERM), Retention()) is None


@pytest.mark.parametrize("delete", [False, True])
def test_age(delete):
    """Over its days it is archived, or deleted; kept if it is important, exempt, or was used."""
    standings = [
        standing(1, idle=91),
        standing(2, idle=89),
        standing(3, idle=91, importance=0.8),
        standing(4, idle=91, exempt="pinned"),
        standing(5, idle=91, type=MemoryType.SHORT_TERM),
        standing(6, idle=91, archived=10),
    ]
    expected = {1: (delete, "retention.retention_days")}
    if delete:
        expected[6] = (True, "retention.retention_days")
    assert judged(standings, Retention(delete=delete)) == expected


def test_number():
    """The least important go, of equals the one used longest ago; important ones count, and stay."""
    standings = [
        standing(1, importance=0.9),
        standing(2, importance=0.3, idle=2),
        standing(3, importance=0.3, idle=5),
        standing(4, importance=0.1),
        standing(5, importance=0.6),
        standing(6, importance=0.2, archived=3),
    ]
    assert judged(standings, Retention(max_entries=3)).keys() == {4, 3}
    assert judged(standings, Retention(max_entries=3, delete=True)).keys() == {4, 6, 3}
    assert judged(standings, Retention(max_entries=0)).keys() == {2, 3, 4, 5}
    assert judged(standings, Retention(max_entries=None)) == {}
    assert judged(standings, Retention(max_entries=5)) == {}


def test_what_is_over_its_age_makes_room():
    """It does not count, so that nothing else has to go for it."""
    standings = [standing(1, idle=91), standing(2, importance=0.1), standing(3, importance=0.2)]
    assert judged(standings, Retention(max_entries=2)) == {1: (False, "retention.retention_days")}


@pytest.mark.parametrize("delete", [False, True])
def test_expiry(delete):
    """Whatever its type, its importance or its use; not what is exempt."""
    standings = [
        standing(1, expires=1, importance=1.0),
        standing(2, expires=-1),
        standing(3, expires=1, type=MemoryType.SHORT_TERM),
        standing(4, expires=1, exempt="in the window"),
    ]
    found = judged(standings, Retention(delete=delete))
    assert found == {1: (delete, "expires_at"), 3: (delete, "expires_at")}


def test_age_in_the_archive():
    """It counts only with retention.delete, for any type; not for what is important or was used since."""
    standings = [
        standing(1, idle=200, archived=181, type=MemoryType.SHORT_TERM),
        standing(2, idle=200, archived=179, type=MemoryType.SHORT_TERM),
        standing(3, idle=200, archived=181, type=MemoryType.SHORT_TERM, importance=0.8),
        standing(4, idle=5, archived=181, type=MemoryType.SHORT_TERM, uses=1),
    ]
    assert judged(standings) == {}
    assert judged(standings, Retention(delete=True)) == {1: (True, "archive.max_age_days")}
    assert judged(standings, Retention(delete=True), Cold(max_age_days=None)) == {}


def test_rules_of_a_type():
    """A type may have days or a number of its own; what it does not say is as for the others."""
    retention = Retention(types={"short_term": {"retention_days": 10}, "episodic": {"max_entries": 1}})
    standings = [
        standing(1, idle=11, type=MemoryType.SHORT_TERM),
        standing(2, idle=9, type=MemoryType.SHORT_TERM),
        standing(3, type=MemoryType.EPISODIC, importance=0.2),
        standing(4, type=MemoryType.EPISODIC, importance=0.3),
        standing(5, type=MemoryType.EPISODIC, idle=91, importance=0.3),
        standing(6, importance=0.1),
    ]
    assert judged(standings, retention) == {
        1: (False, "retention.types.short_term.retention_days"),
        3: (False, "retention.types.episodic.max_entries"),
        5: (False, "retention.types.episodic.retention_days"),
    }


def test_rules_of_a_tag():
    """They win over those of a type; of several, the one that keeps longest."""
    retention = Retention(
        delete=True,
        types={"long_term": {"retention_days": 20}},
        tags={
            "gossip": {"retention_days": 5},
            "news": {"retention_days": 10},
            "contract": {"delete": False},
            "law": {"retention_days": None},
        },
    )
    standings = [
        standing(1, idle=21),
        standing(2, idle=6, tags=("gossip",)),
        standing(3, idle=6, tags=("gossip", "news")),
        standing(4, idle=21, tags=("gossip", "contract")),
        standing(5, idle=500, tags=("law", "gossip")),
        standing(6, idle=6, tags=("gossip",), type=MemoryType.SHORT_TERM),
        standing(7, idle=19, tags=("unknown",)),
    ]
    assert judged(standings, retention) == {
        1: (True, "retention.types.long_term.retention_days"),
        2: (True, "retention.tags.gossip.retention_days"),
        4: (False, "retention.tags.contract.retention_days"),
        6: (True, "retention.tags.gossip.retention_days"),
    }


def test_no_type_and_no_tag_deletes_by_itself():
    """Only retention.delete does."""
    retention = Retention(types={"long_term": {"delete": True, "retention_days": 1}}, tags={"x": {"delete": True}})
    assert judged([standing(1, idle=5), standing(2, idle=5, tags=("x",))], retention) == {
        1: (False, "retention.types.long_term.retention_days"),
        2: (False, "retention.tags.x.retention_days"),
    }


LIVES = st.builds(
    standing,
    st.integers(1, 50),
    idle=st.floats(0, 400),
    archived=st.none() | st.floats(0, 400),
    expires=st.none() | st.floats(-10, 10),
    exempt=st.none() | st.just("pinned"),
    uses=st.floats(0, 10),
    type=st.sampled_from(list(MemoryType)),
    importance=st.floats(0, 1),
    tags=st.lists(st.sampled_from("ab"), unique=True).map(tuple),
)
KEEPS = st.builds(
    lambda given: Keep(**given),
    st.fixed_dictionaries(
        {},
        optional={
            "retention_days": st.none() | st.floats(1, 400),
            "max_entries": st.none() | st.integers(0, 5),
            "keep_importance": st.floats(0, 1),
            "delete": st.booleans(),
        },
    ),
)


@given(
    st.lists(LIVES, max_size=20, unique_by=lambda one: one.number),
    st.booleans(),
    st.dictionaries(st.sampled_from(list(MemoryType)), KEEPS, max_size=2),
    st.dictionaries(st.sampled_from("ab"), KEEPS, max_size=2),
)
def test_whatever_the_rules(standings, delete, types, tags):
    """Nothing exempt is due, nothing is deleted unless that was asked for, nothing cold archived, each is due once."""
    found = due(standings, Retention(delete=delete, max_entries=3, types=types, tags=tags), Cold(), now=NOW)
    assert len({d.standing.number for d in found}) == len(found)
    for d in found:
        assert d.standing.exempt is None
        assert delete or not d.delete
        assert d.delete or d.standing.archived_at is None
        assert d.rule
        assert d.reason


# -- by sweeps


@pytest.fixture
def clock():
    return ManualClock()


def swept(opened, clock, **retention):
    """A memory that keeps what is told for sixty days."""
    options = {"delete": True, "retention_days": 60, "max_delete_share": 1.0} | retention
    return opened(pruning=SMALL, clock=clock, retention=options)


def known(chat):
    return {e.content for e in chat.entries.list(types=["long_term"])}


def test_deleting_and_undoing(opened, clock):
    """Gone from everything, and back as it was with the run's name; once only, and not after the days for it."""
    memory = swept(opened, clock)
    chat = memory.session("chat", user_id="ada")
    chat.remember("The cleaner comes on Mondays", importance=0.3, tags=["home"], metadata={"n": 1})
    chat.remember("The lease ends in 2031", importance=0.9)
    memory.flush()
    (before,) = chat.entries.list(filter={"importance": 0.3})
    clock.advance(days=61)
    plan = memory.sweep(dry_run=True)
    assert (plan.count("delete"), plan.done) == (1, 0)
    assert known(chat) == {"The cleaner comes on Mondays", "The lease ends in 2031"}
    report = memory.sweep()
    assert (report.count("delete"), report.done) == (1, 2)  # the other becomes cold
    memory.flush()
    assert known(chat) == {"The lease ends in 2031"}
    assert [h.entry.content for h in chat.search("cleaner", k=9)] == []
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats()["discarded"] == 1
    with pytest.raises(NotFound):
        memory.undo(plan.run)
    assert memory.undo(report.run) == 1
    (after,) = chat.entries.list(filter={"importance": 0.3})
    changed = {"version"}
    assert {n: getattr(after, n) for n in after.__slots__ if n not in changed} == {
        n: getattr(before, n) for n in before.__slots__ if n not in changed
    }
    assert after.version > before.version
    assert chat.search("cleaner", k=1)[0].entry == after
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    with pytest.raises(NotFound):
        memory.undo(report.run)
    again = memory.sweep()
    clock.advance(days=8)
    memory.sweep()
    assert memory.stats()["discarded"] == 0
    with pytest.raises(NotFound, match="undo_days"):
        memory.undo(again.run)


def test_without_days_to_undo_it_is_gone_at_once(opened, clock):
    """undo_days=0."""
    memory = swept(opened, clock, undo_days=0)
    chat = memory.session("chat", user_id="ada")
    chat.remember("The cleaner comes on Mondays", importance=0.3)
    clock.advance(days=61)
    report = memory.sweep()
    assert report.done == 1
    assert memory.stats()["discarded"] == 0
    with pytest.raises(NotFound):
        memory.undo(report.run)


def test_what_somebody_deletes_never_comes_back(opened, clock):
    """Not by the undo of a sweep that deleted it before, nor what was of a cleared session."""
    memory = swept(opened, clock, types={"short_term": {"retention_days": 60}}, keep_importance=1.0)
    chat, other = (memory.session(name, user_id="ada") for name in ("chat", "other"))
    fact = chat.remember("The cleaner comes on Mondays", importance=0.3)
    for who in (chat, other):
        who.add([Message("user", f"Turn {n} of sailing", id=f"t{n}") for n in range(12)])
        memory.flush()
    clock.advance(days=61)
    report = memory.sweep()
    assert report.count("delete") > 10
    assert chat.entries.delete(fact) == 1
    chat.clear()
    memory.undo(report.run)
    assert known(chat) == set()
    assert chat.messages() == []
    assert len(other.messages()) == 12
    with pytest.raises(NotFound):
        chat.entries.delete(fact)


def test_an_id_that_was_used_again_is_not_overwritten(opened, clock):
    """What is there now stays."""
    memory = swept(opened, clock, types={"short_term": {"retention_days": 60}}, keep_importance=1.0)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"Turn {n} of sailing", id=f"t{n}") for n in range(12)])
    memory.flush()
    clock.advance(days=61)
    report = memory.sweep()
    chat.add(Message("user", "New", id="t1"))
    assert memory.undo(report.run) == report.count("delete") - 1
    assert chat.entries.get("t1").content == "New"
    assert len(chat.messages()) == 12


def test_the_safety_stop(opened, clock):
    """Nothing is deleted, the rest is done, and everybody says so; with a higher share it is."""
    memory = swept(opened, clock, max_delete_share=0.4)
    chat = memory.session("chat", user_id="ada")
    for n in range(10):
        chat.remember(f"Fact {n}", importance=0.3 if n < 5 else 0.9)
    clock.advance(days=61)
    report = memory.sweep()
    assert "5 of 10 entries" in report.refused
    assert (report.count("delete"), report.count("archive"), report.done) == (5, 5, 5)
    assert report.refused in " ".join(str(report).split())
    assert "5 not deleted" in str(report)
    assert len(known(chat)) == 10
    assert memory.stats()["last_sweep"]["refused"] == report.refused
    memory.close()
    memory = swept(opened, clock, max_delete_share=0.5)
    assert memory.sweep().refused is None
    assert len(known(memory.session("chat", user_id="ada"))) == 5


def test_turns_that_retention_deletes_take_their_summary_with_them_and_return_no_others(opened, clock):
    """The window is as it was; the summary no longer speaks of them once the chat goes on."""
    memory = swept(opened, clock, types={"short_term": {"retention_days": 60}}, keep_importance=1.0)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"Turn{n} of sailing in Week{n}", id=f"t{n}") for n in range(20)])
    memory.flush()
    clock.advance(days=30)
    chat.add([Message("user", f"Turn{n} of sailing in Week{n}", id=f"t{n}") for n in range(20, 40)])
    memory.flush()
    window = chat.messages(view="window")
    clock.advance(days=31)
    report = memory.sweep()
    gone = {m.id for m in report.moves if m.what == "delete"}
    assert gone
    assert gone <= {f"t{n}" for n in range(20)}
    assert chat.messages(view="window") == window
    chat.add([Message("user", f"Later {n}", id=f"u{n}") for n in range(6)])
    memory.flush()
    said = chat.summary()
    assert not any(f"Week{own[1:]} " in f"{said} " for own in gone)
    assert [m.id for m in chat.messages()] == [
        own for own in (*(f"t{n}" for n in range(40)), *(f"u{n}" for n in range(6))) if own not in gone
    ]


def test_what_is_expired_is_archived_by_default(opened, clock):
    """Search does not find it, as before; `get` reads it."""
    memory = opened(clock=clock)
    chat = memory.session("chat", user_id="ada")
    own = chat.remember("Sale until Friday", expires_at=clock().replace(day=2))
    clock.advance(days=2)
    (move,) = memory.sweep().moves
    assert (move.what, move.rule) == ("archive", "expires_at")
    assert chat.search("sale", k=3) == []
    assert chat.entries.get(own).content == "Sale until Friday"


@pytest.mark.parametrize(
    "wrong",
    [
        {"retention": {"types": {"thoughts": {}}}},
        {"retention": {"tags": {"x": {"days": 3}}}},
        {"retention": {"max_delete_share": 2}},
        {"retention": {"retention_days": 0}},
        {"tiers": {"tier_migration_interval": 0}},
        {"archive": {"below_importance": 2}},
    ],
)
def test_wrong_options_are_refused(opened, wrong):
    """By name."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        opened(**wrong)
