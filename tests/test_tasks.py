"""Task memory: values, notes and progress until a task ends, one outcome afterwards, and nothing left behind."""

import asyncio
import contextvars
import inspect
import itertools
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import pytest
from conftest import found, in_threads, index_keys, live_keys, rows, texts, wait_until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neuralflow_memory import (
    AccessDenied,
    ClosedError,
    ConflictError,
    InputError,
    MemoryType,
    MessageError,
    NotFound,
    _failpoints,
    open_memory,
)
from neuralflow_memory.errors import TaskError
from neuralflow_memory.pipeline.tasks import (
    LONGEST_DETAIL,
    LONGEST_NOTE,
    LONGEST_VALUE,
    MOST_DETAILS,
    MOST_NOTES,
    MOST_OVER,
    MOST_VALUES,
    shown,
)
from neuralflow_memory.rules.analysis import recorded
from neuralflow_memory.task import Task
from neuralflow_memory.testing import ManualClock

LONE = "half \ud800 a pair"
WEEK = 7 * 24 * 3600
DAY = 86400


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def memory(opened):
    """Without a vector index, which only some of these tests are about."""
    return opened(embedder="none")


@pytest.fixture
def timed(opened, clock):
    """A session whose time stands still until it is moved."""
    return opened(clock=clock, embedder="none").session("chat", user_id="ada")


def indexed(opened, **options):
    """A session with a vector index."""
    return opened(**options).session("chat", user_id="ada")


def flushed(session):
    """Whether the vector index holds what is there and nothing else."""
    session.memory.flush()
    return index_keys(session.memory) == live_keys(session.memory)


def working(session):
    """The lines that a prompt shows of tasks, and of temporary notes; RAM and ledger must agree."""
    parts = session._parts
    resident = parts.resident(session.scope)
    with resident.lock:  # a fold may be under way
        window, stored = parts.window(session.scope), parts.ledger.window(session.scope)
        with parts.ledger._db.read() as db:
            features = {n for (n,) in db.execute("SELECT no FROM features")}
        assert resident.index is None or set(resident.index.number[resident.index.alive].tolist()) <= features
    if stored:
        assert window.session == stored.session
    assert {t.number: t for t in window.tasks} == {t.number: t for t in (stored.tasks if stored else [])}
    tasks, notes = shown(window.tasks, now=parts.clock(), open_max_age=WEEK)
    return [t.lines for t in tasks], [line for n in notes for line in n.lines]


def outcomes(session):
    return session.entries.list(types=[MemoryType.EPISODIC], filter={"kind": "task"}, within="session")


def entry_of(session, task):
    return session.entries.get(task.id)


# -- a task from its beginning to its end


def test_a_task_is_made_without_any_io(memory):
    """Only starting it writes."""
    before = rows(memory)
    task = memory.session("chat").task("book flight")
    assert (task.name, task.id, task.status, repr(task)) == ("book flight", None, "new", "Task('book flight', new)")
    assert rows(memory) == before


def test_a_block_keeps_values_notes_and_progress(timed):
    """What is set is got, and stands in the prompt: heading, values, notes; temporary notes apart."""
    with timed.task("book flight") as task:
        task.set("destination", "Lisbon")
        task.set("seats", {"adults": 2})
        task.note("prefers an aisle seat")
        task.note("comparing\nfares", temporary=True)
        task.progress(0.4, "comparing fares")
        assert (task.status, task.get("destination"), task.get("seats")) == ("open", "Lisbon", {"adults": 2})
        assert (task.get("missing"), task.get("missing", 7)) == (None, 7)
        assert task.values() == {"destination": "Lisbon", "seats": {"adults": 2}}
        assert task.notes() == ["prefers an aisle seat", "comparing\nfares"]
        assert working(timed) == (
            [
                [
                    "book flight: open, 40% done, comparing fares",
                    "- destination: Lisbon",
                    '- seats: {"adults": 2}',
                    "- prefers an aisle seat",
                ]
            ],
            ["book flight: comparing fares"],
        )
        entry = entry_of(timed, task)
        assert (entry.type, entry.id[:5], len(entry.id), entry.version) == (MemoryType.WORKING, "task-", 17, 6)
        assert entry.content == "\n".join(working(timed)[0][0])
        task.progress(1)
        assert working(timed)[0][0][0] == "book flight: open, 100% done"


def test_completing_clears_the_task_and_leaves_an_outcome(timed, clock):
    """Values and notes go; an episode of the session says what it came to, and a line stays in working memory."""
    task = timed.task("book flight")
    task.start()
    task.set("destination", "Lisbon")
    task.note("prefers an aisle seat")
    task.note("comparing fares", temporary=True)
    began = clock.now
    clock.advance(minutes=5)
    task.complete("booked TP 123")
    assert task.status == "completed"
    assert working(timed) == ([["book flight: completed, booked TP 123"]], [])
    entry = entry_of(timed, task)
    assert (entry.metadata["values"], entry.metadata["notes"]) == ({}, [])
    assert entry.expires_at == clock.now + timedelta(days=1)
    [outcome] = outcomes(timed)
    assert outcome.content == (
        "Task book flight: completed. booked TP 123. destination: Lisbon. prefers an aisle seat."
    )
    assert (outcome.provenance, outcome.sources) == ("derived", (task.id,))
    assert outcome.metadata == {
        "kind": "task",
        "name": "book flight",
        "status": "completed",
        "started": began.isoformat(),
        "ended": clock.now.isoformat(),
    }
    assert timed.messages() == timed.messages(view="window") == []


def test_failing_says_why(timed):
    """With a text, or with an error; long errors are cut, odd ones don't matter."""

    class Odd(Exception):
        def __str__(self):
            raise RuntimeError

    for why in ("no seats", TimeoutError("no answer"), KeyError(), Odd(), ValueError("x" * 9999), ValueError(LONE)):
        with timed.task("book flight") as task:
            task.fail(why)
        assert task.status == "failed"
    told = [o.content.removeprefix("Task book flight: failed: ") for o in outcomes(timed)]
    assert told[:4] == ["no seats.", "TimeoutError: no answer.", "KeyError.", "Odd."]
    assert len(told[4]) == LONGEST_DETAIL
    assert told[5] == "ValueError: half ? a pair."
    assert working(timed)[0][0] == ["book flight: failed, TimeoutError: no answer"]


def test_leaving_the_block_completes_without_a_result(timed):
    """And ending it in the block is enough."""
    with timed.task("one"):
        pass
    with timed.task("two") as two:
        two.complete("done")
    assert [o.content for o in outcomes(timed)] == ["Task one: completed.", "Task two: completed. done."]
    assert working(timed)[0] == [["one: completed"], ["two: completed, done"]]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_an_error_in_the_block_fails_the_task_and_goes_on(chat, error):
    """Whatever kind of error it is."""
    with pytest.raises(type(error)) as raised:
        with chat.task("book flight") as task:
            task.note("on it", temporary=True)
            raise error
    assert raised.value is error
    assert task.status == "failed"
    assert outcomes(chat)[0].content.startswith(f"Task book flight: failed: {type(error).__name__}")
    assert working(chat)[1] == []


def test_an_error_after_the_end_leaves_the_end_as_it_is(chat):
    """The block's error goes on; the task was completed."""
    with pytest.raises(ValueError, match="later"):
        with chat.task("book flight") as task:
            task.complete("booked")
            raise ValueError("later")
    assert task.status == "completed"
    assert len(outcomes(chat)) == 1


