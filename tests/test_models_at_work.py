"""Gemini and other models at work inside a memory: whatever they do, no turn is lost, and none waits for them."""

import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tenacity
from conftest import SMALL, found, in_threads, texts, wait_until
from google import genai
from google.genai.types import HttpOptions
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage
from llama_index.core.llms import MockLLM

from neuralflow_memory import ConfigError, Message, SummarizerError
from neuralflow_memory.models.gemini import GeminiSummarizer
from neuralflow_memory.models.prompted import PromptedSummarizer
from neuralflow_memory.pipeline import summarize as summarizing
from neuralflow_memory.testing import HashingEmbedder, ManualClock
from neuralflow_memory.types import Summary

sys.path.insert(0, str(Path(__file__).parent))
from gemini_server import Paced, answer, failure, gemini_server

GEMINI = "gemini:gemini-3.5-flash-lite"
LONG_AGO = {"expiry_time": 1e9}
"""No pause is long enough for a fold of its own, however far a clock is moved."""


@pytest.fixture
def opened(opened):
    """As elsewhere, without an embedder: summaries need none, and opening is faster."""
    return functools.partial(opened, embedder="none")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """The pauses between Gemini's attempts take no time."""
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: None))


def gemini(server, **options):
    return GeminiSummarizer(api_key="k-123", base_url=server.url, **options)


def held(item, go):
    """An item of a server's script, begun when the event *go* is set."""
    return replace(item if isinstance(item, Paced) else Paced(item), until=go)


def told(body):
    """The transcript that a request holds."""
    return body["contents"][0]["parts"][0]["text"]


class Service:
    """A Gemini that notes which turns it was given, unless it is `down`; then it is as broken as told."""

    def __init__(self, broken=None, *, usage=()):
        self.broken = failure(404, "models/gone is not found") if broken is None else broken
        self.down, self.usage = False, usage

    def __call__(self, body):
        seen = dict.fromkeys(re.findall(r"\bT\d+\b", told(body)))
        return self.broken if self.down else answer(f"Noted: {', '.join(seen)}.", usage=self.usage)


def said(chat, start, stop):
    """Add turns start..stop, one at a time; their ids."""
    return [
        chat.add(Message("user" if n % 2 == 0 else "assistant", f"T{n} is about sailing to Oslo", id=f"t{n}"))[0]
        for n in range(start, stop)
    ]


def folded(chat, start, stop):
    """Add turns and wait for each one's folds."""
    ids = []
    for n in range(start, stop):
        ids += said(chat, n, n + 1)
        chat.memory.flush()
    return ids


def segments(chat):
    """Those of the session's summary, in the order of the turns that they cover."""
    made = chat.entries.list(within="session", types=["episodic"])
    return sorted((e for e in made if e.metadata["kind"] == "segment"), key=lambda e: e.metadata["first"])


def whole(chat, ids):
    """All turns are there, in order, each in the window or covered by a segment of the summary; the segments."""
    assert [m.id for m in chat.messages()] == ids
    found = segments(chat)
    covered = {source for s in found for source in s.sources}
    assert [i for i in ids if i not in covered] == [m.id for m in chat.messages(view="window")]
    assert sum(s.metadata["covered"] for s in found) == len(covered)
    summaries = [e for e in chat.entries.list(within="session", types=["episodic"]) if e not in found]
    assert [set(s.sources) for s in summaries] == ([{s.id for s in found}] if found else [])
    assert bool(chat.summary()) == bool(found)
    return found


def usable(chat, newest):
    """Search and context do their work: old turns are found, the prompt fits and ends with the newest turn."""
    assert "T3 is about sailing to Oslo" in found(chat.search("T3", types=["short_term"]))
    context = chat.context("What was T3 about?", max_tokens=1500)
    assert context.tokens <= 1500
    assert [m.id for m in context.messages if m.id][-1] == newest


# -- whatever Gemini does --

