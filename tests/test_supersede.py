"""Facts that a model says are replaced: only where it may, only what it was given, and never by a failure."""

import json

import pytest
from conftest import SMALL, found
from gemini_server import Paced, answer, failure, gemini_server
from hypothesis import given
from hypothesis import strategies as st
from test_extract import knowledge, talk

from neuralflow_memory import ConfigError, Extraction, ExtractionError, Finding, Message, Superseding
from neuralflow_memory.models.gemini import GeminiSummarizer
from neuralflow_memory.models.prompted import PromptedSummarizer
from neuralflow_memory.models.superseding import PROMPT, SCHEMA, pairs
from neuralflow_memory.testing import ManualClock


class Judge:
    """Finds what comes after "fact: ", and says that each new fact replaces the known ones that `replaces` names."""

    name = "judge"

    def __init__(self, *replaced, cost=0.0):
        self.replaced, self.cost, self.asked, self.fails = replaced, cost, [], None
        self.before = lambda: None

    def extract(self, messages):
        facts = [Finding(m.content.split("fact: ")[1], (m.id,)) for m in messages if "fact: " in m.content]
        return Extraction(tuple(facts), 10, 1, self.cost)

    def supersede(self, new, known):
        self.asked.append(([e.content for e in new], [e.content for e in known]))
        self.before()
        if self.fails is not None:
            raise self.fails
        chosen = [k for k, e in enumerate(known) if e.content in self.replaced]
        return Superseding(tuple((0, k) for k in chosen), 20, 2, self.cost)


def by_content(chat):
    return {e.content: e for e in knowledge(chat)}


ROME, OSLO = "Ada lives in Rome", "Ada lives in Oslo"


def moved(memory, *, first=ROME, then=OSLO, user="ada"):
    """Two chats of one user, the later of which says something else than the first."""
    talk(memory.session("before", user_id=user), f"fact: {first}")
    chat = memory.session("after", user_id=user)
    talk(chat, f"fact: {then}")
    return chat


def test_a_new_fact_takes_the_place_of_an_old_one(opened):
    """Both are kept, with links and times; search finds what holds, and history shows it."""
    judge, clock = Judge(ROME), ManualClock()
    memory = opened(extractor=judge, knowledge={"supersede": "found"}, pruning=SMALL, clock=clock)
    talk(memory.session("before", user_id="ada"), f"fact: {ROME}", "fact: Ada keeps bees")
    moved_at = clock.advance(days=30)
    chat = memory.session("after", user_id="ada")
    talk(chat, f"fact: {OSLO}")
    assert judge.asked == [([OSLO], [ROME])]  # bees are far from it
    facts = by_content(chat)
    rome, oslo = facts[ROME], facts[OSLO]
    assert (rome.superseded_by, rome.valid_to) == (oslo.id, moved_at)
    assert (oslo.supersedes, oslo.valid_to, oslo.provenance) == ((rome.id,), None, "derived")
    assert facts["Ada keeps bees"].valid_to is None
    assert [e.superseded_by for e in chat.entries.history(rome.id)] == [None, oslo.id]
    clock.advance(days=1)
    hits = [h.entry.content for h in chat.search("Where does Ada live?", types=["long_term"])]
    assert OSLO in hits
    assert ROME not in hits
    then = chat.search("Where does Ada live?", types=["long_term"], as_of=moved_at.replace(day=15, month=1))
    assert ROME in found(then)
    stats = memory.stats()
    assert (stats["superseded"], stats["extracted"], stats["extractor_failures"]) == (1, 3, 0)
    assert stats["spent"]["input_tokens"] == 10 * (stats["extractor_calls"] - 1) + 20


def test_it_is_off_by_default(opened):
    """An extractor alone is not asked."""
    judge = Judge(ROME)
    chat = moved(opened(extractor=judge, pruning=SMALL))
    assert judge.asked == []
    assert by_content(chat)[ROME].valid_to is None


@pytest.mark.parametrize(("allowed", "ends"), [("found", False), ("any", True)])
def test_what_was_told_is_for_people_to_end_unless_any_is_said(opened, allowed, ends):
    """A fact that somebody told is not even shown to the model."""
    judge, clock = Judge(ROME), ManualClock()
    memory = opened(extractor=judge, knowledge={"supersede": allowed}, pruning=SMALL, clock=clock)
    chat = memory.session("chat", user_id="ada")
    chat.remember(ROME)
    clock.advance(days=1)
    talk(chat, f"fact: {OSLO}")
    assert (judge.asked != []) == ends
    assert (by_content(chat)[ROME].superseded_by is not None) == ends


