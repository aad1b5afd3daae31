"""The same knowledge is kept once, near-duplicates are merged and nothing else is; equal turns stay as they are."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
from conftest import FailingEmbedder, found, in_threads
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory import InputError, MemoryType, Message, MessageError, NotFound, QueryError, _failpoints
from neuralflow_memory.rules.duplicates import agree, alike, pairs, said, same
from neuralflow_memory.testing import HashingEmbedder, ManualClock

SAME = [
    ("Ada likes tea", "ada likes tea."),
    ("Ada likes tea", "Ada really likes the tea!"),
    ("The dentist's number is 555-0199", "the dentist's number is: 555-0199"),
    ("Ada lives in a small flat by the harbour of Hamburg", "Ada lives in a small flat by the old harbour of Hamburg"),
    ("Sie trinkt gern Tee", "sie trinkt gern Tee"),
    ("她喜欢喝茶", "她喜欢喝茶。"),
]
DIFFERENT = [
    ("Ada likes tea", "Ada doesn't like tea"),
    ("Ada likes tea", "Ada does not like tea"),
    ("The key is in room 12", "The key is in room 21"),
    ("She paid 1.50 for 3 apples", "She paid 3 for 1.50 apples"),
    ("Ada likes tea", "Bob likes tea"),
    ("Ada owes Bob ten crowns", "Bob owes Ada ten crowns"),
    ("The night train goes from Rome to Oslo", "The night train goes from Oslo to Rome"),
    ("Ada calls her mother every evening before dinner", "Ada calls her mother every evening after dinner"),
    (
        "The weekly meeting of the marketing team in the Berlin office is at nine in the large room on the left",
        "The weekly meeting of the marketing team in the Berlin office is at ten in the large room on the left",
    ),
    (
        "Ada works as an engineer at the harbour of Hamburg and goes there by bike",
        "Ada formerly works as an engineer at the harbour of Hamburg and goes there by bike",
    ),
    (
        "Ada works as an engineer at the harbour of Hamburg and goes there by bike",
        "Ada works as an engineer at the harbour of Hamburg and goes there by bike with Bob",
    ),
    ("Er trinkt Tee", "Er trinkt keinen Tee"),
    ("她喜欢喝茶", "她不喜欢喝茶"),
    ("The train leaves on 2024-05-03", "The train leaves on 2024-05-04"),
]


@pytest.fixture
def clock():
    return ManualClock(datetime(2024, 3, 1, tzinfo=UTC))


@pytest.fixture
def chat(opened, clock):
    return opened(clock=clock).session("chat", user_id="ada")


# -- the measure


@pytest.mark.parametrize(("one", "other"), SAME)
@pytest.mark.parametrize("cosine", [None, 0.97])
def test_what_says_the_same(one, other, cosine):
    """Whichever comes first."""
    assert same(said(one), said(other), cosine)
    assert same(said(other), said(one), cosine)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
@pytest.mark.parametrize("cosine", [None, 1.0])
def test_what_says_something_else(one, other, cosine):
    """However near the vectors are."""
    assert not same(said(one), said(other), cosine)
    assert not same(said(other), said(one), cosine)


def test_much_more_is_not_the_same():
    """One word more among many is; half as many again are not."""
    assert not same(said("Ada likes tea"), said("Ada likes tea with milk and honey"), 0.95)
    assert agree(said("Ada likes tea"), said("Ada likes tea with milk and honey"))


@given(st.text(max_size=60), st.text(max_size=60), st.floats(-1, 1))
def test_the_measure_is_symmetric_and_bounded(one, other, cosine):
    """For any two texts; each says the same as itself."""
    first, second = said(one), said(other)
    assert alike(first, second, cosine) == alike(second, first, cosine)
    assert 0 <= alike(first, second, cosine) <= 1
    assert same(first, second, cosine) == same(second, first, cosine)
    assert same(first, first, None)


@given(st.lists(st.lists(st.sampled_from(["tea", "milk", "harbour", "Ada"]), max_size=4).map(" ".join), max_size=8))
def test_no_pair_is_missed(texts):
    """Of all that agree, those are found that have words; the same words are found by way of the first."""
    compared = [said(t) for t in texts]
    given = {frozenset(p) for p in pairs(compared, [None] * len(texts))}
    assert len(given) == len(list(pairs(compared, [None] * len(texts))))
    first = {t.order: row for row, t in reversed(list(enumerate(compared)))}
    for i, one in enumerate(compared):
        for other in compared[:i]:
            if one.order and other.order and agree(one, other):
                a, b = first[one.order], first[other.order]
                assert a == b or frozenset((a, b)) in given
                assert i == a or frozenset((i, a)) in given


# -- remember


def test_the_same_text_is_kept_once(chat):
    """The same id, and one entry; another user's is another."""
    own = chat.remember("Ada likes tea")
    assert chat.remember("Ada likes tea") == own
    assert chat.memory.session("elsewhere", user_id="ada").remember("Ada likes tea") == own
    assert chat.entries.count(within="user") == 1
    assert chat.entries.get(own).version == 1
    assert chat.memory.session("chat", user_id="bob").remember("Ada likes tea") != own
    assert chat.memory.session("chat").remember("Ada likes tea") != own


