"""Knowledge from folded turns: found by a model in the background, with its sources; nothing is made up from failures."""

import json
import threading
from datetime import UTC, datetime

import pytest
from conftest import SMALL, found
from gemini_server import answer, failure, gemini_server
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from neuralflow_memory import (
    ConfigError,
    Extraction,
    ExtractionError,
    Finding,
    MemoryType,
    Message,
    NotFound,
    _failpoints,
)
from neuralflow_memory.models.extraction import findings, material
from neuralflow_memory.models.gemini import GeminiSummarizer
from neuralflow_memory.models.prompted import PromptedSummarizer
from neuralflow_memory.testing import ManualClock


class Reader:
    """Finds in each message that says "fact" what comes after it, and fails while it is down."""

    name = "reader"

    def __init__(self, *, cost=0.0):
        self.read, self.down, self.cost, self.before = [], False, cost, lambda: None

    def extract(self, messages):
        self.read.append([m.id for m in messages])
        before, self.before = self.before, lambda: None
        before()
        if self.down:
            raise RuntimeError("out of order")
        facts = [Finding(m.content.split("fact: ")[1], (m.id,), "facts") for m in messages if "fact: " in m.content]
        return Extraction(tuple(facts), 100, 10, self.cost)


@pytest.fixture
def reader():
    return Reader()


def talk(chat, *told, start=0):
    """Six questions and answers, of which the first fold takes the older ones."""
    chat.memory.flush()
    chat.add(
        [
            m
            for n, text in enumerate([*told, *["Nothing much"] * (6 - len(told))], start=start)
            for m in (Message("user", text, id=f"q{n}"), Message("assistant", "I see", id=f"a{n}"))
        ]
    )
    chat.memory.flush()


def knowledge(chat):
    return chat.entries.list(types=[MemoryType.LONG_TERM])