def test_an_outcome_is_found_by_search(opened):
    """By what it came to and by what it held, at once; and the vector index follows."""
    chat = indexed(opened)
    with chat.task("book flight") as task:
        task.set("destination", "Lisbon")
        task.complete("booked TP 123")
    wait_until(lambda: chat.memory.stats()["dirty"] == 0, seconds=10)  # without being asked to
    for query in ("booked", "Lisbon"):
        assert outcomes(chat)[0].id in [h.entry.id for h in chat.search(query)]
    assert flushed(chat)


def test_an_open_task_is_found_by_what_it_holds_until_it_ends(chat):
    """Without its temporary notes; afterwards only its outcome holds the words."""
    chat.search("warm")  # from here on, RAM is kept up to date
    with chat.task("book flight") as task:
        task.set("destination", "Lisbon")
        task.note("zucchini", temporary=True)
        hits = chat.search("Lisbon", types=[MemoryType.WORKING])
        assert [h.entry.id for h in hits] == [task.id]
        assert all(h.signals.get("lexical", 0) == 0 for h in chat.search("zucchini"))
    hits = [h.entry.type for h in chat.search("Lisbon") if h.signals.get("lexical")]
    assert hits == [MemoryType.EPISODIC]


def test_an_outcome_tells_of_the_newest(chat):
    """At most so many values and notes, each cut; working memory keeps them all."""
    with chat.task("count") as task:
        for n in range(MOST_DETAILS + 5):
            task.set(f"v{n}", n)
            task.note(f"note {n} {'x' * 1900}")
        task.set("v6", "again")
        assert len(task.notes()) == len(task.values()) == MOST_DETAILS + 5
        assert list(task.values())[-1] == "v6"
        assert len(working(chat)[0][0]) == 1 + 2 * (MOST_DETAILS + 5)
    text = outcomes(chat)[0].content
    assert "v6: again" in text
    assert "v5: 5" in text
    assert "v4: 4" not in text
    assert "note 5 x" in text
    assert "note 4 x" not in text
    assert len(text) < (MOST_DETAILS + 1) * LONGEST_DETAIL + 500


def test_results_and_long_values_are_cut_only_in_lines(chat):
    """The outcome has all of a result; a value is got as it was set."""
    result, value = "word " * 500 + "end.", "y" * 5000
    with chat.task("long") as task:
        task.set("big", value)
        assert task.get("big") == value
        assert len(working(chat)[0][0][1]) == LONGEST_DETAIL + 2
        task.complete(result)
    assert outcomes(chat)[0].content.startswith(f"Task long: completed. {result} big: yyy")
    assert len(working(chat)[0][0][0]) < LONGEST_DETAIL + 50


# -- using it at the wrong time, or wrongly