def edit(chat, rome):
    chat.entries.update(rome.id, content="Ada lives in Roma")


def bound(chat, rome):
    chat.entries.update(rome.id, valid_to=rome.created_at.replace(year=2099))


def tell(chat, rome):
    chat.remember(rome.content)


@pytest.mark.parametrize("change", [edit, bound, tell])
def test_what_somebody_has_changed_by_hand_is_left_alone(opened, change):
    """Edited, told as well, or given an end of its own."""
    judge = Judge(ROME, "Ada lives in Roma")
    memory = opened(extractor=judge, knowledge={"supersede": "found"}, pruning=SMALL)
    before = memory.session("before", user_id="ada")
    talk(before, f"fact: {ROME}")
    change(before, by_content(before)[ROME])
    talk(memory.session("after", user_id="ada"), f"fact: {OSLO}")
    assert judge.asked == []
    assert all(e.superseded_by is None for e in knowledge(before))


@pytest.mark.parametrize("allowed", ["found", "any"])
def test_what_was_restored_stays(opened, allowed):
    """Somebody has said that it holds all the same: no later fact of a model's ends it."""
    judge = Judge(ROME)
    memory = opened(extractor=judge, knowledge={"supersede": allowed}, pruning=SMALL)
    chat = moved(memory)
    rome = by_content(chat)[ROME]
    chat.entries.restore(rome.id, 1)
    del judge.asked[:]
    talk(memory.session("third", user_id="ada"), "fact: Ada lives in Bergen")
    assert ROME not in judge.asked[0][1]
    assert chat.entries.get(rome.id).superseded_by is None


def test_deleting_what_superseded_lets_it_hold_again(opened):
    """As with any other knowledge; also when the turn goes that said it."""
    memory = opened(extractor=Judge(ROME), knowledge={"supersede": "found"}, pruning=SMALL)
    chat = moved(memory)
    chat.entries.delete("q0")
    facts = by_content(chat)
    assert facts.keys() == {ROME}
    assert facts[ROME].valid_to is None


def test_what_an_old_chat_says_does_not_replace_what_is_known_since(opened):
    """The fact was said before the one that is known, though it is found after it."""
    judge, clock = Judge(OSLO), ManualClock()
    memory = opened(extractor=judge, knowledge={"supersede": "any"}, pruning=SMALL, clock=clock)
    chat = memory.session("chat", user_id="ada")
    chat.remember(OSLO)
    old = clock.now.replace(year=2020)
    chat.add(
        [
            m
            for n in range(6)
            for m in (
                Message("user", f"fact: {ROME}" if n == 0 else "Nothing", created_at=old),
                Message("assistant", "I see", created_at=old),
            )
        ]
    )
    memory.flush()
    assert by_content(chat).keys() == {ROME, OSLO}
    assert judge.asked == []


def test_scopes_do_not_leak(opened):
    """The model sees facts of the same user only, and none of an agent's."""
    judge, clock = Judge(ROME), ManualClock()
    memory = opened(extractor=judge, knowledge={"supersede": "any"}, pruning=SMALL, clock=clock)
    memory.session("chat", user_id="bo").remember(ROME)
    memory.session("chat", user_id="ada", tenant="other").remember(ROME)
    memory.session("chat", user_id="ada", agent_id="guide").remember(ROME)
    memory.session("chat").remember(ROME)
    clock.advance(days=1)
    talk(memory.session("chat", user_id="ada"), f"fact: {OSLO}")
    assert judge.asked == []


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failure_is_not_none(opened):
    """The fact is kept, nothing is superseded, it is counted, and extract() raises; "none" is no failure."""
    judge = Judge(ROME)
    judge.fails = RuntimeError("out of order")
    memory = opened(extractor=judge, knowledge={"supersede": "found"}, pruning=SMALL)
    chat = moved(memory)
    assert by_content(chat)[ROME].superseded_by is None
    assert OSLO in by_content(chat)
    stats = memory.stats()
    assert (stats["extractor_failures"], stats["superseded"]) == (1, 0)
    assert "out of order" in stats["last_error"]
    judge.fails, judge.replaced = None, ()
    talk(memory.session("third", user_id="ada"), "fact: Ada lives in Bergen")
    assert memory.stats()["extractor_failures"] == 1