MAX_TOKENS = answer("Ada: the flat co", reason="MAX_TOKENS")
CASES = {
    "an answer": ([answer("Ada sails.")], None),
    "a slowly paced answer": ([Paced(answer("Ada sails."), pieces=5, pause=0.02)], None),
    "429 once": ([failure(429, "busy"), answer("Ada sails.")], None),
    "503 twice": ([failure(503, "busy"), failure(503, "busy"), answer("Ada sails.")], None),
    "429": ([failure(429, "quota exhausted")], "429.*quota exhausted"),
    "500": ([failure(500, "backend down")], "500.*backend down"),
    "503": ([failure(503, "overloaded")], "503.*overloaded"),
    "404": (
        [failure(404, "models/old is not found")],
        "was not found: the model may be retired.*models/old is not found",
    ),
    "400": ([failure(400, "API key not valid")], "400.*API key not valid"),
    "empty text": ([answer("")], "returned no text"),
    "blank text": ([answer(" \n ")], "returned no text"),
    "MAX_TOKENS with text": ([MAX_TOKENS], "cut-off.*MAX_TOKENS"),
    "MAX_TOKENS without": ([answer(None, reason="MAX_TOKENS", thought="hm")], "returned no text .*MAX_TOKENS"),
    "malformed JSON": ([b'{"candidates": [{"content"'], "JSONDecodeError"),
    "not a JSON object": ([b"[1, 2]"], "gemini-3.5-flash-lite: (failed|returned no text)"),
    "a blocked prompt": ([{"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}], "PROHIBITED_CONTENT"),
    "a refused answer": ([answer("Ada", reason="SAFETY")], "refused.*SAFETY"),
    "over the limit": ([answer("word " * 5000)], r"a summary of \d+ tokens, and \d+ were asked for"),
}


@pytest.mark.parametrize(("script", "trouble"), CASES.values(), ids=CASES)
def test_nothing_is_lost_or_delayed_whatever_gemini_does(opened, script, trouble):
    """60 turns come in while the first request hangs; then the service does what it does, for good.

    Each add returned before the service had answered anything, so none waits for it.
    """
    go = threading.Event()
    options = {"pruning": {"max_context_items": 5, "summarization_threshold": 10}, "clock": ManualClock()}
    with gemini_server(*(held(item, go) for item in script)) as server:
        summarizer = gemini(server)
        memory = opened(summarizer=summarizer, **options)
        chat = memory.session("chat", user_id="ada")
        ids = said(chat, 0, 30)
        wait_until(lambda: server.requests)
        ids += said(chat, 30, 60)
        assert not go.is_set()
        assert whole(chat, ids) == []  # nothing was folded: the request still hangs
        usable(chat, "t59")
        go.set()
        in_threads(memory.flush)
        made = whole(chat, ids)
        assert len(chat.messages(view="window")) < 20
        usable(chat, "t59")
        stats = memory.stats()
        if trouble is None:
            assert {(s.metadata["by"], s.metadata["plain"]) for s in made} == {(GEMINI, False)}
            assert chat.summary().startswith("Ada sails.")
            assert (stats["summarizer_fallbacks"], stats["last_error"]) == (0, None)
        else:
            assert {(s.metadata["by"], s.metadata["plain"]) for s in made} == {("extractive", True)}
            assert "is about sailing to Oslo" in chat.summary()
            assert stats["summarizer_fallbacks"] > 0
            assert stats["last_error"].startswith(GEMINI)
            assert re.search(trouble, stats["last_error"])
        in_threads(memory.close)
        memory = opened(summarizer=summarizer, **options)
        chat = memory.session("chat", user_id="ada")
        assert {s.key for s in whole(chat, ids)} == {s.key for s in made}
        ids += said(chat, 60, 80)
        in_threads(memory.flush)
        whole(chat, ids)
        usable(chat, "t79")


@pytest.mark.parametrize("how", ["stalls", "drips", "refuses connections"])
def test_a_service_that_never_gets_there(opened, monkeypatch, how):
    """A request that hangs, an answer that never ends, nobody who listens: flush() and close() come to an end."""
    monkeypatch.setattr(summarizing, "PATIENCE", 0.3 if how == "drips" else 30.0)
    item = Paced(answer("Ada sails. " * 20), pieces=600, pause=0.1) if how == "drips" else None
    with gemini_server(item) as server:
        summarizer = gemini(server, timeout=10.0 if how == "drips" else 0.1)
        if how == "refuses connections":
            server.shutdown()
            server.server_close()
        embedder = HashingEmbedder()
        memory = opened(summarizer=summarizer, pruning=SMALL, clock=ManualClock(), embedder=embedder)
        chat = memory.session("chat", user_id="ada")
        ids = said(chat, 0, 60)
        in_threads(memory.flush)
        made = whole(chat, ids)
        assert {s.metadata["by"] for s in made} == {"extractive"}
        usable(chat, "t59")
        trouble = {"stalls": "ReadTimeout", "drips": "", "refuses connections": "ConnectError"}[how]
        assert re.match(f"{GEMINI}: .*{trouble}", memory.stats()["last_error"])
        in_threads(memory.close)
        memory = opened(summarizer="extractive", pruning=SMALL, embedder=embedder)
        chat = memory.session("chat", user_id="ada")
        ids += folded(chat, 60, 70)
        whole(chat, ids)
        usable(chat, "t69")


def test_closing_while_gemini_hangs(opened, monkeypatch):
    """Closing waits no longer than a fold does; the folder is free at once, with every turn in it."""
    monkeypatch.setattr(summarizing, "PATIENCE", 0.2)
    with gemini_server(None) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL, clock=ManualClock())
        ids = said(memory.session("chat", user_id="ada"), 0, 60)
        wait_until(lambda: server.requests)
        in_threads(memory.close)
        with opened(summarizer="extractive", pruning=SMALL) as memory:
            chat = memory.session("chat", user_id="ada")
            whole(chat, ids)
            ids += folded(chat, 60, 61)
            whole(chat, ids)
            assert len(chat.messages(view="window")) < 8
            usable(chat, "t60")


async def test_the_event_loop_goes_on_while_gemini_hangs(opened):
    """Async twins too return before the service has answered anything."""
    go = threading.Event()
    with gemini_server(held(answer("Ada sails."), go)) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL)
        chat = memory.session("chat", user_id="ada")
        for n in range(60):
            await chat.aadd(f"T{n} is about sailing to Oslo")
        assert [h.entry.content for h in await chat.asearch("T3", k=1)] == ["T3 is about sailing to Oslo"]
        context = await chat.acontext("What was T3 about?", max_tokens=1500)
        assert context.messages[-1].content == "T59 is about sailing to Oslo"
        assert len(await chat.amessages(view="window")) == 60
        assert not go.is_set()
        go.set()
        await memory.aflush()
        assert whole(chat, [m.id for m in await chat.amessages()])
        assert (await chat.asummary()).startswith("Ada sails.")


def test_two_sessions_are_summarized_at_once(opened):
    """Their requests are under way at the same time, and each summary speaks of its own chat."""
    go, service = threading.Event(), Service()
    with gemini_server(held(service, go)) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL)
        chats = [memory.session(name, user_id="ada") for name in ("one", "two")]
        ids = [said(chat, 100 * n, 100 * n + 8) for n, chat in enumerate(chats)]
        wait_until(lambda: len(server.requests) == 2)
        assert [chat.summary() for chat in chats] == ["", ""]
        go.set()
        memory.flush()
        for chat, own in zip(chats, ids, strict=True):
            (segment,) = whole(chat, own)
            assert segment.content == f"Noted: {', '.join(i.upper() for i in segment.sources)}."
            assert chat.summary().startswith(segment.content)