VERBS = {
    "set": lambda t: t.set("a", 1),
    "get": lambda t: t.get("a"),
    "values": lambda t: t.values(),
    "note": lambda t: t.note("x"),
    "notes": lambda t: t.notes(),
    "progress": lambda t: t.progress(0.5),
    "complete": lambda t: t.complete(),
    "fail": lambda t: t.fail("x"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_task_is_used_only_while_it_is_open(chat, memory, verb):
    """Before its start, after its end and once it is gone: an error that says what to do; the status is always there."""
    task = chat.task("book flight")
    with pytest.raises(TaskError, match=r"start\(\)") as error:
        verb(task)
    assert (error.value.name, task.status) == ("book flight", "new")
    task.start()
    task.complete()
    before = rows(memory)
    with pytest.raises(TaskError, match=r"is over \(completed\).*session\.task\('book flight'\)"):
        verb(task)
    assert task.status == "completed"
    again = chat.task("book flight")
    again.start()
    chat.clear()
    with pytest.raises(TaskError, match="not there any more") as error:
        verb(again)
    assert (error.value.name, again.status) == ("book flight", "gone")
    assert before["entries"] == 2
    assert rows(memory)["entries"] == 0


def test_a_task_is_started_once(chat):
    """Whether by a block or by a call, before or after its end."""
    task = chat.task("book flight")
    with task:
        for start in (task.start, task.__enter__):
            with pytest.raises(TaskError, match="started already"):
                start()
        assert task.status == "open"
    with pytest.raises(TaskError, match="started already"):
        task.start()


BAD = {
    "blank note": (MessageError, lambda t: t.note(" \n")),
    "no text": (MessageError, lambda t: t.note(None)),
    "surrogate in a note": (MessageError, lambda t: t.note(LONE)),
    "lifetime of a lasting note": (InputError, lambda t: t.note("x", lifetime=5)),
    "no lifetime": (InputError, lambda t: t.note("x", temporary=True, lifetime=0)),
    "lifetime nan": (InputError, lambda t: t.note("x", temporary=True, lifetime=float("nan"))),
    "lifetime text": (InputError, lambda t: t.note("x", temporary=True, lifetime="1")),
    "value not json": (MessageError, lambda t: t.set("a", object())),
    "value nan": (MessageError, lambda t: t.set("a", float("nan"))),
    "surrogate in a value": (MessageError, lambda t: t.set("a", [LONE])),
    "no value name": (InputError, lambda t: t.set("", 1)),
    "value name": (InputError, lambda t: t.set(1, 1)),
    "surrogate in a value name": (MessageError, lambda t: t.set(LONE, 1)),
    "progress": (InputError, lambda t: t.progress(1.01)),
    "progress nan": (InputError, lambda t: t.progress(float("nan"))),
    "progress bool": (InputError, lambda t: t.progress(True)),
    "progress text": (InputError, lambda t: t.progress("half")),
    "blank step": (MessageError, lambda t: t.progress(0.1, " ")),
    "surrogate in a step": (MessageError, lambda t: t.progress(0.1, LONE)),
    "result": (MessageError, lambda t: t.complete({"flight": 1})),
    "surrogate in a result": (MessageError, lambda t: t.complete(LONE)),
    "error": (MessageError, lambda t: t.fail(5)),
}


@pytest.mark.parametrize(("kind", "use"), BAD.values(), ids=BAD)
def test_bad_input_changes_nothing(chat, kind, use):
    """A typed error, and the task is as it was."""
    task = chat.task("book flight")
    task.start()
    before = entry_of(chat, task)
    with pytest.raises(kind):
        use(task)
    assert entry_of(chat, task) == before
    assert (task.status, outcomes(chat)) == ("open", [])


@pytest.mark.parametrize("name", ["", "  ", None, 5, "x" * 201])
def test_names_are_short_texts(chat, name):
    """Refused before anything is done."""
    with pytest.raises(InputError, match="1 to 200"):
        chat.task(name)
    with pytest.raises(MessageError, match="surrogate"):
        chat.task(LONE)
    assert chat.task("x" * 200).name == "x" * 200


def test_a_blank_result_is_none(chat):
    """What a model returned as nothing is no reason not to end."""
    with chat.task("one") as task:
        task.complete("")
    with chat.task("two") as task:
        task.fail(" ")
    assert [o.content for o in outcomes(chat)] == ["Task one: completed.", "Task two: failed."]


def test_values_are_the_callers_own(chat):
    """Neither what was passed in nor what was returned is tied to what is stored."""
    with chat.task("book flight") as task:
        given = {"seats": [1]}
        task.set("plan", given)
        given["seats"].append(2)
        task.get("plan")["seats"].append(3)
        task.values()["more"] = 1
        task.notes().append("more")
        assert (task.values(), task.notes()) == ({"plan": {"seats": [1]}}, [])


# -- temporary notes and the age of ended tasks


def test_temporary_notes_outlive_their_lifetime_by_nothing(timed, clock):
    """`context.expiry_time` by default; they are shown oldest first, whichever task they are of."""
    with timed.task("one") as one, timed.task("two") as two:
        two.note("default", temporary=True)
        clock.advance(seconds=1)
        one.note("short", temporary=True, lifetime=10)
        one.note("forever", temporary=True, lifetime=float("inf"))
        one.note("lasting")
        assert working(timed)[1] == ["two: default", "one: short", "one: forever"]
        clock.advance(seconds=9.999)
        assert one.notes() == ["short", "forever", "lasting"]
        clock.advance(seconds=0.001)
        assert one.notes() == ["forever", "lasting"]
        clock.advance(seconds=3599 - 10 - 0.001)
        assert working(timed)[1] == ["two: default", "one: forever"]
        clock.advance(seconds=0.001)
        assert (two.notes(), working(timed)[1]) == ([], ["one: forever"])
        assert len(entry_of(timed, one).metadata["notes"]) == 3
        one.progress(0.1)  # the next write of the task leaves out what is over
        assert [n["text"] for n in entry_of(timed, one).metadata["notes"]] == ["forever", "lasting"]


def test_the_default_lifetime_is_an_option(opened, clock):
    """`context.expiry_time`."""
    chat = opened(clock=clock, embedder="none", context={"expiry_time": 5}).session("chat")
    with chat.task("one") as task:
        task.note("x", temporary=True)
        clock.advance(seconds=4.9)
        assert task.notes() == ["x"]
        clock.advance(seconds=0.1)
        assert task.notes() == []


def test_an_ended_task_stays_until_its_age(opened, clock):
    """Then it is shown and found no more, and the next write of any task of the session deletes it."""
    timed = indexed(opened, clock=clock)
    timed.search("warm")
    with timed.task("old") as old:
        pass
    clock.advance(seconds=DAY - 1)
    assert working(timed)[0] == [["old: completed"]]
    clock.advance(seconds=1)
    assert working(timed) == ([], [])
    assert timed.search("old", types=[MemoryType.WORKING]) == []
    assert entry_of(timed, old).metadata["status"] == "completed"  # nothing was written since
    new = timed.task("new")
    new.start()
    with pytest.raises(NotFound):
        entry_of(timed, old)
    assert working(timed)[0] == [["new: open"]]
    assert (old.status, [o.content for o in outcomes(timed)]) == ("completed", ["Task old: completed."])
    assert flushed(timed)


@pytest.mark.parametrize(("age", "there"), [(0, False), (1e300, True), (float("inf"), True)])
def test_the_age_is_an_option(opened, age, there):
    """0 deletes at once, in the same transaction; any other number will do."""
    chat = indexed(opened, tasks={"completed_max_age": age})
    chat.search("warm")
    with chat.task("one") as task:
        task.complete("done")
    assert (working(chat)[0] == [["one: completed, done"]]) is there
    assert [o.content for o in outcomes(chat)] == ["Task one: completed. done."]
    assert chat.entries.count() == 1 + there
    assert task.status == "completed"
    with pytest.raises(TaskError):
        task.note("x")
    assert flushed(chat)


def test_an_open_task_fails_at_its_age(opened, clock):
    """It leaves the prompt at once; the next write to any task of the session writes its outcome, with its parts'."""
    timed = indexed(opened, clock=clock)
    trip, flight, hotel = (timed.task(name) for name in ("trip", "flight", "hotel"))

    def killed():
        trip.__enter__()
        flight.start()
        hotel.start()
        hotel.complete("booked")
        trip.set("place", "Lisbon")

    contextvars.copy_context().run(killed)
    clock.advance(seconds=WEEK - 1)
    flight.progress(0.5)
    clock.advance(seconds=1)
    assert (trip.status, working(timed)[0][0][0]) == ("open", "trip: open")  # a part goes on
    clock.advance(seconds=WEEK - 1)
    assert ([t.status for t in timed.tasks()], working(timed)) == (["failed", "failed"], ([], []))
    assert timed.tasks(status="open") == []
    with pytest.raises(TaskError, match=r"over \(failed\)"):
        flight.values()
    assert len(outcomes(timed)) == 1  # the hotel's; nothing was written since
    with timed.task("trip") as again:
        assert again.id != trip.id
    told = [o.content for o in outcomes(timed)]
    assert told == [
        "Task hotel: completed. booked.",
        "Task trip: failed: nothing was done for 7 days. place: Lisbon. Task flight: failed: nothing was done for 7 days.",
        "Task trip: completed.",
    ]
    with pytest.raises(TaskError):
        flight.note("too late")
    assert flushed(timed)


@pytest.mark.parametrize(("age", "stands"), [(10, "failed"), (1e300, "open"), (float("inf"), "open")])
def test_the_age_of_open_tasks_is_an_option(opened, clock, age, stands):
    """`tasks.open_max_age`."""
    chat = opened(clock=clock, embedder="none", tasks={"open_max_age": age}).session("chat")
    task = chat.task("one")
    task.start()
    clock.advance(seconds=10)
    assert task.status == stands


# -- nesting


def test_a_nested_task_is_a_part_of_the_one_around_it(chat):
    """Its entries say so, and the prompt shows it below."""
    with chat.task("trip") as trip:
        side = chat.task("side")  # no block of its own
        side.start()
        with chat.task("flight") as flight:
            with chat.task("fare") as fare:
                parents = [entry_of(chat, t).metadata["parent"] for t in (trip, side, flight, fare)]
                assert parents == [None, trip.id, trip.id, flight.id]
                assert [lines[0] for lines in working(chat)[0]] == [
                    "trip: open",
                    "side (part of trip): open",
                    "flight (part of trip): open",
                    "fare (part of flight): open",
                ]
        side.complete()
        late = chat.task("late")
        late.start()
        assert entry_of(chat, late).metadata["parent"] == trip.id
        late.complete()
    assert [o.metadata.get("parent") for o in outcomes(chat)] == [flight.id, trip.id, trip.id, trip.id, None]
    after = chat.task("after")
    after.start()
    assert entry_of(chat, after).metadata["parent"] is None


def test_a_block_whose_task_is_over_has_no_parts(chat):
    """What is begun in it belongs to the open task further out, or to none."""
    with chat.task("trip") as trip:
        with chat.task("flight") as flight:
            flight.complete()
            with chat.task("hotel") as hotel:
                assert entry_of(chat, hotel).metadata["parent"] == trip.id
            trip.complete()
            with chat.task("other") as other:
                assert entry_of(chat, other).metadata["parent"] is None


def test_nesting_is_per_session(memory):
    """Another session's block is not around this session's tasks, nor is another user's session of the same name."""
    one, other, foreign = (memory.session(s, user_id=u) for s, u in (("a", "ada"), ("b", "ada"), ("a", "bob")))
    with one.task("trip") as trip:
        for session in (other, foreign):
            with session.task("trip") as task:
                assert task.id != trip.id
                assert entry_of(session, task).metadata["parent"] is None
                with one.task("flight") as flight:
                    assert entry_of(one, flight).metadata["parent"] == trip.id


@pytest.mark.parametrize("how", ["completed", "failed"])
def test_ending_a_task_ends_its_parts_first(chat, monkeypatch, how):
    """In one transaction, all in the same way; no orphan stays, one outcome tells of all."""
    with chat.task("trip") as trip:
        with chat.task("flight") as flight:
            with chat.task("fare") as fare:
                fare.set("price", 120)
                passed = []
                monkeypatch.setattr(_failpoints, "hook", passed.append)
                trip.complete("off") if how == "completed" else trip.fail("strike")
                assert passed.count("change.committed") == 1
                assert [t.status for t in (trip, flight, fare)] == [how] * 3
                with pytest.raises(TaskError, match=how):
                    fare.note("x")
    result = {"completed": ". off.", "failed": ": strike."}[how]
    rest = {"completed": ".", "failed": ": strike."}[how]
    [outcome] = outcomes(chat)
    assert outcome.content == f"Task trip: {how}{result} Task flight: {how}{rest} Task fare: {how}{rest} price: 120."
    assert outcome.sources == (trip.id, flight.id, fare.id)
    assert all(e.metadata["values"] == {} for e in chat.entries.list(types=[MemoryType.WORKING]))


def test_an_ending_happens_whole_or_not_at_all(chat, monkeypatch):
    """What breaks in its transaction leaves everything as it was, in the ledger and in RAM; then it can be done again."""
    chat.search("warm")
    with chat.task("trip") as trip:
        trip.note("by train")
        flight = chat.task("flight")
        flight.start()
        before = (rows(chat.memory), working(chat))

        def breaks(name):
            if name == "change.applied":
                raise OSError("pulled the plug")

        monkeypatch.setattr(_failpoints, "hook", breaks)
        with pytest.raises(OSError, match="plug"):
            trip.complete()
        monkeypatch.setattr(_failpoints, "hook", None)
        assert working(chat) == before[1]
        counted = ("entries", "features", "tombstones")
        after = (rows(chat.memory), working(chat))
        assert [after[0][c] for c in counted] == [before[0][c] for c in counted]
        assert (after[1], trip.status, flight.status) == (before[1], "open", "open")
        assert [h.entry.id for h in chat.search("train") if h.signals["lexical"]] == [trip.id]
    assert (trip.status, flight.status, len(outcomes(chat))) == ("completed", "completed", 1)


def test_what_breaks_after_the_ending_was_written_leaves_it_written(chat, monkeypatch):
    """RAM is read anew, so that it shows what the ledger has."""
    task = chat.task("trip")
    task.start()

    def breaks(name):
        if name == "change.committed":
            raise KeyboardInterrupt

    monkeypatch.setattr(_failpoints, "hook", breaks)
    with pytest.raises(KeyboardInterrupt):
        task.complete("done")
    monkeypatch.setattr(_failpoints, "hook", None)
    assert (task.status, working(chat)[0]) == ("completed", [["trip: completed, done"]])


# -- switching from one task to another


def test_a_switch_of_context_drops_temporary_notes_of_other_tasks(chat):
    """When a task is begun or resumed that is not nested; lasting notes and the task's own notes stay."""
    one, two = chat.task("one"), chat.task("two")
    one.start()
    one.note("lasting")
    one.note("fleeting", temporary=True)
    two.start()
    assert one.notes() == ["lasting"]
    two.note("mine", temporary=True)
    one.note("again", temporary=True)
    chat.task("two").start()
    assert (one.notes(), two.notes()) == (["lasting"], ["mine"])


def test_a_nested_task_is_no_switch(chat):
    """Neither begun nor resumed in a block; what is resumed outside keeps the notes of the tasks it is a part of."""
    other = chat.task("other")
    other.start()
    with chat.task("trip") as trip:
        trip.note("here", temporary=True)
        other.note("there", temporary=True)
        flight = chat.task("flight")
        flight.start()
        flight.note("up", temporary=True)
        chat.task("other").start()
        assert working(chat)[1] == ["trip: here", "other: there", "flight: up"]
        contextvars.Context().run(chat.task("flight").start)  # as another process would, outside of the block
        assert (trip.notes(), other.notes(), flight.notes()) == (["here"], [], ["up"])


def test_a_switch_is_written_in_one_transaction(chat, monkeypatch):
    """The new task and what the others lose."""
    for name in ("a", "b"):
        chat.task(name).start()
        task = chat.task(name)
        task.start()
        task.note(name, temporary=True)
    passed = []
    monkeypatch.setattr(_failpoints, "hook", passed.append)
    chat.task("c").start()
    assert passed.count("change.committed") == 1
    assert working(chat)[1] == []


# -- who shares a task


def test_an_open_task_is_resumed(opened, clock):
    """By another object, another handle, and after closing and opening again, with all it held; an ended one is not."""
    first = opened(clock=clock, embedder="none")
    one = first.session("chat", user_id="ada").task("book flight")
    one.start()
    one.set("destination", "Lisbon")
    one.note("aisle")
    one.note("fares", temporary=True)
    second = opened(clock=clock, embedder="none").session("chat", user_id="ada")
    two = second.task("book flight")
    two.start()
    assert (two.id, two.values(), two.notes()) == (one.id, {"destination": "Lisbon"}, ["aisle", "fares"])
    before = working(second)
    first.close()
    second.memory.close()
    third = opened(clock=clock, embedder="none").session("chat", user_id="ada")
    assert working(third) == before
    three = third.task("book flight")
    three.start()
    assert (three.id, three.get("destination"), three.notes()) == (one.id, "Lisbon", ["aisle", "fares"])
    four = third.task("book flight")
    four.start()
    four.complete()
    assert (three.status, four.status) == ("completed", "completed")
    five = third.task("book flight")
    five.start()
    assert five.id != one.id
    assert five.values() == {}


def test_what_another_handle_ended_is_over(opened):
    """The block leaves quietly, and its own error goes on."""
    one, two = (opened(embedder="none").session("chat") for _ in range(2))
    for error in (None, ValueError("wrong")):
        with pytest.raises(ValueError, match="wrong") if error else nullcontext() as raised:
            with one.task("shared") as task:
                [other] = two.tasks(status="open")
                other.complete("by the other")
                assert task.status == "completed"
                with pytest.raises(TaskError):
                    task.note("x")
                if error:
                    raise error
        assert raised is None or not hasattr(raised.value, "__notes__")
    assert [o.content for o in outcomes(one)] == ["Task shared: completed. by the other."] * 2
    one.clear()
    assert (task.status, other.status) == ("completed", "completed")  # what was seen once stays so


def test_a_change_that_was_overtaken_is_made_again(chat):
    """Another writer's change, which RAM did not see, is kept; ended by another writer, the task is over."""
    task = chat.task("shared")
    task.start()
    parts = chat._parts

    def by_another(**changes):
        entry = entry_of(chat, task)
        changed = replace(entry, metadata={**entry.metadata, **changes})
        parts.ledger.work(chat.scope, tasks=[recorded(changed)], over=[], outcome=None, now=0)

    by_another(values={"theirs": 1})
    task.set("ours", 2)
    assert task.values() == {"theirs": 1, "ours": 2}
    by_another(status="failed")
    with pytest.raises(TaskError, match="failed"):
        task.complete()
    assert (task.status, outcomes(chat)) == ("failed", [])


def test_a_change_that_is_always_overtaken_gives_up(chat, monkeypatch):
    """After a few times, with the ledger's own error; nothing is written."""
    task = chat.task("shared")
    task.start()
    calls = []

    def work(*args, **kwargs):
        calls.append(1)
        raise ConflictError("changed", id=task.id)

    monkeypatch.setattr(chat._parts.ledger, "work", work)
    with pytest.raises(ConflictError):
        task.note("x")
    assert 2 <= len(calls) <= 10
    monkeypatch.undo()
    assert task.notes() == []


def test_nothing_of_another_user_is_seen(memory):
    """Same session id, same task name, same words: neither task nor outcome."""
    ada, bob, nobody = (memory.session("chat", user_id=u) for u in ("ada", "bob", None))
    task = ada.task("book flight")
    task.start()
    task.set("destination", "Lisbon")
    task.note("secret", temporary=True)
    for other in (bob, nobody):
        with pytest.raises(NotFound):
            other.entries.get(task.id)
        with other.task("book flight") as theirs:
            assert theirs.id != task.id
            assert (theirs.values(), theirs.notes()) == ({}, [])
        assert len(working(other)[0]) == 1
    assert task.notes() == ["secret"]  # no switch of context either
    task.complete("booked TP 123")
    for other in (bob, nobody):
        assert [o.content for o in outcomes(other)] == ["Task book flight: completed."]
        assert all("Lisbon" not in text and "123" not in text for text in found(other.search("Lisbon TP 123")))
    sibling = memory.session("other chat", user_id="ada")
    assert working(sibling) == ([], [])


def test_the_policy_is_asked(memory):
    """A principal without the right to it can neither start, change nor read a task."""
    task = memory.session("chat", user_id="ada").task("book flight")
    task.start()
    stranger = memory.session("chat", user_id="ada", principal="bob").task("book flight")
    with pytest.raises(AccessDenied):
        stranger.start()
    stranger._begun = task._begun.__class__(task._begun.scope, "bob", "book flight", task.id, task._begun.key)
    stranger._seen = "open"
    for verb in (*VERBS.values(), lambda t: t.status):
        with pytest.raises(AccessDenied):
            verb(stranger)
    assert task.status == "open"


def test_clearing_the_session_erases_its_tasks(opened):
    """Open and ended ones, with outcomes; a block around it leaves quietly, and the name is free again."""
    timed = indexed(opened)
    with timed.task("done"):
        pass
    with timed.task("book flight") as task:
        task.note("aisle")
        timed.clear()
        assert (task.status, working(timed), timed.entries.count()) == ("gone", ([], []), 0)
    assert outcomes(timed) == []
    assert timed.search("flight aisle done") == []
    assert flushed(timed)
    assert index_keys(timed.memory) == set()
    with timed.task("book flight") as again:
        assert again.notes() == []


def test_clearing_does_not_take_what_was_remembered(chat):
    """Notes that `remember` keeps are no tasks, even of their type."""
    own = chat.remember("Ada sails", type=MemoryType.WORKING)
    chat.task("one").start()
    assert len(working(chat)[0]) == 1
    chat.clear()
    assert chat.entries.get(own).content == "Ada sails"


def test_turns_and_tasks_leave_each_other_alone(chat):
    """Turns keep their order, and a task survives turns, window changes and folds."""
    chat.add(["One", "Two"])
    with chat.task("book flight") as task:
        task.note("aisle")
        chat.add("Three")
        chat.replace(["Four"])
        chat.compact(max_tokens=0)
        task.note("window")
        assert task.notes() == ["aisle", "window"]
    chat.add("Five")
    assert [m.content for m in chat.messages()] == ["One", "Two", "Three", "Four", "Five"]
    assert len(working(chat)[0]) == 1


# -- threads and event loops


def test_threads_share_a_task(chat):
    """No note is lost, whichever object it is written through."""
    task = chat.task("shared")
    task.start()

    def write(own):
        mine = chat.task("shared")
        mine.start()
        for n in range(10):
            (task if n % 2 else mine).note(f"{own}-{n}")
            mine.set(f"{own}-{n}", n)

    in_threads(*[lambda own=own: write(own) for own in range(4)])
    assert sorted(task.notes()) == sorted(f"{o}-{n}" for o in range(4) for n in range(10))
    assert len(task.values()) == 40
    for own in range(4):  # each thread's in its order
        assert [n for n in task.notes() if n.startswith(f"{own}-")] == [f"{own}-{n}" for n in range(10)]


def test_one_of_many_threads_ends_a_task(chat):
    """The others are told that it is over; there is one outcome."""
    for turn in range(5):
        task = chat.task("shared")
        task.start()
        ended = []

        def end(n, task=task, ended=ended):
            try:
                task.complete(str(n))
                ended.append(n)
            except TaskError:
                pass

        in_threads(*[lambda n=n: end(n) for n in range(4)])
        assert len(ended) == 1
        assert len(outcomes(chat)) == turn + 1


def test_threads_nest_by_themselves(chat):
    """A block in one thread is not around another thread's tasks."""
    with chat.task("trip") as trip:
        parents = []

        def other():
            with chat.task("other") as task, chat.task("inner") as inner:
                parents.extend(entry_of(chat, t).metadata["parent"] for t in (task, inner))
                assert parents == [None, task.id]

        in_threads(other)
        assert len(parents) == 2
        with chat.task("flight") as flight:
            assert entry_of(chat, flight).metadata["parent"] == trip.id


def test_every_operation_has_an_async_twin():
    """The same name with an `a`, the same parameters."""
    methods = [n for n, m in vars(Task).items() if inspect.isfunction(m) and not n.startswith("_")]
    sync = [n for n in methods if not inspect.iscoroutinefunction(getattr(Task, n))]
    assert set(sync) == {*VERBS, "start"}
    for name in sync:
        twin = getattr(Task, f"a{name}")
        assert inspect.iscoroutinefunction(twin)
        assert inspect.signature(twin).parameters == inspect.signature(getattr(Task, name)).parameters


async def test_async_does_what_sync_does(chat):
    """Blocks, nesting, verbs."""
    async with chat.task("trip") as trip:
        async with chat.task("flight") as flight:
            await flight.aset("destination", "Lisbon")
            await flight.anote("aisle")
            await flight.aprogress(0.5, "looking")
            assert await flight.aget("destination") == "Lisbon"
            assert (await flight.avalues(), await flight.anotes()) == ({"destination": "Lisbon"}, ["aisle"])
            assert (await flight.astatus(), flight.status) == ("open", "open")
            inner = chat.task("inner")
            await inner.astart()
            assert entry_of(chat, inner).metadata["parent"] == flight.id
            await inner.afail("no")
            with chat.task("sync inside") as mixed:
                assert entry_of(chat, mixed).metadata["parent"] == flight.id
            await flight.acomplete("booked")
        assert entry_of(chat, flight).metadata["parent"] == trip.id
    assert await trip.astatus() == "completed"
    with pytest.raises(ValueError, match="wrong"):
        async with chat.task("bad") as bad:
            raise ValueError("wrong")
    assert bad.status == "failed"
    with pytest.raises(TaskError):
        await bad.anote("x")


async def test_asyncio_tasks_nest_by_themselves(chat):
    """Blocks side by side don't see each other; what is begun in a block's own tasks is a part of it."""
    everybody_in = asyncio.Barrier(5)

    async def one(name):
        async with chat.task(name) as task:
            await everybody_in.wait()
            async with chat.task(f"{name} part") as part:
                await everybody_in.wait()
                return [entry_of(chat, t).metadata["parent"] for t in (task, part)] == [None, task.id]

    assert all(await asyncio.gather(*(one(str(n)) for n in range(5))))
    async with chat.task("around") as around:
        everybody_in = asyncio.Barrier(1)

        async def part():
            async with chat.task("part") as task:
                return entry_of(chat, task).metadata["parent"]

        assert await asyncio.create_task(part()) == around.id


async def test_cancelling_fails_the_task(chat):
    """The cancellation goes on, and the task does not stay open."""
    entered = asyncio.Event()

    async def work():
        async with chat.task("book flight") as task:
            await task.anote("waiting", temporary=True)
            entered.set()
            await asyncio.sleep(60)

    running = asyncio.create_task(work())
    await entered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert outcomes(chat)[0].content == "Task book flight: failed: CancelledError."
    assert working(chat) == ([["book flight: failed, CancelledError"]], [])


async def test_a_task_cancelled_at_any_moment_does_not_stay_open(chat):
    """While entering, inside, and while leaving."""
    left = []

    async def work(n):
        async with chat.task(f"task {n}") as task:
            await task.anote("x")
        left.append(n)

    for n in range(40):
        running = asyncio.create_task(work(n))
        for _ in range(n % 10):
            await asyncio.sleep(0)
        if n >= 10:
            await asyncio.sleep(0.0004 * (n % 10))
        running.cancel()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    ended = [o.metadata["name"] for o in outcomes(chat)]
    assert len(set(ended)) == len(ended)
    assert {f"task {n}" for n in left} <= set(ended)
    assert all("open" not in lines[0] for lines in working(chat)[0])
    fresh = chat.task("fresh")
    fresh.start()
    assert entry_of(chat, fresh).metadata["parent"] is None


async def test_a_timeout_inside_a_block_fails_the_task_once(chat):
    """`asyncio.timeout` gets its cancellation back and makes its error of it."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            async with chat.task("slow"):
                await asyncio.sleep(60)
    with pytest.raises(TimeoutError):
        async with chat.task("around"):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
    assert [o.content for o in outcomes(chat)] == [
        "Task slow: failed: CancelledError.",
        "Task around: failed: TimeoutError.",
    ]


def test_a_memory_closed_inside_a_block(opened):
    """The block's own error goes on, with a note; without one, closing too early is the error. The task waits."""
    memory = opened(embedder="none")
    with pytest.raises(ValueError, match="wrong") as error:
        with memory.session("chat").task("one"):
            memory.close()
            raise ValueError("wrong")
    assert "could not be marked as failed: ClosedError" in error.value.__notes__[0]
    memory = opened(embedder="none")
    with pytest.raises(ClosedError):
        with memory.session("chat").task("one") as task:
            other_handle = opened(embedder="none")  # the folder stays open, this handle does not
            memory.close()
            with pytest.raises(ClosedError):
                task.note("x")
    assert working(other_handle.session("chat"))[0] == [["one: open"]]
    late = other_handle.session("chat").task("late")
    late.start()
    assert entry_of(other_handle.session("chat"), late).metadata["parent"] is None


async def test_a_memory_closed_inside_an_async_block(opened):
    """The same."""
    memory = opened(embedder="none")
    with pytest.raises(ValueError, match="wrong") as error:
        async with memory.session("chat").task("one"):
            await memory.aclose()
            raise ValueError("wrong")
    assert "ClosedError" in error.value.__notes__[0]


# -- what a prompt shows


def test_lines_stand_still(timed, clock):
    """Time and other tasks' changes leave a task's lines as they are; ended ones follow in the order of their ends."""
    tasks = [timed.task(n) for n in ("a", "b", "c")]
    for task in tasks:
        task.start()
        task.note(f"of {task.name}")
    before = working(timed)[0]
    clock.advance(hours=5)
    tasks[2].set("x", 1)
    assert working(timed)[0][:2] == before[:2]
    tasks[1].complete()
    clock.advance(seconds=1)
    tasks[0].complete()
    assert [lines[0] for lines in working(timed)[0]] == ["c: open", "b: completed", "a: completed"]
    assert shown([], now=clock.now, open_max_age=WEEK) == ([], [])


def test_shown_does_not_depend_on_the_order_given(timed):
    """Of tasks, parts of tasks, and ended ones."""
    for name in ("over", "over, too"):
        with timed.task(name):
            pass
    with timed.task("one") as one:
        one.note("t", temporary=True)
        for name in ("two", "three"):
            timed.task(name).start()
        tasks = timed._parts.ledger.window(timed.scope).tasks
        results = [shown(order, now=timed._parts.clock(), open_max_age=WEEK) for order in itertools.permutations(tasks)]
        assert all(r == results[0] for r in results)
        lines = [s.lines for s in results[0][0]]
        assert lines[:3] == [["one: open"], ["two (part of one): open"], ["three (part of one): open"]]
        assert [s.id for s in results[0][1]] == [one.id]


def test_what_others_write_into_a_task_breaks_nothing(chat):
    """Without what makes it a task it is gone; parts in a circle are shown and ended all the same."""
    with chat.task("one") as one, chat.task("two") as two:
        chat.entries.update(one.id, metadata={**entry_of(chat, one).metadata, "parent": two.id})
        contextvars.Context().run(chat.task("two").start)
        assert [lines[0][:3] for lines in working(chat)[0]] == ["one", "two"]
        one.complete()
        assert (one.status, two.status) == ("completed", "completed")
    with chat.task("three") as three:
        chat.entries.update(three.id, metadata={"kind": "task"})
        assert (three.status, len(working(chat)[0])) == ("gone", 2)


def test_a_line_is_one_line(chat):
    """Whatever line breaks names, notes, values, steps and results have."""
    with chat.task("a\nname") as task:
        task.set("k\nv", "x\r\ny")
        task.note("n\u2028m\n\n- forged: line")
        task.progress(0, "s\nt")
        task.note("t\nu", temporary=True)
        lines, notes = working(chat)
        assert lines == [["a name: open, 0% done, s t", "- k v: x y", "- n m - forged: line"]]
        assert notes == ["a name: t u"]
        task.complete("r\ns")
    assert working(chat)[0] == [["a name: completed, r s"]]


# -- any order of everything


NAMES = st.sampled_from(["a", "b", "c", "d"])
AGE, LIFETIME = 100, 50


class Tasks(RuleBasedStateMachine):
    """`open` maps ids of open tasks to what they hold; `blocks` are the blocks that the code is in, as (task, id)."""

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.clock = ManualClock()
        self.open, self.ended, self.told, self.blocks = {}, [], 0, []
        self.connect()

    def connect(self):
        self.memory = open_memory(
            f"{self.folder.name}/memory",
            embedder="none",
            clock=self.clock,
            tasks={"completed_max_age": AGE},
            context={"expiry_time": LIFETIME},
        )
        self.chat = self.memory.session("chat", user_id="ada")
        self.chat.search("warm")

    def teardown(self):
        while self.blocks:
            self.leave()
        self.memory.close()
        self.folder.cleanup()

    def any_open(self, data):
        ids = {t["name"]: i for i, t in self.open.items()}
        task = self.chat.task(data.draw(st.sampled_from(sorted(ids))))
        own = ids[task.name]
        if own in self.blocks_around():
            with pytest.raises(TaskError, match="around"):
                task.start()
            return own, next(t for t in self.chat.tasks(status="open") if t.id == own)
        # Resuming is a switch of context unless it happens in a block.
        task.start()
        assert task.id == own
        self.switched(own)
        return own, task

    def switched(self, own):
        if any(i in self.open for i in self.blocks_around()):
            return
        kept = {own}
        while (own := self.open[own]["parent"]) in self.open:
            kept.add(own)
        for other in self.open.keys() - kept:
            self.open[other]["temporary"] = []

    def blocks_around(self):
        return [own for _, own in self.blocks]

    def wrote(self):
        self.ended = [e for e in self.ended if e[2] > self.clock.now]

    def started(self, task, around):
        if task.id not in self.open:
            assert task.name not in [t["name"] for t in self.open.values()]
            parent = next((i for i in reversed(around) if i in self.open), None)
            self.open[task.id] = {"name": task.name, "parent": parent, "values": {}, "notes": [], "temporary": []}
            self.wrote()
        self.switched(task.id)

    @rule(name=NAMES, block=st.booleans())
    def start(self, name, block):
        task = self.chat.task(name)
        if name in [self.open[own]["name"] for own in self.blocks_around() if own in self.open]:
            with pytest.raises(TaskError, match="around"):
                task.__enter__() if block else task.start()
            return
        if block:
            task.__enter__()
        else:
            task.start()
        self.started(task, self.blocks_around())
        if block:
            self.blocks.append((task, task.id))

    @precondition(lambda self: self.blocks)
    @rule(error=st.sampled_from([None, ValueError("wrong")]))
    def leave(self, error=None):
        task, own = self.blocks[-1]
        task.__exit__(type(error) if error else None, error, None)
        self.blocks.pop()
        if own in self.open:
            self.over(own, "completed" if error is None else "failed")
        assert task.status != "open"

    def over(self, own, status):
        for child in [i for i, t in self.open.items() if t["parent"] == own]:
            self.over(child, status)
            self.told -= 1
        self.ended.append((own, status, self.clock.now + timedelta(seconds=AGE)))
        del self.open[own]
        self.told += 1
        self.wrote()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), value=st.integers(0, 3))
    def set(self, data, value):
        own, task = self.any_open(data)
        task.set("v", value)
        self.open[own]["values"] = {"v": value}
        self.wrote()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), temporary=st.booleans(), text=st.sampled_from(["x", "y"]))
    def note(self, data, temporary, text):
        own, task = self.any_open(data)
        task.note(text, temporary=temporary)
        if temporary:
            self.open[own]["temporary"].append((text, self.clock.now + timedelta(seconds=LIFETIME)))
        else:
            self.open[own]["notes"].append(text)
        self.wrote()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), status=st.sampled_from(["completed", "failed"]))
    def end(self, data, status):
        own, task = self.any_open(data)
        task.complete() if status == "completed" else task.fail("why")
        self.over(own, status)

    @rule(seconds=st.sampled_from([1, LIFETIME, AGE]))
    def wait(self, seconds):
        self.clock.advance(seconds=seconds)

    @rule()
    def turn(self):
        self.chat.add("Hello")

    @rule()
    def clear(self):
        self.chat.clear()
        self.open, self.ended, self.told = {}, [], 0

    @rule()
    def reopen(self):
        while self.blocks:
            self.leave()
        self.memory.close()
        self.connect()

    @invariant()
    def it_shows_what_there_is(self):
        parts, now = self.chat._parts, self.clock.now
        tasks, notes = shown(parts.window(self.chat.scope).tasks, now=now, open_max_age=WEEK)
        living = [(i, text) for i, t in self.open.items() for text, until in t["temporary"] if until > now]
        assert sorted((n.id, n.lines[0][-1]) for n in notes) == sorted(living)
        ids = [t.id for t in tasks]
        assert set(ids[: len(self.open)]) == self.open.keys()
        over, alive = ids[len(self.open) :], {i for i, _, until in self.ended if until > now}
        assert len(over) == min(MOST_OVER, len(alive))
        assert set(over) <= alive
        for place, own in enumerate(ids[: len(self.open)]):
            task = self.open[own]
            assert task["parent"] is None or task["parent"] in ids[:place]
            lines = [f"- {k}: {v}" for k, v in task["values"].items()] + [f"- {n}" for n in task["notes"]]
            assert tasks[place].lines[1:] == lines
        working(self.chat)

    @invariant()
    def nothing_is_left_behind(self):
        stored = self.chat.entries.list(types=[MemoryType.WORKING])
        assert {e.id: e.metadata["status"] for e in stored} == {
            **dict.fromkeys(self.open, "open"),
            **{i: status for i, status, _ in self.ended},
        }
        assert len(outcomes(self.chat)) == self.told


