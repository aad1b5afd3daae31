"""What a summarizer may do wrong, and what may go wrong around it."""

import asyncio
import threading

import pytest
from conftest import SMALL, wait_until
from gemini_server import answer, gemini_server

from neuralflow_memory import ConfigError, SummarizerError
from neuralflow_memory.models.gemini import GeminiSummarizer
from neuralflow_memory.pipeline import summarize as summarizing
from neuralflow_memory.testing import ManualClock
from neuralflow_memory.types import Summary


def folded(chat, start, stop):
    for n in range(start, stop):
        chat.add(f"T{n} is about sailing to Oslo")
        chat.memory.flush()


class Model:
    name = "model"

    def __init__(self, act):
        self.act, self.given = act, []

    def summarize(self, messages, *, previous, max_tokens):
        self.given.append([m.text for m in messages])
        return self.act(messages)


def test_one_turn_that_the_model_refuses_does_not_cost_two_calls_with_every_turn_forever(opened):
    """Its segment is tried again a few times, then left as it is."""

    def act(messages):
        if any("T1 " in m.text and m.role == "user" for m in messages):
            raise SummarizerError("blocked: PROHIBITED_CONTENT")
        return "A summary."

    model, clock = Model(act), ManualClock()
    memory = opened(embedder="none", summarizer=model, pruning=SMALL, clock=clock, context={"expiry_time": 1e9})
    chat = memory.session("chat")
    folded(chat, 0, 4)
    before, folds = len(model.given), memory.stats()["folds"]
    for n in range(4, 64):
        clock.advance(minutes=1)
        folded(chat, n, n + 1)
    folds = memory.stats()["folds"] - folds
    shared = 12  # segments that read the turn as their overlap; each is tried three times
    assert len(model.given) - before <= 1.2 * folds + 2 * shared + 6


def test_a_segment_that_the_model_refuses_does_not_hold_up_the_others(opened):
    """What came after it is written again; the refused one stays the floor's."""
    clock, down = ManualClock(), [1]

    def act(messages):
        if down or any("T1 " in m.text and m.role == "user" for m in messages):
            raise SummarizerError("blocked: PROHIBITED_CONTENT")
        return "A summary."

    options = {"pruning": SMALL, "clock": clock, "context": {"expiry_time": 1e9, "context_overlap": 0}}
    memory = opened(embedder="none", summarizer=Model(act), **options)
    chat = memory.session("chat")
    folded(chat, 0, 12)  # an outage
    down.clear()
    for n in range(12, 40):
        clock.advance(minutes=15)
        folded(chat, n, n + 1)
    made = [e for e in chat.entries.list(within="session", types=["episodic"]) if e.metadata["kind"] == "segment"]
    assert [e.metadata["by"] for e in made].count("extractive") == 1


def test_the_breakers_pause_begins_when_the_call_has_failed(opened):
    """A service that takes its time to fail has not used up the pause by then."""
    clock = ManualClock()

    def hangs(messages):
        clock.advance(seconds=120)
        raise TimeoutError

    model = Model(hangs)
    memory = opened(embedder="none", summarizer=model, pruning=SMALL, clock=clock)
    folded(memory.session("chat"), 0, 60)
    assert len(model.given) == 3


def test_after_the_pause_one_call_is_let_through(opened):
    """While that one is under way, other sessions' folds don't ask."""
    clock, go, hang = ManualClock(), threading.Event(), []

    def act(messages):
        if hang:
            go.wait(30)
        raise ConnectionError

    model = Model(act)
    memory = opened(embedder="none", summarizer=model, pruning=SMALL, clock=clock)
    chats = [memory.session(name) for name in ("a", "b")]
    for chat in chats:
        folded(chat, 0, 12)
    before = len(model.given)
    hang.append(1)
    clock.advance(minutes=15)
    chats[0].add(["U1", "U2", "U3"])
    wait_until(lambda: len(model.given) == before + 1)
    chats[1].add(["U1", "U2", "U3"])
    try:
        wait_until(lambda: len(chats[1].messages(view="window")) < 4, seconds=3)  # the floor writes at once
    finally:
        go.set()
    assert len(model.given) == before + 1