# -- the breaker, and what is written again --


def test_three_failures_in_a_row_give_the_service_a_rest(opened):
    """No request more, until a pause is over; then one, which doubles the pause, or ends it all if it succeeds."""
    clock, service = ManualClock(), Service()
    service.down = True
    with gemini_server(service) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL, clock=clock)
        chat = memory.session("chat", user_id="ada")
        ids = folded(chat, 0, 24)
        assert (memory.stats()["folds"] > 3, len(server.requests)) == (True, 3)
        for pause, requests in ((29, 3), (1, 4), (59, 4), (1, 5), (119, 5)):
            clock.advance(seconds=pause)
            ids += folded(chat, len(ids), len(ids) + 8)
            assert len(server.requests) == requests
        service.down = False
        clock.advance(seconds=1)
        ids += folded(chat, len(ids), len(ids) + 8)
        assert not any(s.metadata["plain"] for s in whole(chat, ids))
        before, folds = len(server.requests), memory.stats()["folds"]
        assert before > 6
        ids += folded(chat, len(ids), len(ids) + 16)
        assert len(server.requests) - before >= memory.stats()["folds"] - folds > 2  # closed for good
        assert {s.metadata["by"] for s in whole(chat, ids)} == {GEMINI}
        service.down = True
        ids += folded(chat, len(ids), len(ids) + 16)
        service.down = False
        clock.advance(seconds=30)  # what failed before the success is forgotten
        ids += folded(chat, len(ids), len(ids) + 1)
        assert {s.metadata["by"] for s in whole(chat, ids)} == {GEMINI}


def rest(clock):
    """Let the breaker's longest pause pass."""
    clock.advance(minutes=15)


