"""Coverage: what became of the facts of folded turns, and which sentences are pinned."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory.models.tokens import ApproximateCounter, token_counter
from neuralflow_memory.rules import sentences
from neuralflow_memory.rules.coverage import Fact, Kind, check, facts, pins
from neuralflow_memory.types import Message, ToolCall

COUNT = token_counter("cl100k_base").count


def ada(text):
    return Message("user", text, name="Ada")


def bob(text):
    return Message("assistant", text, name="Bob")


def found(*messages):
    """(kind, text) of every fact."""
    return [(f.kind, f.text) for f in facts(messages)]


def kinds(*messages):
    return {f.kind for f in facts(messages)}


def kept(messages, text):
    """The kinds, in order, that *text* holds."""
    return [f.kind for f in check(facts(messages), text).kept]


def pinned(messages, *, earlier=(), text="", max_tokens=1000):
    return pins(check(facts(messages), text).missing, earlier, text, count=COUNT, max_tokens=max_tokens)


chats = st.lists(
    st.builds(
        lambda role, text, name, call: Message(
            role,
            text,
            name=name or None,
            tool_call_id="c",
            tool_calls=[ToolCall("c", "book", {"day": text})] if call and role == "assistant" else (),
        ),
        st.sampled_from(["user", "assistant", "tool", "system"]),
        st.one_of(
            st.text(min_size=1).filter(str.strip),
            st.lists(
                st.sampled_from(
                    [
                        "Grace paid 1,250 euros on 2024-05-03.",
                        "I don't eat pork.",
                        "Where is the spare key?",
                        "I'll call the dentist on Monday.",
                        "我们五月三日搬到了里斯本。",
                        "Не звони Грейс 3 мая.",
                        "Ich komme nicht im Juni.",
                        "```py\nx = 1\n```",
                        "Let me check.",
                        "Hi!",
                    ]
                ),
                min_size=1,
                max_size=6,
            ).map(" ".join),
        ),
        st.text(max_size=8),
        st.booleans(),
    ),
    max_size=10,
)


@pytest.mark.parametrize(
    ("sentence", "kind", "text"),
    [
        ("The flat costs 1,250 euros.", Kind.NUMBER, "1,250"),
        ("Die Wohnung kostet 1250 Euro.", Kind.NUMBER, "1250"),
        ("公寓每月1250欧元。", Kind.NUMBER, "1250"),
        ("Our flight is AP131 to the north.", Kind.NUMBER, "ap131"),
        ("The visit begins 2024-05-03 at the gate.", Kind.DATE, "2024-05-03"),
        ("The visit begins on Monday.", Kind.DATE, "monday"),
        ("we meet in june, she said", Kind.DATE, "june"),
        ("Wir sehen uns am 3. märz wieder.", Kind.DATE, "märz"),
        ("On se voit le 3 mai au parc.", Kind.DATE, "mai"),
        ("Мы встретимся 3 июня в парке.", Kind.DATE, "июня"),
        ("我们五月三日搬到了里斯本。", Kind.DATE, "五月三日"),
        ("会議は5月3日に開きます。", Kind.DATE, "5月3日"),
        ("회의는 5월 3일에 열립니다.", Kind.DATE, "5월 3일"),
        ("My cousin moved to Lisbon.", Kind.NAME, "lisbon"),
        ("I bought Grace's old boat.", Kind.NAME, "grace"),
        ("Мы переехали в Лиссабон летом.", Kind.NAME, "лиссабон"),
        ("Please never suggest satay.", Kind.NEGATION, "never"),
        ("I don’t eat pork.", Kind.NEGATION, "don't"),
        ("he cant come to the party", Kind.NEGATION, "cant"),
        ("There is no elevator.", Kind.NEGATION, "no"),
        ("Wir essen kein Fleisch.", Kind.NEGATION, "kein"),
        ("Je ne mange pas de viande.", Kind.NEGATION, "ne"),
        ("Nunca como carne.", Kind.NEGATION, "nunca"),
        ("Мы не едим мясо.", Kind.NEGATION, "не"),
        ("У нас нет машины.", Kind.NEGATION, "нет"),
        ("孩子不吃花生。", Kind.NEGATION, "不"),
        ("我没有车。", Kind.NEGATION, "没"),
        ("肉は食べません。", Kind.NEGATION, "ません"),
        ("고기는 먹지 않아요.", Kind.NEGATION, "않"),
        ("Where is the spare key?", Kind.QUESTION, ""),
        ("Wo liegt der Schlüssel?", Kind.QUESTION, ""),
        ("钥匙在哪里？", Kind.QUESTION, ""),
        ("أين المفتاح؟", Kind.QUESTION, ""),
        ("I'll call the dentist.", Kind.COMMITMENT, ""),
        ("The landlord must repair the heating.", Kind.COMMITMENT, ""),
        ("I promise to water the plants.", Kind.COMMITMENT, ""),
        ("The report is due at noon.", Kind.COMMITMENT, ""),
        ("He has to renew the lease.", Kind.COMMITMENT, ""),
        ("Don't forget the passport.", Kind.COMMITMENT, ""),
        ("Ich werde den Zahnarzt anrufen.", Kind.COMMITMENT, ""),
        ("Je vais appeler le dentiste.", Kind.COMMITMENT, ""),
        ("Voy a llamar al dentista.", Kind.COMMITMENT, ""),
        ("Я обещаю полить цветы.", Kind.COMMITMENT, ""),
        ("我会带帐篷。", Kind.COMMITMENT, ""),
        ("明日までの約束です。", Kind.COMMITMENT, ""),
        ("내일까지 마감입니다.", Kind.COMMITMENT, ""),
    ],
)
def test_facts_of_each_kind(sentence, kind, text):
    """Each kind is found in several languages, with the word that must stand in a summary."""
    assert (kind, text) in found(ada(sentence))


@pytest.mark.parametrize(
    "sentence",
    [
        "Hi there!",
        "No.",
        "How are you?",
        "I will.",
        "No worries!",
        "Can't wait to see it!",
        "That must have been hard.",
        "You'll love it.",
        "It's going to be fun.",
        "Kein Problem!",
        "没关系。",
        "It may rain, so we march on.",
        "Thanks, Grace!",
        "Hi Grace!",
    ],
)
def test_small_talk_has_no_facts(sentence):
    """Phrases that only sound like a negation or a promise, verbs that spell like months, a mere name: nothing to keep."""
    assert found(ada(sentence), bob("Yes.")) == []


def test_a_fact_knows_its_sentence():
    """The line as it would be pinned, its other content words, and the message it stands in."""
    said = Message(
        "user", "Hello! I saw Dr. Watson last Friday.", name="Ada", created_at=datetime(2024, 3, 5, tzinfo=UTC)
    )
    name, day = facts([bob("Yes."), said])
    line = "Ada (2024-03-05): I saw Dr. Watson last Friday."
    assert (name.text, name.line, name.words, name.row) == ("watson", line, {"saw", "last", "friday"}, 1)
    assert (day.kind, day.text, day.line, day.words, day.row) == (
        Kind.DATE,
        "friday",
        line,
        {"saw", "last", "watson"},
        1,
    )


def test_words_are_content_words_of_the_language():
    """Articles and the like tell nothing in German either."""
    number = facts([ada("Unsere Miete ist mit der Heizung und dem Strom 900 euro.")])[-1]
    assert number.words.isdisjoint({"ist", "mit", "der", "und", "dem"})
    assert {"miete", "heizung", "strom"} <= number.words


def test_speakers_are_no_names():
    """Who speaks stands before every line; somebody else's name is a fact."""
    chat = [ada("I told Bob about Grace and the boat."), bob("And I told Ada.")]
    assert found(*chat) == [(Kind.NAME, "grace")]
    assert all(f.words.isdisjoint({"ada", "bob"}) for f in facts(chat))