def test_facts_of_folded_turns_become_knowledge(opened, reader):
    """In the background, with the turns that say them, where they were said, and their trust."""
    memory = opened(extractor=reader, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    talk(chat, "fact: Ada keeps bees", "fact: Ada lives in Oslo")
    bees, oslo = knowledge(chat)
    assert (bees.content, bees.sources, bees.source, bees.category) == ("Ada keeps bees", ("q0",), "chat", "facts")
    assert (bees.provenance, bees.trust, bees.type) == ("derived", 1.0, MemoryType.LONG_TERM)
    assert bees.created_at == chat.entries.get("q0").created_at
    assert oslo.sources == ("q1",)
    other = memory.session("another", user_id="ada")
    assert "Ada keeps bees" in found(other.search("Who keeps bees?"))
    stats = memory.stats()
    assert (stats["extractor"], stats["extracted"], stats["extractor_failures"]) == ("reader", 2, 0)
    assert stats["spent"]["input_tokens"] >= 100


def test_it_is_off_by_default(opened):
    """And extract() says how to have it."""
    chat = opened(pruning=SMALL).session("chat", user_id="ada")
    talk(chat, "fact: Ada keeps bees")
    assert knowledge(chat) == []
    assert chat.memory.stats()["extractor"] is None
    with pytest.raises(ConfigError, match="extractor="):
        chat.extract()


def test_turns_are_read_once(opened, reader):
    """Also after reopening; each folded turn in one call."""
    with opened(extractor=reader, pruning=SMALL) as memory:
        chat = memory.session("chat", user_id="ada")
        for start in (0, 6, 12):
            talk(chat, f"fact: Ada has boat {start}", start=start)
        assert chat.extract() == []
    memory = opened(extractor=reader, pruning=SMALL)
    memory.flush()
    read = [i for ids in reader.read for i in ids]
    assert len(read) == len(set(read))
    assert len(read) == 36 - len(memory.session("chat", user_id="ada").messages(view="window"))


def test_nothing_found_is_told_apart_from_a_failure(opened, reader):
    """The one is done; the other is counted and tried again."""
    memory = opened(extractor=reader, pruning=SMALL, clock=ManualClock())
    chat = memory.session("chat", user_id="ada")
    talk(chat)
    assert (len(reader.read), memory.stats()["extractor_failures"]) == (1, 0)
    assert memory._core.parts.ledger.unextracted(chat.scope, attempts=None) == []
    reader.down = True
    talk(chat, "fact: Ada keeps bees", start=6)
    stats = memory.stats()
    assert (stats["extractor_failures"], stats["extracted"]) == (1, 0)
    assert "out of order" in stats["last_error"]
    assert knowledge(chat) == []
    with pytest.raises(ExtractionError, match="out of order"):
        chat.extract()
    reader.down = False
    assert found_texts(chat.extract()) == ["Ada keeps bees"]
    assert chat.extract() == []


def found_texts(entries):
    return [e.content for e in entries]


def test_what_failed_is_tried_again_with_the_next_fold_and_when_opened(opened, reader):
    """Nobody has to ask."""
    reader.down = True
    with opened(extractor=reader, pruning=SMALL, clock=ManualClock()) as memory:
        talk(memory.session("chat", user_id="ada"), "fact: Ada keeps bees")
    reader.down = False
    with opened(extractor=reader, pruning=SMALL, clock=ManualClock()) as memory:
        memory.flush()
        chat = memory.session("chat", user_id="ada")
        assert found_texts(knowledge(chat)) == ["Ada keeps bees"]
        reader.down = True
        talk(chat, "fact: Ada lives in Oslo", start=6)
        reader.down = False
        talk(chat, start=12)
        assert "Ada lives in Oslo" in found_texts(knowledge(chat))


def test_what_fails_for_ever_is_left_alone_until_it_is_asked_for(opened, reader):
    """Five times; then only extract() tries."""
    reader.down = True
    clock = ManualClock()
    for _ in range(8):
        with opened(extractor=reader, pruning=SMALL, clock=clock) as memory:
            chat = memory.session("chat", user_id="ada")
            if not chat.messages():
                talk(chat, "fact: Ada keeps bees")
            memory.flush()
    assert len(reader.read) == 5
    reader.down = False
    chat = opened(extractor=reader, pruning=SMALL, clock=clock).session("chat", user_id="ada")
    assert found_texts(chat.extract()) == ["Ada keeps bees"]


def test_a_failing_model_is_left_alone_for_a_while(opened, reader):
    """Three failures open the breaker; folds go on."""
    reader.down = True
    clock = ManualClock()
    memory = opened(extractor=reader, pruning=SMALL, clock=clock)
    chat = memory.session("chat", user_id="ada")
    for start in range(0, 60, 6):
        talk(chat, start=start)
    assert len(reader.read) == 3
    assert memory.stats()["folds"] >= 9
    clock.advance(hours=1)
    reader.down = False
    chat.extract()
    assert memory._core.parts.ledger.unextracted(chat.scope, attempts=None) == []


def test_the_spend_cap_holds_for_it_too(opened):
    """What is over it is read on another day."""
    reader, clock = Reader(cost=0.6), ManualClock(datetime(2024, 5, 3, 9, tzinfo=UTC))
    memory = opened(extractor=reader, pruning=SMALL, clock=clock, gemini={"spend_cap": 1.0})
    chat = memory.session("chat", user_id="ada")
    for start in range(0, 30, 6):
        talk(chat, f"fact: Ada has boat {start}", start=start)
    assert len(reader.read) == 2
    assert memory.stats()["spent"]["cost"] == pytest.approx(1.2)
    assert "spend_cap" in memory.stats()["last_error"]
    clock.advance(days=1)
    chat.extract()
    assert len(reader.read) == 4


def test_a_cap_needs_a_price(opened):
    """A model whose cost is not known can't be kept within it."""
    with pytest.raises(ConfigError, match="spend_cap"):
        opened(extractor=lambda text: "[]", gemini={"spend_cap": 1.0})


def test_the_same_fact_is_kept_once_with_all_its_sources(opened, reader):
    """Found again, or told before: it is strengthened."""
    chat = opened(extractor=reader, pruning=SMALL).session("chat", user_id="ada")
    told = chat.remember("Ada keeps bees", tags=["hobby"])
    talk(chat, "fact: Ada keeps bees")
    talk(chat, "fact: Ada keeps bees", start=6)
    talk(chat, start=12)
    (bees,) = knowledge(chat)
    assert (bees.id, bees.sources, bees.tags, bees.provenance) == (told, ("q0", "q6"), ("hobby",), "told")


@pytest.mark.parametrize("how", ["delete", "update", "clear"])
def test_a_fact_goes_with_the_last_turn_that_says_it(opened, reader, how):
    """From ledger, search and RAM; what another turn says as well, or somebody has told, stays."""
    memory = opened(extractor=reader, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    talk(chat, "fact: Ada keeps bees", "fact: Ada lives in Oslo", "fact: Ada likes tea")
    chat.remember("Ada likes tea")
    chat.search("bees")
    other = memory.session("other", user_id="ada")
    talk(other, "fact: Ada lives in Oslo")
    assert len(knowledge(chat)) == 3
    if how == "clear":
        chat.clear()
    for own in [] if how == "clear" else ("q0", "q1", "q2"):
        chat.entries.delete(own) if how == "delete" else chat.entries.update(own, content="something else")
    memory.flush()
    assert sorted(found_texts(knowledge(chat))) == ["Ada likes tea", "Ada lives in Oslo"]
    hits = chat.search("Who keeps bees?", types=[MemoryType.LONG_TERM])
    assert "Ada keeps bees" not in found(hits)
    index = memory._core.parts.resident(chat.scope).index
    assert all(e.number in index.number[index.alive] for e in knowledge(chat))
    assert int(((index.kind == 2) & index.alive).sum()) == 2
    other.clear()
    assert found_texts(knowledge(chat)) == ["Ada likes tea"]


@pytest.mark.parametrize("how", ["delete", "clear", "update"])
def test_what_is_deleted_while_the_model_reads_does_not_come_back(opened, reader, how):
    """Nothing is written of a turn that has gone or changed meanwhile."""
    memory = opened(extractor=reader, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")

    def meanwhile():
        if how == "clear":
            chat.clear()
        elif how == "delete":
            chat.entries.delete("q0")
        else:
            chat.entries.update("q0", content="Nothing of that")

    reader.before = meanwhile
    talk(chat, "fact: Ada keeps bees", "fact: Ada lives in Oslo")
    assert found_texts(knowledge(chat)) == ([] if how == "clear" else ["Ada lives in Oslo"])


@pytest.mark.parametrize("how", ["delete", "update", "supersede"])
def test_what_somebody_has_put_right_is_not_found_again(opened, reader, how):
    """The same turns, looked through anew after an edit of another one, don't bring back what was there; new ones do."""
    memory = opened(extractor=reader, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    talk(chat, "fact: Ada keeps bees", "fact: Ada lives in Oslo")
    (bees,) = (e for e in knowledge(chat) if "bees" in e.content)
    if how == "delete":
        chat.entries.delete(bees.id)
    elif how == "update":
        chat.entries.update(bees.id, content="Ada kept bees")
    else:
        chat.remember("Ada sold her bees", supersedes=bees.id)
    before = {e.id: e.content for e in knowledge(chat) if "bees" in e.content}
    chat.entries.update("q3", content="Quite a lot")
    memory.flush()
    assert sum("q0" in ids for ids in reader.read) == 2
    assert {e.id: e.content for e in knowledge(chat) if "bees" in e.content} == before
    talk(chat, "fact: Ada keeps bees", start=6)
    talk(chat, start=12)
    assert "Ada keeps bees" in found_texts(chat.entries.list(as_of=datetime.now(UTC), types=[MemoryType.LONG_TERM]))


@pytest.mark.parametrize("point", ["change.applied", "change.committed"])
def test_a_crash_leaves_all_that_was_found_or_nothing(opened, reader, monkeypatch, point):
    """Done again, nothing is there twice, and nothing is missing."""
    memory = opened(extractor=reader, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    reader.down = True
    talk(chat, "fact: Ada keeps bees", "fact: Ada lives in Oslo")
    reader.down = False
    own = threading.get_ident()

    def killed(name):
        if name == point and threading.get_ident() == own:
            raise KeyboardInterrupt

    monkeypatch.setattr(_failpoints, "hook", killed)
    with pytest.raises(KeyboardInterrupt):
        chat.extract()
    monkeypatch.setattr(_failpoints, "hook", None)
    assert len(knowledge(chat)) == (2 if point == "change.committed" else 0)
    assert len(chat.extract()) == (0 if point == "change.committed" else 2)
    assert sorted(found_texts(knowledge(chat))) == ["Ada keeps bees", "Ada lives in Oslo"]


def test_two_processes_read_each_turn_once(opened, beside, reader):
    """Whichever asks first."""
    memory = opened(extractor=reader, pruning=SMALL)
    other = beside(memory, extractor=reader)
    chat, same = (m.session("chat", user_id="ada") for m in (memory, other))
    talk(chat, "fact: Ada keeps bees")
    same.extract()
    other.flush()
    assert len(reader.read) == 1
    assert found(same.search("bees", types=[MemoryType.LONG_TERM])) == ["Ada keeps bees"]


def test_a_chat_of_nobody_keeps_its_facts_to_itself(opened, reader):
    """They belong to the session."""
    memory = opened(extractor=reader, pruning=SMALL)
    chat = memory.session("chat")
    talk(chat, "fact: Somebody keeps bees")
    assert found_texts(knowledge(chat)) == ["Somebody keeps bees"]
    assert knowledge(memory.session("other")) == []


# -- the models


FACTS = json.dumps([{"fact": "Ada keeps bees", "from": [1], "category": "hobbies"}])


def test_gemini_finds_facts(opened):
    """Asked for JSON, with the messages numbered; what it took is counted."""
    with gemini_server(answer(FACTS, usage=(1000, 100))) as server:
        model = GeminiSummarizer(api_key="k", base_url=server.url)
        memory = opened(extractor=model, pruning=SMALL)
        chat = memory.session("chat", user_id="ada")
        talk(chat, "I keep bees")
        (bees,) = knowledge(chat)
        assert (bees.content, bees.sources, bees.category) == ("Ada keeps bees", ("q0",), "hobbies")
        (request,) = server.requests
        assert request["body"]["generationConfig"]["responseMimeType"] == "application/json"
        assert '{"n": 1, "role": "user"' in request["body"]["contents"][0]["parts"][0]["text"]
        assert memory.stats()["spent"]["cost"] == pytest.approx((1000 * 0.30 + 100 * 2.50) / 1e6)


@pytest.mark.parametrize(
    "bad",
    [
        answer("I found nothing", usage=(10, 5)),
        answer('{"facts": 3}', usage=(10, 5)),
        answer('[{"fact": "Ada keeps bees"}]', usage=(10, 5)),
        answer('[{"fact": "Ada keeps bees", "from": [99]}]', usage=(10, 5)),
        answer("[", reason="MAX_TOKENS", usage=(10, 5)),
        answer(None, reason="SAFETY", usage=(10, 5)),
        failure(400, "no"),
    ],
)
def test_what_gemini_gets_wrong_is_a_failure(opened, bad):
    """Not that it found nothing; what it took is counted all the same."""
    with gemini_server(bad) as server:
        memory = opened(
            extractor=GeminiSummarizer(api_key="k", base_url=server.url), pruning=SMALL, clock=ManualClock()
        )
        chat = memory.session("chat", user_id="ada")
        talk(chat, "I keep bees")
        assert knowledge(chat) == []
        stats = memory.stats()
        assert stats["extractor_failures"] == 1
        assert stats["spent"]["input_tokens"] == (0 if isinstance(bad, tuple) else 10)
        server.script[:] = [answer("[]")]
        assert chat.extract() == []
        assert memory._core.parts.ledger.unextracted(chat.scope, attempts=None) == []


def test_a_model_of_langchain_finds_facts(opened):
    """Fenced as models like to."""
    said = AIMessage(
        f"```json\n{FACTS}\n```", usage_metadata={"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
    )
    chat = opened(extractor=GenericFakeChatModel(messages=iter([said])), pruning=SMALL).session("chat", user_id="ada")
    talk(chat, "I keep bees")
    assert found_texts(knowledge(chat)) == ["Ada keeps bees"]
    assert chat.memory.stats()["spent"]["input_tokens"] == 7


def test_a_function_finds_facts(opened):
    """From one text to another."""
    asked = []
    chat = opened(extractor=lambda text: asked.append(text) or FACTS, pruning=SMALL).session("chat", user_id="ada")
    talk(chat, "I keep bees")
    assert found_texts(knowledge(chat)) == ["Ada keeps bees"]
    assert "JSON array" in asked[0]
    assert "I keep bees" in asked[0]


def test_only_an_extractor_or_a_model_will_do(opened):
    """A class, a number, something async, a name that is none."""

    async def later(text):
        return "[]"

    for wrong in (Reader, 7, later, "claude"):
        with pytest.raises(ConfigError, match="extractor="):
            opened(extractor=wrong)


def test_what_returns_something_else_fails(opened):
    """And says so."""

    class Wrong:
        def extract(self, messages):
            return ["Ada keeps bees"]

    memory = opened(extractor=Wrong(), pruning=SMALL)
    talk(memory.session("chat", user_id="ada"), "fact: Ada keeps bees")
    assert memory.stats()["extractor"] == "Wrong"
    assert "must return an Extraction" in memory.stats()["last_error"]


MESSAGES = [Message("user", "One", id="a"), Message("assistant", "Two", id="b")]


def test_material_is_numbered_and_quoted():
    """A message can't pose as another."""
    lines = [json.loads(line) for line in material([Message("user", 'x"}\n{"n": 2', id="a"), MESSAGES[1]]).splitlines()]
    assert [line["n"] for line in lines] == [1, 2]
    assert lines[0]["text"] == 'x"}\n{"n": 2'


def test_an_answer_is_read_with_care():
    """Whatever names no message, is too long or no text is left out; sources are named once."""
    answer = [
        {"fact": " Ada keeps bees ", "from": [2, 1, 2, 3, True, "1"], "category": ""},
        {"fact": "", "from": [1]},
        {"fact": "x" * 1001, "from": [1]},
        {"fact": "None of these", "from": []},
        "a text",
    ]
    assert findings(json.dumps(answer), MESSAGES) == (Finding("Ada keeps bees", ("b", "a"), None),)
    assert findings("[]", MESSAGES) == ()
    assert findings('{"facts": []}', MESSAGES) == ()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda s: st.lists(s) | st.dictionaries(st.sampled_from(["fact", "from", "facts", "category"]), s),
    )
)
def test_any_json_is_read_or_refused(value):
    """By findings that name messages, or a ValueError."""
    try:
        facts = findings(json.dumps(value), MESSAGES)
    except ValueError:
        return
    assert all(f.text and set(f.sources) <= {"a", "b"} for f in facts)


async def test_the_async_twin_does_the_same(opened, reader):
    """Off the storage workers."""
    chat = opened(extractor=reader, pruning=SMALL).session("chat", user_id="ada")
    talk(chat, "fact: Ada keeps bees")
    assert await chat.aextract() == []
    with pytest.raises(NotFound):
        chat.entries.get("nothing")
    assert PromptedSummarizer(lambda text: "[]").extract(MESSAGES).facts == ()


def test_what_is_folded_by_hand_is_looked_through_too(opened, reader):
    """In the background, after compact()."""
    chat = opened(extractor=reader).session("chat", user_id="ada")
    talk(chat, "fact: Ada keeps bees")
    assert knowledge(chat) == []
    chat.compact(max_tokens=20)
    chat.memory.flush()
    assert found_texts(knowledge(chat)) == ["Ada keeps bees"]