def test_half_a_surrogate_pair_in_a_summary_does_not_stop_folding(opened):
    """A cut emoji in a model's JSON is replaced; the fold is stored."""
    body = b'{"candidates":[{"content":{"parts":[{"text":"Ada \\ud83d"}]},"finishReason":"STOP"}]}'
    with gemini_server(body) as server:
        memory = opened(embedder="none", summarizer=GeminiSummarizer(api_key="k", base_url=server.url), pruning=SMALL)
        chat = memory.session("chat")
        folded(chat, 0, 12)
        assert len(chat.messages(view="window")) < 4


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit(1)])
def test_whatever_a_model_raises_flush_comes_back(opened, error):
    """A cancellation or exit inside a model is a failure like any other."""

    def notes(text):
        raise error

    memory = opened(embedder="none", summarizer=notes, pruning=SMALL)
    chat = memory.session("chat")
    chat.add([f"T{n}" for n in range(6)])
    flushing = threading.Thread(target=memory.flush, daemon=True)
    flushing.start()
    flushing.join(5)
    assert not flushing.is_alive()
    assert len(chat.messages(view="window")) < 4


def test_a_summarizer_that_takes_too_long_is_named_in_words(opened, monkeypatch):
    """`last_error` says who gave no answer, and for how long."""
    monkeypatch.setattr(summarizing, "PATIENCE", 0.05)
    go = threading.Event()
    memory = opened(embedder="none", summarizer=Model(lambda _: go.wait(20) and ""), pruning=SMALL)
    folded(memory.session("chat"), 0, 6)
    go.set()
    assert memory.stats()["last_error"].rstrip()[-1] != ":"


def test_what_waited_to_be_worked_in_is_worked_in_when_the_model_is_back(opened):
    """Beside what is written again, the model gets the segments that waited."""
    clock, down = ManualClock(), []

    def act(messages):
        if down:
            raise ConnectionError
        return f"Segment {len(model.given)}"

    model = Model(act)
    memory = opened(embedder="none", summarizer=model, clock=clock, pruning=SMALL, context={"context_overlap": 0})
    chat = memory.session("chat")
    folded(chat, 0, 10)
    down.append(1)
    folded(chat, 10, 14)
    down.clear()
    clock.advance(minutes=15)
    chat.compact()
    assert {"Segment 1", "Segment 2", "Segment 3", "Segment 4"} <= set(model.given[-1])


class Async:
    name = "async"

    async def summarize(self, messages, *, previous, max_tokens):
        return "x"


class AsyncCall:
    async def __call__(self, text):
        return "x"


@pytest.mark.parametrize("wrong", [Async(), AsyncCall()])
def test_what_is_asynchronous_is_refused_when_opening(opened, wrong):
    """An async function or summarizer can't be called in the background: it is refused at once."""
    with pytest.raises(ConfigError):
        opened(embedder="none", summarizer=wrong)


class Host:
    def notes(self, text):
        return "x"


HOST = Host()


@pytest.mark.parametrize("given", [lambda: str(b"extractive", "ascii"), lambda: HOST.notes], ids=["name", "method"])
def test_the_same_summarizer_twice_is_no_difference(opened, given):
    """Equal names are one, and so are two readings of one bound method."""
    opened(embedder="none", summarizer=given())
    opened(embedder="none", summarizer=given())


def test_a_cap_that_can_never_be_reached_is_said_to_be(opened):
    """A cap on a model whose price is not known is refused when opening."""
    with gemini_server(answer("ok", usage=(10_000_000, 0))) as server:
        model = GeminiSummarizer(model="gemini-2.5-flash", api_key="k", base_url=server.url)
        with pytest.raises(ConfigError, match="input_price"):
            opened(embedder="none", summarizer=model, gemini={"spend_cap": 0.01})


def test_without_room_for_a_summary_no_model_is_asked(opened):
    """With budget.summary=0 turns are folded all the same, into nothing."""
    model = Model(lambda _: "A summary.")
    memory = opened(embedder="none", summarizer=model, pruning=SMALL, budget={"summary": 0})
    folded(memory.session("chat"), 0, 20)
    assert (model.given, memory.stats()["last_error"]) == ([], None)