def test_what_the_floor_wrote_is_written_again_once_gemini_is_back(opened):
    """Segments and summary are the model's then; what was deleted meanwhile is in neither, nor in any request."""
    clock, service = ManualClock(), Service()
    service.down = True
    with gemini_server(service) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL, clock=clock)
        chat = memory.session("chat", user_id="ada")
        chat.add(Message("user", "T1000 is the password Swordfish", id="secret"))
        ids = ["secret", *folded(chat, 0, 20)]
        assert {(s.metadata["by"], s.metadata["plain"]) for s in whole(chat, ids)} == {("extractive", True)}
        assert "Swordfish" in chat.summary()
        chat.entries.delete("secret")
        ids.remove("secret")
        memory.flush()
        whole(chat, ids)
        service.down, before = False, len(server.requests)
        rest(clock)
        ids += folded(chat, 20, 21)
        made = whole(chat, ids)
        assert {(s.metadata["by"], s.metadata["plain"]) for s in made} == {(GEMINI, False)}
        for segment in made:
            assert segment.content == f"Noted: {', '.join(i.upper() for i in segment.sources)}."
        assert chat.summary().startswith("Noted: T0")
        everything = str([e.content for e in chat.entries.list()]) + chat.summary() + str(server.requests[before:])
        assert "Swordfish" not in everything
        assert "T1000" not in everything
        assert found(chat.search("T0", types=["short_term"]))[0] == "T0 is about sailing to Oslo"
        before = len(server.requests)
        chat.compact()
        assert len(server.requests) == before  # it is done


def test_compact_has_it_written_again_at_once(opened):
    """Whoever does not want to wait for the next turn calls compact(); it folds nothing that need not be folded."""
    clock, service = ManualClock(), Service()
    service.down = True
    with gemini_server(service) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL, clock=clock)
        chat = memory.session("chat", user_id="ada")
        ids = folded(chat, 0, 8)
        service.down = False
        window = chat.messages(view="window")
        rest(clock)
        report = chat.compact()
        assert (report.needed, report.folded) == (False, ())
        assert {s.metadata["by"] for s in whole(chat, ids)} == {GEMINI}
        assert chat.messages(view="window") == window
        assert chat.summary().startswith("Noted: ")


def test_a_reopened_memory_has_it_written_again(opened):
    """The marks are in the ledger: a process that finds the model back does what an earlier one could not."""
    service = Service()
    service.down = True
    with gemini_server(service) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL)
        ids = folded(memory.session("chat", user_id="ada"), 0, 12)
        memory.close()
        service.down = False
        memory = opened(summarizer=gemini(server), pruning=SMALL)
        chat = memory.session("chat", user_id="ada")
        assert {s.metadata["by"] for s in whole(chat, ids)} == {"extractive"}
        ids += folded(chat, 12, 13)
        assert {s.metadata["by"] for s in whole(chat, ids)} == {GEMINI}


@pytest.mark.parametrize("race", ["delete", "update"])
def test_what_changes_while_it_is_written_again_is_not_spoken_of(opened, race):
    """The model's words about a text that is gone are thrown away, and written anew from what is left."""
    clock, service, go = ManualClock(), Service(), threading.Event()
    service.down = True
    go.set()
    with gemini_server(held(service, go)) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL, clock=clock)
        chat = memory.session("chat", user_id="ada")
        ids = folded(chat, 0, 8)
        service.down, before = False, len(server.requests)
        go.clear()
        rest(clock)
        ids += said(chat, 8, 9)
        wait_until(lambda: len(server.requests) > before)
        assert "T1 is about" in told(server.requests[before]["body"])
        if race == "delete":
            chat.entries.delete("t1")
            ids.remove("t1")
        else:
            chat.entries.update("t1", content="T77 it is now")
        go.set()
        memory.flush()
        ids += folded(chat, 9, 10)
        made = whole(chat, ids)
        assert {s.metadata["by"] for s in made} == {GEMINI}
        everything = " ".join([chat.summary(), *(s.content for s in made)])
        assert "T0" in everything
        assert not re.search(r"\bT1\b", everything)
        assert (race == "delete") != ("T77" in everything + str(texts(chat.messages(view="window"))))


def test_only_what_was_made_in_the_models_place_is_written_again(opened):
    """A chat that was summarized without a model on purpose stays so when it is opened with one."""
    memory = opened(summarizer="extractive", pruning=SMALL)
    ids = folded(memory.session("chat", user_id="ada"), 0, 12)
    memory.close()
    with gemini_server(Service()) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL)
        chat = memory.session("chat", user_id="ada")
        before = {s.key: s.version for s in whole(chat, ids)}
        chat.compact()
        assert server.requests == []
        ids += folded(chat, 12, 20)
        made = whole(chat, ids)
        assert {s.key: s.version for s in made if s.metadata["by"] == "extractive"} == before
        assert {s.metadata["by"] for s in made if s.key not in before} == {GEMINI}
        assert not any(s.metadata["plain"] for s in made)