Tasks.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_any_order_of_everything_leaves_what_it_should = Tasks.TestCase


# -- lists, limits, and blocks that meet


def test_tasks_can_be_listed_and_taken_up_again(opened, folder, clock):
    """After a restart nobody needs to know the names: what is open is found, and goes on."""
    chat = opened(folder, embedder="none", clock=clock).session("chat", user_id="ada")
    assert chat.tasks() == []
    for name in ("book flight", "book hotel", "buy socks"):
        task = chat.task(name)
        task.start()
        task.set("for", name)
    task.complete("wool")
    chat.memory.close()
    chat = opened(folder, embedder="none", clock=clock).session("chat", user_id="ada")
    assert [repr(t) for t in chat.tasks()] == [
        "Task('book flight', open)",
        "Task('book hotel', open)",
        "Task('buy socks', completed)",
    ]
    flight, hotel = chat.tasks(status="open")
    assert (flight.id, flight.values()) == (entry_of(chat, flight).id, {"for": "book flight"})
    hotel.fail("full")
    assert [t.status for t in chat.tasks()] == ["open", "failed", "completed"]
    assert [t.id for t in chat.tasks(status="failed")] == [hotel.id]
    with pytest.raises(TaskError, match=r"is over \(completed\)"):
        chat.tasks(status="completed")[0].note("more")
    with pytest.raises(TaskError, match="started already"):
        flight.start()
    clock.advance(seconds=DAY)  # nothing was written since
    assert [t.name for t in chat.tasks()] == ["book flight"]
    for other in (chat.memory.session("other", user_id="ada"), chat.memory.session("chat", user_id="bob")):
        assert other.tasks() == []
    chat.clear()
    assert (chat.tasks(), repr(flight), flight.status, repr(flight)) == (
        [],
        "Task('book flight', open)",
        "gone",
        "Task('book flight', gone)",
    )


