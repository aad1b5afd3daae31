"""How a prompt is laid out: what changes least comes first, hits stand in one place, what is long is cut to size."""

import itertools
import random

import pytest
from conftest import texts, wait_until

from neuralflow_memory import BudgetError, InputError, Message, ToolCall
from neuralflow_memory.testing import ManualClock

TEXT = """
    sail boat Lisbon Porto invoice tomato garden Berlin train Tuesday dentist projector paid euros flat hotel museum
    ticket flight aisle seat breakfast cousin Maria Otto harbour storm engine repair rope anchor captain letter library
"""
WORDS = TEXT.split()
MARK = {"neuralflow": "context"}


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def talk(rng, *, items):
    """A plain chat: what is added before each prompt."""
    for n in range(items):
        yield [Message("user", f"Question {n}: {sentence(rng, rng.randint(6, 25))}")]
        yield [Message("assistant", sentence(rng, rng.randint(10, 60)))]


def agent(rng, *, items):
    """An agent at work: each tool call and its result makes a prompt."""
    for n in range(items):
        yield [Message("user", f"Task {n}: {sentence(rng, 12)}")]
        for step in range(rng.randint(1, 4)):
            call = ToolCall(f"call-{n}-{step}", "look_up", {"words": sentence(rng, 4)})
            result = Message("tool", sentence(rng, rng.choice([20, 60, 300])), tool_call_id=call.id)
            yield [Message("assistant", "", tool_calls=[call]), result]
        yield [Message("assistant", sentence(rng, 20))]


def same(one, other):
    """Whether two messages are the same bytes to a provider."""
    parts = ("role", "content", "name", "tool_calls", "tool_call_id")
    return all(getattr(one, p) == getattr(other, p) for p in parts)


def shared(one, other):
    """The messages with which both prompts begin."""
    pairs = zip(one.messages, other.messages, strict=False)
    return [a for a, _ in itertools.takewhile(lambda pair: same(*pair), pairs)]


def tokens(memory, messages):
    return memory.count_tokens(messages) - memory.count_tokens([])


def sent(context):
    """What of each turn the prompt holds."""
    return {m.id: m.content for m in context.messages if m.id is not None}


def blocks(context):
    """Places of what the memory added."""
    return [n for n, m in enumerate(context.messages) if m.metadata == MARK]


def prompts(opened, kind, *, placement, max_tokens, items=24):
    """The prompts of a long chat, each with how many folds came before it, and the memory."""
    rng = random.Random(7)
    memory = opened(embedder="none", clock=ManualClock(), context={"hits_placement": placement})
    memory.session("other", user_id="ada").add([sentence(rng, 20) for _ in range(30)])
    chat = memory.session("chat", user_id="ada")
    chat.add(Message("system", "You plan journeys."))
    found = []
    for batch in kind(rng, items=items):
        chat.add(batch)
        memory.flush()
        found.append((memory.stats()["folds"], chat.context(max_tokens=max_tokens)))
    return memory, found


def neighbours(found):
    """Pairs of prompts without a fold in between."""
    return [(a, b) for (before, a), (after, b) in itertools.pairwise(found) if before == after]


@pytest.mark.parametrize("kind", [talk, agent])
def test_between_folds_each_prompt_begins_with_the_one_before(opened, kind):
    """Byte for byte, for as many tokens as `cacheable` said, which is all that stands before the hits."""
    memory, found = prompts(opened, kind, placement="end", max_tokens=None)
    pairs = neighbours(found)
    assert memory.stats()["folds"] >= 1
    assert len(pairs) > 30
    quoted = 0
    for before, after in pairs:
        assert tokens(memory, shared(before, after)) >= before.cacheable
        stable = list(itertools.takewhile(lambda m: not (m.role == "user" and m.metadata == MARK), before.messages))
        assert tokens(memory, stable) == before.cacheable
        quoted += len(stable) < len(before.messages)
    assert quoted > 30
    whole = sum(a.tokens for a, _ in pairs)
    assert sum(a.cacheable for a, _ in pairs) > whole * 0.4


