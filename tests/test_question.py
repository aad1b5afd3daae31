"""What a question names, and what an entry's text is by itself."""

from datetime import UTC, date, datetime

import pytest

from neuralflow_memory.rules.question import aliases, understood
from neuralflow_memory.rules.traits import QUESTION, TIMED, WISH, called, traits

NOW = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)  # a Saturday
PEOPLE = ("Caroline", "Melanie Smith")


def asked(query, speakers=PEOPLE, known=()):
    return understood(query, speakers={name: name for name in speakers}, known=lambda word: word in known, now=NOW)


@pytest.mark.parametrize(
    ("query", "speakers", "text"),
    [
        ("What did Caroline paint?", {"Caroline"}, "What did paint?"),
        ("What is Caroline's dog called?", {"Caroline"}, "What is dog called?"),
        ("what did caroline paint?", {"Caroline"}, "what did paint?"),
        ("When did Melanie move?", {"Melanie Smith"}, "When did move?"),
        ("When did Mel move?", {"Melanie Smith"}, "When did move?"),
        ("When did Melanie Smith move?", {"Melanie Smith"}, "When did move?"),
        ("When did Carolyne move?", {"Caroline"}, "When did move?"),
        ("Did Caroline and Melanie meet?", set(PEOPLE), "Did and meet?"),
        ("Who is Oscar?", set(), "Who is Oscar?"),
        ("Is a melody in it?", set(), "Is a melody in it?"),
        ("Caroline", {"Caroline"}, "Caroline"),
    ],
)
def test_speakers_are_known_by_their_names(query, speakers, text):
    """By the label, its first word, the beginning of it, or misspelt; what is left is what is compared."""
    found = asked(query)
    assert (found.speakers, found.text) == (frozenset(speakers), text)


def test_a_word_of_the_chats_is_no_misspelt_name():
    """A capital alone does not make one."""
    assert asked("Is Caroling fun?", known={"Caroling"}).speakers == frozenset()
    assert asked("Is Caroling fun?").speakers == {"Caroline"}


def test_roles_are_no_names():
    """In a chat with an assistant, "user" is a word like any other."""
    assert asked("Which user said that?", speakers=("user", "assistant")).text == "Which user said that?"


def test_names_of_scripts_without_spaces():
    """They stand in the text without a gap."""
    found = asked("小明什么时候搬家?", speakers=("小明", "Анна"))
    assert (found.speakers, found.text) == ({"小明"}, "什么时候搬家?")
    assert asked("Когда Анна переехала?", speakers=("小明", "Анна")).speakers == {"Анна"}


def test_other_names_are_learned_from_how_people_speak():
    """From greetings, for the one spoken to, and from introductions; not from words that are used otherwise, too."""
    people = ("Joanna", "Nathaniel")
    given = [("Joanna", "Nate"), ("Joanna", "Nate\nMan"), ("Nathaniel", "=Buddy\nJojo"), ("Nathaniel", "Man\nJojo")]
    given += [("Joanna", "Great"), ("Joanna", "Great"), ("user", "Nate"), ("Joanna", "Once")]
    found = aliases(given, people, count=lambda word: 40 if word == "Great" else 3)
    assert found == {"Nate": "Nathaniel", "Jojo": "Joanna"}
    assert aliases(given, (*people, "Max"), count=len) == {}
    asked = understood("What did Nate cook?", speakers={**found, "Nathaniel": "Nathaniel"}, known=bool, now=NOW)
    assert (asked.speakers, asked.text) == ({"Nathaniel"}, "What did cook?")


@pytest.mark.parametrize(
    ("text", "others", "own"),
    [
        ("Hey Jo, how are you?", (), ()),
        ("Hey Joey, how are you?", ("Joey",), ()),
        ("Thanks, Nate! Oh Nate.", ("Nate", "Nate"), ()),
        ("I'm Max, call me Maxi.", (), ("Max", "Maxi")),
        ("hey there", (), ()),
    ],
)
def test_names_that_a_text_gives(text, others, own):
    """A capital, and three letters at least."""
    assert called(text) == (others, own)