def test_each_fact_of_a_sentence_counts_once():
    """However often a sentence is said, and however often it says it."""
    assert found(*[ada("Room 12 is next to room 12, said Grace.")] * 5) == [(Kind.NUMBER, "12"), (Kind.NAME, "grace")]


def test_numbers_stay_whole():
    """Thousands, decimals, times, addresses and ranges are one fact each."""
    chat = ada("Pay 1,250.50 at 09:39 to 10.0.12.5 for 10-12 boxes of 5kg.")
    assert [text for kind, text in found(chat) if kind is Kind.NUMBER] == [
        "1,250.50",
        "09:39",
        "10.0.12.5",
        "10-12",
        "5kg",
    ]


@pytest.mark.parametrize(
    ("replies", "is_open"),
    [
        ([], True),
        (["In the drawer."], False),
        (["I don't know."], True),
        (["Let me check."], True),
        (["I'll tell you later."], True),
        (["Will find out."], True),
        (["Keine Ahnung."], True),
        (["Je ne sais pas."], True),
        (["Не знаю."], True),
        (["我不知道。"], True),
        (["Let me check.", "It is in the drawer."], False),
        (["Later in the day I put it back where it belongs: " + "left, then right, " * 10], False),
    ],
)
def test_open_questions(replies, is_open):
    """A question is open while nobody else says anything, or only that he can't tell yet."""
    chat = [ada("Where is the spare key?"), *map(bob, replies)]
    assert (Kind.QUESTION in kinds(*chat)) is is_open
    assert Kind.QUESTION in kinds(*chat[:1], ada("I looked everywhere."))


