"""`Thread`: a host's own list of messages, kept in step with a session, without any host."""

import asyncio
import functools
import inspect
import itertools
import random
import time

import pytest
from conftest import SMALL, in_threads, texts
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory import BudgetError, InputError, Message, MessageError, Thread, ToolCall, open_memory

MARK = {"neuralflow": "context"}
NUMBERS = itertools.count()


@pytest.fixture
def memory(opened):
    return opened(embedder={"model": "none"})


@pytest.fixture
def folding(opened):
    return opened(embedder={"model": "none"}, pruning=SMALL)


def user(text, id=None, **more):
    return Message("user", text, id=id or f"u{next(NUMBERS)}", **more)


def said(text, id=None, **more):
    return Message("assistant", text, id=id or f"a{next(NUMBERS)}", **more)


def call(result="seen", **more):
    """A tool call and its result."""
    own = f"c{next(NUMBERS)}"
    calls = said("", tool_calls=[ToolCall(own, "look", {"at": own})])
    return [calls, Message("tool", result, id=f"r{own}", tool_call_id=own, **more)]


def talk(*names):
    """A question and its answer for each name."""
    return [m for name in names for m in (user(name, name), said(f"re {name}", f"re-{name}"))]


def window(session):
    return texts(session.messages(view="window"))


def transcript(session):
    return texts(session.messages())


def turns(context):
    """What a prompt holds beside what memory made up."""
    return texts(m for m in context.messages if m.metadata != MARK)


# --- writing --------------------------------------------------------------------------------------------------------


def test_what_is_new_is_written_once(chat):
    """The list grows; each message is there once, in order, and keeps its id, time, name and payload."""
    thread = chat.thread("t")
    first = user("hello", "m1", name="Ada", payload={"host": "x"}, metadata={"mood": "good"})
    assert thread.update([first]) == "m1"
    assert thread.update([first, said("hi", "m2")]) == "m2"
    assert thread.update([first, said("hi", "m2"), user("bye", "m3")]) == "m3"
    assert [(m.id, m.content) for m in chat.messages()] == [("m1", "hello"), ("m2", "hi"), ("m3", "bye")]
    stored = chat.messages()[0]
    assert (stored.name, stored.payload, stored.metadata["mood"]) == ("Ada", {"host": "x"}, "good")
    assert thread.update([]) is None