KILLED = """
import os, signal, sys
from neuralflow_memory import Message, _failpoints, open_memory
from neuralflow_memory.testing import ManualClock

folder, place = sys.argv[1:]
up, clock = [], ManualClock()

def die(passed):
    if passed == place:
        os.kill(os.getpid(), signal.SIGKILL)

def notes(text):
    if not up:
        raise ConnectionError("no route")
    up.append(text)
    die(f"call {len(up) - 1}")
    return "Noted by the model."

pruning = {"max_context_items": 2, "summarization_threshold": 4}
memory = open_memory(folder, embedder="none", summarizer=notes, clock=clock, pruning=pruning)
chat = memory.session("chat", user_id="ada")
for n in range(12):
    chat.add(Message("user", f"T{n} is about sailing to Oslo", id=f"t{n}"))
    memory.flush()
up.append("now")
clock.advance(minutes=15)
_failpoints.hook = die
chat.compact()
"""


@pytest.mark.parametrize("place", ["call 2", "fold.applied", "fold.committed"])
def test_a_crash_while_it_is_written_again_loses_nothing(opened, folder, place):
    """Killed between two calls, before the commit or after it: all old texts or all new ones, and the work goes on."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(folder), place], capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL, run.stderr

    def notes(text):
        return "Noted by the model."

    memory = opened(embedder="none", summarizer=notes, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    ids = [f"t{n}" for n in range(12)]
    done = place == "fold.committed"
    assert {(s.metadata["by"], s.metadata["plain"]) for s in whole(chat, ids)} == {
        ("notes", False) if done else ("extractive", True)
    }
    assert ("Noted by the model." in chat.summary()) == done
    chat.compact()
    assert {(s.metadata["by"], s.metadata["plain"]) for s in whole(chat, ids)} == {("notes", False)}
    assert chat.summary().startswith("Noted by the model.")
    assert memory.stats(verify=True)["integrity"] == "ok"


def test_an_answer_that_comes_too_late_changes_nothing_but_is_billed(opened, monkeypatch):
    """The floor has written by then; the breaker does not take it for a success either."""
    monkeypatch.setattr(summarizing, "PATIENCE", 0.1)
    go = threading.Event()
    with gemini_server(held(answer("Too late.", usage=(1000, 200)), go)) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL, clock=ManualClock())
        chat = memory.session("chat", user_id="ada")
        ids = folded(chat, 0, 12)
        before = [(s.key, s.version) for s in whole(chat, ids)]
        assert memory.stats()["spent"]["calls"] == 0
        summary, asked = chat.summary(), len(server.requests)
        go.set()
        wait_until(lambda: memory.stats()["spent"]["calls"] == asked)
        assert memory.stats()["spent"] == {
            "calls": asked,
            "input_tokens": 1000 * asked,
            "output_tokens": 200 * asked,
            "cost": pytest.approx(0.0008 * asked),
        }
        chat.compact()
        assert (len(server.requests), chat.summary()) == (asked, summary)
        assert [(s.key, s.version) for s in whole(chat, ids)] == before
        assert "Too late." not in str([e.content for e in chat.entries.list()])


# -- what it costs --


def spent(chat, **of):
    """Calls, tokens in and out, and dollars that the ledger has of a session."""
    ledger = chat.memory._core.parts.ledger
    return tuple(ledger.spent(session=ledger.session_number(chat.scope), **of).values())


def test_tokens_and_dollars_are_counted_for_each_session(opened):
    """As the service reports them, thoughts and unusable answers included; what was refused costs nothing."""
    script = [
        answer("Ada sails.", usage=(1000, 200, 50)),
        answer(None, reason="MAX_TOKENS", usage=(2000, 0, 400)),
        failure(400, "no"),
        {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 500}},
    ]
    with gemini_server(*script) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL, clock=ManualClock())
        good, bad, quiet = (memory.session(name, user_id="ada") for name in ("good", "bad", "quiet"))
        for chat, turns in ((good, 8), (bad, 24), (quiet, 3)):
            folded(chat, 0, turns)
        rows = [(1, 1000, 250, pytest.approx(0.000925)), (3, 2500, 400, pytest.approx(0.00175)), (0, 0, 0, 0)]
        assert len(server.requests) == 4
        wait_until(lambda: memory.stats()["spent"]["calls"] == 4)
        assert [spent(chat) for chat in (good, bad, quiet)] == rows
        assert spent(bad, day=20454) == rows[1]
        assert spent(bad, day=20455) == (0, 0, 0, 0)
        assert tuple(memory.stats()["spent"].values()) == (4, 3500, 650, pytest.approx(0.002675))
        memory.close()
        assert tuple(opened(summarizer="extractive").stats()["spent"].values())[:3] == (4, 3500, 650)


def test_a_spend_cap_ends_the_days_requests(opened):
    """Once it is spent, to the cent, nothing is asked until the next day of UTC; then what the floor wrote is written again."""
    clock, service = ManualClock(), Service(usage=(1_000_000, 0))
    with gemini_server(service) as server:
        options = {"pruning": SMALL, "clock": clock, "context": LONG_AGO}
        memory = opened(summarizer=gemini(server), gemini={"spend_cap": 0.6}, **options)
        chat = memory.session("chat", user_id="ada")
        clock.advance(hours=9)
        ids = folded(chat, 0, 20)
        assert len(server.requests) == 2  # 30 cents each
        assert memory.stats()["spent"]["cost"] == pytest.approx(0.6)
        assert [s.metadata["by"] for s in whole(chat, ids)] == [GEMINI, GEMINI, "extractive", "extractive"]
        assert memory.stats()["last_error"] == f"{GEMINI}: today's gemini.spend_cap of 0.6 US dollars is spent"
        memory.close()
        memory = opened(summarizer=gemini(server), gemini={"spend_cap": 0.6}, **options)  # the ledger remembers
        chat = memory.session("chat", user_id="ada")
        for step in ({"hours": 14, "minutes": 59, "seconds": 59}, {"seconds": 1}):
            assert len(server.requests) == 2
            clock.advance(**step)
            ids += folded(chat, len(ids), len(ids) + 1)
        assert len(server.requests) == 4
        assert memory.stats()["spent"]["cost"] == pytest.approx(1.2)
        clock.advance(days=1)
        ids += folded(chat, len(ids), len(ids) + 1)
        clock.advance(days=1)
        ids += folded(chat, len(ids), len(ids) + 1)
        assert {s.metadata["by"] for s in whole(chat, ids)} == {GEMINI}


def test_a_cap_counts_failures_and_may_be_zero(opened):
    """An answer that was charged but is of no use counts; with a cap of 0 nothing is ever asked."""
    unusable = answer(None, reason="MAX_TOKENS", usage=(0, 0, 200_000))  # 50 cents
    with gemini_server(unusable) as server:
        for cap, requests in ((0, 0), (0.4, 1)):
            memory = opened(summarizer=gemini(server), gemini={"spend_cap": cap}, pruning=SMALL, clock=ManualClock())
            folded(memory.session(f"cap {cap}", user_id="ada"), 0, 20)
            assert len(server.requests) == requests
            assert "spend_cap" in memory.stats()["last_error"]
            memory.close()


# -- which model, and what it is told --


def instructions(server):
    return {r["body"]["systemInstruction"]["parts"][0]["text"] for r in server.requests}


def test_the_model_is_told_the_limit_and_the_language(opened):
    """The instruction keeps the chat's language and names the limit that the settings leave; turns are sent as they are."""
    with gemini_server(answer("Ada segelt nach Oslo.")) as server:
        memory = opened(summarizer=gemini(server), pruning=SMALL | {"summary_max_tokens": 200})
        chat = memory.session("chat", user_id="ada")
        chat.add([Message("user", f"Am {n}. Mai segle ich nach Oslo.", name="Ada") for n in range(1, 9)])
        memory.flush()
        assert chat.summary().startswith("Ada segelt nach Oslo.")
    (instruction,) = instructions(server)
    assert "At most 100 tokens" in instruction
    assert "Write in the language that the conversation is mostly in" in instruction
    first = json.loads(told(server.requests[0]["body"]).split("\n")[0])
    assert (first["role"], first["name"]) == ("user", "Ada")
    assert first["text"] == "Am 1. Mai segle ich nach Oslo."