def test_said_again_it_is_strengthened(chat, clock):
    """The greater importance, what both are tagged and filed with, the earlier beginning, the later end."""
    soon = clock() + timedelta(days=1)
    own = chat.remember("Ada likes tea", importance=0.6, tags=["drink"], metadata={"a": 1, "b": 1}, expires_at=soon)
    clock.advance(hours=1)
    same = chat.remember(
        "Ada likes tea",
        importance=0.9,
        tags=["habit", "drink"],
        category="food/drinks",
        source="diary",
        metadata={"b": 2},
        created_at=clock() - timedelta(days=9),
        valid_from=datetime(2020, 1, 1, tzinfo=UTC),
    )
    assert same == own
    now = chat.entries.get(own)
    assert (now.importance, now.tags, now.category, now.source) == (0.9, ("drink", "habit"), "food/drinks", "diary")
    assert (now.metadata, now.expires_at) == ({"a": 1, "b": 2}, None)
    assert now.created_at == clock() - timedelta(days=9)
    assert now.valid_from == datetime(2020, 1, 1, tzinfo=UTC)
    assert [e.version for e in chat.entries.history(own)] == [1, 2]
    chat.remember("Ada likes tea", importance=0.1)
    chat.remember("Ada likes tea")
    assert chat.entries.get(own) == now


def test_what_says_nothing_of_importance_does_not_raise_it(chat):
    """It was set, and stays as it was set."""
    own = chat.remember("Ada likes tea", importance=0.1)
    chat.remember("Ada likes tea")
    assert chat.entries.get(own).importance == 0.1


def test_what_has_expired_lives_anew(chat, clock):
    """It is found again."""
    own = chat.remember("Ada parks in row 7", expires_at=clock() + timedelta(hours=1))
    clock.advance(hours=2)
    assert found(chat.search("Where does Ada park?")) == []
    assert chat.remember("Ada parks in row 7") == own
    assert found(chat.search("Where does Ada park?")) == ["Ada parks in row 7"]


def test_other_kinds_and_other_agents_have_their_own(chat):
    """Two episodes may read alike; an agent finds what it was told."""
    first, second = (chat.remember("We met at the harbour", type=MemoryType.EPISODIC) for _ in range(2))
    assert first != second
    agents = [chat.memory.session("chat", user_id="ada", agent_id=name) for name in ("one", "two")]
    assert len({a.remember("Ada likes tea") for a in agents}) == 2
    assert found(agents[1].search("tea", within="agent")) == ["Ada likes tea"]


def test_a_keyed_values_text_is_not_knowledge(chat):
    """Deleting the value takes nothing that was remembered."""
    values = chat.memory.values(user_id="ada")
    values.put(("a",), "k", {"n": 1}, texts=["Ada likes tea"])
    own = chat.remember("Ada likes tea")
    assert chat.entries.consolidate() == []
    values.delete(("a",), "k")
    assert chat.entries.get(own).content == "Ada likes tea"


def test_equal_turns_are_never_duplicates(chat):
    """Each "yes" is a turn of its own, whatever is consolidated."""
    for n in range(3):
        chat.add([f"Question {n}?", Message("assistant", "Yes")])
    chat.remember("Yes")
    assert chat.entries.consolidate() == []
    assert [m.content for m in chat.messages()].count("Yes") == 3