def test_an_answer_is_what_was_said_before_the_asker_spoke_again():
    """A later word of the other answers the later question; tools and the host's own words answer nothing."""
    chat = [ada("Where is the spare key?"), bob("No idea."), ada("Where is the gate code?"), bob("It's 4711.")]
    assert [f.line for f in facts(chat) if f.kind is Kind.QUESTION] == ["Ada: Where is the spare key?"]
    silent = [
        ada("Where is the spare key?"),
        Message("assistant", "", name="Bob", tool_calls=[ToolCall("c", "find", {})]),
        Message("tool", "In the drawer.", tool_call_id="c"),
        Message("system", "Be brief."),
    ]
    assert Kind.QUESTION in kinds(*silent)


def test_a_question_binds_nobody_unless_it_reminds():
    """ "Will you ...?" is answered or open; "could you remind me" stays a request. Neither denies anything."""
    assert kinds(ada("Will you bring the tent?"), bob("Yes.")) == set()
    assert kinds(ada("Don't you like peanuts?"), bob("Yes.")) == set()
    assert kinds(ada("Could you remind me to call the dentist?"), bob("Yes.")) == {Kind.COMMITMENT}


def test_a_negation_is_no_commitment():
    """What isn't, or isn't done, binds nobody."""
    assert kinds(ada("My brother doesn't drink beer.")) == {Kind.NEGATION}
    assert kinds(ada("Мы не едим мясо.")) == {Kind.NEGATION}


def test_tools_count_by_their_beginning():
    """A result of thousands of numbers yields as many facts as its line has; a call yields its arguments."""
    numbers = [str(n) for n in range(5_000)]
    spaced = facts([Message("tool", " ".join(numbers), tool_call_id="c", name="search")])
    joined = facts([Message("tool", ",".join(numbers), tool_call_id="c", name="search")])
    assert 10 < len(spaced) <= 20
    assert 0 < len(joined) < 100
    call = Message("assistant", "", tool_calls=[ToolCall("c", "search", {"to": "Porto", "limit": 3})])
    assert found(call) == [(Kind.NAME, "porto"), (Kind.NUMBER, "3")]
    assert found(Message("tool", "", tool_call_id="c")) == []


def test_code_counts_by_its_beginning():
    """A block of code is one line, whatever its length."""
    code = "```python\n" + "\n".join(f"x{i} = {i}" for i in range(500)) + "\n```"
    assert len({f.line for f in facts([ada("The bug is in line 88:\n" + code)])}) == 2
    assert len(facts([ada(code)])) <= 20


def test_nothing_said_nothing_found():
    """No messages, no facts, no pins."""
    assert facts([]) == []
    assert check([], "Some text.") == check([], "")
    assert pins([], [], "", count=COUNT, max_tokens=100) == []


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("They moved to Lisbon on May 3rd and pay 1250 for the flat, in euros.", True),
        ("The flat costs 1,250 euros.", True),
        ("The flat costs 11,250 euros.", False),
        ("Something costs 1,250.", False),
        ("The flat costs euros.", False),
    ],
)
def test_a_number_is_held_with_two_words(text, held):
    """As a word, however it is written, and with enough of its sentence to know what it counts."""
    assert (Kind.NUMBER in kept([ada("The flat costs 1,250 euros.")], text)) is held