def test_prompts_of_ones_own(opened):
    """For Gemini and for any other model."""
    with gemini_server(answer("Ada sails.")) as server:
        memory = opened(":memory:", summarizer=gemini(server, prompt="{tokens} tokens, {words} words."), pruning=SMALL)
        said(memory.session("chat"), 0, 8)
        memory.flush()
    assert instructions(server) == {"375 tokens, 250 words."}
    given = []
    model = PromptedSummarizer(lambda text: given.append(text) or "Ada sails.", prompt="{tokens} or {words}?")
    memory = opened(":memory:", summarizer=model, pruning=SMALL)
    said(memory.session("chat"), 0, 8)
    memory.flush()
    assert given[0].startswith('375 or 250?\n\n{"role": "user"')


@pytest.mark.parametrize("summarizer", [None, "gemini", "extractive"])
def test_a_key_among_the_settings(opened, monkeypatch, summarizer):
    """Gemini is used where it is configured, with its model; not where sentences are asked for."""
    with gemini_server(answer("Ada sails.")) as server:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        memory = opened(summarizer=summarizer, gemini={"api_key": "k-9", "model": "gemini-3.6-flash"}, pruning=SMALL)
        chat = memory.session("chat", user_id="ada")
        ids = folded(chat, 0, 8)
        (segment,) = whole(chat, ids)
        name = memory.stats()["summarizer"]
        assert segment.metadata["by"] == name
        assert not segment.metadata["plain"]
    if summarizer == "extractive":
        assert (name, server.requests) == ("extractive", [])
        return
    (request,) = server.requests
    assert name == "gemini:gemini-3.6-flash"
    assert request["path"] == "/v1beta/models/gemini-3.6-flash:generateContent"
    assert {k.lower(): v for k, v in request["headers"].items()}["x-goog-api-key"] == "k-9"


