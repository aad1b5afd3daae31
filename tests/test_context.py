"""The budget holds, whatever was said and whatever is asked for."""

import itertools

import pytest
from conftest import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralflow_memory import BudgetError, MemoryType, Message, ToolCall, open_memory
from neuralflow_memory.testing import HashingEmbedder, ManualClock

TEXTS = st.one_of(
    st.sampled_from(
        [
            "Hello",
            "I moved to Berlin in 1989 and have been sailing ever since.",
            "<|endoftext|> <|im_start|>",
            "記憶は時間とともに薄れていく。東京で会いましょう。",
            "👩‍👩‍👧‍👦🙂🔥" * 5,
            "word " * 60,
            "a\n\nb\n- c\n" * 8,
            '{"json": [1, 2, {"x": null}]}',
            "x" * 400,
        ]
    ),
    st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=60).filter(lambda t: t.strip()),
)
CALL_IDS = st.sampled_from(["c1", "c2", "c3"])
CALLS = st.builds(
    ToolCall, CALL_IDS, st.sampled_from(["look_up", "buy"]), st.dictionaries(st.sampled_from("ab"), TEXTS, max_size=2)
)
MEDIA = st.tuples(TEXTS, st.sampled_from(["image", "audio", "custom"])).map(
    lambda t: [{"type": "text", "text": t[0]}, {"type": t[1], "url": "https://example.org/x"}]
)
MESSAGES = st.one_of(
    st.builds(Message, st.just("user"), TEXTS, name=st.none() | st.just("Ada")),
    st.builds(Message, st.just("user"), MEDIA),
    st.builds(Message, st.sampled_from(["assistant", "system", "developer"]), TEXTS),
    st.builds(Message, st.just("assistant"), st.just("") | TEXTS, tool_calls=st.lists(CALLS, min_size=1, max_size=3)),
    st.builds(
        Message, st.just("tool"), st.just("") | TEXTS, tool_call_id=CALL_IDS, name=st.none() | st.just("look_up")
    ),
)
BUDGETS = st.one_of(st.integers(0, 60), st.integers(60, 700), st.just(8000))
OPTIONS = st.fixed_dictionaries(
    {
        "max_tokens": BUDGETS,
        "reserve_tokens": st.sampled_from([0, 0, 0, 5, 50, 1000]),
        "overflow": st.sampled_from(["raise", "truncate"]),
        "search": st.booleans(),
        "query": st.sampled_from([None, None, "Berlin sailing word", "x"]),
    }
)
names = itertools.count()


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    # One memory for all examples, each with a chat of its own; folds come early, so that summaries are in play.
    with open_memory(
        tmp_path_factory.mktemp("context") / "memory",
        embedder="none",
        clock=ManualClock(),
        pruning={"max_context_items": 2, "summarization_threshold": 5, "max_context_tokens": 400},
        budget={"total": 2000, "conversation": 1200, "summary": 200},
    ) as opened:
        yield opened


def atoms(messages):
    """Check that each call has all of its results after it, and each result its call before it, once."""
    waiting = {}
    for message in messages:
        if message.role == "tool":
            assert waiting.pop(message.tool_call_id, None), "a result without its call, or a second one"
        for call in message.tool_calls:
            assert call.id not in waiting, "a call that was never answered, used again"
            waiting[call.id] = True
    assert not waiting, "a call without all of its results"


def check(memory, chat, said, options):
    budget = options["max_tokens"] - options["reserve_tokens"]
    options = dict(options)
    query = options.pop("query")
    newest = next((m for m in reversed(said) if m.role == "user"), None)
    needed = memory.count_tokens([newest] if newest else [])
    try:
        context = chat.context(query, **options)
    except BudgetError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.available == budget < needed
        assert options["overflow"] == "raise" or budget < 40
        return
    assert context.budget == budget
    assert memory.count_tokens(context.messages) == context.tokens <= context.budget
    atoms(context.messages)
    verbatim = [m for m in context.messages if m.id is not None]
    place = {m.id: n for n, m in enumerate(chat.messages())}
    spoken = [place[m.id] for m in verbatim if m.role != "tool"]
    assert spoken == sorted(spoken), "out of order"
    for before, message in itertools.pairwise(verbatim):
        if message.role == "tool":  # right behind its call, or another result of it: late ones move up
            assert before.role == "tool" or message.tool_call_id in {c.id for c in before.tool_calls}
    users = [m for m in said if m.role == "user"]
    if users:
        sent = [m for m in verbatim if m.role == "user"]
        assert sent, "the newest user turn is missing"
        assert sent[-1].id == [m for m in chat.messages() if m.role == "user"][-1].id
        if options["overflow"] == "raise":
            assert sent[-1].content == [m for m in chat.messages() if m.role == "user"][-1].content
    included = [c.id for c in context.report if c.included and c.part in ("turn", "system")]
    assert sorted(included) == sorted(m.id for m in verbatim)
    assert all(c.reason for c in context.report)