def test_a_fact_by_itself_is_held_by_itself():
    """ "4711." has no words that could be missing; a short sentence needs all of them."""
    assert kept([ada("4711.")], "The code: 4711") == [Kind.NUMBER]
    assert kept([ada("Gate 4711.")], "The code: 4711") == []


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Ada will not have peanuts in the house.", True),
        ("She avoids peanuts. Satay is not for her.", False),
        ("Ada likes peanuts in the house.", False),
        ("House rules, peanuts included: none.", True),
        ("The house has no peanuts.\nOther rules follow.", True),
        ("The house has peanuts.\nNever mind.", False),
    ],
)
def test_a_negation_is_held_beside_its_words(text, held):
    """Any negating word does, but in the sentence that has two of the words."""
    assert (kept([ada("Never bring peanuts into our house.")], text) == [Kind.NEGATION]) is held


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Ada calls the dentist before lunch.", True),
        ("The dentist is called.\nLunch comes before that.", False),
        ("Ada has lunch.", False),
    ],
)
def test_a_commitment_is_held_by_most_of_its_words(text, held):
    """Three of five words in one sentence; and so with a question."""
    assert (kept([ada("I'll phone the dentist right before lunch.")], text) == [Kind.COMMITMENT]) is held
    assert (kept([ada("Who can phone the dentist right before lunch?")], text) == [Kind.QUESTION]) is held


def test_chinese_is_checked_by_pairs_of_characters():
    """Pairs that are mere grammar hold nothing."""
    chat = [ada("公寓每月1250欧元。"), ada("孩子不吃花生。")]
    assert kept(chat, "公寓的租金是每月1250欧元。孩子对花生过敏，不能吃。") == [Kind.NUMBER, Kind.NEGATION]
    assert kept(chat, "我们有1250个，也不是我们的。") == []
    assert kept([ada("我们的公寓1250欧元。")], "我们的车号是1250，这是我们的。") == []


def test_pins_come_in_order_within_the_budget():
    """Earlier pins first, then new ones as they were said; what the summary holds is left out."""
    earlier = ["Ada: The deadline is Friday 13 June.", "Bob: My sister lives in Oslo."]
    chat = [ada("The flat costs 1,250 euros."), bob("I'll bring the big tent."), ada("I don't eat pork.")]
    text = "Bob's sister lives in Oslo."
    lines = pinned(chat, earlier=earlier, text=text)
    assert lines == [
        earlier[0],
        "Ada: The flat costs 1,250 euros.",
        "Bob: I'll bring the big tent.",
        "Ada: I don't eat pork.",
    ]
    assert pinned(chat, earlier=earlier, text=text, max_tokens=0) == []
    few = pinned(chat, earlier=earlier, text=text, max_tokens=25)
    assert 0 < len(few) < 4
    assert few == [line for line in lines if line in few]


def test_nothing_is_pinned_twice():
    """The same fact from another mouth, or the same line old and new, takes one pin."""
    chat = [ada("The gate code is 4711 for the garage."), bob("The garage gate code is 4711, and that is it.")]
    assert len(pinned(chat)) == 1
    assert pinned(chat[:1], earlier=["Ada: The gate code is 4711 for the garage."]) == [
        "Ada: The gate code is 4711 for the garage."
    ]


def test_promises_dates_and_negations_come_before_names():
    """Where the room is short, what must not be forgotten stays."""
    chat = [
        ada("My cousin saw Grace near the harbour."),
        ada("The visit begins at 9:30 near the harbour."),
        bob("I'll phone the dentist right before lunch."),
        ada("Never bring peanuts into our house."),
    ]
    assert pinned(chat, max_tokens=COUNT("\n".join(pinned(chat))) - 5) == [
        "Ada: The visit begins at 9:30 near the harbour.",
        "Bob: I'll phone the dentist right before lunch.",
        "Ada: Never bring peanuts into our house.",
    ]


def test_a_table_of_numbers_does_not_fill_the_room():
    """A tool's twenty numbers are worth less than four sentences."""
    table = Message("tool", " ".join(str(n * 37) for n in range(300)), tool_call_id="c", name="query")
    said = [
        ada("The flat costs 1,250 euros, said Grace."),
        bob("I'll phone the dentist in Porto on Monday."),
        ada("Never bring peanuts or satay into our house."),
    ]
    lines = pinned([table, *said], max_tokens=50)
    assert len(lines) == 3
    assert not any(line.startswith("tool") for line in lines)