@pytest.mark.parametrize("kind", [talk, agent])
@pytest.mark.parametrize("max_tokens", [600, 1500])
def test_in_a_small_budget_the_front_changes_only_where_old_turns_yield(opened, kind, max_tokens):
    """What was promised is kept, unless there is no room any more for what the prompt before began with."""
    memory, found = prompts(opened, kind, placement="end", max_tokens=max_tokens)
    pairs = neighbours(found)
    yielded = 0
    for before, after in pairs:
        assert after.tokens <= max_tokens
        if tokens(memory, shared(before, after)) >= before.cacheable:
            continue
        yielded += 1
        told = {c.id: c.reason for c in after.report if c.part != "hit"}
        changed = {own for own, content in sent(before).items() if sent(after).get(own) != content}
        if blocks(before)[:1] and before.messages[1].content != after.messages[1].content:
            changed |= {c.id for c in after.report if c.part == "summary"}
        assert {told[own] for own in changed} & {
            "older than what fits",
            "recent, cut to size",
            "cut to its share of the budget",
        }
    assert yielded < len(pairs) * (0.55 if max_tokens == 600 else 0.4)


@pytest.mark.parametrize("kind", [talk, agent])
def test_with_hits_at_the_start_no_more_is_promised_than_holds(opened, kind):
    """Hits in the system block change it with each question; only what stands before it is promised."""
    memory, found = prompts(opened, kind, placement="start", max_tokens=None, items=12)
    for before, after in neighbours(found):
        assert tokens(memory, shared(before, after)) >= before.cacheable
        if any(c.part == "hit" and c.included for c in before.report):
            assert before.cacheable == tokens(memory, before.messages[:1])


@pytest.fixture
def quoting(opened):
    """A session whose user said things elsewhere, and a function that makes one like it with other options."""

    def make(name="chat", **options):
        memory = opened(embedder="none", clock=ManualClock(), **options)
        memory.session("elsewhere", user_id="ada").add(
            ["My dog is called Zuse", "The dog of my cousin is called Turing", "I paid 99 euros for the anchor"]
        )
        chat = memory.session(name, user_id="ada")
        chat.add([Message("system", "Be kind"), "Hello", Message("assistant", "Hello Ada")])
        return chat

    return make


def test_hits_stand_in_one_block_before_the_newest_user_turn(quoting):
    """All of them, quoted as the user's role, right before the question."""
    chat = quoting()
    chat.add("What is my dog called, and what did I pay for the anchor?")
    context = chat.context()
    assert [m.role for m in context.messages] == ["system", "user", "assistant", "user", "user"]
    assert blocks(context) == [3]
    assert "Zuse" in context.messages[3].content
    assert "99 euros" in context.messages[3].content
    assert context.cacheable == tokens(chat.memory, context.messages[:3])


def test_hits_stay_before_the_question_while_an_agent_works(quoting):
    """A tool call and its result come after the question, and so after the hits."""
    chat = quoting()
    call = ToolCall("c1", "ask", {"about": "dog"})
    chat.add(["What is my dog called?", Message("assistant", "", tool_calls=[call])])
    chat.add(Message("tool", "A dog has a name", tool_call_id="c1"))
    context = chat.context()
    assert [m.role for m in context.messages] == ["system", "user", "assistant", "user", "user", "assistant", "tool"]
    assert blocks(context) == [3]