@pytest.mark.parametrize("status", ["done", "new", "gone", "", [], 5])
async def test_tasks_are_listed_by_a_status_there_is(memory, status):
    """Refused with what there is; the policy is asked; a closed memory says so; listing writes nothing."""
    chat = memory.session("chat", user_id="ada")
    before = rows(memory)
    with pytest.raises(InputError, match="open, completed, failed"):
        chat.tasks(status=status)
    with pytest.raises(InputError, match="open, completed, failed"):
        await chat.atasks(status=status)
    assert await chat.atasks(status="open") == []
    assert rows(memory) == before
    with pytest.raises(AccessDenied):
        memory.session("chat", user_id="ada", principal="bob").tasks()
    memory.close()
    with pytest.raises(ClosedError):
        chat.tasks()


def test_repr_reads_nothing(memory):
    """It says what was known last, also of a closed memory."""
    task = memory.session("chat").task("book flight")
    seen = [repr(task)]
    task.start()
    seen.append(repr(task))
    task.fail("full")
    seen.append(repr(task))
    late = memory.session("chat").task("late")
    late.start()
    memory.close()
    assert [*seen, repr(late)] == [
        "Task('book flight', new)",
        "Task('book flight', open)",
        "Task('book flight', failed)",
        "Task('late', open)",
    ]


