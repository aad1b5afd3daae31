"""What superseded what, and since when: both are kept, search finds what holds, or held at a time."""

from datetime import UTC, datetime, timedelta

import pytest
from conftest import found

from neuralflow_memory import (
    ConflictError,
    FilterError,
    InputError,
    MemoryType,
    Message,
    NotFound,
    QueryError,
    _failpoints,
)
from neuralflow_memory.testing import ManualClock

DAY = timedelta(days=1)
SOON = datetime(2024, 3, 1, tzinfo=UTC)


@pytest.fixture
def clock():
    return ManualClock(SOON)


@pytest.fixture
def chat(opened, clock):
    return opened(clock=clock).session("chat", user_id="ada")


def moved(chat, clock):
    """Ada lived in Rome, and lives in Oslo since ten days later."""
    rome = chat.remember("Ada lives in Rome")
    clock.advance(days=10)
    return rome, chat.remember("Ada lives in Oslo", supersedes=rome)


def test_both_are_kept_with_a_link_both_ways(chat, clock):
    """Nothing is deleted: the old one says until when, and what stands for it."""
    rome, oslo = moved(chat, clock)
    old, new = chat.entries.get(rome), chat.entries.get(oslo)
    assert (old.superseded_by, old.valid_to, old.valid_from) == (oslo, clock(), None)
    assert (new.supersedes, new.valid_to, new.superseded_by) == ((rome,), None, None)
    assert [e.valid_to for e in chat.entries.history(rome)] == [None, clock()]
    assert [e.content for e in chat.entries.list()] == ["Ada lives in Rome", "Ada lives in Oslo"]


def test_search_finds_what_holds_now(chat, clock):
    """What was superseded is no hit, unless asked for."""
    moved(chat, clock)
    assert found(chat.search("Where does Ada live?")) == ["Ada lives in Oslo"]
    assert set(found(chat.search("Ada lives", as_of="ever"))) == {"Ada lives in Oslo", "Ada lives in Rome"}


def test_search_can_ask_what_held_at_a_date(chat, clock):
    """To the microsecond; before anything was said, nothing did."""
    moved(chat, clock)
    for when, held in (
        (SOON - DAY, []),
        (SOON, ["Ada lives in Rome"]),
        ("2024-03-10T23:59", ["Ada lives in Rome"]),
        (clock() - timedelta(microseconds=1), ["Ada lives in Rome"]),
        (clock(), ["Ada lives in Oslo"]),
        (clock() + 99 * DAY, ["Ada lives in Oslo"]),
    ):
        assert found(chat.search("Where does Ada live?", as_of=when)) == held
        assert [e.content for e in chat.entries.list(as_of=when)] == held


def test_a_prompt_holds_what_holds_now(chat, clock):
    """`context` quotes nothing that was superseded."""
    moved(chat, clock)
    chat.add("Where does Ada live?")
    said = "\n".join(m.text for m in chat.context().messages)
    assert "Oslo" in said
    assert "Rome" not in said


def test_knowledge_may_have_begun_to_hold_earlier(chat, clock):
    """`valid_from` is since when, and until when the older one did; `created_at` when it was said."""
    rome = chat.remember("Ada lives in Rome", valid_from=datetime(2020, 1, 1, tzinfo=UTC))
    oslo = chat.remember("Ada lives in Oslo", valid_from=datetime(2023, 1, 1, tzinfo=UTC), supersedes=[rome])
    assert chat.entries.get(rome).valid_to == chat.entries.get(oslo).valid_from
    assert found(chat.search("Where does Ada live?", as_of="2019-12-31")) == []
    assert found(chat.search("Where does Ada live?", as_of="2022-12-31")) == ["Ada lives in Rome"]
    assert found(chat.search("Where does Ada live?", as_of="2023-01-01")) == ["Ada lives in Oslo"]


def test_what_is_to_hold_later_does_not_hold_now(chat, clock):
    """It does when its time has come; the older one until then."""
    rome = chat.remember("Ada lives in Rome")
    chat.remember("Ada lives in Oslo", supersedes=rome, valid_from=clock() + 5 * DAY)
    assert found(chat.search("Where does Ada live?")) == ["Ada lives in Rome"]
    clock.advance(days=5)
    assert found(chat.search("Where does Ada live?")) == ["Ada lives in Oslo"]


