"""What an entry is worth keeping: told by its text, set when it is written, overridden by its host, weighed by search."""

from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory import MemoryType, Message, open_memory
from neuralflow_memory.rules.importance import UNJUDGED, worth_keeping
from neuralflow_memory.rules.traits import traits
from neuralflow_memory.testing import ManualClock

ROLES = ("system", "developer", "user", "assistant", "tool", None)
ANSWER = (
    "There are many ways to plan a journey through Portugal, and I will name a few of them. Begin in Lisbon, where you should "
    "stay for 3 days and see Alfama and Belém. Then take the train to Coimbra, which costs 25 euros, and walk through its old "
    "university of 1290. From there it is 1 hour to Porto, where you must not miss the river. In October it rains on 9 days, so "
    "never go without a coat. If you have a week left, rent a car and drive along the Douro up to Pinhão, where the wine grows, "
    "and come back on Sunday, when the roads are empty. Tell me what you like best and I will plan the rest of it with you."
)


def worth(text, role="user", name=None):
    return worth_keeping(text, traits=traits(text), role=role, name=name)


@pytest.mark.parametrize(
    "texts",
    [
        (
            "My sister Ida moved to Graz on 4 May 2023.",
            "I am allergic to nuts.",
            "Nice weather for ducks.",
            "Thanks a lot!",
        ),
        ("Never book a hotel without a bath tub for me.", "I looked at a hotel.", "Which hotel?", "Ok"),
        ("We will pay the 300 euros by Friday.", "It costs 300 euros.", "That costs something.", "Haha yes, exactly!"),
        ("I don't eat meat on Fridays.", "People eat meat.", "Do people eat meat?", "Hello there!"),
        ("Ich wohne seit 2019 in Graz.", "Dort regnet es öfter.", "Regnet es dort?", "Hallo, vielen Dank!"),
        ("Am 3. Oktober zahle ich die Miete.", "Ich zahle gern.", "Wer zahlt?", "Ja, genau, super!"),
        ("我打算十月三日和妹妹去里斯本。", "我对花生过敏。", "花生很便宜。", "花生贵吗？", "谢谢你，太好了！"),
        ("我不吃肉，我住在北京，今年三十岁。", "他们吃肉。", "好的"),
    ],
    ids=lambda texts: texts[0][:12],
)
def test_facts_come_before_remarks_questions_and_greetings(texts):
    """In each language the more telling sentence is worth more, and a greeting nothing to speak of."""
    values = [worth(text) for text in texts]
    assert all(more > less for more, less in pairwise(values)), dict(zip(texts, values, strict=True))
    assert values[-1] <= 0.1


def test_a_long_answer_is_worth_less_than_a_users_fact():
    """However many numbers and names it holds; the longer, the less."""
    assert len(ANSWER.split()) > 100
    assert worth(ANSWER, "assistant") < worth("I smoke a pipe.")
    assert worth(ANSWER * 2, "assistant") < worth(ANSWER, "assistant") < worth(ANSWER)
    assert worth(ANSWER, "tool") < worth(ANSWER)


def test_whose_words_they_are():
    """A person's count in full, whatever role stands beside the name; an assistant's by half, a tool's by a fifth."""
    text = "I moved to Graz in 2019."
    assert worth(text, "assistant", "Melanie") == worth(text) > worth(text, "assistant") > worth(text, "tool") > 0
    assert worth(text, "assistant", "AI") == worth(text, "assistant"), "a role is no name"
    assert worth(text, "system") == worth("", "developer") == UNJUDGED
    assert worth("ok", None) == UNJUDGED < worth(text, None), "what somebody chose to tell is worth something"


def test_a_question_takes_nothing_from_what_was_said_before_it():
    """Sentences that state something are looked at without it."""
    assert worth("I moved to Graz in 2019. Where do I find a dentist?") == worth("I moved to Graz in 2019.")
    assert worth("Does Ida live in Graz since 2019?") < worth("Ida lives in Graz since 2019.") / 2


def test_code_counts_neither_way():
    """Names and numbers in it are no facts, and its length is none; with nothing beside it, it can't be judged."""
    code = "```python\nTotal = 42 if Graz in Cities else 2019\n```"
    assert worth(f"The parser fails.\n{code}") == worth("The parser fails.")
    assert worth(code) == worth("") == UNJUDGED
    assert worth(f"Thanks!\n{code}") == 0


@given(st.text() | st.text(alphabet="I will 42?!我不。会 Graz`\n'"), st.sampled_from(ROLES), st.none() | st.just("Ada"))
def test_any_text_has_a_worth(text, role, name):
    """Between 0 and 1, the same every time."""
    found = worth(text, role, name)
    assert 0 <= found <= 1
    assert worth(text, role, name) == found


@pytest.mark.parametrize("part", ["a", "?", "I ", "```", "会", "1.", "\n", "Aa1'"])
def test_very_long_texts_are_judged_by_their_beginning(part):
    """A text without end costs no more than a long one."""
    assert worth(part * 6_000) == worth(part * 600_000)


# -- in a session


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def chat(opened, clock):
    return opened(embedder="none", clock=clock).session("chat", user_id="ada")


def importance(chat, id):
    return chat.entries.get(id).importance


def test_turns_are_weighed_when_they_are_added(chat):
    """By text, role and name; metadata has no say in it."""
    fact = "I am allergic to nuts."
    chat.add([Message("user", fact, id="fact", metadata={"importance": 1.0}), Message("user", "Hi!", id="hi")])
    chat.add([Message("assistant", fact, id="answer"), Message("assistant", fact, id="named", name="Bo")])
    assert importance(chat, "fact") == importance(chat, "named") == worth(fact)
    assert importance(chat, "hi") == 0
    assert importance(chat, "answer") == worth(fact, "assistant")
    assert [e.id for e in chat.entries.list(filter={"importance": {"$gt": 0.4}})] == ["fact", "named"]