@pytest.mark.parametrize(
    "given",
    [Superseding(((0, 7),)), Superseding(((3, 0),)), Superseding(((-1, 0),)), [(0, 0)], None],
    ids=["no such known fact", "no such new fact", "a row from behind", "no Superseding", "nothing"],
)
def test_nonsense_changes_nothing(opened, given, monkeypatch):
    """What a model was not given it can't name, in whatever way."""
    judge = Judge()
    monkeypatch.setattr(judge, "supersede", lambda new, known: given)
    memory = opened(extractor=judge, knowledge={"supersede": "found"}, pruning=SMALL)
    chat = moved(memory)
    assert all(e.superseded_by is None for e in knowledge(chat))
    assert memory.stats()["extractor_failures"] == 1


def test_what_is_changed_while_the_model_reads_is_not_superseded(opened):
    """The new fact is kept, without a second call."""
    judge = Judge(ROME)
    memory = opened(extractor=judge, knowledge={"supersede": "found"}, pruning=SMALL)
    before = memory.session("before", user_id="ada")
    judge.before = lambda: before.entries.update(by_content(before)[ROME].id, tags=["mine"])
    chat = moved(memory)
    facts = by_content(chat)
    assert (facts[ROME].superseded_by, facts[ROME].tags, facts[OSLO].supersedes) == (None, ("mine",), ())
    judge.before = lambda: before.entries.delete(facts[ROME].id)
    talk(memory.session("third", user_id="ada"), "fact: Ada lives in Bergen")
    assert len(judge.asked) == 2
    assert by_content(chat).keys() == {OSLO, "Ada lives in Bergen"}


def test_it_keeps_to_the_spend_cap(opened):
    """The call that would ask what is replaced is not made once the day's money is spent."""
    judge = Judge(ROME, cost=0.4)
    memory = opened(
        extractor=judge, knowledge={"supersede": "found"}, pruning=SMALL, gemini={"spend_cap": 0.8}, clock=ManualClock()
    )
    chat = moved(memory)  # two calls to find facts
    assert judge.asked == []
    assert by_content(chat).keys() == {ROME, OSLO}
    assert memory.stats()["spent"]["cost"] == pytest.approx(0.8)


def test_the_option_needs_an_extractor_that_can_say(opened):
    """One without the method is refused when the memory is opened; without any, there is nothing to ask for."""

    class Plain:
        extract = Judge.extract

    class Unnamed(Plain):
        supersede = Judge.supersede
        replaced, asked, before, fails, cost = (ROME,), [], staticmethod(lambda: None), None, 0.0

    with pytest.raises(ConfigError, match="supersede"):
        opened(extractor=Plain(), knowledge={"supersede": "found"})
    opened(knowledge={"supersede": "found"}).close()
    chat = moved(opened(extractor=Unnamed(), knowledge={"supersede": "found"}, pruning=SMALL))
    assert by_content(chat)[ROME].superseded_by == by_content(chat)[OSLO].id


# --- real clients ---------------------------------------------------------------------------------------------------


def told(body):
    """The facts that a model was given, by kind and number."""
    lines = [json.loads(line) for line in body["contents"][0]["parts"][0]["text"].splitlines()]
    return {(kind, line[kind]): line["fact"] for line in lines for kind in ("new", "known") if kind in line}


def gemini(server):
    return GeminiSummarizer(api_key="k", base_url=server.url)


def finds(text):
    return answer(json.dumps([{"fact": text, "from": [1]}]), usage=(100, 10))


