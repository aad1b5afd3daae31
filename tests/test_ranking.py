"""What search puts first, and why: each signal where it applies, in chats between people and with an assistant."""

from datetime import UTC, datetime

import numpy as np
import pytest

from neuralflow_memory import Message
from neuralflow_memory.rules import ranking
from neuralflow_memory.testing import ManualClock

ADVICE = (
    "Here is what I would suggest for a peanut allergy. Read every label, since peanuts hide in sauces, in bread and in sweets. "
    "Carry your injector wherever you go. Tell the people at the restaurant about the allergy before you order, and ask how "
    "the allergy is handled in their kitchen. A peanut allergy may change over the years, so see a doctor about the allergy "
    "once a year. For a trip, write a card that names the allergy in the language of the place, and keep it with you."
)


@pytest.fixture
def chat(opened):
    return opened(embedder="none", clock=ManualClock()).session("chat", user_id="ada")


def said(hits):
    return [hit.entry.content for hit in hits]


def test_the_users_own_words_come_before_a_long_answer(chat):
    """A fact in a few words, against an answer that repeats the words of the question."""
    chat.add([Message("user", "I have a peanut allergy, by the way."), Message("assistant", ADVICE)])
    chat.add([Message("user", "What is the weather?"), Message("assistant", "Rain.")])
    hits = chat.search("Which allergy do I have?")
    assert said(hits)[0] == "I have a peanut allergy, by the way."
    assert hits[0].signals["user"] > 0
    assert hits[1].signals["user"] == 0


def test_what_the_assistant_said_is_found_when_it_is_asked_for(chat):
    """Then being the user's counts nothing."""
    chat.add([Message("user", "What about my allergy at restaurants?")])
    chat.add([Message("assistant", "Tell the restaurant about the allergy before you order.")])
    hits = chat.search("What did you recommend about my allergy at restaurants?")
    assert said(hits)[0].startswith("Tell the restaurant")
    assert "user" not in hits[0].signals


def test_a_wish_counts_more_than_a_remark(chat):
    """How the assistant is to behave is what a question of that kind needs."""
    chat.add(
        ["A parser is code, and this parser is our own code for parsers.", "Always show tests when I ask for code."]
    )
    assert said(chat.search("Write code for a parser"))[0] == "Always show tests when I ask for code."


def test_the_named_speaker_comes_first(chat):
    """Whoever else used the words of the question; knowledge, which nobody said, is not held back."""
    chat.add([Message("user", "I paint lakes and mountains.", name="Caroline")])
    chat.add([Message("assistant", "I paint sunsets and lakes, all I paint is water.", name="Melanie")])
    chat.remember("Melanie likes to paint lakes.")
    assert said(chat.search("What does Caroline paint, lakes?"))[0].startswith("I paint lakes")
    hits = chat.search("What does Melanie paint, lakes?")
    assert {h.entry.content for h in hits[:2]} == {
        "I paint sunsets and lakes, all I paint is water.",
        "Melanie likes to paint lakes.",
    }
    assert "speaker" not in chat.search("What do Caroline and Melanie paint?")[0].signals
    assert "user" not in hits[0].signals, "people with names are no assistants"


def test_a_speaker_is_known_by_a_nickname(opened):
    """One that the other uses; it is learned from what is said, and read back with it."""
    with opened(embedder="none") as memory:
        chat = memory.session("chat", user_id="ada")
        for n in range(2):
            chat.add(
                [Message("user", f"Hey Nate, news {n}?", name="Joanna"), Message("assistant", "No.", name="Nathaniel")]
            )
        chat.add([Message("user", "I cook soup and stew.", name="Joanna")])
        chat.add([Message("assistant", "I cook rice, soup and beans.", name="Nathaniel")])
        assert said(chat.search("What does Nate cook, soup?"))[0] == "I cook rice, soup and beans."
    chat = opened(embedder="none").session("chat", user_id="ada")
    hits = chat.search("What does Nate cook, soup?")
    assert said(hits)[0] == "I cook rice, soup and beans."
    assert hits[0].signals["speaker"] > 0


