"""After a long silence a chat starts with a fresh window: its past is folded, but for a few messages to go on from."""

from datetime import timedelta

import pytest
from conftest import SMALL, texts
from test_folding import Quoting, said, summaries

from neuralflow_memory import Message, ToolCall
from neuralflow_memory.testing import ManualClock

HOUR = 3600


class Counting(Quoting):
    """Quotes, and counts how often it was asked."""

    calls = 0

    def summarize(self, messages, *, previous, max_tokens):
        self.calls += 1
        return super().summarize(messages, previous=previous, max_tokens=max_tokens)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def idle(opened, clock):
    """Opens a memory that folds only because of silence, and its chat."""

    def open_(*, overlap=0, **options):
        options = {"embedder": "none", "summarizer": Counting(), "clock": clock, **options}
        options["context"] = {"expiry_time": HOUR, "context_overlap": overlap, **options.get("context", {})}
        return opened(**options).session("chat", user_id="ada")

    return open_


def say(chat, *ids, minutes=1):
    """Add a turn and its answer for each id, some minutes apart, and let what is due happen."""
    for own in ids:
        chat.memory._core.parts.clock.advance(minutes=minutes)
        chat.add([Message("user", f"Turn {own}", id=own), Message("assistant", f"Answer {own}", id=f"{own}!")])
        chat.memory.flush()


def window(chat):
    return [m.id for m in chat.messages(view="window")]


def all_is_there(chat):
    """Every turn is in the window or covered by a segment, never both, and the summary quotes what is covered."""
    covered = {i for s in summaries(chat, kind="segment") for i in s.sources}
    assert window(chat) == [m.id for m in chat.messages() if m.id not in covered]
    assert said(chat).splitlines() == [m.content for m in chat.messages() if m.id in covered and m.content]
    assert not chat.memory._core.parts.window(chat.scope).due


def test_the_first_turn_after_a_long_silence_folds_what_was_before_it(idle, clock):
    """All of it without overlap; the new turns stay, in one add or in many."""
    chat = idle()
    say(chat, "a", "b", "c")
    clock.advance(seconds=HOUR + 1)
    chat.add([Message("user", "Back", id="d"), Message("assistant", "Welcome", id="d!"), Message("user", "So", id="e")])
    chat.memory.flush()
    assert window(chat) == ["d", "d!", "e"]
    all_is_there(chat)
    assert (chat.memory.stats()["folds"], chat.memory._core.parts.summarizer.calls) == (1, 1)
    context = chat.context(search=False)
    assert texts(context.messages)[1:] == ["Back", "Welcome", "So"]
    assert "Turn a" in context.messages[0].content
    say(chat, "f", "g")
    assert window(chat)[:3] == ["d", "d!", "e"]
    assert chat.memory.stats()["folds"] == 1


@pytest.mark.parametrize("minutes", [1, 30, 60])
def test_nothing_happens_for_a_short_silence(idle, minutes):
    """Up to `expiry_time` the window goes on; a day of such pauses is no silence."""
    chat = idle()
    say(chat, *"abcdefghijklmnopqrstu", minutes=minutes)
    assert len(window(chat)) == 42
    assert chat.summary() == ""
    assert not chat.compact().needed
    assert chat.memory._core.parts.summarizer.calls == 0


def test_only_an_add_ends_a_silence(idle, clock):
    """Reading, searching and waiting change nothing, and the new turn is not needed for what they show."""
    chat = idle()
    say(chat, "a", "b")
    clock.advance(days=3)
    chat.search("Turn")
    chat.context()
    assert not chat.compact().needed
    chat.memory.flush()
    assert window(chat) == ["a", "a!", "b", "b!"]
    chat.add(Message("user", "Turn a", id="a"))  # an id that is there already adds nothing
    chat.memory.flush()
    assert window(chat) == ["a", "a!", "b", "b!"]
    all_is_there(chat)