def test_old_pins_give_way_when_equal():
    """Of two lines that tell as much, the new one is pinned."""
    old, new = "Ada: The red boat costs 700 euros.", "The blue boat costs 900 euros."
    assert pinned([ada(new)], earlier=[old], max_tokens=COUNT(old) + 3) == [f"Ada: {new}"]
    assert pinned([], earlier=[old], max_tokens=COUNT(old) + 3) == [old]


def test_phrases_said_everywhere_are_worth_little():
    """A commitment of common words yields to one that says something."""
    chat = [ada(f"I'll try hard {when}.") for when in ("today", "again", "anyway", "indeed", "soon")]
    promise = bob("I promised to feed the tortoise while they sail.")
    room = COUNT(f"Bob: {promise.text}") + 1
    assert pinned([*chat, promise], max_tokens=room) == ["Bob: I promised to feed the tortoise while they sail."]
    assert pinned(chat, max_tokens=room) != []


@given(chats)
def test_facts_are_kept_or_missing(chat):
    """Nothing gets lost in between; an empty text keeps none, all the lines keep all, again and again."""
    told = facts(chat)
    assert told == facts(chat)
    assert all(0 <= f.row < len(chat) and f.line in sentences.lines([chat[f.row]]) for f in told)
    for text in ("", "Grace paid 1,250 euros. I don't eat pork.", "\n".join(sentences.lines(chat))):
        result = check(told, text)
        assert sorted(result.kept + result.missing, key=told.index) == told
        assert [f for f in told if f in result.kept] == list(result.kept)
        assert [f for f in told if f in result.missing] == list(result.missing)
    assert check(told, "").kept == ()
    assert check(told, "\n".join(sentences.lines(chat))).missing == ()


@given(chats, chats, st.text(max_size=200), st.integers(0, 120), st.sampled_from(["tokens", "letters", "rough"]))
def test_pins_never_exceed_their_room(chat, before, text, max_tokens, counter):
    """Whatever was said and however it is counted; what is pinned was said, in order, and holds a fact that was missing."""
    count = {"tokens": COUNT, "letters": lambda t: len(t) ** 2 // 50, "rough": ApproximateCounter().count}[counter]
    earlier = list(sentences.lines(before))
    missing = check(facts(chat), text).missing
    lines = pins(missing, earlier, text, count=count, max_tokens=max_tokens)
    assert not lines or count("\n".join(lines)) <= max_tokens
    known = list(dict.fromkeys([*earlier, *(f.line for f in missing)]))
    assert lines == [line for line in known if line in lines]
    assert lines == pins(missing, earlier, text, count=count, max_tokens=max_tokens)


@given(chats)
def test_with_room_for_all_nothing_stays_missing(chat):
    """Pinned without a limit, summary and pins hold every fact."""
    missing = check(facts(chat), "").missing
    lines = pins(missing, [], "", count=COUNT, max_tokens=10**9)
    assert check(missing, "\n".join(lines)).missing == ()


def test_every_process_pins_the_same():
    """Hash randomization, and with it the order of sets, decides nothing."""
    code = (
        "from neuralflow_memory.models.tokens import ApproximateCounter as C\n"
        "from neuralflow_memory.rules.coverage import facts, pins\n"
        "from neuralflow_memory.types import Message as M\n"
        "texts = [f'In {1900 + i} I must not sell Boat{i % 7} number {i * i} to Harbour{i % 11}.' for i in range(80)]\n"
        "told = facts([M('user', t) for t in texts])\n"
        "print(told[3].text, '|'.join(pins(told, [], '', count=C().count, max_tokens=300)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert "Boat" in outputs.pop()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "noise", [" ", "\n", "x", "7", "1,", "n't ", "不", "十月", "?", "no way, ", "a. ", "'", "will "]
)
def test_noise_costs_no_time(noise):
    """No pattern goes over the same long run again and again, in a message or in a text: the fact is found."""
    long = noise * 30_000 + "\nThe boat costs 700 euros."
    told = [f for f in facts([ada(long)]) if f.text == "700"]
    assert [f.line for f in told] == ["Ada: The boat costs 700 euros."]
    assert check(told, long).kept == tuple(told)


def test_a_fact_made_by_hand_is_checked_alike():
    """A fact needs no message; without words a commitment can't be held by a text."""
    assert check([Fact(Kind.NAME, "grace", "", frozenset({"boat"}))], "Grace has a boat.").missing == ()
    assert check([Fact(Kind.COMMITMENT, "", "x", frozenset())], "Grace has a boat.").kept == ()