async def test_a_task_is_not_started_within_its_own_block(chat):
    """The inner one would end the outer: refused in any form, however deep; the outer one goes on untouched."""

    def plan(depth):
        with chat.task("plan"), chat.task(f"part {depth}"):
            plan(depth + 1)

    with pytest.raises(TaskError, match=r"around this code.*another name") as error:
        plan(0)
    assert error.value.name == "plan"
    assert [o.content[:17] for o in outcomes(chat)] == ["Task part 0: fail", "Task plan: failed"]

    with chat.task("plan") as outer:
        outer.note("kept", temporary=True)
        same = chat.task("plan")
        for start in (same.start, same.__enter__):
            with pytest.raises(TaskError, match="around"):
                start()
        for start in (same.astart, same.__aenter__):
            with pytest.raises(TaskError, match="around"):
                await start()
            with pytest.raises(TaskError, match="around"):
                await asyncio.create_task(start())
        assert (same.status, same.id) == ("new", None)
        [held] = chat.tasks(status="open")
        held.set("days", 2)
        assert (outer.status, outer.values(), outer.notes()) == ("open", {"days": 2}, ["kept"])
        with chat.task("hotels") as inner:
            assert entry_of(chat, inner).metadata["parent"] == outer.id
        outer.complete()
        with same:  # its name is free again
            assert same.id != outer.id
    chat.clear()
    with chat.task("plan"):
        chat.clear()
        with chat.task("plan") as anew:
            assert anew.status == "open"