@settings(max_examples=250, deadline=None)
@given(st.lists(MESSAGES, max_size=14), st.lists(OPTIONS, min_size=1, max_size=4))
def test_the_budget_holds_for_any_conversation(memory, said, all_options):
    """Never over, by the counter, everything counted; newest user turn there; no half tool call; in order."""
    chat = memory.session(f"chat-{next(names)}")
    chat.add(said)
    for options in all_options:
        check(memory, chat, said, options)


@settings(max_examples=60, deadline=None)
@given(st.lists(MESSAGES, min_size=6, max_size=20), st.lists(OPTIONS, min_size=1, max_size=3))
def test_the_budget_holds_with_a_summary(memory, said, all_options):
    """The same after a fold, with a user whose other chats and knowledge are quoted."""
    own = next(names)
    other, chat = (memory.session(f"{n}-{own}", user_id=f"user-{own}") for n in ("other", "chat"))
    other.add(["Berlin " + "word " * 50, "sailing x"])
    other.remember("Ada has been sailing since 1989")
    for message in said:
        chat.add(message)
    chat.compact()
    for options in all_options:
        check(memory, chat, said, options)


def test_an_empty_chat_has_an_empty_context(memory):
    """Nothing said, nothing sent, whatever the budget; too small a one says so."""
    chat = memory.session(f"chat-{next(names)}")
    context = chat.context()
    assert context.messages == ()
    assert context.tokens == memory.count_tokens([])


def test_a_tool_call_stands_or_falls_with_all_of_its_results(memory):
    """One token short of the whole, none of it is sent."""
    chat = memory.session(f"chat-{next(names)}")
    chat.add(
        [
            Message("user", "What is the weather in Berlin and Rome?"),
            Message(
                "assistant", "", tool_calls=[ToolCall("c1", "weather", {"city": "Berlin"}), ToolCall("c2", "weather")]
            ),
            Message("tool", "Rain. " * 10, tool_call_id="c2"),
            Message("tool", "Sun. " * 10, tool_call_id="c1"),
            Message("user", "Thanks"),
        ]
    )
    whole = chat.context(search=False)
    assert len(whole.messages) == 5
    less = chat.context(max_tokens=whole.tokens - 1, search=False)
    assert [m.role for m in less.messages] == ["user"]
    assert less.messages[0].content == "Thanks"


def test_truncation_cuts_content_and_never_a_pairing(memory):
    """A current tool result that is too long is cut; its call, its id and the user's turn stay."""
    chat = memory.session(f"chat-{next(names)}")
    chat.add(
        [
            Message("user", "Read the report"),
            Message("assistant", "", tool_calls=[ToolCall("c1", "read", {"file": "report"})]),
            Message("tool", "line of the report\n" * 2000, tool_call_id="c1"),
        ]
    )
    context = chat.context(max_tokens=300, search=False, overflow="truncate")
    assert [m.role for m in context.messages] == ["user", "assistant", "tool"]
    assert context.tokens <= 300
    assert context.tokens > 250
    assert context.messages[2].tool_call_id == "c1"
    assert context.messages[2].content.startswith("line of the report")
    assert len(chat.messages()[2].content) > 30_000


def test_instructions_come_first_and_the_memory_block_after_them(memory):
    """The host's system message, then the memory block; what the memory quotes stands before the newest turn."""
    own = next(names)
    memory.session(f"other-{own}", user_id=f"user-{own}").add("My dog is called Zuse")
    chat = memory.session(f"chat-{own}", user_id=f"user-{own}")
    chat.add([Message("system", "Be kind"), "What is my dog called?"])
    context = chat.context()
    assert [m.role for m in context.messages] == ["system", "user", "user"]
    assert context.messages[0].content == "Be kind"
    assert "Zuse" in context.messages[1].content
    assert context.messages[1].metadata == {"neuralflow": "context"}
    assert "Zuse" not in str(chat.context(search=False).messages)


def test_what_context_made_up_is_not_written_down(memory):
    """Adding a whole context back adds the turns only."""
    own = next(names)
    chat = memory.session(f"chat-{own}", user_id=f"user-{own}")
    chat.remember("The dog is called Zuse")
    chat.add("What is my dog called?")
    context = chat.context()
    assert len(context.messages) == 2
    chat.add(context.messages)
    assert len(chat.messages()) == 1


def test_the_report_accounts_for_everything(memory):
    """Every turn of the window and every hit is in it once, in or out, with its cost."""
    own = next(names)
    chat = memory.session(f"chat-{own}", user_id=f"user-{own}")
    chat.add([f"Sailing {n} " + "word " * 30 for n in range(4)])
    context = chat.context("sailing", max_tokens=120)
    turns = [c for c in context.report if c.part == "turn"]
    assert [c.id for c in turns] == [m.id for m in chat.messages(view="window")]
    assert any(not c.included for c in turns)
    assert all(c.tokens > 0 for c in context.report)
    hits = [c.id for c in context.report if c.part == "hit"]
    assert len(set(hits)) == len(hits)