@pytest.mark.parametrize(
    ("query", "fits", "misses"),
    [
        ("What was on 3 May 2023?", [date(2023, 5, 3), date(2023, 5, 6)], [date(2023, 5, 7), date(2024, 5, 3)]),
        ("What was on May 3rd?", [date(2021, 5, 1)], [date(2021, 5, 20)]),
        ("What was on the 3rd of May, 2023?", [date(2023, 5, 3)], [date(2023, 6, 3)]),
        ("What did he do in August?", [date(2020, 8, 31)], [date(2020, 7, 31)]),
        ("What happened in Aug 2022?", [date(2022, 8, 1)], [date(2023, 8, 1)]),
        ("What happened on 2023-05-03?", [date(2023, 5, 3)], [date(2023, 3, 5)]),
        ("What happened on 3.5.2023?", [date(2023, 5, 3), date(2023, 3, 5)], [date(2023, 4, 20)]),
        ("What happened on 03/05/2023?", [date(2023, 5, 3), date(2023, 3, 5)], [date(2022, 5, 3)]),
        ("What did I say yesterday?", [date(2026, 11, 20)], [date(2026, 11, 21), date(2026, 11, 19)]),
        ("What did I say two weeks ago?", [date(2026, 11, 7)], [date(2026, 11, 20), date(2026, 10, 20)]),
        ("What did I eat last week?", [date(2026, 11, 9), date(2026, 11, 15)], [date(2026, 11, 16), date(2026, 11, 8)]),
        ("What did I eat this week?", [date(2026, 11, 16), date(2026, 11, 21)], [date(2026, 11, 15)]),
        ("What did I eat last month?", [date(2026, 10, 1), date(2026, 10, 31)], [date(2026, 11, 1)]),
        ("Where was I last year?", [date(2025, 1, 1), date(2025, 12, 31)], [date(2026, 1, 1), date(2024, 12, 31)]),
        ("Where was I this year?", [date(2026, 1, 1)], [date(2025, 12, 31)]),
    ],
)
def test_times_are_understood(query, fits, misses):
    """Named ones by month, day and year, the day give or take three; relative ones from the day of the question."""
    times = asked(query).times
    assert all(any(time.fits(day) for time in times) for day in fits)
    assert not any(time.fits(day) for time in times for day in misses)


@pytest.mark.parametrize(
    "query",
    ["Where may I sit?", "They march every day", "the dec file", "version 1.2.3", "call 999-99-99", "32.13.2023 days"],
)
def test_words_and_numbers_are_no_times(query):
    """A month in lower case needs a day or a year, unless it is long enough to be nothing else."""
    assert not any(
        time.fits(date(2026, m, d)) for time in asked(query).times for m in range(1, 13) for d in (1, 15, 28)
    )


@pytest.mark.parametrize("query", ["9999999 days ago", "999 years ago", "on 99 May 2023", "0 weeks ago", "2023-99-99"])
def test_impossible_times_fit_nothing_and_raise_nothing(query):
    """Whatever is typed."""
    assert not any(time.fits(date(2020, m, 15)) for time in asked(query).times for m in (1, 4, 6, 12))


def test_kinds_of_questions():
    """What is asked for decides which signals there are."""
    assert asked("When did she move?").asks_time
    assert asked("How many weeks did it take?").asks_time
    assert not asked("What happened whenever it rained?").asks_time
    assert asked("What did you recommend?").asks_assistant
    assert asked("Which book had you suggested?").asks_assistant
    assert not asked("What do you know of my trip?").asks_assistant
    assert [asked(q).asks for q in ("Where is it", "It is here", "Wo ist das", "是吗？")] == [True, False, True, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is it?", QUESTION),
        ("它在哪里？ ", QUESTION),
        ("It was last Friday.", 0),
        ("We met yesterday.", TIMED),
        ("We met two weeks ago, in May.", TIMED),
        ("I was born in 1998", TIMED),
        ("She moved in for three months.", TIMED),
        ("Always answer in French.", WISH),
        ("I'd really prefer trains.", WISH),
        ("When I ask for code, show tests. OK?", WISH | QUESTION),
        ("They always come late.", 0),
        ("", 0),
    ],
)
def test_traits_of_a_text(text, expected):
    """A sum of what it is; nothing for what the lists don't know."""
    assert traits(text) == (expected or (TIMED if "Friday" in text else 0))