def test_a_correction_of_the_past_leaves_nothing_of_it(chat, clock):
    """What is superseded from before it began never held."""
    rome = chat.remember("Ada was born in Rome")
    clock.advance(days=1)
    chat.remember("Ada was born in Oslo", supersedes=rome, valid_from=datetime(1990, 1, 1, tzinfo=UTC))
    assert found(chat.search("Where was Ada born?", as_of=SOON)) == ["Ada was born in Oslo"]


def test_turns_hold_since_they_were_said(chat, clock):
    """As of a time, what was said later had not been said; now, also what is dated ahead is found."""
    chat.add(Message("user", "I bought a boat", created_at=SOON - DAY))
    chat.add(Message("user", "I sold the boat", created_at=SOON + DAY))
    assert set(found(chat.search("boat"))) == {"I bought a boat", "I sold the boat"}
    assert found(chat.search("boat", as_of=SOON)) == ["I bought a boat"]


def test_several_are_superseded_at_once(chat, clock):
    """Their links name the same one; it names all."""
    older = chat.remember_many(["Ada drinks tea", "Ada drinks coffee"])
    newer = chat.remember("Ada drinks water only", supersedes=older)
    assert chat.entries.get(newer).supersedes == tuple(older)
    assert {chat.entries.get(i).superseded_by for i in older} == {newer}
    assert found(chat.search("Ada drinks")) == ["Ada drinks water only"]


def test_what_was_superseded_can_come_back(chat, clock):
    """Said again, it is new knowledge, and holds from then on."""
    rome, oslo = moved(chat, clock)
    clock.advance(days=10)
    back = chat.remember("Ada lives in Rome", supersedes=oslo)
    assert back not in (rome, oslo)
    assert found(chat.search("Where does Ada live?")) == ["Ada lives in Rome"]
    assert [e.id for e in chat.entries.list(as_of=SOON)] == [rome]
    assert [e.id for e in chat.entries.list(as_of=SOON + 10 * DAY)] == [oslo]
    assert [e.id for e in chat.entries.list(as_of=clock())] == [back]


def test_repeating_it_changes_nothing(chat, clock):
    """The same text superseding the same entry, also after an interruption."""
    rome, oslo = moved(chat, clock)
    before = chat.entries.list()
    assert chat.remember("Ada lives in Oslo", supersedes=rome) == oslo
    assert chat.remember("Ada lives in Oslo", supersedes=oslo) == oslo
    assert chat.entries.list() == before


def test_what_cant_be_superseded_changes_nothing(chat, clock):
    """A turn, an unknown id, another user's knowledge, what something else superseded."""
    rome, oslo = moved(chat, clock)
    (turn,) = chat.add("Hello")
    theirs = chat.memory.session("chat", user_id="bob").remember("Bob lives in Bonn")
    chat.memory.values(user_id="ada").put(("a",), "k", {}, texts=["Ada likes jazz"])
    (value,) = chat.entries.list(filter={"content": "Ada likes jazz"})
    before = chat.entries.list()
    for wrong, error in (
        (turn, NotFound),
        (theirs, NotFound),
        ("nothing", NotFound),
        ([oslo, "nothing"], NotFound),
        (rome, ConflictError),
        (value.id, InputError),
        (7, InputError),
        ([None], InputError),
    ):
        with pytest.raises(error):
            chat.remember("Ada lives in Bern", supersedes=wrong)
    assert chat.entries.list() == before


def test_restore_lets_it_hold_again(chat, clock):
    """Its version of before; what stood for it does so no longer."""
    rome, oslo = moved(chat, clock)
    assert chat.entries.restore(rome, 1).superseded_by is None
    assert chat.entries.get(oslo).supersedes == ()
    assert set(found(chat.search("Where does Ada live?"))) == {"Ada lives in Rome", "Ada lives in Oslo"}


def test_restoring_the_words_does_not_undo_what_superseded_it(chat, clock):
    """A version that was superseded then is so still."""
    rome, oslo = moved(chat, clock)
    chat.entries.update(rome, tags=["city"])
    restored = chat.entries.restore(rome, 2)
    assert (restored.tags, restored.superseded_by) == ((), oslo)
    assert chat.entries.get(oslo).supersedes == (rome,)


def test_update_says_until_when(chat, clock):
    """And None that it holds again; wrong times raise."""
    rome, oslo = moved(chat, clock)
    chat.entries.update(oslo, valid_to=clock() + DAY)
    clock.advance(days=2)
    assert found(chat.search("Where does Ada live?")) == []
    chat.entries.update(oslo, valid_to=None)
    assert found(chat.search("Where does Ada live?")) == ["Ada lives in Oslo"]
    assert chat.entries.update(rome, valid_to=None).superseded_by is None
    assert chat.entries.get(oslo).supersedes == ()
    with pytest.raises(InputError):
        chat.entries.update(oslo, valid_from="yesterday")