@pytest.mark.parametrize("place", ["chat", "new"])
@pytest.mark.parametrize("embedder", [HashingEmbedder(), "none"], ids=["vectors", "words"])
def test_a_question_that_was_added_already_scores_like_one_that_was_not(opened, embedder, place):
    """The question is no match of its own: hits and their scores are those of a search made before it was stored."""
    memory = opened(embedder=embedder, clock=ManualClock())
    for n in range(12):
        topics = ("sailing in Lisbon with Zuse", "the tomato recipe", "a train to Berlin on Tuesday")
        name = "chat" if n % 2 else "other"
        memory.session(name, user_id="ada").add(f"Turn {n} is about {topics[n % 3]}, or so I said")
    memory.session("chat", user_id="ada").remember("Ada keeps a boat for sailing in Lisbon")
    chat = memory.session(place, user_id="ada")
    question = "When did I last go sailing in Lisbon?"
    memory.flush()
    types = [MemoryType.SHORT_TERM, MemoryType.LONG_TERM]
    before = [(h.entry.id, h.score, dict(h.signals)) for h in chat.search(question, k=50, types=types)]
    (own,) = chat.add(question)
    memory.flush()
    hits = [c for c in chat.context(max_tokens=4000).report if c.part == "hit"]
    assert own not in [c.id for c in hits]
    assert [c.id for c in hits] == [own_id for own_id, _, _ in before][: len(hits)]
    assert len(hits) >= 8
    for hit, (_, score, signals) in zip(hits, before, strict=False):
        assert hit.score == pytest.approx(score, rel=1e-5)
        assert hit.signals == pytest.approx(signals, abs=1e-3)


def test_a_summary_of_one_paragraph_is_shortened_and_not_dropped(opened):
    """However small the budget, as long as it holds a sentence, some of the summary is sent."""

    class Paragraph:
        name = "paragraph"

        def summarize(self, messages, *, previous, max_tokens):
            said = (f"Ada told on day {n} that she lives in Rome, house {n * 7}, and likes cats." for n in range(14))
            return " ".join(said)

    memory = opened(
        embedder="none", summarizer=Paragraph(), pruning={"max_context_items": 2, "summarization_threshold": 4}
    )
    chat = memory.session("chat")
    chat.add([f"Turn {n}" for n in range(5)])
    memory.flush()
    assert "\n" not in chat.summary().partition("\nWord for word:")[0]
    sent = []
    for max_tokens in (8000, 4000, 2000, 1000, 600):
        context = chat.context(max_tokens=max_tokens, search=False)
        (summary,) = [c for c in context.report if c.part == "summary"]
        assert summary.included
        assert 0 < summary.tokens <= min(memory.settings.budget.summary, max_tokens)
        assert "lives in Rome" in context.messages[0].content
        assert texts(context.messages[1:]) == texts(chat.messages(view="window"))
        assert context.tokens == memory.count_tokens(context.messages) <= max_tokens
        sent.append(summary.tokens)
    assert sent == sorted(sent, reverse=True)
    assert sent[0] > 4 * sent[-1]


def test_a_brief_answer_is_quoted_with_what_it_answers(opened):
    """Alone it would say nothing; where the question is quoted too, it stands once."""
    memory = opened(embedder="none", clock=ManualClock())
    old = memory.session("old", user_id="ada")
    old.add([Message("assistant", "Which colour shall it have, then?"), Message("user", "Pale blue wall.")])
    old.add([f"And then there is point {n}, of which we spoke before." for n in range(6)])
    chat = memory.session("new", user_id="ada")
    chat.add("What wall was pale?")
    (block,) = [m.text for m in chat.context(max_tokens=2000).messages if m.metadata]
    day = memory._core.parts.clock.now.strftime("%Y-%m-%d")
    assert f"- [{day}] assistant: Which colour shall it have, then? / user: Pale blue wall." in block
    chat.add(Message("assistant", "Pale blue."))
    chat.add("Which colour shall the wall have, then?")
    (block,) = [m.text for m in chat.context(max_tokens=2000).messages if m.metadata]
    assert block.count("Which colour shall it have, then?") == 1
    assert f"- [{day}] user: Pale blue wall." in block


def test_what_is_said_again_is_quoted_once(opened):
    """Also where a word more is said; another number, or a denial, says something else."""
    memory = opened(embedder="none")
    for n, text in enumerate(
        [
            "My seat in the theatre is number 12, in the third row on the left side.",
            "My seat in the theatre is number 12, in the third row on the left side, please.",
            "My seat in the theatre is number 21, in the third row on the left side.",
            "My seat in the theatre is not number 12, in the third row on the left side.",
        ]
    ):
        memory.session(f"old-{n}", user_id="ada").add(text)
    chat = memory.session("new", user_id="ada")
    chat.add("Which seat in the theatre is mine?")
    made = chat.context(max_tokens=2000)
    (block,) = [m.text for m in made.messages if m.metadata]
    assert block.count("number 12, in the third") == 2
    assert "is not number 12" in block
    assert "number 21" in block
    assert [c.reason for c in made.report if c.part == "hit" and not c.included] == ["another quote says the same"]
