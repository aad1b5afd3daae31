"""A scope that is too large to compare every entry: the hits are those of the whole comparison, and none is out of reach."""

import random
from datetime import UTC, datetime, timedelta

import pytest

from neuralflow_memory import Message
from neuralflow_memory.pipeline import scope_index, scoring, search

WORDS = [
    "sailing",
    "tomato",
    "violin",
    "harbour",
    "winter",
    "train",
    "garden",
    "bread",
    "letter",
    "mountain",
    "school",
    "cousin",
    "market",
    "river",
    "lamp",
]
QUESTIONS = [
    "Where did the violin stand?",
    "the harbour in winter",
    "Which bread does cousin like",
    "a letter about the mountain school",
]


@pytest.fixture
def chat(opened):
    """Four sessions of 250 turns about fifteen things, and one turn about something else."""
    rng = random.Random(8)
    chat = opened().session("s0", user_id="ada")
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for n in range(4):
        said = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(250)]
        chat.memory.session(f"s{n}", user_id="ada").add(
            [Message("user", text, created_at=start + timedelta(days=7 * n, minutes=i)) for i, text in enumerate(said)]
        )
    chat.add(Message("user", "Grandmother grows apricots", created_at=start))
    chat.memory.flush()
    return chat


@pytest.fixture(params=["exact", "compressed"])
def parted(request, chat, monkeypatch):
    """Called, makes the scope too large; in one case also for exact vectors."""

    def make(*, seeds=16):
        monkeypatch.setattr(scoring, "MOST_COMPARED", 50)
        monkeypatch.setattr(search, "SEEDS", seeds)
        if request.param == "compressed":
            monkeypatch.setattr(scope_index, "MOST_EXACT", 100)
        parts = chat.memory._core.parts
        parts.residents.forget()
        chat.search("anything")
        assert parts.resident(chat.scope).index.vectors.exact == (request.param == "exact")

    return make


def found(chat, question, **options):
    return [hit.entry.content for hit in chat.search(question, **options)]


def test_the_best_are_those_of_the_whole_comparison(chat, parted):
    """Nine of ten of them, where a sixteenth of the scope is looked at."""
    whole = {question: found(chat, question, k=10) for question in QUESTIONS}
    parted()
    same = sum(len(set(found(chat, question, k=10)) & set(hits)) for question, hits in whole.items())
    assert same >= 36
    assert found(chat, "apricots", k=1) == ["Grandmother grows apricots"]


def test_every_hit_is_reached_once(chat, parted):
    """Who walks on comes to all of them, however many were compared at first."""
    whole = [hit.entry.number for hit in chat.search("violin bread", k=2000)]
    assert len(whole) > 500
    parted(seeds=2)
    hits = [hit.entry.number for hit in chat.search("violin bread", k=2000)]
    assert len(hits) == len(set(hits))
    assert set(hits) >= set(whole)


def test_a_rare_condition_is_fulfilled(chat, parted):
    """By a filter, by a session and by a time that hold for few."""
    parted(seeds=2)
    assert len(found(chat, "violin", k=5, filter={"content": {"$contains": "apricots"}})) <= 1
    (hit,) = chat.search("something that grows", k=5, since="2026-01-01", until="2026-01-01", within="session")
    assert hit.entry.content
    hits = chat.search("violin", k=20, since="2026-01-22")
    assert len(hits) == 20
    assert {hit.entry.scope.session_id for hit in hits} == {"s3"}


def test_where_nothing_may_be_a_hit_nothing_is_found(chat, parted):
    """Though others hold the words that are asked for."""
    parted()
    new = chat.memory.session("new", user_id="ada")
    assert new.search("violin", within="session") == []
    assert chat.search("violin", since="2030-01-01") == []


def test_a_day_that_is_named_is_looked_at(chat, parted):
    """Though entries of other days are nearer in words."""
    parted(seeds=2)
    hits = chat.search("What about the violin on 15 January 2026?", k=10)
    assert {hit.entry.created_at.day for hit in hits} == {15}


def test_what_was_just_said_is_found(chat, parted):
    """A turn that came after the scope was loaded, by meaning and words; not after its deletion."""
    parted()
    entry = chat.add("The zeppelin landed beside the lamp")[0]
    assert found(chat, "zeppelin", k=1) == ["The zeppelin landed beside the lamp"]
    chat.entries.delete(entry)
    assert "The zeppelin landed beside the lamp" not in found(chat, "zeppelin", k=50)