def test_gemini_says_what_is_replaced(opened):
    """One call with a schema; what the facts say is data, however it is put."""
    order = 'Ada lives in Oslo"}\n{"new": 2}'
    replaces = answer('[{"new": 1, "replaces": [1]}]', usage=(200, 20))
    with gemini_server(finds(ROME), finds(order), replaces) as server:
        memory = opened(
            extractor=gemini(server), summarizer="extractive", knowledge={"supersede": "found"}, pruning=SMALL
        )
        chat = moved(memory)
        facts = by_content(chat)
        assert facts[ROME].superseded_by == facts[order].id
        body = server.requests[2]["body"]
        assert len(server.requests) == 3
    assert told(body) == {("known", 1): ROME, ("new", 1): order}
    assert body["generationConfig"]["responseMimeType"] == "application/json"
    assert body["generationConfig"]["responseJsonSchema"] == SCHEMA
    assert body["systemInstruction"]["parts"][0]["text"] == PROMPT
    assert ROME not in PROMPT
    spent = memory.stats()["spent"]
    assert (spent["input_tokens"], spent["output_tokens"]) == (400, 40)


@pytest.mark.parametrize(
    "says",
    [
        failure(400, "no"),
        answer("I replaced everything"),
        answer("[1]"),
        answer('{"new": 1, "replaces": [1]}'),
        answer('[{"new": 1, "replaces": [2]}]'),
        answer('[{"new": 2, "replaces": [1]}]'),
        answer('[{"new": 1, "replaces": [true]}]'),
        answer('[{"new": 1, "replaces": [1]}', reason="MAX_TOKENS"),
        answer(None, reason="SAFETY"),
    ],
    ids=["error", "prose", "numbers", "object", "not given", "no such new one", "a bool", "cut off", "refused"],
)
def test_what_gemini_can_not_have_meant_is_a_failure(opened, says):
    """Nothing is superseded, the fact is there, and it is told."""
    with gemini_server(finds(ROME), finds(OSLO), says) as server:
        memory = opened(
            extractor=gemini(server), summarizer="extractive", knowledge={"supersede": "found"}, pruning=SMALL
        )
        chat = moved(memory)
    assert [by_content(chat)[text].superseded_by for text in (ROME, OSLO)] == [None, None]
    assert memory.stats()["extractor_failures"] == 1
    assert memory.stats()["last_error"].startswith("folding: ExtractionError: ")


def test_extract_raises_what_kept_it_from_asking(opened):
    """The knowledge is written, and the next call has nothing left to do."""
    with gemini_server(Paced(finds(ROME)), finds(OSLO), answer("?")) as server:
        memory = opened(
            extractor=gemini(server), summarizer="extractive", knowledge={"supersede": "found"}, pruning=SMALL
        )
        talk(memory.session("before", user_id="ada"), f"fact: {ROME}")
        chat = memory.session("after", user_id="ada")
        chat.add([f"Turn {n}" if n % 2 else Message("assistant", "I see") for n in range(1, 5)])
        memory._core.parts.full = lambda _: None  # only by hand
        chat.compact(max_tokens=1)
        with pytest.raises(ExtractionError, match="what is replaced"):
            chat.extract()
        assert OSLO in by_content(chat)
        assert chat.extract() == []


def test_any_model_can_be_asked():
    """A function from text to text, fences and all; and none is none."""
    asked = []

    def model(prompt):
        asked.append(prompt)
        return '```json\n[{"new": 1, "replaces": []}]\n```'

    new, known = entries("Ada lives in Oslo"), entries("Ada lives in Rome", "Ada has a boat")
    assert PromptedSummarizer(model).supersede(new, known).pairs == ()
    assert '{"known": 2, "date": "2026-01-01", "fact": "Ada has a boat"}' in asked[0]
    with pytest.raises(ExtractionError, match="was not given"):
        PromptedSummarizer(lambda _: '[{"new": 1, "replaces": [3]}]').supersede(new, known)
    assert PromptedSummarizer(lambda _: '[{"new": 1, "replaces": [2, 1]}]').supersede(new, known).pairs == (
        (0, 1),
        (0, 0),
    )


def entries(*texts):
    from neuralflow_memory import Entry, Scope

    now = ManualClock().now
    return [Entry(t, t, "long_term", t, Scope(), 1, now, now, now) for t in texts]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["new", "replaces", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(JSON)
def test_whatever_is_answered_names_given_facts_or_is_refused(said):
    """No answer leads to a row that is not there."""
    try:
        found = pairs(json.dumps(said), new=2, known=3)
    except ValueError:
        return
    assert isinstance(said, list)
    assert all(0 <= n < 2 and 0 <= k < 3 for n, k in found)
    assert len({k for _, k in found}) == len(found)