INITIALIZED = """
import sys
from google.cloud import aiplatform
from google.oauth2.credentials import Credentials
from neuralflow_memory import open_memory

aiplatform.init(project="acme", location="europe-west4", credentials=Credentials(token="theirs"))
pruning = {"max_context_items": 2, "summarization_threshold": 4}
for options in ({}, {"gemini": {"location": "us-east1"}}, {"gemini": {"project": "mine"}, "summarizer": "extractive"}):
    options = {"summarizer": "gemini", **options}
    with open_memory(":memory:", embedder="none", pruning=pruning, **options) as memory:
        chat = memory.session("chat")
        chat.add([f"T{n}" for n in range(5)])
        memory.flush()
        print(memory.stats()["summarizer"], chat.summary().splitlines()[0])
"""


@pytest.mark.slow  # importing aiplatform takes up to 11 s
def test_gemini_is_used_with_what_aiplatform_was_given():
    """`summarizer="gemini"` needs no settings in a program that has called `aiplatform.init`."""
    with gemini_server(answer("Ada sails.")) as server:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", INITIALIZED],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"GOOGLE_VERTEX_BASE_URL": server.url},
        )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{GEMINI} Ada sails."] * 2 + ["extractive user: T0"]
    seen = [(r["path"].partition("/publishers")[0], r["headers"]["Authorization"]) for r in server.requests]
    assert seen == [
        ("/v1beta1/projects/acme/locations/europe-west4", "Bearer theirs"),
        ("/v1beta1/projects/acme/locations/us-east1", "Bearer theirs"),
    ]


def langchain_model():
    usage = {"input_tokens": 500, "output_tokens": 60, "total_tokens": 560}
    said = AIMessage("Ada sails.", usage_metadata=usage, response_metadata={"finish_reason": "stop"})
    return GenericFakeChatModel(messages=itertools.repeat(said))


def function(text):
    return "Ada sails."


class Own:
    """A summarizer without a name."""

    def summarize(self, messages, *, previous, max_tokens):
        return Summary("Ada sails.", 7, 8, 9.0)


@pytest.mark.parametrize(
    ("model", "name", "text", "took"),
    [
        (langchain_model(), "GenericFakeChatModel", "Ada sails.", (1, 500, 60, 0.0)),
        (FakeListChatModel(responses=["Ada sails."]), "FakeListChatModel", "Ada sails.", (1, 0, 0, 0.0)),
        (MockLLM(max_tokens=3), "MockLLM", "text text text", (1, 0, 0, 0.0)),
        (function, "function", "Ada sails.", (1, 0, 0, 0.0)),
        (Own(), "Own", "Ada sails.", (1, 7, 8, 9.0)),
    ],
)
def test_any_model_of_the_hosts_writes_the_summaries(opened, model, name, text, took):
    """A LangChain chat model, a LlamaIndex LLM, a function, an object; with the tokens they took where they say so."""
    memory = opened(summarizer=model, pruning=SMALL)
    again = opened(summarizer=model, pruning=SMALL)  # the same object is no difference
    chat = again.session("chat", user_id="ada")
    ids = folded(chat, 0, 8)
    (segment,) = whole(chat, ids)
    assert (segment.content, segment.metadata["by"], segment.metadata["plain"]) == (text, name, False)
    assert chat.summary().startswith(text)
    stats = memory.stats()
    assert (stats["summarizer"], stats["last_error"], tuple(stats["spent"].values())) == (name, None, took)


class Down(FakeListChatModel):
    """A model of LangChain's that is out of service."""

    def _call(self, *args, **kwargs):
        raise ConnectionError("no route")


class BrokenLLM(MockLLM):
    """The same of LlamaIndex's."""

    def complete(self, *args, **kwargs):
        raise ConnectionError("no route")