def test_deleting_what_superseded_it_lets_it_hold_again(opened, beside, clock):
    """It would be found by nothing else; another process sees it, too."""
    memory = opened(clock=clock)
    chat = memory.session("chat", user_id="ada")
    rome, oslo = moved(chat, clock)
    other = beside(memory, clock=clock).session("chat", user_id="ada")
    assert found(other.search("Where does Ada live?")) == ["Ada lives in Oslo"]
    chat.entries.delete(oslo)
    for who in (chat, other):
        assert found(who.search("Where does Ada live?")) == ["Ada lives in Rome"]
    back = chat.entries.get(rome)
    assert (back.valid_to, back.superseded_by, back.version) == (None, None, 3)
    assert [e.superseded_by for e in chat.entries.history(rome)] == [None, oslo, None]
    memory.flush()
    assert memory.stats()["dirty"] == 0


def test_deleting_what_was_superseded_leaves_the_other(chat, clock):
    """It holds; its link leads nowhere."""
    rome, oslo = moved(chat, clock)
    chat.entries.delete(rome)
    assert chat.entries.get(oslo).supersedes == (rome,)
    assert found(chat.search("Where does Ada live?")) == ["Ada lives in Oslo"]


def test_filters_know_the_links_and_times(chat, clock):
    """What was superseded, by what, since when."""
    rome, oslo = moved(chat, clock)
    contents = lambda asked: [e.content for e in chat.entries.list(filter=asked)]
    assert contents({"superseded_by": oslo}) == ["Ada lives in Rome"]
    assert contents({"supersedes": {"$contains": rome}}) == ["Ada lives in Oslo"]
    assert contents({"valid_to": None}) == ["Ada lives in Oslo"]
    assert contents({"valid_to": {"$lte": clock()}}) == ["Ada lives in Rome"]
    with pytest.raises(FilterError):
        chat.entries.list(filter={"valid_from": 3})
    with pytest.raises(QueryError):
        chat.search("Ada", as_of="once")
    with pytest.raises(QueryError):
        chat.entries.list(as_of=3)


@pytest.mark.parametrize("point", ["change.applied", "change.committed"])
def test_a_crash_leaves_both_or_one(opened, clock, monkeypatch, point):
    """Never an old one that ended without a new one."""
    chat = opened(clock=clock).session("chat", user_id="ada")
    rome = chat.remember("Ada lives in Rome")

    def killed(name):
        if name == point:
            raise KeyboardInterrupt

    monkeypatch.setattr(_failpoints, "hook", killed)
    with pytest.raises(KeyboardInterrupt):
        chat.remember("Ada lives in Oslo", supersedes=rome)
    monkeypatch.setattr(_failpoints, "hook", None)
    expected = ["Ada lives in Rome"] if point == "change.applied" else ["Ada lives in Oslo"]
    assert found(chat.search("Where does Ada live?")) == expected
    assert chat.entries.count(within="user") == (1 if point == "change.applied" else 2)


def test_it_is_the_same_after_reopening(opened, clock):
    """What is read anew from the ledger says the same as RAM did."""
    with opened(clock=clock) as memory:
        moved(memory.session("chat", user_id="ada"), clock)
    chat = opened(clock=clock).session("chat", user_id="ada")
    assert found(chat.search("Where does Ada live?")) == ["Ada lives in Oslo"]
    assert found(chat.search("Where does Ada live?", as_of=SOON)) == ["Ada lives in Rome"]


def test_a_long_chain_costs_a_search_nothing(opened, clock):
    """Two hundred values of one thing: the one that holds is read, and no other."""
    chat = opened(clock=clock, embedder="none").session("chat", user_id="ada")
    last = ()
    for n in range(200):
        last = chat.remember(f"The balance is {n} crowns", supersedes=last)
        clock.advance(hours=1)
    assert found(chat.search("What is the balance in crowns?", k=50)) == ["The balance is 199 crowns"]
    assert found(chat.search("balance", as_of=SOON + timedelta(hours=17, minutes=1))) == ["The balance is 17 crowns"]


def test_only_knowledge_has_links(chat, clock):
    """Episodes and notes that were remembered may be superseded as well."""
    first = chat.remember("We met at the harbour", type=MemoryType.EPISODIC)
    second = chat.remember("We met at the station", type=MemoryType.EPISODIC, supersedes=first)
    assert chat.entries.get(first).superseded_by == second