def test_silence_is_measured_by_the_clock_of_writing(idle, clock):
    """A chat of last year that is imported now is one chat; backdating makes no silence, and hides none."""
    chat = idle()
    then = clock() - timedelta(days=400)
    for n in range(6):
        chat.add(Message("user", f"Old {n}", id=f"o{n}", created_at=then + timedelta(days=n)))
        chat.memory.flush()
    assert len(window(chat)) == 6
    clock.advance(hours=2)
    chat.add(Message("user", "Old 6", id="o6", created_at=then + timedelta(days=5, minutes=1)))
    chat.memory.flush()
    assert window(chat) == ["o6"]
    all_is_there(chat)


@pytest.mark.parametrize(
    ("overlap", "kept"),
    [(0, ""), (5, ""), (11, ""), (12, "c"), (23, "c"), (24, "bc"), (35, "bc"), (36, "abc"), (4000, "abc")],
)
def test_the_newest_whole_messages_before_it_stay(idle, clock, overlap, kept):
    """As many as fit `context_overlap`, from a user turn on."""
    chat = idle(overlap=overlap)
    say(chat, "a", "b", "c")
    sizes = [chat.memory.count_tokens([m]) - chat.memory.count_tokens([]) for m in chat.messages()]
    assert sizes == [6] * 6
    clock.advance(hours=5)
    say(chat, "d")
    assert window(chat) == [i for own in (*kept, "d") for i in (own, f"{own}!")]
    all_is_there(chat)


def test_what_stays_is_folded_once(idle, clock):
    """The silence in the middle of the window folds nothing more: not with further turns, compact() or a reopening."""
    chat = idle(overlap=20)
    say(chat, "a", "b", "c")
    clock.advance(hours=5)
    say(chat, "d")
    assert window(chat) == ["c", "c!", "d", "d!"]
    summarizer = chat.memory._core.parts.summarizer
    for _ in range(3):
        say(chat, *(f"{len(window(chat))}-{n}" for n in range(2)))
        report = chat.compact()
        assert report.folded == ()
        assert window(chat)[:4] == ["c", "c!", "d", "d!"]
        chat.memory.close()
        chat = idle(overlap=20, summarizer=summarizer)
    assert chat.compact().folded == ()
    all_is_there(chat)
    assert summarizer.calls == 1


def test_a_second_silence_folds_again(idle, clock):
    """Up to the last one; with little said in between, what the first one left may stay."""
    chat = idle(overlap=20)
    say(chat, "a", "b")
    for own in ("c", "d", "e"):
        clock.advance(hours=2)
        say(chat, own)
        before = {"c": "b", "d": "c", "e": "d"}[own]
        assert window(chat) == [before, f"{before}!", own, f"{own}!"]
        all_is_there(chat)
    clock.advance(hours=2)
    chat.add(Message("user", "Short", id="f"))
    chat.memory.flush()
    clock.advance(hours=2)
    chat.add(Message("user", "Shorter", id="g"))
    chat.memory.flush()
    assert window(chat) == ["e", "e!", "f", "g"]  # what fits the overlap, from a user turn on
    all_is_there(chat)


def test_both_limits_hold_after_a_silence(idle, clock):
    """A batch that overfills the window as it ends a silence leaves what either limit leaves."""
    chat = idle(pruning=SMALL, overlap=4000, context={"max_context_length": 4096})
    say(chat, "a", "b")
    clock.advance(hours=2)
    chat.add([Message("user", f"Turn {n}", id=f"n{n}") for n in range(5)])
    chat.memory.flush()
    assert window(chat) == ["n3", "n4"]
    all_is_there(chat)


def test_instructions_and_pinned_turns_stay(idle, clock):
    """A silence is no reason to forget what was to be kept."""
    chat = idle()
    chat.add([Message("system", "Be kind.", id="s"), Message("user", "Turn a", id="a")])
    say(chat, "b", "c")
    chat.pin("b")
    clock.advance(hours=2)
    say(chat, "d")
    assert window(chat) == ["s", "b", "d", "d!"]
    sent = chat.context(search=False).messages
    assert [m.id for m in sent if m.id] == ["s", "b", "d", "d!"]