def test_a_task_keeps_its_newest_notes(timed, clock):
    """So many lasting and so many temporary ones; those that have outlived their time don't count."""
    with timed.task("long") as task:
        task.note("long-lived", temporary=True, lifetime=1000)
        for n in range(MOST_NOTES - 1):
            task.note(f"short {n}", temporary=True, lifetime=10)
        clock.advance(seconds=10)
        task.note("fresh", temporary=True)
        assert task.notes() == ["long-lived", "fresh"]
        assert len(entry_of(timed, task).metadata["notes"]) == 2
        for n in range(MOST_NOTES + 3):
            task.note(f"lasting {n}")
        for _ in range(MOST_NOTES + 3):
            task.note("same", temporary=True)
        kept = [f"lasting {n}" for n in range(3, MOST_NOTES + 3)]
        assert task.notes() == [*kept, *["same"] * MOST_NOTES]
        task.note("newest")
        assert task.notes() == [*kept[1:], *["same"] * MOST_NOTES, "newest"]


def test_a_task_holds_so_much_and_says_so(chat):
    """Sizes of notes and values, and the number of values; what is refused leaves all as it was."""
    with chat.task("long") as task:
        task.note("x" * LONGEST_NOTE)
        task.set("log", "x" * (LONGEST_VALUE - 2))  # the quotes count
        for n in range(MOST_VALUES - 1):
            task.set(f"v{n}", n)
        before = entry_of(chat, task)
        for temporary in (False, True):
            with pytest.raises(MessageError, match=r"2,000 characters, and this one has 2,001"):
                task.note("x" * (LONGEST_NOTE + 1), temporary=temporary)
        with pytest.raises(InputError, match=r"20,000 characters as JSON, and 'v1' has 20,001"):
            task.set("v1", "x" * (LONGEST_VALUE - 1))
        with pytest.raises(InputError, match="200 values"):
            task.set("one more", 1)
        for name in ([], 10**5, None, ""):
            with pytest.raises(InputError, match="value's name"):
                task.get(name)
        assert entry_of(chat, task) == before
        task.set("v7", "changed")
        assert (len(task.values()), task.get("v7")) == (MOST_VALUES, "changed")