def reads(memory, monkeypatch):
    """A list that grows with each time the database is read or written."""
    database, seen = memory._core.parts.ledger._db, []
    for name in ("read", "write"):
        real = getattr(database, name)
        monkeypatch.setattr(database, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
    return seen


def test_the_same_list_again_costs_no_read_and_no_write(folding, monkeypatch):
    """What the window holds is known without the database, also when older turns are folded."""
    chat = folding.session("chat")
    thread, chain = chat.thread("t"), talk(*"abcdefgh")
    written = thread.update(chain)
    folding.flush()
    assert len(window(chat)) < len(chain)
    seen = reads(folding, monkeypatch)
    assert thread.update(chain, written=written) == thread.update(chain) == "re-h"
    assert seen == []
    thread.update([*chain, user("i")])
    assert seen  # it is counted


def test_what_the_host_edits_is_replaced_and_what_the_memory_edits_stays(chat):
    """Each has the last word on its own edits, whatever the list still says."""
    thread, chain = chat.thread("t"), talk("one", "two")
    thread.update(chain)
    chain[2] = user("TWO", "two")
    thread.update(chain)
    assert window(chat) == ["one", "re one", "TWO", "re two"]
    chat.entries.update("one", content="(redacted)")
    thread.update(chain)
    assert window(chat) == ["(redacted)", "re one", "TWO", "re two"]
    assert turns(thread.prompt(chain)) == ["(redacted)", "re one", "TWO", "re two"]
    chain[0] = user("one anew", "one")
    thread.update(chain)
    assert window(chat)[0] == "one anew"


def test_a_fork_leaves_what_came_after_and_a_branch_comes_back_whole(chat):
    """Gone from the list's end: gone from the window, and not from the transcript."""
    thread, chain = chat.thread("t"), talk("one", "two", "three")
    thread.update(chain)
    other = [*chain[:2], user("other"), said("re other")]
    thread.update(other[:3])
    assert window(chat) == ["one", "re one", "other"]
    thread.update(other)
    thread.update(chain[:5])
    assert window(chat) == ["one", "re one", "two", "re two", "three"]
    assert len(chat.messages()) == 8


def test_an_answer_replaced_in_the_middle_is_replaced(chat):
    """What stands in the list in a turn's stead is another branch, though what follows is the same."""
    thread, chain = chat.thread("t"), talk("one", "two")[:3]
    thread.update(chain)
    thread.update([chain[0], said("another"), chain[2]])
    assert window(chat) == ["one", "another", "two"]


def test_branches_that_share_a_message_are_told_apart(chat):
    """One id with the same words in both, at different places: going from one to the other leaves nothing behind."""
    thread, short = chat.thread("t"), talk("one", "two")
    long = [*short[:2], *talk("between"), short[2], said("another")]
    failed = [*short[:2], *talk("between"), user("other words", "two")]
    edited = [*short[:2], user("third words", "two")]
    for chain in (short, long, short, long, edited, long, short, failed, short, failed[:2], long):
        thread.update(chain)
        assert window(chat) == texts(chain)


def test_a_list_without_an_id_never_takes_anything_away(chat):
    """It may be the new messages only; edits count all the same."""
    thread, chain = chat.thread(), talk("one", "two", "three")
    thread.update(chain)
    thread.update([user("four", "four")])
    thread.update([user("TWO", "two")])
    thread.update([chain[0], user("THREE", "three")])
    thread.update([chain[3], chain[1]])
    assert window(chat) == ["one", "re one", "TWO", "re two", "THREE", "re three", "four"]


def test_what_another_way_wrote_stays_as_it_is(chat):
    """A turn that no list wrote, or whose metadata was set in the memory, is the memory's."""
    chat.add(user("by hand", "one"))
    thread = chat.thread("t")
    thread.update([user("another", "one"), said("two", "two")])
    chat.entries.update("two", content="(redacted)", metadata={})
    thread.update([user("another", "one"), said("two", "two")])
    assert window(chat) == ["by hand", "(redacted)"]


def test_the_same_words_under_another_id_are_said_again(chat):
    """Where messages have ids, those say which is which; where they have none, the same list is the same."""
    for _ in range(2):
        chat.thread().update([user("yes")])
    assert window(chat) == ["yes", "yes"]
    for _ in range(2):
        chat.thread().update([Message("user", "no")])
    assert window(chat) == ["yes", "yes", "no"]


def test_two_lists_in_one_session_leave_each_other_alone(chat):
    """And so do turns that were added otherwise: one list's fork takes nothing of theirs."""
    one, two = chat.thread("one"), chat.thread("two")
    chain = talk("a", "b")
    one.update(chain)
    chat.add("by hand")
    two.update(talk("x", "y"))
    one.update([*chain[:2], user("c")])
    assert window(chat) == ["a", "re a", "by hand", "x", "re x", "y", "re y", "c"]


@pytest.mark.parametrize("left", [slice(4, None), slice(5, None), slice(0, 0)])
def test_what_is_cut_off_the_front_stays(chat, left):
    """A host that shortens its list says nothing about the memory."""
    thread, chain = chat.thread("t"), talk("one", "two", "three")
    thread.update(chain)
    thread.update([*chain[left], user("four")])
    assert window(chat) == [*texts(chain), "four"]


def test_what_is_cut_out_of_the_middle_stays_too(chat):
    """Some hosts keep the first message and the last ones."""
    thread, chain = chat.thread("t"), talk("one", "two", "three")
    thread.update(chain)
    thread.update([chain[0], *chain[4:], user("four")])
    assert window(chat) == [*texts(chain), "four"]


def test_what_was_deleted_from_memory_stays_deleted(chat):
    """Though the list still has it, if the host hands back what update returned."""
    thread, chain = chat.thread("t"), talk("one", "two")
    written = thread.update(chain)
    chat.entries.delete(["two", "re-two"])
    assert thread.update(chain, written=written) == written
    assert window(chat) == ["one", "re one"]
    thread.update([*chain, user("three")], written=written)
    assert window(chat) == ["one", "re one", "three"]
    chat.clear()
    thread.update([*chain, user("four")], written="re-two")
    assert window(chat) == ["four"]


def test_folded_turns_do_not_come_back(folding):
    """The list has them all the same; the summary stands for them."""
    chat = folding.session("chat")
    thread, chain = chat.thread("t"), talk(*"abcdefgh")
    for n in range(2, len(chain) + 1, 2):
        thread.update(chain[:n])
        folding.flush()
    assert 0 < len(window(chat)) < len(chain)
    assert window(chat) == texts(chain)[-len(window(chat)) :]
    assert transcript(chat) == texts(chain)


@pytest.mark.parametrize("kept", [True, False])
def test_a_fork_before_the_window_begins_it_anew(folding, kept):
    """With the last question before it; what was folded earlier stays in the summary."""
    chat = folding.session("chat")
    thread, chain = chat.thread("t"), talk(*"abcdefgh")
    thread.update(chain[:4])
    written = thread.update(chain[:6])
    thread.update(chain)
    folding.flush()
    assert window(chat)[0] > "d"
    thread.update([*chain[:6], user("new")], written=written if kept else None)
    assert window(chat) == ["c", "re c", "new"]


def test_a_chat_sent_again_without_ids_is_written_once(folding):
    """A front end that passes all of it each time, folded turns too; the same again adds nothing."""
    chat, chain = folding.session("chat"), []
    thread = chat.thread("t")
    for n in range(12):
        chain.append(Message("user", f"turn {n % 5}"))
        for _ in range(2):
            thread.update(chain)
        folding.flush()
        prompt = thread.prompt(chain)
        assert prompt.messages[-1] is chain[-1]
        assert len(turns(prompt)) == len(window(chat))
        chain.append(Message("assistant", f"reply {n}"))
        thread.update(chain)
    assert transcript(chat) == texts(chain)


def test_a_chat_sent_again_under_other_ids_is_written_once(chat):
    """Some hosts hand out new ids each time."""
    for n in range(1, 6):
        chain = [user(f"turn {i // 2}") if i % 2 == 0 else said(f"reply {i // 2}") for i in range(2 * n - 1)]
        chat.thread("t").update(chain)
        assert turns(chat.thread("t").prompt(chain)) == texts(chain)
        chat.thread("t").update([*chain, said(f"reply {n - 1}")])
    assert transcript(chat) == [t for n in range(5) for t in (f"turn {n}", f"reply {n}")]


def test_a_pinned_turn_stays_and_brings_back_nothing(chat):
    """All but it has left the window: that is neither fork nor edit."""
    thread, chain = chat.thread("t"), talk("one", "two")
    written = thread.update(chain)
    chat.pin("one")
    chat.replace(chat.messages()[:1])
    thread.update([*chain, user("three")], written=written)
    assert window(chat) == ["one", "three"]


def test_a_pinned_turn_survives_a_fork_before_the_window(folding):
    """Whoever pinned it wants it there; nothing else of the branch is."""
    chat = folding.session("chat")
    thread, chain = chat.thread("t"), talk(*"abcdefgh")
    thread.update(chain)
    folding.flush()
    chat.pin("g")
    thread.update([*chain[:4], user("new")])
    assert window(chat) == ["g", "b", "re b", "new"]


def test_what_is_new_is_never_taken_for_deleted(folding):
    """Also where it stands between turns of a branch that comes back, and the host hands back nothing."""
    chat = folding.session("chat")
    thread, chain = chat.thread("t"), talk(*"abcdefgh")
    thread.update(chain)
    folding.flush()
    thread.update([*chain[:3], said("new"), user("other words", "c")])
    assert window(chat)[-3:] == ["b", "new", "other words"]


def test_a_turn_said_again_under_its_id_is_in_the_window_again(chat):
    """It had left."""
    thread = chat.thread("t")
    thread.update([user("one", "one")])
    chat.replace([])
    thread.update([user("one", "one")])
    assert window(chat) == ["one"]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_wherever_a_host_jumps_the_window_is_the_lists_end(opened, folder, seed, folds, kept):
    """Forks, replays, failures, branches left and taken up again, one id with other words in each, folds, new memories."""
    chance, count = random.Random(seed), itertools.count()
    options = {"embedder": {"model": "none"}, "pruning": SMALL if folds else {}}
    memory = opened(folder, **options)
    states = [((), None)]

    def update(chain, written):
        session = memory.session("s", user_id="ada")
        newest = session.thread("t").update(chain, written=written if kept else None)
        memory.flush()
        have = [(m.id, m.content) for m in session.messages(view="window")]
        assert have == [(m.id, m.content) for m in chain][len(chain) - len(have) :]
        assert have
        assert chain[len(chain) - len(have)].role == "user"
        assert folds or len(have) == len(chain)
        states.append((tuple(chain), newest))
        return newest

    for _ in range(25):
        chain, written = chance.choice(states[-1:] * 2 + states[1:] * (len(states) > 1))
        chain = list(chain)
        if chance.random() < 0.1:
            memory.close()
            memory = opened(folder, **options)
        if chain and chance.random() < 0.1:
            update(chain, written)
            continue
        ids = [m.id for past, _ in states for m in past if m.role == "user" and m.id not in {c.id for c in chain}]
        reused = chain and ids and chance.random() < 0.4
        chain.append(user(f"turn {next(count)}", chance.choice(ids) if reused else None))
        written = update(chain, written)
        while chance.random() < 0.3:
            chain += call()
            written = update(chain, written)
        if chance.random() < 0.8:  # else the model is out of reach
            chain.append(said(f"reply {next(count)}"))
            update(chain, written)


def test_the_summary_takes_what_leaves_the_list(chat):
    """`fold` folds just that, and says the summary."""
    thread, chain = chat.thread("t"), talk("My code is 4711.", "two", "three")
    thread.update(chain)
    summary = thread.fold(chain[:4])
    assert "4711" in summary
    assert summary == chat.summary()
    assert window(chat) == ["three", "re three"]
    assert transcript(chat) == texts(chain)


# --- the prompt -----------------------------------------------------------------------------------------------------


def test_turns_are_sent_as_the_lists_own_objects(memory):
    """So that a host finds its messages again, and what memory adds is marked."""
    memory.session("old", user_id="ada").add("The red key opens the cellar.")
    session = memory.session("s", user_id="ada")
    thread = session.thread("t")
    chain = [*talk("one"), user("Which key opens the cellar?", payload={"raw": [1]}, metadata={"x": [1]}), *call()]
    thread.update(chain)
    prompt = thread.prompt(chain)
    added = [m for m in prompt.messages if m.metadata == MARK]
    assert [m for m in prompt.messages if m not in added] == chain
    assert all(any(m is own for own in chain) for m in prompt.messages if m not in added)
    assert "red key" in added[0].text
    assert prompt.messages[prompt.messages.index(added[0]) + 1] is chain[2]
    assert prompt.tokens == memory.count_tokens(prompt.messages)


def test_turns_that_left_the_list_are_sent_unless_the_host_sums_them_up(chat):
    """Memory has what the list has not; `older=False` says that something in the list stands for them."""
    thread, chain = chat.thread("t"), talk("one", "two", "three")
    thread.update(chain)
    short = [Message("user", "In short: one, two.", metadata=MARK), *chain[4:]]
    assert turns(thread.prompt(short)) == texts(chain)
    prompt = thread.prompt(short, older=False)
    assert texts(prompt.messages) == ["In short: one, two.", "three", "re three"]
    assert prompt.messages[0] is short[0]


def test_what_others_changed_or_added_is_sent_as_it_is_and_not_kept(chat):
    """A cleared result, a reminder after the question, instructions and an example at the front."""
    thread = chat.thread("t")
    chain = [user("one"), *call("x" * 500), said("ok"), user("two")]
    thread.update(chain)
    cleared = Message("tool", "[cleared]", id=chain[2].id, tool_call_id=chain[2].tool_call_id)
    example = Message("user", "An example.", metadata=MARK)
    rules = Message("system", "Speak Latin.", metadata=MARK)
    reminder = Message("user", "Mind the gap.", metadata=MARK)
    asked = [rules, example, *chain[:2], cleared, chain[3], reminder, chain[4], reminder]
    with chat.task("travel"):
        prompt = thread.prompt(asked)
    block = next(m for m in prompt.messages if m.text.startswith("Tasks:"))
    assert [m for m in prompt.messages if m is not block] == asked
    assert prompt.messages.index(block) == 1
    assert prompt.tokens == chat.memory.count_tokens(prompt.messages)
    thread.update(asked[2:4] + asked[4:])
    assert "Mind the gap." not in transcript(chat)


def test_what_quotes_the_memory_is_shown_for_its_question_and_not_kept(chat):
    """A recall must not be recalled; it counts in the budget while it is shown."""
    thread = chat.thread("t")
    chain = [user("one"), *call("SECRET " * 50, metadata={"neuralflow": "recalled"})]
    thread.update(chain)
    prompt = thread.prompt(chain)
    assert prompt.messages[-1] is chain[-1]
    assert prompt.tokens == chat.memory.count_tokens(prompt.messages)
    chain += [said("ok"), user("two")]
    thread.update(chain)
    assert "SECRET" not in str(transcript(chat))
    assert "SECRET" not in str(texts(thread.prompt(chain).messages))


def searches(monkeypatch):
    """The queries of every search."""
    from neuralflow_memory.pipeline import assemble

    seen, ranked = [], assemble.ranked
    monkeypatch.setattr(assemble, "ranked", lambda p, s, query, **o: (seen.append(query), ranked(p, s, query, **o))[1])
    return seen


def test_one_search_for_each_question(memory, monkeypatch):
    """However many calls of the model it takes; an edit, a fork and an answer end that."""
    seen = searches(monkeypatch)
    old = memory.session("old", user_id="ada")
    own, other = old.add(["The red key opens the cellar.", "An iron key opens the cellar, too."])
    thread = memory.session("s", user_id="ada").thread("t")
    chain = [user("Which key opens the cellar?", "q")]
    for _ in range(4):
        thread.update(chain)
        sent = str(texts(thread.prompt(chain).messages))
        assert (sent.count("red key"), sent.count("iron key")) == (1, 1)
        chain += call()
    assert len(seen) == 1
    old.entries.delete(own)  # deleted is gone, also in the middle of a run
    old.entries.update(other, content="(redacted)")
    assert not {"red", "iron"} & set(str(texts(thread.prompt(chain).messages)).split())
    old.add("The blue key opens the cellar.")
    assert "blue key" not in str(texts(thread.prompt(chain).messages))
    assert len(seen) == 1
    thread.update(chain[:1])  # asked again
    assert "blue key" in str(texts(thread.prompt(chain[:1]).messages))
    thread.update([*chain[:1], said("ok", "ok")])
    old.add("The green key opens the cellar.")
    assert "green key" in str(texts(thread.prompt([*chain[:1], said("ok", "ok")]).messages))
    edited = [user("Which key opens the attic?", "q")]
    thread.update(edited)
    thread.prompt(edited)
    assert seen == [*["Which key opens the cellar?"] * 3, "Which key opens the attic?"]
    thread.prompt([user("else")], search=False)
    assert len(seen) == 4


def test_a_list_that_was_not_written_is_sent_all_the_same(chat):
    """Without update nothing of it is a turn, and it counts."""
    chain = talk("one")
    prompt = chat.thread("t").prompt(chain)
    assert list(prompt.messages) == chain
    assert prompt.tokens == chat.memory.count_tokens(chain)
    assert chat.thread("t").prompt([]).messages == ()


WORDS = st.sampled_from(["yes", "word " * 30, "key cellar " * 90, "lorem ipsum " * 400])
STEPS = st.lists(
    st.tuples(st.sampled_from(["user", "said", "call", "extra", "cleared", "recalled"]), WORDS), min_size=1, max_size=14
)


@functools.cache
def shared():
    memory = open_memory(":memory:", embedder={"model": "none"}, pruning=SMALL)
    memory.session("old", user_id="ada").add([f"The key {n} opens cellar {n}. " + "word " * 40 for n in range(20)])
    return memory


@given(STEPS, st.integers(150, 3000), st.integers(0, 100), st.booleans(), st.booleans())
def test_the_budget_holds_whatever_is_in_the_list(steps, most, reserve, older, start):
    """Everything sent counts, also what others added or changed; calls stay whole; the question is there."""
    memory = shared()
    session = memory.session(f"s{next(NUMBERS)}", user_id="ada")
    thread = session.thread("t")
    chain, asked = [user("key cellar?")], []
    for kind, text in steps:
        if kind in ("call", "cleared", "recalled"):
            mark = {"metadata": {"neuralflow": "recalled"}} if kind == "recalled" else {}
            chain += call(text, **mark)
        elif kind == "extra":
            asked.append((len(chain) if not start else 0, Message("user", text[:60], metadata=MARK)))
        else:
            chain.append(user(text) if kind == "user" else said(text))
        thread.update(chain)
    shown = list(chain)
    if any(kind == "cleared" for kind, _ in steps):
        place = next(n for n, m in enumerate(chain) if m.role == "tool")
        shown[place] = Message("tool", "[cleared] " * 40, id=chain[place].id, tool_call_id=chain[place].tool_call_id)
    for place, extra in reversed(asked):
        shown.insert(place, extra)
    try:
        prompt = thread.prompt(shown, max_tokens=most, reserve_tokens=reserve, older=older)
    except BudgetError:
        assert memory.count_tokens([m for _, m in asked] + chain[-1:]) + reserve > 100
        return
    assert memory.count_tokens(prompt.messages) + reserve <= most
    assert prompt.tokens == memory.count_tokens(prompt.messages)
    newest = next(m for m in reversed(chain) if m.role == "user")
    assert any(m.id == newest.id for m in prompt.messages)
    assert all(any(m is sent for sent in prompt.messages) for _, m in asked)
    waiting = set()
    for message in prompt.messages:
        if message.role == "tool":
            waiting.remove(message.tool_call_id)
            continue
        assert not waiting
        waiting = {c.id for c in message.tool_calls}
    assert not waiting


# --- bad input, and many at once ------------------------------------------------------------------------------------

BAD = {
    "no message": lambda t: t.update([{"role": "user", "content": "x"}]),
    "nothing": lambda t: t.update(None),
    "one id twice": lambda t: t.update([user("x", "same"), user("y", "same")]),
    "half a character": lambda t: t.update([user("x"), user("\ud800")]),
    "half a character in an id": lambda t: t.update([user("x"), user("y", "\ud800")]),
    "not json": lambda t: t.update([user("x"), user("y", metadata={"x": object()})]),
    "no json in a block": lambda t: t.update([Message("user", [{"type": "image", "x": object()}], id="b")]),
    "written": lambda t: t.update([user("x")], written=5),
    "no message to prompt": lambda t: t.prompt([1]),
    "max_tokens": lambda t: t.prompt([user("x")], max_tokens="many"),
    "reserve_tokens": lambda t: t.prompt([user("x")], reserve_tokens=-5),
    "reserve_tokens as text": lambda t: t.prompt([user("x")], reserve_tokens="5"),
    "no room": lambda t: t.prompt([user("x")], max_tokens=5),
    "fold without ids": lambda t: t.fold([Message("user", "x")]),
    "fold of nothing": lambda t: t.fold(7),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_a_typed_error_and_nothing_is_written(chat, bad):
    """All or none."""
    chat.add("before")
    with pytest.raises(InputError):
        BAD[bad](chat.thread("t"))
    assert transcript(chat) == ["before"]


@pytest.mark.parametrize("id", ["", 5, b"t", "\ud800"])
def test_a_threads_id_is_a_text(chat, id):
    """Said where it is made."""
    with pytest.raises((InputError, MessageError)):
        chat.thread(id)


def test_many_lists_at_once_in_threads(memory):
    """Each user's list is their session's window, and two that update one list at once double nothing."""

    def lead(name):
        session = memory.session("same", user_id=name)
        thread, chain = session.thread("t"), []
        for n in range(12):
            chain += [user(f"{name} {n}", f"{n}"), said(f"re {n}", f"re {n}")]
            in_threads(*[functools.partial(thread.update, list(chain))] * 2)
            assert turns(thread.prompt(chain)) == texts(chain)
        assert window(session) == texts(chain)
        assert transcript(session) == texts(chain)

    in_threads(*(functools.partial(lead, name) for name in ("ada", "bob", "cyd")))


async def test_many_lists_at_once_in_tasks(memory):
    """The twins do the same, and the loop is free meanwhile."""

    async def lead(name):
        session = memory.session("same", user_id=name)
        thread, chain = session.thread("t"), []
        for n in range(8):
            chain += [user(f"{name} {n}"), *call()]
            await asyncio.gather(thread.aupdate(list(chain)), thread.aupdate(list(chain)))
            assert turns(await thread.aprompt(chain)) == texts(chain)
        assert window(session) == texts(chain)
        assert await thread.afold(chain[:3])

    started = time.perf_counter()
    await asyncio.gather(*map(lead, ("ada", "bob", "cyd")))
    assert time.perf_counter() - started < 30


def test_every_method_has_its_twin():
    """The same name with an `a`, the same parameters."""
    for name in ("update", "prompt", "fold"):
        twin = getattr(Thread, f"a{name}")
        assert inspect.iscoroutinefunction(twin)
        assert inspect.signature(twin).parameters == inspect.signature(getattr(Thread, name)).parameters
        assert name in twin.__doc__