def test_threads_and_processes_keep_it_once(opened, beside, clock):
    """Whoever is first."""
    memory = opened(clock=clock)
    chats = [m.session("chat", user_id="ada") for m in (memory, memory, beside(memory, clock=clock))]
    ids = []
    gate = threading.Barrier(len(chats))

    def told(chat):
        for n in range(20):
            gate.wait(30)
            ids.append((n, chat.remember(f"Fact {n}")))

    in_threads(*(lambda c=c: told(c) for c in chats))
    assert len(ids) == 60
    assert len(set(ids)) == 20
    assert memory.stats()["entries"] == 20


def test_looking_it_up_costs_the_same_however_much_is_known(opened):
    """By an index: as many steps among fifteen hundred as among thirty."""
    memory = opened(embedder="none")
    steps = []
    for number in (30, 1500):
        chat = memory.session("chat", user_id=f"user {number}")
        chat.remember_many(f"Fact {n} of many" for n in range(number))
        ledger = memory._core.parts.ledger
        assert not ledger.known(chat.scope, ["nothing"])
        taken = [0]
        for connection in ledger._db._readers:
            connection.set_progress_handler(lambda taken=taken: taken.__setitem__(0, taken[0] + 1), 1)
        assert ledger.known(chat.scope, ["Fact 7 of many"])
        for connection in ledger._db._readers:
            connection.set_progress_handler(None, 0)
        steps.append(taken[0])
    assert steps[1] <= steps[0] + 20


# -- many at once


def test_many_are_remembered_at_once(chat):
    """Texts, or mappings; in order, each once; the rest of the arguments for all."""
    told = []
    ids = chat.remember_many(
        ["Ada likes tea", {"text": "Ada keeps bees", "tags": ["hobby"]}, "Ada likes tea"],
        tags=["ada"],
        progress=told.append,
    )
    assert ids[0] == ids[2] != ids[1]
    assert told == [3]
    assert [e.tags for e in chat.entries.list()] == [("ada",), ("hobby",)]
    assert chat.remember_many([]) == []


def test_a_batch_is_read_as_it_is_needed_and_may_be_repeated(chat):
    """An interruption keeps what was written; doing it again keeps nothing twice."""

    def facts(*, until):
        for n in range(until):
            if n == 1200 and until == 1201:
                raise RuntimeError("the file is torn")
            yield f"Fact {n}"

    done = []
    with pytest.raises(RuntimeError):
        chat.remember_many(facts(until=1201), progress=done.append)
    assert done == [500, 500]
    assert len(set(chat.remember_many(facts(until=1300)))) == 1300
    assert chat.entries.count(within="user") == 1300


def test_bad_items_change_nothing_of_their_batch(chat):
    """And say which argument there is not."""
    for wrong, error in (
        ("Ada", MessageError),
        ({"text": "Ada"}, MessageError),
        (7, MessageError),
        ([{"tags": ["a"]}], InputError),
        ([{"text": "Ada likes tea", "tag": "a"}], InputError),
        (["Ada likes tea", ""], MessageError),
        (["Ada likes tea", {"text": "b", "importance": 2}], InputError),
        (["Ada likes tea", {"text": "b", "supersedes": "nothing"}], NotFound),
    ):
        with pytest.raises(error):
            chat.remember_many(wrong)
    assert chat.entries.count(within="user") == 0


def test_a_history_is_added_in_batches(chat):
    """In order, with progress; by their ids none is written twice."""
    history = [Message("user", f"Turn {n}", id=f"t{n}") for n in range(1100)]
    done = []
    assert chat.add_many(iter(history), progress=done.append) == [m.id for m in history]
    assert done == [500, 500, 100]
    chat.add_many(history)
    assert [m.id for m in chat.messages()] == [m.id for m in history]


# -- consolidation