def test_a_pinned_turn_makes_no_silence(idle):
    """What was said around it was said without a pause, though it is never folded itself."""
    chat = idle(pruning={"max_context_items": 5, "summarization_threshold": 8})
    say(chat, *"abcdefg", minutes=50)
    chat.pin("f")
    chat.pin("f!")
    say(chat, *"hij", minutes=50)
    assert [own for own in window(chat) if "!" not in own] == [
        *"defghij"
    ]  # five were left when "i" was said, and the pin


def call(own):
    return Message("assistant", "", id=f"{own}-call", tool_calls=[ToolCall(own, "slow", {})])


def test_a_tool_call_across_the_silence_stays_whole(idle, clock):
    """Its result came late: call, result and question stay together, what was before them is folded."""
    chat = idle()
    say(chat, "a", "b")
    chat.add([Message("user", "Compute it", id="q"), call("k")])
    clock.advance(hours=8)
    chat.add(Message("tool", "42", id="r", tool_call_id="k"))
    chat.memory.flush()
    assert window(chat) == ["q", "k-call", "r"]
    all_is_there(chat)
    assert [m.id for m in chat.context(search=False).messages][1:] == ["q", "k-call", "r"]
    say(chat, "c")
    assert chat.memory.stats()["folds"] == 1
    clock.advance(hours=8)
    say(chat, "d")
    assert window(chat) == ["d", "d!"]


def test_one_chats_silence_is_not_anothers(idle, clock):
    """Each session has its own, also of one user."""
    chat = idle()
    other = chat.memory.session("other", user_id="ada")
    say(chat, "a")
    for n in range(10):
        say(other, f"o{n}", minutes=20)
    say(chat, "b")
    assert window(chat) == ["b", "b!"]
    assert len(window(other)) == 20


def stopped(chat):
    """Let no more folds begin, as if the process were killed before."""
    chat.memory._core.parts.full = lambda _: None


@pytest.mark.parametrize("overlap", [0, 20])
def test_a_fold_that_was_cut_off_comes_with_the_next_turn(idle, clock, overlap):
    """Reopened, the window is as it was; the next add folds what was before the silence, and no more."""
    chat = idle(overlap=overlap)
    say(chat, "a", "b", "c")
    clock.advance(hours=2)
    stopped(chat)
    say(chat, "d")
    chat.memory.close()
    chat = idle(overlap=overlap)
    assert window(chat) == [i for own in "abcd" for i in (own, f"{own}!")]
    assert chat.summary() == ""
    chat.context()
    chat.memory.flush()
    assert len(window(chat)) == 8
    say(chat, "e")
    kept = ["c", "c!"] if overlap else []
    assert window(chat) == [*kept, "d", "d!", "e", "e!"]
    all_is_there(chat)


def test_a_silence_while_nobody_had_it_open(idle, clock):
    """It need not be the same process that ends it."""
    chat = idle()
    say(chat, "a", "b")
    chat.memory.close()
    clock.advance(days=30)
    chat = idle()
    assert window(chat) == ["a", "a!", "b", "b!"]
    say(chat, "c")
    assert window(chat) == ["c", "c!"]
    all_is_there(chat)


@pytest.mark.parametrize("again", ["compact", "add"])
def test_a_fold_that_failed_is_tried_again(idle, clock, monkeypatch, again):
    """Trouble while folding costs the silence nothing."""
    chat = idle()
    say(chat, "a", "b")
    ledger = chat.memory._core.parts.ledger

    def full(*_, **__):
        raise OSError("no space left")

    clock.advance(hours=2)
    monkeypatch.setattr(ledger, "fold", full)
    say(chat, "c")
    assert "no space left" in chat.memory.stats()["last_error"]
    assert window(chat) == [i for own in "abc" for i in (own, f"{own}!")]
    monkeypatch.undo()
    if again == "compact":
        assert chat.compact().folded == ("a", "a!", "b", "b!")
    else:
        say(chat, "d")
    assert window(chat)[:2] == ["c", "c!"]
    all_is_there(chat)