def test_told_knowledge_is_weighed_unless_its_importance_is_given(chat):
    """Never below what can't be judged; what is given stays."""
    fact = "Ada must not eat nuts, and has an injector from Dr. Berg since 2019."
    assert importance(chat, chat.remember("ok")) == UNJUDGED
    assert importance(chat, chat.remember(fact)) == worth(fact, None) > UNJUDGED
    assert importance(chat, chat.remember(fact + " Really.", importance=0.0)) == 0
    assert importance(chat, chat.remember("ok", type=MemoryType.EPISODIC, importance=0.95)) == 0.95


def test_an_edit_weighs_anew_what_was_weighed_and_keeps_what_was_set(chat):
    """Changes of anything but the content leave the importance alone."""
    chat.add([Message("user", "Hi!", id="weighed"), Message("user", "Hi!", id="set")])
    chat.entries.update("set", importance=0.9)
    new = "I am allergic to nuts."
    assert chat.entries.update("weighed", tags=["a"]).importance == 0
    assert chat.entries.update("weighed", content=new).importance == worth(new)
    assert chat.entries.update("set", content=new).importance == 0.9
    assert chat.entries.update("set", content="Hi!", importance=0.3).importance == 0.3
    assert importance(chat, "set") == 0.3


def test_a_set_importance_survives_folding(opened):
    """The turn stays in the transcript as it was."""
    few = {"max_context_items": 2, "summarization_threshold": 4}
    chat = opened(embedder="none", pruning=few).session("chat", user_id="ada")
    chat.add(Message("user", "Hi!", id="set"))
    chat.entries.update("set", importance=0.9)
    chat.add([Message("user", f"I have {n} cats.", id=f"{n}") for n in range(8)])
    chat.memory.flush()
    assert "set" not in {m.id for m in chat.messages(view="window")}
    assert importance(chat, "set") == 0.9


# -- in search


def test_importance_tells_equal_entries_apart(opened, tmp_path):
    """The signal is at most its weight's share of the score, and gone where it has no weight."""
    for weight in (0.5, 0.0):
        memory = opened(tmp_path / f"{weight}", embedder="none", ranking={"importance": weight})
        chat = memory.session("chat", user_id="ada")
        for value in (0.0, 1.0, 0.4):
            chat.remember("The boat is in Lisbon.", importance=value, type=MemoryType.EPISODIC)  # kept thrice
        hits = chat.search("Where is the boat?")
        if weight:
            assert [h.entry.importance for h in hits] == [1.0, 0.4, 0.0]
            first, _, last = (h.signals["importance"] for h in hits)
            assert 0 == last < first < 0.1
            assert hits[0].score == pytest.approx(sum(hits[0].signals.values()), abs=1e-3)
        else:
            assert all("importance" not in h.signals for h in hits)
            assert len({h.score for h in hits}) == 1


@pytest.fixture(scope="module")
def searched():
    with open_memory(":memory:", embedder="none", ranking={"importance": 100.0}) as memory:
        yield memory.session("chat", user_id="ada")


WORDS = st.lists(
    st.sampled_from(["boat", "harbour", "lemon", "dentist", "purple", "42", "Graz"]), min_size=1, max_size=6
)


@given(query=WORDS, texts=st.lists(st.tuples(WORDS, st.floats(0, 1)), min_size=1, max_size=6))
def test_importance_brings_nothing_back_that_has_nothing_in_common(searched, query, texts):
    """However much importance counts: the hits are the entries that share a word with the question."""
    ids = {searched.remember(" ".join(words), importance=value): {*words} for words, value in texts}
    try:
        hits = {h.entry.id for h in searched.search(" ".join(query), k=50)}
        assert hits == {own for own, words in ids.items() if words & {*query}}
    finally:
        searched.entries.delete(ids, within="user")


def test_importance_does_not_outvote_words(chat):
    """By default an entry with both words of the question, worth nothing, comes before one with one, worth everything."""
    both = chat.remember("The dentist in Graz closes early", importance=0.0)
    one = chat.remember("The dentist in Rome closes early", importance=1.0)
    assert [h.entry.id for h in chat.search("a dentist in Graz")] == [both, one]


def test_recency_is_half_after_thirty_days(opened, clock):
    """Only where it has a weight; what is dated ahead of the clock is no more recent than now."""
    ages = (0, 30, 60, -5)
    chat = opened(embedder="none", clock=clock, ranking={"recency": 1.0}).session("chat", user_id="ada")
    for n, days in enumerate(ages):
        chat.add(Message("user", "I saw the boat.", id=f"{n}", created_at=clock.now - timedelta(days=days)))
    found = {h.entry.id: h.signals["recency"] for h in chat.search("boat")}
    now, month, two, ahead = (found[f"{n}"] for n in range(len(ages)))
    assert (month, two, ahead) == pytest.approx((now / 2, now / 4, now), abs=1e-3)
    clock.advance(days=30)
    later = {h.entry.id: h.signals["recency"] for h in chat.search("boat")}
    assert later["0"] == pytest.approx(month, abs=1e-3)
    assert 0 < now < 0.1


def test_by_default_the_time_counts_nothing(chat):
    """Old or new, the same words have the same score."""
    chat.add(Message("user", "I saw the boat.", created_at=chat.memory._core.parts.clock() - timedelta(days=900)))
    assert "recency" not in chat.search("boat")[0].signals