def test_near_duplicates_are_merged_with_their_provenance(chat, clock):
    """What says more is kept, with what the others had; they stay, and name it."""
    texts = [
        "Ada lives with two cats in a small flat by the old harbour of Hamburg",
        "ada lives with two cats in a small flat by the harbour of hamburg.",
        "Ada likes tea",
    ]
    long, short, tea = chat.remember_many(
        [
            {"text": texts[0], "tags": ["home"], "importance": 0.6},
            {"text": texts[1], "tags": ["city"], "importance": 0.9, "metadata": {"sure": True}},
            texts[2],
        ]
    )
    chat.memory.flush()
    plan = chat.entries.consolidate(dry_run=True)
    assert [e.version for e in chat.entries.list()] == [1, 1, 1]
    (merged,) = done = chat.entries.consolidate()
    assert done == plan
    assert (merged.kept, merged.merged) == (long, (short,))
    assert 0.85 <= merged.score <= 1
    assert merged.reason == "says that, and more"
    kept, gone = chat.entries.get(long), chat.entries.get(short)
    assert (kept.tags, kept.importance, kept.metadata, kept.supersedes) == (
        ("home", "city"),
        0.9,
        {"sure": True},
        (short,),
    )
    assert (gone.content, gone.superseded_by, gone.metadata["merged_into"]) == (texts[1], long, long)
    assert set(found(chat.search("Where in Hamburg does Ada live?"))) == {texts[0], texts[2]}
    assert chat.entries.consolidate() == []
    assert chat.entries.get(tea).version == 1


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_differs_is_not_merged(chat, one, other):
    """Numbers, negations, names, order."""
    chat.remember_many([one, other])
    chat.memory.flush()
    assert chat.entries.consolidate() == []


def test_what_is_filed_apart_stays_apart(chat):
    """Under other categories, with other metadata, of other agents, superseded or expired."""
    clock = chat.memory._core.parts.clock
    chat.remember("Ada likes tea", category="food")
    chat.remember("ada likes tea", category="gifts")
    chat.remember("Bo has a key", metadata={"room": 1})
    chat.remember("bo has a key", metadata={"room": 2})
    chat.remember("It was told by one")
    chat.memory.session("chat", user_id="ada", agent_id="two").remember("it was told by one")
    old = chat.remember("Cy lives here")
    chat.remember("Cy lives in Oslo", supersedes=old)
    chat.remember("cy lives here", expires_at=clock() - timedelta(hours=1))
    assert chat.entries.consolidate() == []


def test_exact_duplicates_are_merged_into_the_first(chat):
    """As an edit leaves them."""
    first, second, third = chat.remember_many(["Ada likes tea", "Ada likes milk", "Ada likes cocoa"])
    for own in (second, third):
        chat.entries.update(own, content="Ada likes tea")
    (merged,) = chat.entries.consolidate()
    assert (merged.kept, merged.merged, merged.score, merged.reason) == (first, (second, third), 1.0, "says the same")
    assert found(chat.search("tea")) == ["Ada likes tea"]


def test_deleting_what_is_kept_deletes_what_went_into_it(chat):
    """It says the same: it does not come back."""
    first, second = chat.remember_many(["Ada likes tea", "ada likes tea!"])
    chat.entries.consolidate()
    assert chat.entries.delete(first) == 1
    assert chat.entries.count(within="user") == 0
    with pytest.raises(NotFound):
        chat.entries.get(second)
    assert found(chat.search("tea", as_of="ever")) == []


def test_what_was_merged_can_be_taken_out_for_good(chat):
    """By restoring it; the next time leaves it alone, and deleting the other leaves it there."""
    first, second = chat.remember_many(["Ada likes tea", "ada likes tea!"])
    chat.entries.consolidate()
    assert "merged_into" not in chat.entries.restore(second, 1).metadata
    assert chat.entries.consolidate() == []
    chat.entries.delete(first)
    assert found(chat.search("tea")) == ["ada likes tea!"]


@pytest.mark.parametrize("passing", range(6))
def test_a_crash_between_merges_loses_nothing(opened, monkeypatch, passing):
    """Done again, it merges the rest."""
    chat = opened().session("chat", user_id="ada")
    chat.remember_many(text for n in "abc" for text in (f"Ada likes {n}{n}{n}", f"ada likes {n}{n}{n}!"))
    chat.memory.flush()
    passed = []

    def killed(name):
        if name.startswith("change."):
            passed.append(name)
            if len(passed) == passing + 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(_failpoints, "hook", killed)
    with pytest.raises(KeyboardInterrupt):
        chat.entries.consolidate()
    monkeypatch.setattr(_failpoints, "hook", None)
    done = (passing + 1) // 2
    assert len(chat.entries.consolidate()) == 3 - done
    held = {e.content for e in chat.entries.list(as_of=datetime.now(UTC))}
    assert held == {f"Ada likes {n}{n}{n}" for n in "abc"}
    assert chat.entries.count(within="user") == 6