def raising(text):
    raise KeyError("a bug of the host's")


@pytest.mark.parametrize(
    ("model", "trouble"),
    [
        (Down(responses=[]), "Down: failed: ConnectionError: no route"),
        (BrokenLLM(), "BrokenLLM: failed: ConnectionError: no route"),
        (raising, "raising: failed: KeyError: .*a bug of the host's.*"),
        (lambda text: "", "<lambda>: .*an empty text.*"),
        (lambda text: None, "<lambda>: .*no text but None"),
        (lambda text: "word " * 5000, r"<lambda>: .*a summary of \d+ tokens, and \d+ were asked for"),
    ],
)
def test_a_model_of_the_hosts_that_fails_costs_no_turn(opened, model, trouble):
    """The floor writes, and `stats()` says why."""
    memory = opened(summarizer=model, pruning=SMALL, clock=ManualClock())
    chat = memory.session("chat", user_id="ada")
    ids = folded(chat, 0, 60)
    assert {(s.metadata["by"], s.metadata["plain"]) for s in whole(chat, ids)} == {("extractive", True)}
    usable(chat, "t59")
    assert re.fullmatch(trouble, memory.stats()["last_error"])


def test_a_function_that_streams(opened):
    """A host's own function, streaming from the real SDK; a stream that breaks off or stalls is a failure like another."""
    parts = [answer("Ada ", reason=None), answer("sails.")]
    broken = b'data: {"candidates": [\r\n\r\n'
    with gemini_server(
        broken, Paced(parts, pieces=2, pause=30), failure(503, "busy"), Paced(parts, pieces=4)
    ) as server:
        client = genai.Client(vertexai=False, api_key="k", http_options=HttpOptions(base_url=server.url, timeout=200))

        def streamed(text):
            chunks = client.models.generate_content_stream(model="gemini-3.5-flash-lite", contents=text)
            return "".join(chunk.text or "" for chunk in chunks)

        clock = ManualClock()
        memory = opened(summarizer=streamed, pruning=SMALL, clock=clock)
        chat = memory.session("chat", user_id="ada")
        ids = folded(chat, 0, 60)
        assert len(server.requests) == 3
        assert {s.metadata["plain"] for s in whole(chat, ids)} == {True}
        assert "503" in memory.stats()["last_error"]
        rest(clock)
        ids += folded(chat, 60, 61)
        assert {(s.content, s.metadata["by"]) for s in whole(chat, ids)} == {("Ada sails.", "streamed")}
        usable(chat, "t60")


async def asynchronous(text):
    return text


@pytest.mark.parametrize(
    "wrong",
    [
        Own,
        FakeListChatModel,
        MockLLM,
        GeminiSummarizer,
        str,
        object(),
        "gpt-5",
        "",
        7,
        False,
        {},
        [function],
        asynchronous,
    ],
)
def test_what_is_no_summarizer_is_refused_when_opening(opened, wrong):
    """Not in the background, when the first chat is long; and the folder is free for a second try."""
    with pytest.raises(ConfigError, match=r"summarizer= takes .*an object with name and summarize"):
        opened(summarizer=wrong)
    assert opened(summarizer=function).stats()["summarizer"] == "function"


def test_gemini_without_anything_to_sign_in_with_is_refused_when_opening(opened):
    """The error says what to set, and the folder is free for a second try."""
    with pytest.raises(
        ConfigError, match=r"set gemini.project or gemini.api_key, or call google.cloud.aiplatform.init"
    ):
        opened(summarizer="gemini")
    assert opened(summarizer="extractive").stats()["summarizer"] == "extractive"


def test_another_model_for_an_open_folder_is_refused(opened):
    """One memory has one summarizer, whoever opened it first."""
    opened(summarizer=function)
    for other in (Own(), "extractive", lambda text: "Ada sails."):
        with pytest.raises(ConfigError, match=r"summarizer differ"):
            opened(summarizer=other)
    assert opened().stats()["summarizer"] == "function"  # whoever names none takes what is there


def test_the_errors_of_a_summarizer_are_its_bill(opened):
    """A summarizer of one's own says with its error what a useless call has cost."""

    class Charging:
        name = "charging"

        def summarize(self, messages, *, previous, max_tokens):
            raise SummarizerError("refused", input_tokens=10, output_tokens=2, cost=0.5)

    memory = opened(summarizer=Charging(), pruning=SMALL, gemini={"spend_cap": 0.9}, clock=ManualClock())
    folded(memory.session("chat", user_id="ada"), 0, 30)
    assert tuple(memory.stats()["spent"].values()) == (2, 20, 4, 1.0)