def test_hits_come_last_when_the_question_has_its_answer(quoting):
    """What is asked next comes from outside: nothing of the prompt so far moves."""
    chat = quoting()
    chat.add(["What is my dog called?", Message("assistant", "I don't know")])
    context = chat.context("dog called")
    assert [m.role for m in context.messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert blocks(context) == [5]
    assert "Zuse" in context.messages[5].content
    assert context.cacheable == tokens(chat.memory, context.messages[:5])


def test_hits_stand_with_the_summary_where_they_were_asked_to(quoting):
    """`hits_placement="start"`: one system block after the host's instructions has it all."""
    chat = quoting(context={"hits_placement": "start"}, pruning={"max_context_items": 1, "summarization_threshold": 2})
    with chat.task("walk the dog") as task:
        task.note("the leash is red", temporary=True)
        chat.add("What is my dog called?")
        chat.memory.flush()
        context = chat.context()
    assert [m.role for m in context.messages] == ["system", "system", "user"]
    block = context.messages[1].content
    places = [block.index(s) for s in ("walk the dog", "Summary", "Hello", "the leash is red", "Zuse")]
    assert places == sorted(places)
    assert context.cacheable == tokens(chat.memory, context.messages[:1])


def test_tasks_and_summary_stand_at_the_front_notes_and_hits_at_the_end(quoting):
    """The front block is the same with every question; what is for now stands before the question."""
    chat = quoting(pruning={"max_context_items": 1, "summarization_threshold": 2})
    fronts = set()
    with chat.task("walk the dog") as task:
        task.note("it is afraid of trams")
        chat.add("What is my dog called?")
        chat.memory.flush()
        for n in range(3):
            task.note(f"the leash is red {n}", temporary=True)
            context = chat.context(["What is my dog called?", "the anchor", "Turing"][n])
            assert blocks(context) == [1, 2]
            assert (context.messages[1].role, context.messages[2].role) == ("system", "user")
            fronts.add(context.messages[1].content)
            assert f"the leash is red {n}" in context.messages[2].content
            assert "Turing" in context.messages[2].content or n == 1
    (front,) = fronts
    assert "it is afraid of trams" in front
    assert "Hello Ada" in front
    assert "leash" not in front


def test_what_is_far_from_the_question_is_left_out_and_said_to_be(opened):
    """A hit that shares little with the question is out, with its share of the best one's relevance."""
    memory = opened(embedder="none", clock=ManualClock())
    for n, text in enumerate(
        ["The blue boat in the harbour of Lisbon belongs to Maria", "Maria likes tea", "Tomatoes"]
    ):
        memory.session(f"elsewhere-{n}", user_id="ada").add(text)
    context = memory.session("chat", user_id="ada").context("Whose blue boat is in the harbour of Lisbon, Maria's?")
    told = {c.reason.split(":")[0]: c for c in context.report if c.part == "hit"}
    assert set(told) == {"found by search", "too far from the question"}
    assert told["found by search"].included
    assert not told["too far from the question"].included
    assert told["too far from the question"].score < told["found by search"].score
    assert "tea" not in context.messages[0].content
    assert "Tomatoes" not in context.messages[0].content


def test_a_long_hit_is_cut_to_what_says_most_about_the_question(opened):
    """Its best sentence is quoted, gaps are marked, and the rest stays in the memory."""
    memory = opened(embedder="none", clock=ManualClock())
    elsewhere = memory.session("elsewhere", user_id="ada")
    filler = [f"On day {n} we sailed on and saw nothing but water and birds." for n in range(60)]
    filler[40] = "The captain of the blue boat is called Zuse."
    elsewhere.add(" ".join(filler))
    context = memory.session("chat", user_id="ada").context("What is the captain of the blue boat called?")
    (hit,) = [c for c in context.report if c.part == "hit"]
    assert hit.included
    assert hit.reason == "found by search, cut to what says most about the question"
    assert hit.tokens <= 200 < elsewhere.entries.get(elsewhere.messages()[0].id).tokens
    assert "The captain of the blue boat is called Zuse." in context.messages[0].content
    assert "…" in context.messages[0].content


def test_long_older_tool_results_are_cut_to_size(opened):
    """Where not everything fits, an old result of a tool is cut, call and ids whole; nothing stored is."""
    memory = opened(embedder="none", clock=ManualClock())
    chat = memory.session("chat")
    chat.add(["Read the report", Message("assistant", "", tool_calls=[ToolCall("c1", "read", {"file": "report"})])])
    report = "line of the report\n" * 500 + "Traceback: no page 501"
    chat.add(Message("tool", report, tool_call_id="c1"))
    chat.add([Message("assistant", "It has lines"), "And now?"])
    whole = chat.context()
    assert texts(whole.messages) == texts(chat.messages())
    context = chat.context(max_tokens=1200, search=False)
    assert [m.role for m in context.messages] == ["user", "assistant", "tool", "assistant", "user"]
    cut = context.messages[2]
    assert cut.tool_call_id == "c1"
    assert cut.content.startswith("line of the report\nline of the report")
    assert " […] " in cut.content
    assert cut.content.endswith("line of the report\nTraceback: no page 501")
    assert 100 < tokens(memory, [cut]) <= 4000 * 1200 // 8000 // 4 + 1
    assert [c.reason for c in context.report][1:3] == ["recent", "recent, cut to size"]
    assert context.report[2].tokens == tokens(memory, [cut])
    assert chat.messages()[2].content == report


# --- margins --------------------------------------------------------------------------------------------------------


def billed(chat, model, ratio, *, times=1):
    """Report that *model* counts *ratio* times our tokens, for prompts just built."""
    for _ in range(times):
        context = chat.context(search=False)
        margin = chat.report_usage(model, round(context.tokens * ratio))
    return margin


@pytest.fixture
def chat(opened):
    chat = opened(embedder="none").session("chat", user_id="ada")
    chat.add([f"Turn {n} is about " + "sailing " * 50 for n in range(8)])
    return chat


def test_a_margin_is_learned_and_the_budget_divided_by_it(chat):
    """A model that counts 1.3 times our tokens gets so many fewer of ours, and its own count fits the budget."""
    assert chat.context().margin == 1.0
    first = billed(chat, "tall-1", 1.3)
    learned = billed(chat, "tall-1", 1.3, times=20)
    assert 1.3 <= learned < first
    assert learned < 1.36
    context = chat.context(max_tokens=500, reserve_tokens=40, search=False)
    assert context.margin == learned
    assert context.budget == int(500 / learned) - 40
    assert (context.tokens + 40) * 1.3 <= 500
    assert context.tokens > 200
    assert f"safety margin {learned:.2f}" in str(context)


def test_what_varies_gets_a_wider_margin_than_what_does_not(chat):
    """The margin is the upper end of what is to be expected, not the mean."""
    steady = billed(chat, "steady", 1.2, times=12)
    for ratio in (1.0, 1.4) * 6:
        varying = billed(chat, "varying", ratio)
    assert 1.2 <= steady < 1.3
    assert varying > 1.4


def test_a_margin_is_never_below_one(chat):
    """A model that counts fewer tokens than we do is no reason to go over the budget."""
    assert billed(chat, "short-1", 0.5, times=30) == 1.0
    assert chat.context(max_tokens=300, search=False).budget == 300


def test_a_report_that_is_far_off_counts_for_little(chat):
    """Ten thousand times our tokens is about another prompt: taken as four times at most."""
    context = chat.context(search=False)
    assert chat.report_usage("odd-1", context.tokens * 10_000) == chat.report_usage("odd-2", context.tokens * 4)


def test_margins_are_kept_by_model_over_sessions_and_reopening(opened, folder, chat):
    """What is known of a model serves every session that uses it, and no session of another."""
    learned = billed(chat, "tall-1", 1.5, times=5)
    memory = chat.memory
    other = memory.session("other", user_id="bob")
    other.add("Hello")
    assert other.context().margin == 1.0
    assert billed(other, "plain-1", 1.0, times=5) < 1.15
    memory.close()
    memory = opened(folder, embedder="none")
    chat, other = memory.session("chat", user_id="ada"), memory.session("other", user_id="bob")
    assert chat.context().margin == pytest.approx(learned)
    assert other.context().margin < 1.15
    assert other.report_usage("tall-1", 5) > 1.15, "known from the other session"
    assert chat.report_usage("plain-1", 10**6) == pytest.approx(other.report_usage("plain-1", 1), rel=1), "one model"


def test_what_the_caller_reserved_is_part_of_the_prompt_that_is_reported(chat):
    """Tool schemas and pending input are billed too: reserved, they are no reason for a margin."""
    for _ in range(20):
        context = chat.context(reserve_tokens=500, search=False)
        margin = chat.report_usage("fair-1", context.tokens + 500)
    assert margin < 1.06


def test_nothing_is_learned_without_a_prompt_nor_from_nonsense(opened, folder, chat):
    """Reopened, no prompt was built yet; names and numbers that are none are refused."""
    chat.context()
    for model, billing in (("", 5), (None, 5), ("m", 0), ("m", -1), ("m", True), ("m", 1.5), ("m", "5")):
        with pytest.raises(InputError):
            chat.report_usage(model, billing)
    chat.memory.close()
    chat = opened(folder, embedder="none").session("chat", user_id="ada")
    assert chat.report_usage("tall-1", 10**6) == 1.0
    assert chat.context().margin == 1.0


async def test_usage_can_be_reported_from_a_loop(chat):
    """The async twin learns the same."""
    context = await chat.acontext(search=False)
    assert await chat.areport_usage("tall-1", context.tokens * 2) > 2
    wait_until(lambda: chat.context().margin > 2)


def test_nothing_stands_between_a_pending_call_and_its_results(opened):
    """Also where no user turn comes before the call."""
    chat = opened(embedder="none").session("chat")
    chat.add(Message("assistant", "", tool_calls=[ToolCall("c1", "look_up", {})]))
    task = chat.task("trip")
    task.start()
    task.note("Ines likes trains", temporary=True)
    context = chat.context(search=False, pending_calls=True)
    assert [m.role for m in context.messages] == ["system", "user", "assistant"]
    assert "Ines" in context.messages[1].text


def test_margins_are_each_tenants_own_and_told(chat):
    """What one tenant reports, however wrong, moves nobody else's budget; stats() has them all."""
    other = chat.memory.session("chat", user_id="ada", tenant="acme")
    other.add("Hello")
    wild = billed(other, "tall-1", 50, times=30)
    assert wild == 4.0
    assert billed(chat, "tall-1", 1.0, times=5) < 1.15
    assert chat.memory.stats()["margins"] == {
        "acme": {"tall-1": 4.0},
        "default": {"tall-1": pytest.approx(chat.context().margin)},
    }


@pytest.mark.parametrize("change", ["pin", "update", "delete", "replace"])
def test_usage_is_learned_from_though_the_window_changed_meanwhile(chat, change):
    """The prompt was sent before; what it was charged counts."""
    tokens = chat.context(search=False).tokens
    own = chat.messages()[2].id
    {
        "pin": lambda: chat.pin(own),
        "update": lambda: chat.entries.update(own, content="Shorter"),
        "delete": lambda: chat.entries.delete(own),
        "replace": lambda: chat.replace("All anew"),
    }[change]()
    assert chat.report_usage("tall-1", tokens * 2) > 2


def test_sizes_beyond_all_bounds_are_sizes(chat):
    """A budget or a bill of any number of digits is taken, or refused as what it is."""
    assert chat.context(max_tokens=10**400, search=False).tokens == chat.context(search=False).tokens
    with pytest.raises(BudgetError):
        chat.context(reserve_tokens=10**400, search=False)
    assert chat.report_usage("tall-1", 10**400) == 4.0
    with pytest.raises(InputError):
        chat.compact(max_tokens=True)