def test_what_changes_meanwhile_is_left_for_the_next_time(opened, beside, monkeypatch):
    """Another process was faster."""
    memory = opened()
    chat = memory.session("chat", user_id="ada")
    first, second = chat.remember_many(["Ada likes tea", "ada likes tea!"])
    memory.flush()
    other = beside(memory).session("chat", user_id="ada")
    ledger = memory._core.parts.ledger
    revise = ledger.revise

    def late(*args, **options):
        monkeypatch.setattr(ledger, "revise", revise)
        other.entries.update(second, content="ada likes coffee")
        return revise(*args, **options)

    monkeypatch.setattr(ledger, "revise", late)
    assert chat.entries.consolidate() == []
    assert {e.content for e in chat.entries.list(filter={"superseded_by": None})} == {
        "Ada likes tea",
        "ada likes coffee",
    }
    assert chat.entries.get(first).version == 1


def test_thousands_are_compared_in_a_moment(opened):
    """Whose words are the same but for a number, and which all agree with one."""
    chat = opened(embedder="none").session("chat", user_id="ada")
    chat.remember_many(f"Ada has been in room {n} of the old hotel by the harbour" for n in range(2000))
    chat.remember_many(f"note {'x' * (n + 1)}" for n in range(50))
    own = chat.remember("ada has been in room 7 of the old hotel by the harbour!")
    (merged,) = chat.entries.consolidate()
    assert own in (merged.kept, *merged.merged)


# -- similar


def test_similar_shows_what_may_be_superseded(opened):
    """Best first, with what tells them apart; nothing is changed."""
    memory = opened()
    chat = memory.session("chat", user_id="ada")
    chat.remember_many(["Ada's desk is in room 12", "Ada's desk is white", "The harbour is closed"])
    chat.add("Ada's desk is in room 12")
    hits = chat.entries.similar("Ada's desk is in room 21")
    assert found(hits)[:2] == ["Ada's desk is in room 12", "Ada's desk is white"]
    assert hits[0].signals.keys() == {"cosine", "words", "agree"}
    assert hits[0].signals["agree"] == 0.0
    assert 0 <= hits[1].score < hits[0].score <= 1
    assert len(chat.entries.similar("Ada's desk is in room 21", k=1)) == 1
    new = chat.remember("Ada's desk is in room 21", supersedes=hits[0].entry.id)
    assert found(chat.entries.similar(id=new))[0] == "Ada's desk is white"
    assert [e.version for e in chat.entries.list(filter={"content": {"$contains": "white"}})] == [1]


def test_similar_agrees_with_what_says_the_same(chat):
    """By id or by text; an entry is not similar to itself."""
    own = chat.remember("Ada likes tea")
    (hit,) = chat.entries.similar("ada likes tea.")
    assert (hit.entry.id, hit.signals["agree"]) == (own, 1.0)
    assert chat.entries.similar(id=own) == []


def test_similar_without_vectors_goes_by_words(opened, tmp_path):
    """With no embedder, and with one that fails."""
    chat = opened(embedder="none").session("chat", user_id="ada")
    chat.remember("Ada likes tea")
    (hit,) = chat.entries.similar("Ada likes black tea")
    assert hit.signals.keys() == {"words", "agree"}
    broken = opened(tmp_path / "broken", embedder=FailingEmbedder(lambda text: "tea" in text))
    chat = broken.session("chat", user_id="ada")
    chat.remember("Ada likes tea")
    with pytest.warns(RuntimeWarning, match="words alone"):
        assert found(chat.entries.similar("Ada likes black tea")) == ["Ada likes tea"]


def test_similar_takes_a_text_or_an_id(chat):
    """One of them."""
    chat.remember("Ada likes tea")
    for wrong, error in (
        ({}, InputError),
        ({"text": "tea", "id": "x"}, InputError),
        ({"text": " "}, QueryError),
        ({"text": 3}, QueryError),
        ({"text": "tea", "k": 0}, QueryError),
        ({"id": "nothing"}, NotFound),
    ):
        with pytest.raises(error):
            chat.entries.similar(**wrong)


async def test_the_async_twins_do_the_same(opened):
    """Of all of it."""
    chat = opened(embedder=HashingEmbedder()).session("chat", user_id="ada")
    await chat.aremember_many(["Ada likes tea", "ada likes tea!"])
    await chat.aadd_many(["Hello"])
    assert len(await chat.entries.asimilar("Ada likes tea")) == 2
    assert len(await chat.entries.aconsolidate()) == 1