def test_what_is_long_is_cut_in_the_prompt_not_left_out(chat):
    """A note or value of pages has its beginning shown, and a sign that there is more; so has the outcome."""
    chat.add("Go on")
    with chat.task("read") as task:
        task.note("alpha " * 300)
        task.note("omega " * 300, temporary=True)
        task.set("log", ["delta"] * 300)
        [[_, *lines]], [note] = working(chat)
        for line, word in zip([*lines, note], ["delta", "alpha", "omega"], strict=True):
            assert LONGEST_DETAIL - 6 < len(line.removeprefix("- ")) <= LONGEST_DETAIL
            assert line.endswith(" […]")
            assert line.count(word) > 40
        prompt = "\n".join(texts(chat.context(search=False).messages))
        assert all(line in prompt for line in [*lines, note])
    assert outcomes(chat)[0].content.endswith(" […]")


def test_finished_tasks_do_not_fill_the_prompt(timed, clock):
    """Of many that have just ended, the newest five are shown; all are listed, and found by search."""
    timed.add("Go on")
    for n in range(20):
        clock.advance(seconds=1)
        with timed.task(f"errand {n}") as task:
            task.complete(f"done {n}")
    prompt = "\n".join(texts(timed.context(search=False).messages))
    assert [n for n in range(20) if f"errand {n}:" in prompt] == list(range(20 - MOST_OVER, 20))
    assert [t.name for t in timed.tasks(status="completed")] == [f"errand {n}" for n in range(20)]
    assert "errand 3" in timed.search("errand 3 done", types=["episodic"])[0].entry.content


async def test_tasks_side_by_side_keep_their_temporary_notes(chat):
    """Starting one is no switch of context away from those whose blocks are running, in asyncio tasks or in threads."""
    ready = asyncio.Barrier(3)

    async def work(name):
        async with chat.task(name) as task:
            await task.anote(f"of {name}", temporary=True)
            await ready.wait()
            await ready.wait()
            return await task.anotes()

    async def switch():
        await ready.wait()
        await asyncio.to_thread(contextvars.Context().run, chat.task("another").start)
        await ready.wait()

    idle = chat.task("idle")
    idle.start()
    for _ in range(2):
        idle.note("fleeting", temporary=True)
        assert await asyncio.gather(work("a"), work("b"), switch()) == [["of a"], ["of b"], None]
        assert idle.notes() == []


def test_a_block_that_could_not_end_its_task_is_not_running(opened):
    """Its task, which stays open, loses its temporary notes at a switch as any other does."""
    memory, other = opened(embedder="none"), opened(embedder="none").session("chat")
    with pytest.raises(ClosedError):
        with memory.session("chat").task("one") as left:
            [task] = other.tasks()
            task.note("fleeting", temporary=True)
            contextvars.Context().run(other.task("two").start)
            assert task.notes() == ["fleeting"]
            memory.close()
    other.task("two").start()
    assert (left.id, task.notes()) == (task.id, [])


async def test_a_task_cancelled_again_while_it_is_left_is_ended(chat):
    """However often: entering and leaving are waited for, and the cancellation goes on."""
    for n in range(12):

        async def work(n=n):
            async with chat.task(f"task {n}"):
                await asyncio.sleep(0.002 * (n % 2))

        running = asyncio.create_task(work())
        await asyncio.sleep(0)
        while not running.done():
            running.cancel()
            await asyncio.sleep(0)
        assert running.cancelled()
        assert chat.tasks(status="open") == []