def test_a_summarizer_may_be_called_as_the_floor_is(opened):
    """A model of that name is marked and asked again like any other."""
    model = Model(lambda _: "")
    model.name = "extractive"
    memory = opened(embedder="none", summarizer=model, pruning=SMALL)
    chat = memory.session("chat")
    folded(chat, 0, 6)
    made = [e for e in chat.entries.list(within="session", types=["episodic"]) if e.metadata["kind"] == "segment"]
    assert {e.metadata["plain"] for e in made} == {True}


def test_a_function_that_says_what_it_cost_is_billed(opened):
    """A function may return a Summary; its tokens and dollars count."""
    memory = opened(embedder="none", summarizer=lambda _: Summary("x", 10, 2, 0.5), pruning=SMALL)
    folded(memory.session("chat"), 0, 4)
    assert memory.stats()["spent"]["cost"] == 0.5


def test_the_error_for_a_misspelt_name_says_the_names(opened):
    """It lists "gemini" and "extractive"."""
    with pytest.raises(ConfigError, match='"extractive"'):
        opened(embedder="none", summarizer="Gemini")


def test_what_a_failed_call_cost_is_counted_before_the_next_is_weighed(opened):
    """However busy the ledger is, the cap sees the bill of the call before."""
    holding, chat = threading.Event(), None

    def hold():
        db = chat.memory._core.parts.ledger._db
        with db.lock, db.write():  # a busy ledger, e.g. a large import
            holding.set()
            threading.Event().wait(0.3)

    def act(messages):
        threading.Thread(target=hold).start()
        assert holding.wait(10)
        raise SummarizerError("refused", cost=0.5)

    model = Model(act)
    pruning, context = (
        {"max_context_items": 2, "summarization_threshold": 40},
        {"max_context_length": 256, "context_overlap": 0},
    )
    memory = opened(embedder="none", summarizer=model, pruning=pruning, context=context, gemini={"spend_cap": 0.4})
    chat = memory.session("chat")
    chat.add([f"T{n} " + "word " * 100 for n in range(40)])
    memory.flush()
    assert len(model.given) == 1


def test_a_turn_longer_than_max_context_length_is_not_sent_whole(opened):
    """A pasted document is worked in piece by piece, each at most context.max_context_length tokens."""
    sent = []
    memory = opened(embedder="none", summarizer=lambda text: sent.append(text) or "x", pruning=SMALL)
    chat = memory.session("chat")
    chat.add(["word " * 100_000, *[f"T{n}" for n in range(6)]])
    memory.flush()
    assert max(memory.count_tokens(text) for text in sent) < 2 * 4096


def test_a_clock_that_is_put_back_ends_a_pause(opened):
    """A machine's clock that was a year ahead when the model failed does not silence it for a year."""
    clock, model = ManualClock(), Model(lambda _: "")
    memory = opened(embedder="none", summarizer=model, pruning=SMALL, clock=clock)
    chat = memory.session("chat")
    clock.advance(days=365)
    folded(chat, 0, 20)
    asked = len(model.given)
    folded(chat, 20, 24)
    assert len(model.given) == asked, "it was not left alone"
    clock.advance(days=-365)
    folded(chat, 24, 28)
    assert len(model.given) > asked


def test_spending_is_told_by_day_and_by_session(opened):
    """Of all, of one day, of one session, of one day of one session."""
    memory = opened(embedder="none")
    parts = memory._core.parts
    for day in range(5):
        for session in range(3):
            parts.ledger.spend(session, day=day, summary=Summary("", 1, 2, 0.5))
    assert parts.ledger.spent(day=3) == {"calls": 3, "input_tokens": 3, "output_tokens": 6, "cost": 1.5}
    assert parts.ledger.spent(session=1)["calls"] == 5
    assert parts.ledger.spent(session=1, day=2)["calls"] == 1
    assert parts.ledger.spent()["calls"] == 15