def test_a_time_in_the_question_is_matched_with_when_it_was_said(chat):
    """By month, or counted back from now."""
    for month in (3, 7, 10):
        when = datetime(2025, month, 12, tzinfo=UTC)
        chat.add(Message("user", "I went to the dentist.", id=f"{month}", created_at=when))
    assert chat.search("When was I at the dentist in July 2025?")[0].entry.id == "7"
    assert chat.search("Was I at the dentist on 2025-03-12?")[0].entry.id == "3"
    chat.memory._core.parts.clock.advance(seconds=0)
    now = chat.memory._core.parts.clock.now
    chat.add(Message("user", "I went to the dentist.", id="now", created_at=now))
    assert chat.search("Did I go to the dentist today?")[0].entry.id == "now"


def test_who_asks_when_is_told_when(chat):
    """An entry that says a time, before one that has the words only."""
    chat.add(["We moved to Graz with the dog.", "We moved to Graz two years ago."])
    assert said(chat.search("When did we move to Graz?"))[0] == "We moved to Graz two years ago."
    assert "time" not in chat.search("Where did we move?")[0].signals


def test_a_short_answer_is_found_by_what_stands_around_it(chat):
    """Its own words say nothing; the turns before it name the topic."""
    chat.add([Message("user", "Let us talk about the kitchen wall."), Message("assistant", "Which colour for it?")])
    chat.add([Message("user", "The pale blue."), Message("assistant", "Noted.")])
    chat.add([Message("user", f"Then there is point {n}.") for n in range(8)])
    hits = chat.search("kitchen wall colour")
    assert "The pale blue." in said(hits)[:3]
    blue = next(h for h in hits if h.entry.content == "The pale blue.")
    assert blue.signals["around"] > 0


def test_neighbours_count_by_meaning_too(opened):
    """A turn among others of the same meaning stands higher than one alone."""
    chat = opened().session("chat", user_id="ada")
    chat.add(["sailing boats and harbours", "sailing on lakes", "harbours for boats"])
    chat.memory.session("other", user_id="ada").add(["tax papers", "sailing on lakes", "a dentist"])
    chat.memory.flush()
    first, second = chat.search("sailing boats harbours", filter={"content": "sailing on lakes"})
    assert (first.entry.scope.session_id, second.entry.scope.session_id) == ("chat", "other")
    assert first.signals["near"] > second.signals["near"]


# -- the arithmetic


def test_standing_is_told_from_the_average():
    """0 up to the mean, 1 from six standard deviations on, whatever the model's cosines are like."""
    rng = np.random.default_rng(3)
    for middle, spread in ((0.1, 0.1), (0.8, 0.03)):
        cosines = rng.normal(middle, spread, 20_000).astype(np.float32)
        found = ranking.standing(cosines, ranking.average(cosines))
        assert found[cosines < middle - spread].max() == 0
        at = np.argmin(abs(cosines - (middle + 2 * spread)))
        assert found[at] == pytest.approx(2 / 6, abs=0.02)
        best = np.sort(cosines)[::-1][:200]
        mean, deviation = ranking.average_behind(best, number=len(cosines))
        assert mean == pytest.approx(middle, abs=spread / 2)
        assert deviation == pytest.approx(spread, rel=0.25)


def test_few_entries_have_no_average_of_their_own():
    """One entry is not average because it is alone; a few are compared with what is usual."""
    alone = np.array([0.6], np.float32)
    assert ranking.standing(alone, ranking.average(alone))[0] > 0.3
    assert ranking.average(np.zeros(0, np.float32)) == pytest.approx((0.1, 0.12))


def test_length_rises_and_falls():
    """Up to twenty words, and beyond sixty; never below 0."""
    words = np.array([0, 1, 5, 20, 40, 60, 200, 1000, 100_000])
    share = ranking.length(words)
    assert share[0] == 0
    assert np.all(np.diff(share[:4]) > 0)
    assert share[3] == share[4] == share[5] == 1
    assert np.all(np.diff(share[5:]) < 0)
    assert share[-1] >= 0
