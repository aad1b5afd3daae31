"""The state of a session: valid, versioned, undoable, and never without the turn that it was written with."""

import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from datetime import date, timedelta
from typing import Literal

import pytest
from conftest import SMALL, in_threads, texts, wait_until
from pydantic import BaseModel, ConfigDict, Field, computed_field, model_validator

from neuralflow_memory import (
    AccessDenied,
    ConfigError,
    ConflictError,
    InputError,
    InvalidTransition,
    Message,
    MessageError,
    NotFound,
    StateError,
    StatePersistenceError,
    StateRules,
    StateVersion,
    StorageError,
    StorageFull,
    open_memory,
)
from neuralflow_memory._failpoints import FAILPOINTS
from neuralflow_memory.pipeline.states import cleanup
from neuralflow_memory.storage.ledger import schema
from neuralflow_memory.testing import ManualClock


class Form(BaseModel):
    stage: Literal["asking", "checking", "booked"] = "asking"
    city: str | None = None
    day: date | None = None
    seats: int = Field(default=1, ge=1, le=9)

    @model_validator(mode="after")
    def whole(self):
        if self.stage == "booked" and not self.city:
            raise ValueError("a booking needs a city")
        return self


TABLE = {"asking": ["checking"], "checking": ["asking", "booked"], "booked": []}
RULES = StateRules(Form, status="stage", transitions=TABLE)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "seats": {"type": "integer", "minimum": 1, "default": 1}},
    "additionalProperties": False,
}


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def chat(opened, clock):
    memory = opened(embedder="none", clock=clock, state_rules=RULES)
    return memory.session("chat", user_id="ada", agent_id="clerk", principal="ada")


def raw(folder, query="SELECT session, version, fields, turn FROM state_versions ORDER BY session, version"):
    db = sqlite3.connect(f"file:{folder}/ledger.sqlite3?mode=ro", uri=True)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


# -- versions


def test_a_state_begins_with_the_rules_defaults(chat):
    """Version 0 is what nobody has written; reading it writes nothing."""
    state = chat.state.get()
    assert (state.version, state.life, state.status, state.at) == (0, "active", "asking", None)
    assert state.fields == {"stage": "asking", "city": None, "day": None, "seats": 1}
    assert chat.state.history() == []
    assert chat.memory.sessions(user_id="ada") == []


def test_an_update_merges_and_says_who_when_and_why(chat, clock):
    """By a mapping, by names, by a model of which those fields count that were set; values are put in place whole."""
    chat.state.update({"city": "Lisbon"}, why="she said so")
    clock.advance(minutes=1)
    chat.state.update(day=date(2026, 10, 9))
    last = chat.state.update(Form(seats=2))
    assert last.fields == {"stage": "asking", "city": "Lisbon", "day": "2026-10-09", "seats": 2}
    assert last == chat.state.get()
    first = chat.state.history()[0]
    assert (first.act, first.principal, first.agent_id, first.why) == ("update", "ada", "clerk", "she said so")
    assert last.at - first.at == timedelta(minutes=1)
    assert [v.version for v in chat.state.history()] == [1, 2, 3]
    assert [v.version for v in chat.state.history(last=2)] == [2, 3]
    assert chat.state.history(last=0) == []
    assert len(chat.state.history(last=10**30)) == 3


def test_what_is_handed_out_is_the_callers_own(opened):
    """A change of a value that was given, or got, reaches nobody."""
    state = opened(embedder="none").session("chat").state
    given = {"list": [1]}
    state.update(given)
    given["list"].append(2)
    state.get().fields["list"].append(3)
    assert state.get().fields == {"list": [1]}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"seats": 0}, "seats"),
        ({"seats": "many"}, "seats"),
        ({"stage": "lost"}, "stage"),
        ({"sets": 2}, "did you mean 'seats'"),
        ({"city": "\ud800"}, ""),
        ({"city": "x" * 300_000}, "200,000"),
        ({"city": object()}, ""),
        ([("city", "x")], "mapping"),
        ({1: 2}, "mapping"),
        ("city", "mapping"),
    ],
)
def test_what_is_not_valid_leaves_the_old_state_whole(chat, given, named):
    """The error names what is wrong; alone or with a turn, nothing is written."""
    chat.add("Hello", state={"city": "Porto"})
    before = chat.state.get()
    for call in (lambda: chat.state.update(given), lambda: chat.add("More", state=given)):
        with pytest.raises(StateError) as caught:
            call()
        assert named in str(caught.value)
    assert chat.state.get() == before
    assert texts(chat.messages()) == ["Hello"]
    assert len(chat.state.history()) == 1


def test_all_problems_are_told_at_once(chat):
    """As attributes, too."""
    with pytest.raises(StateError) as caught:
        chat.state.update(seats=0, day="someday")
    assert sorted(p.partition(":")[0] for p in caught.value.problems) == ["day", "seats"]


def test_a_status_goes_where_the_table_leads(chat):
    """By transition() or by an update of its field; nowhere else, and to itself only by an update."""
    with pytest.raises(InvalidTransition) as caught:
        chat.state.transition("booked", {"city": "Lisbon"})
    assert (caught.value.before, caught.value.after, caught.value.allowed) == ("asking", "booked", ("checking",))
    assert chat.state.get().version == 0
    moved = chat.state.transition("checking", {"city": "Lisbon"}, why="complete")
    assert (moved.status, moved.fields["city"], moved.act, moved.why) == (
        "checking",
        "Lisbon",
        "transition",
        "complete",
    )
    with pytest.raises(InvalidTransition):
        chat.state.transition("checking")
    assert chat.state.update(stage="checking", seats=2).version == 2
    assert chat.state.update(stage="booked").status == "booked"
    for call in (lambda: chat.state.transition("asking"), lambda: chat.state.update(stage="asking")):
        with pytest.raises(InvalidTransition, match="nowhere"):
            call()


def test_a_validator_sees_the_status(chat):
    """So a schema can say what a status needs."""
    chat.state.transition("checking")
    with pytest.raises(StateError, match="needs a city"):
        chat.state.transition("booked")
    assert chat.state.transition("booked", {"city": "Faro"}).fields["city"] == "Faro"


def test_a_rollback_is_a_new_version_with_the_old_fields(chat):
    """It undoes a transition that has no way back; life is not turned back."""
    chat.state.update(city="Lisbon")
    chat.state.transition("checking")
    chat.state.transition("booked")
    back = chat.state.rollback(1, why="wrong city")
    assert (back.version, back.act, back.why, back.status) == (4, "rollback", "wrong city", "asking")
    assert back.fields == chat.state.history()[0].fields
    assert [v.version for v in chat.state.history()] == [1, 2, 3, 4]
    for gone in (0, 5, -1, 10**30):
        with pytest.raises(NotFound, match="versions 1 to 4"):
            chat.state.rollback(gone)
    with pytest.raises(InputError):
        chat.state.rollback("1")


def test_a_rollback_to_what_is_not_valid_any_more_is_refused(opened, folder, chat):
    """By the rules of now, which may have become stricter."""
    chat.state.update(seats=9)
    chat.state.update(seats=2)
    chat.memory.close()

    class Stricter(Form):
        seats: int = Field(default=1, le=4)

    rules = StateRules(Stricter, status="stage", transitions=TABLE)
    state = opened(embedder="none", state_rules=rules).session("chat", user_id="ada").state
    with pytest.raises(StateError, match="seats"):
        state.rollback(1)
    assert state.get().fields["seats"] == 2


def test_a_diff_says_what_came_went_and_changed(opened):
    """Between two versions, or one and now; 1, 1.0 and True are three values."""
    state = opened(embedder="none").session("chat").state
    state.update(a=1, b=[1], c=1)
    state.change(lambda f: {"b": [1], "c": True, "d": None})
    state.update(b=[2])
    found = state.diff(1, 2)
    assert (found.added, found.removed, found.changed) == ({"d": None}, {"a": 1}, {"c": (1, True)})
    assert state.diff(2).changed == {"b": ([1], [2])}
    assert not state.diff(3)
    assert state.diff(2, 1).added == {"a": 1}
    with pytest.raises(NotFound):
        state.diff(1, 9)


def test_the_history_is_bounded_and_numbers_go_on(opened, folder):
    """`state.max_states`, the newest; lowered, the cleanup drops what is over."""
    memory = opened(embedder="none", state={"max_states": 3})
    state = memory.session("chat").state
    for n in range(10):
        state.update(n=n)
    assert [v.version for v in state.history()] == [8, 9, 10]
    assert len(raw(folder)) == 3
    with pytest.raises(NotFound, match="max_states"):
        state.rollback(7)
    memory.close()
    memory = opened(embedder="none", state={"max_states": 2})
    assert len(raw(folder)) == 3
    cleanup(memory._core.parts)
    assert [v.version for v in memory.session("chat").state.history()] == [9, 10]
    assert len(raw(folder)) == 2


def test_states_are_each_sessions_own(opened):
    """Of another user, of nobody, of another tenant: nothing is seen."""
    memory = opened(embedder="none")
    memory.session("chat", user_id="ada").state.update(secret=1)
    for other in (
        memory.session("chat"),
        memory.session("chat", user_id="bob"),
        memory.session("chat", user_id="ada", tenant="acme"),
        memory.session("other", user_id="ada"),
    ):
        assert other.state.get().version == 0
        other.state.update(own=1)
        assert other.state.get().fields == {"own": 1}
    assert memory.session("chat", user_id="ada").state.get().fields == {"secret": 1}
    assert memory.stats()["states"] == 5


def test_the_policy_is_asked(opened):
    """Reads and writes of a stranger are refused, of the state and of snapshots."""
    memory = opened(embedder="none")
    memory.session("chat", user_id="ada").state.update(secret=1)
    mine = memory.session("chat", user_id="ada")
    eve = memory.session("chat", user_id="ada", principal="eve")
    calls = [
        eve.state.get,
        eve.state.history,
        eve.snapshot,
        lambda: eve.state.diff(1),
        lambda: eve.state.update(a=1),
        lambda: eve.state.change(dict),
        lambda: eve.state.transition(life="closed"),
        lambda: eve.state.rollback(1),
        lambda: eve.add("x", state={"a": 1}),
        lambda: eve.restore(mine.snapshot()),
    ]
    for call in calls:
        with pytest.raises(AccessDenied):
            call()
    assert mine.state.get().version == 1
    assert mine.messages() == []


# -- versions that others write


def test_who_expects_another_version_is_told_both(chat):
    """`expect=` is compare-and-set, for each kind of change; nothing is written."""
    chat.state.update(city="Lisbon")
    stale = [
        lambda: chat.state.update(seats=2, expect=0),
        lambda: chat.state.transition("checking", expect=0),
        lambda: chat.state.rollback(1, expect=5),
        lambda: chat.add("Hello", state={"seats": 2}, expect=0),
    ]
    for call in stale:
        with pytest.raises(ConflictError) as caught:
            call()
        assert (caught.value.expected, caught.value.found, caught.value.id) == (
            5 if call is stale[2] else 0,
            1,
            "chat",
        )
    assert chat.messages() == []
    assert chat.state.update(seats=2, expect=1).version == 2
    assert chat.add("Hello", state={"seats": 3}, expect=2)
    for wrong in ("1", True, 1.0):
        with pytest.raises(InputError):
            chat.state.update(seats=2, expect=wrong)


def test_threads_lose_no_update(opened):
    """Merged or counted: each is a version, and none is lost."""
    memory = opened(embedder="none", state={"max_states": 1000})
    chat = memory.session("chat", user_id="ada")

    def work(own):
        state = memory.session("chat", user_id="ada", agent_id=own).state
        for n in range(25):
            state.update({own: n})
            state.change(lambda f: {**f, "count": f.get("count", 0) + 1})

    in_threads(*(lambda own=f"agent-{n}": work(own) for n in range(6)))
    last = chat.state.get()
    assert last.fields == {"count": 150, **{f"agent-{n}": 24 for n in range(6)}}
    assert [v.version for v in chat.state.history()] == list(range(1, 301))


def test_a_change_is_made_again_when_somebody_was_faster(chat, beside):
    """From the state as it is then; and what was made before is not stored."""
    other = beside(chat.memory, state_rules=RULES).session("chat", user_id="ada")
    seen = []

    def make(fields):
        seen.append(fields["seats"])
        if len(seen) == 1:
            other.state.update(seats=5)
        return {**fields, "seats": fields["seats"] + 1}

    assert chat.state.change(make).fields["seats"] == 6
    assert seen == [1, 5]
    assert [v.fields["seats"] for v in chat.state.history()] == [5, 6]


def test_rules_are_asked_under_no_lock(opened):
    """A validator, or a function of change(), may use the memory, also from another thread that it waits for."""
    memory = opened(embedder="none")
    chat = memory.session("chat", user_id="ada")

    def make(fields):
        in_threads(lambda: chat.add("Meanwhile"))
        chat.state.history()
        return {"n": 1}

    assert chat.state.change(make).fields == {"n": 1}
    assert texts(chat.messages()) == ["Meanwhile"]


# -- with a turn


def test_a_turn_and_its_state_are_one(chat):
    """The version names the turn; an invalid state, or a turn that is refused, leaves neither."""
    (own,) = chat.add("To Lisbon, please", state={"city": "Lisbon"})
    state = chat.state.get()
    assert (state.fields["city"], state.turn, state.version) == ("Lisbon", own, 1)
    with pytest.raises(MessageError):
        chat.add([Message("user", "x"), 5], state={"city": "Porto"})
    chat.add(Message("user", "One", id="m"))
    with pytest.raises(ConflictError) as caught:
        chat.add(Message("user", "Other", id="m"), state={"city": "Porto"})
    assert caught.value.found is None
    with pytest.raises(InvalidTransition):
        chat.add("Book it", state={"stage": "booked"})
    assert chat.state.get() == state
    assert texts(chat.messages()) == ["To Lisbon, please", "One"]


def test_a_repeated_add_does_not_merge_again(chat):
    """As after a crash that left it open whether the first came through; but a state for a turn that had none is merged."""
    turn = Message("user", "To Lisbon", id="m")
    chat.add(turn)
    for _ in range(2):
        assert chat.add(turn, state={"city": "Lisbon"}) == ["m"]
    chat.state.update(city="Porto")
    chat.add(turn, state={"city": "Lisbon"})
    assert chat.state.get().fields["city"] == "Porto"
    assert [v.turn for v in chat.state.history()] == ["m", None]


def test_a_repeated_add_is_none_though_the_state_has_moved_on(chat):
    """Where the table does not lead there any more, the version is another one, or the session is closed."""
    turn = Message("user", "Go on", id="m")
    chat.add(turn, state={"stage": "checking", "city": "Lisbon"}, expect=0)
    chat.state.transition("booked")
    assert chat.add(turn, state={"stage": "checking", "city": "Lisbon"}, expect=0) == ["m"]
    chat.state.transition(life="closed")
    assert chat.add(turn, state={"stage": "checking", "city": "Lisbon"}) == ["m"]
    assert (chat.state.get().version, chat.state.get().status) == (3, "booked")
    with pytest.raises(ConflictError, match="other content"):
        chat.add(Message("user", "Other", id="m"), state={"stage": "checking"})
    with pytest.raises(InvalidTransition):
        chat.add(Message("user", "New", id="n"), state={"seats": 2})


def test_a_turn_may_expect_a_version_without_changing_fields(chat):
    """As a lock on what was read; it makes a version."""
    chat.add("Hello", expect=0)
    with pytest.raises(ConflictError):
        chat.add("Hello", expect=0)
    assert chat.state.get().version == len(chat.messages()) == 1


def test_a_state_without_a_turn_is_an_update(chat):
    """Where nothing is left of the messages, or none was given."""
    assert chat.add([], state={"city": "Lisbon"}) == []
    injected = Message("system", "recalled", metadata={"neuralflow": "context"})
    assert chat.add(injected, state={"seats": 2}) == []
    assert chat.state.get().fields["seats"] == 2
    assert [v.turn for v in chat.state.history()] == [None, None]


@pytest.mark.parametrize("name", ["append.begun", "append.applied", "append.committed"])
def test_an_error_on_the_way_leaves_both_or_neither(chat, folder, monkeypatch, name):
    """Whatever interrupts it, in this process."""
    assert name in FAILPOINTS

    def fail(passed):
        if passed == name:
            raise KeyboardInterrupt

    monkeypatch.setattr("neuralflow_memory._failpoints.hook", fail)
    with pytest.raises(KeyboardInterrupt):
        chat.add("To Lisbon", state={"city": "Lisbon"})
    monkeypatch.undo()
    both = name == "append.committed"
    assert len(chat.messages()) == chat.state.get().version == len(raw(folder)) == both
    assert len(chat.messages(view="window")) == both
    chat.add("Again", state={"city": "Porto"})
    assert chat.state.get().fields["city"] == "Porto"


CHILD = """
    import os, signal, sys
    import neuralflow_memory._failpoints as failpoints
    from neuralflow_memory import Message, open_memory
    folder, name = sys.argv[1:]
    memory = open_memory(folder, embedder="none", pruning={small})
    chat = memory.session("chat", user_id="ada")
    left = [5]
    def kill(passed):
        if passed == name:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    failpoints.hook = kill
    for n in range(40):
        chat.add(Message("user", f"Turn {{n}}", id=f"t{{n}}"), state={{"n": n, "text": "x" * 5000}})
        chat.entries.update(f"t{{n}}", tags=["seen"])
        chat.state.update(between=n)
        memory.flush()
"""


@pytest.mark.parametrize("name", [n for n in FAILPOINTS if n.partition(".")[0] in ("append", "change", "fold")])
def test_a_kill_leaves_no_turn_without_its_state(folder, opened, name):
    """At any point of writing, changing, folding: what is committed is whole, and each turn has its state and none else has."""
    code = textwrap.dedent(CHILD.format(small=SMALL))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder), name], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == -9, done.stderr
    memory = opened(embedder="none", pruning=SMALL)
    assert memory.stats(verify=True)["integrity"] == "ok"
    chat = memory.session("chat", user_id="ada")
    said = [m.id for m in chat.messages()]
    history = chat.state.history()
    assert [v.turn for v in history if v.turn] == said
    assert [v.version for v in history] == list(range(1, len(history) + 1))
    assert all(v.fields["n"] == int(v.turn[1:]) for v in history if v.turn)
    assert len(history) - len(said) in (len(said), len(said) - 1)
    chat.add(Message("user", "Next", id="next"), state={"n": -1})
    assert chat.state.get().version == len(history) + 1


def test_a_state_survives_its_process(opened, folder, chat):
    """With its history."""
    chat.state.update(city="Lisbon")
    chat.state.transition("checking")
    before = chat.state.history()
    chat.memory.close()
    again = opened(embedder="none", state_rules=RULES).session("chat", user_id="ada", agent_id="clerk")
    assert again.state.history() == before
    assert again.state.get().status == "checking"


def test_a_full_disk_leaves_the_old_state(chat, monkeypatch):
    """The error says so, and is a StorageError, too; with a turn it is the turn's own error."""
    chat.state.update(city="Lisbon")
    database = chat.memory._core.parts.ledger._db
    with database.lock:
        size = database._writer.execute("PRAGMA page_count").fetchone()[0]
        database._writer.execute(f"PRAGMA max_page_count = {size}")
    with pytest.raises(StatePersistenceError, match="stands as it was") as caught:
        chat.state.update(city="x" * 100_000)
    assert isinstance(caught.value, StorageError)
    assert isinstance(caught.value.__cause__, StorageFull)
    assert str(chat.memory.path) in caught.value.path
    with pytest.raises(StorageFull):
        chat.add("Hello", state={"city": "x" * 100_000})
    assert chat.state.get().fields["city"] == "Lisbon"
    assert chat.messages() == []
    with database.lock:
        database._writer.execute("PRAGMA max_page_count = 1000000")
    assert chat.state.update(city="Porto").version == 2


def test_clear_takes_the_state_and_its_history(chat, folder):
    """The number goes on, so that whoever read it before is told; nothing that was in it is left."""
    chat.add("Hello", state={"city": "Secretville"})
    chat.state.update(seats=2)
    chat.clear()
    state = chat.state.get()
    assert (state.version, state.act, state.fields["city"], state.principal) == (3, "clear", None, "ada")
    assert [v.version for v in chat.state.history()] == [3]
    assert "Secretville" not in str(raw(folder))
    with pytest.raises(ConflictError):
        chat.state.update(seats=3, expect=2)
    assert chat.state.update(seats=3).version == 4
    assert chat.state.rollback(3).fields == {"stage": "asking", "city": None, "day": None, "seats": 1}
    other = chat.memory.session("new", user_id="ada")
    other.clear()
    assert other.state.get().version == 0


# -- life


def test_silence_makes_a_session_idle_then_expired(chat, clock):
    """By the clock, without a version; any write wakes it, and whoever expects the version of before is told nothing."""
    chat.add("Hello", state={"city": "Lisbon"})
    seen = []
    for minutes in (59, 2, 58, 2):
        clock.advance(minutes=minutes)
        seen.append(chat.state.get().life)
    assert seen == ["active", "idle", "idle", "expired"]
    assert chat.state.get().version == 1
    chat.add("Still there?")
    assert chat.state.get().life == "active"
    clock.advance(minutes=61)
    assert chat.state.update(seats=2, expect=1).life == "active"
    assert [v.life for v in chat.state.history()] == ["active", "active"]


def test_a_session_without_a_state_has_a_life(chat, clock):
    """It needs no row for it."""
    chat.add("Hello")
    clock.advance(hours=3)
    assert (chat.state.get().life, chat.state.get().version) == ("expired", 0)
    chat.add("Hello again")
    assert chat.state.get().life == "active"


def test_the_cleanup_notes_it_once_and_tells_the_hooks(opened, beside, clock):
    """Of two processes one does; the next write is heard of as an awakening."""
    heard = []

    def hook(before, after):
        heard.append((after.scope.session_id, before.life, after.life, after.version))

    rules = StateRules(on_transition=hook)
    memory = opened(embedder="none", clock=clock, state_rules=rules)
    other = beside(memory, clock=clock, state_rules=rules)
    chat = memory.session("chat", user_id="ada")
    chat.state.update(n=1)
    memory.session("plain", user_id="ada").add("Hello")
    parts = memory._core.parts, other._core.parts
    assert [cleanup(p) for p in parts] == [0, 0]
    clock.advance(minutes=61)
    assert [cleanup(p) for p in parts] == [1, 0]
    clock.advance(minutes=61)
    assert [cleanup(p) for p in parts] == [1, 0]
    assert heard == [("chat", "active", "idle", 1), ("chat", "idle", "expired", 1)]
    assert chat.state.get().life == "expired"
    chat.add("Back")
    assert chat.state.get().life == "active"
    assert [cleanup(p) for p in parts] == [1, 0]
    clock.advance(minutes=61)
    assert cleanup(parts[0]) == 1
    chat.state.update(n=2)
    assert [h[1:3] for h in heard[2:]] == [("expired", "active"), ("active", "idle"), ("idle", "active")]
    assert chat.state.get().version == 2
    assert memory.stats()["last_error"] is None


def test_the_background_cleans_up(opened, clock):
    """Every `state.cleanup_interval`, by a thread that is there anyway."""
    heard = []
    threads = threading.active_count()
    rules = StateRules(on_transition=lambda before, after: heard.append(after.life))
    memory = opened(embedder="none", clock=clock, state_rules=rules, state={"cleanup_interval": 0.02})
    usual = threading.active_count() - threads
    chat = memory.session("chat", user_id="ada")
    chat.state.update(n=1)
    clock.advance(minutes=61)
    wait_until(lambda: heard == ["idle"])
    clock.advance(minutes=61)
    wait_until(lambda: heard == ["idle", "expired"])
    memory.close()
    opened(embedder="none", clock=clock)
    assert threading.active_count() - threads == usual


def test_a_life_goes_where_it_may(chat, clock):
    """A closed session takes no change of its state, alone or with a turn, until it is opened again; plain turns it takes."""
    assert chat.state.transition(life="idle").life == "idle"
    clock.advance(seconds=1)
    chat.add("Hello")
    assert chat.state.get().life == "active"
    closed = chat.state.transition(life="closed", why="done")
    assert (closed.life, closed.version, closed.fields) == ("closed", 2, chat.state.get().fields)
    refused = [
        lambda: chat.state.update(seats=2),
        lambda: chat.state.change(dict),
        lambda: chat.state.transition("checking"),
        lambda: chat.state.transition(life="closed"),
        lambda: chat.state.transition(life="idle"),
        lambda: chat.state.rollback(1),
        lambda: chat.add("More", state={"seats": 2}),
    ]
    for call in refused:
        with pytest.raises(InvalidTransition, match="active"):
            call()
    chat.add("A plain turn")
    clock.advance(days=3)
    assert (chat.state.get().life, chat.state.get().version) == ("closed", 2)
    assert cleanup(chat.memory._core.parts) == 0
    assert texts(chat.messages()) == ["Hello", "A plain turn"]
    assert chat.state.transition("checking", life="active").status == "checking"
    both = chat.state.transition("asking", {"seats": 4}, life="closed")
    assert (both.life, both.status, both.fields["seats"]) == ("closed", "asking", 4)
    with pytest.raises(StateError, match="life is one of"):
        chat.state.transition(life="dead")


# -- hooks


def test_hooks_hear_of_transitions_that_are_stored(chat, opened, folder):
    """Not of other changes, nor of what was refused; in order; and see what is stored."""
    chat.memory.close()
    heard = []

    def first(before, after):
        heard.append((before.status, after.status, chat_.state.get().version))

    rules = StateRules(
        Form, status="stage", transitions=TABLE, on_transition=[first, lambda *_: heard.append("second")]
    )
    chat_ = opened(embedder="none", state_rules=rules).session("chat", user_id="ada")
    chat_.state.update(city="Lisbon")
    with pytest.raises(InvalidTransition):
        chat_.state.transition("booked")
    assert heard == []
    chat_.add("Go on", state={"stage": "checking"})
    assert heard == [("asking", "checking", 2), "second"]


def test_a_hook_that_fails_undoes_nothing(opened):
    """The change stands, the other hooks are called, and stats() tells."""
    heard = []

    def broken(before, after):
        raise RuntimeError("no mail today")

    rules = StateRules(transitions={"a": ["b"], "b": []}, on_transition=(broken, lambda *_: heard.append(1)))
    memory = opened(embedder="none", state_rules=rules)
    state = memory.session("chat").state
    assert state.transition("b").status == "b"
    assert heard == [1]
    assert memory.stats()["last_error"] == "on_transition: RuntimeError: no mail today"


# -- rules


def test_a_json_schema_says_what_is_valid(opened):
    """Its defaults are what a state begins with; a session may have rules of its own."""
    memory = opened(embedder="none", state_rules=SCHEMA)
    state = memory.session("chat").state
    assert state.get().fields == {"seats": 1}
    assert state.update(city="Lisbon").fields == {"seats": 1, "city": "Lisbon"}
    for wrong in ({"seats": 0}, {"town": "x"}, {"seats": "1"}):
        with pytest.raises(StateError):
            state.update(wrong)
    own = memory.session("own", state_rules=StateRules(transitions={"x": ["y"], "y": []}))
    assert own.state.transition("y").fields == {"status": "y"}


def test_a_schema_is_never_fetched(opened):
    """A reference to elsewhere is told, and nothing is asked of the network."""
    rules = StateRules({"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(StateError, match=r"\$defs"):
        opened(embedder="none", state_rules=rules).session("chat").state.update(a=1)


def test_models_of_all_kinds_come_back_as_they_were(opened):
    """Aliases, computed fields, strict ones, nested ones, extra ones, required ones."""

    class Inner(BaseModel):
        name: str = Field(alias="Name")

        @computed_field
        @property
        def shout(self) -> str:
            return self.name.upper()

    class Outer(BaseModel):
        model_config = ConfigDict(strict=True, extra="allow")
        inner: Inner | None = Field(default=None, alias="in")
        days: set[date] = set()
        must: int

    memory = opened(embedder="none", state_rules=Outer)
    state = memory.session("chat").state
    assert state.get().fields == {}
    with pytest.raises(StateError, match="must"):
        state.update({"in": {"Name": "x"}})
    state.update({"in": {"Name": "x"}, "must": 1, "days": {date(2026, 1, 1)}, "more": [1]})
    fields = state.update(must=2).fields
    assert fields == {"inner": {"name": "x"}, "days": ["2026-01-01"], "must": 2, "more": [1]}
    made = Outer.model_validate_json(json.dumps(fields), by_name=True)
    assert (made.inner.shout, made.days) == ("X", {date(2026, 1, 1)})
    assert state.rollback(1).fields["must"] == 1
    bare = memory.session("bare")
    bare.state.transition(life="closed")
    other = memory.session("other")
    other.restore(bare.snapshot())
    assert (other.state.get().life, other.state.get().fields) == ("closed", {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: StateRules(5),
        lambda: StateRules(dict),
        lambda: StateRules({"type": "nonsense"}),
        lambda: StateRules(transitions={}),
        lambda: StateRules(transitions=["a"]),
        lambda: StateRules(transitions={"a": ["b"]}),
        lambda: StateRules(transitions={"a": "a"}),
        lambda: StateRules(transitions={"a": [1]}),
        lambda: StateRules(transitions={"a": [["a"]]}),
        lambda: StateRules(Form, status="stage", transitions={"other": []}),
        lambda: StateRules(on_transition=[5]),
        lambda: StateRules(on_transition=5),
        lambda: open_memory(":memory:", embedder="none", state_rules=5),
        lambda: open_memory(":memory:", embedder="none", state={"max_states": 0}),
        lambda: open_memory(":memory:", embedder="none", state={"cleanup_interval": 0}),
    ],
)
def test_rules_that_are_none_are_refused_when_they_are_made(make):
    """Not at the first update."""
    with pytest.raises(ConfigError):
        make()


def test_a_state_without_a_table_has_no_status(opened):
    """A transition of it is refused, with what to do."""
    state = opened(embedder="none").session("chat").state
    assert state.update(status="anything").status is None
    with pytest.raises(StateError, match="StateRules"):
        state.transition("x")
    for call in (state.transition, lambda: state.transition(None, {"a": 1}, life="closed")):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="1,000"):
        state.update(a=1, why="x" * 1001)
    with pytest.raises(InputError):
        state.history(last=-1)
    assert state.get().version == 1


def test_a_table_that_came_later_begins_where_it_begins(opened, folder):
    """What was written without it, or by another one, can go on from the first status."""
    memory = opened(embedder="none")
    memory.session("chat").state.update(status="old", a=1)
    memory.session("bare").state.update(a=1)
    memory.close()
    memory = opened(embedder="none", state_rules=StateRules(transitions={"x": ["y"], "y": []}))
    with pytest.raises(StateError):
        memory.session("chat").state.update(a=2)
    assert memory.session("chat").state.transition("x").fields == {"status": "x", "a": 1}
    assert memory.session("bare").state.update(a=2).fields == {"a": 2, "status": "x"}


# -- in RAM only


def test_without_persistence_nothing_of_it_is_in_the_folder(opened, folder, clock):
    """It works the same meanwhile, says so in stats(), forgets what expired, and all of it on close."""
    options = {"embedder": "none", "clock": clock, "state": {"persistence": False, "max_states": 2}}
    memory = opened(state_rules=RULES, **options)
    chat = memory.session("chat", user_id="ada")
    chat.add("Hello", state={"city": "Lisbon"})
    with pytest.raises(ConflictError):
        chat.add("Other", state={"city": "Porto"}, expect=0)
    with pytest.raises(ConflictError):
        chat.add([Message("user", "A", id="a"), Message("user", "B", id="a")], state={"city": "Porto"})
    assert (chat.state.get().fields["city"], texts(chat.messages())) == ("Lisbon", ["Hello"])
    chat.state.transition("checking")
    chat.state.rollback(1)
    assert [v.version for v in chat.state.history()] == [2, 3]
    assert chat.snapshot()["state"]["version"] == 3
    assert (memory.stats()["states"], memory.stats()["states_persist"]) == (1, False)
    assert raw(folder) == raw(folder, "SELECT * FROM states") == []
    other = memory.session("other", user_id="ada")
    other.state.update(city="Faro")
    clock.advance(minutes=61)
    chat.state.update(seats=3)
    clock.advance(minutes=60)
    assert cleanup(memory._core.parts) == 2
    assert (other.state.get().version, chat.state.get().version) == (0, 4)
    chat.clear()
    assert chat.state.get().version == 5
    memory.close()
    memory = opened(**options)
    assert memory.session("chat", user_id="ada").state.get().version == 0
    assert texts(memory.session("chat", user_id="ada").messages()) == []


def test_with_persistence_stats_says_so(chat):
    """And how many sessions have a state."""
    assert (chat.memory.stats()["states"], chat.memory.stats()["states_persist"]) == (0, True)


@pytest.mark.parametrize("name", ["append.applied", "change.applied"])
def test_in_ram_a_turn_that_failed_has_no_state(opened, monkeypatch, name):
    """The state is put in place when the turn is stored."""
    memory = opened(embedder="none", state={"persistence": False})
    chat = memory.session("chat")

    def fail(passed):
        if passed == name:
            raise OSError("no disk")

    monkeypatch.setattr("neuralflow_memory._failpoints.hook", fail)
    with pytest.raises(OSError):
        chat.add("Hello", state={"a": 1}) if name.startswith("append") else chat.state.update(a=1)
    monkeypatch.undo()
    assert (chat.state.get().version, chat.messages()) == (0, [])


# -- snapshots


def told(memory, chat):
    """A session with turns of all kinds, a summary, a pin, tasks and a state."""
    call = {"id": "c1", "name": "look", "args": {"at": [1, None]}}
    chat.add([f"Turn {n} about the harbour" for n in range(6)])
    memory.flush()
    chat.add(
        [
            Message("user", [{"type": "text", "text": "Look"}, {"type": "image", "url": "x"}], id="m1", name="Ada"),
            Message("assistant", "", tool_calls=[call], id="m2", metadata={"k": 1}, payload={"own": True}),
            Message("tool", "Sea", tool_call_id="c1", id="m3"),
        ],
        state={"city": "Lisbon"},
    )
    chat.pin("m1")
    trip = chat.task("trip")
    with trip:
        trip.set("seats", 2)
        trip.note("aisle")
        trip.progress(0.5, "comparing")
        part = chat.task("part of it")
        part.start()
        chat.memory.flush()
        taken = chat.snapshot()
        part.complete()
    return taken


def test_a_snapshot_is_json_of_one_moment(opened, clock):
    """Window, summary, open tasks and state, as they are."""
    memory = opened(embedder="none", clock=clock, state_rules=RULES, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    taken = told(memory, chat)
    assert json.loads(json.dumps(taken, allow_nan=False)) == taken
    assert taken["format"] == 1
    assert (taken["session_id"], taken["user_id"]) == ("chat", "ada")
    assert [t["id"] for t in taken["window"]] == [m.id for m in chat.messages(view="window")]
    assert [t["pinned"] for t in taken["window"] if t["id"] == "m1"] == [True]
    assert taken["summary"]["text"] in chat.summary()
    assert [t["name"] for t in taken["tasks"]] == ["trip", "part of it"]
    assert taken["tasks"][1]["parent"] == taken["tasks"][0]["id"]
    assert taken["state"] == {
        "version": 1,
        "fields": chat.state.get().fields,
        "life": "active",
        "status": "asking",
    }
    assert memory.session("nobody").snapshot()["window"] == []


def test_a_snapshot_is_restored_in_another_folder(opened, tmp_path, clock):
    """Turns, pins, summary, tasks and state are there, also after reopening; twice is the same."""
    memory = opened(embedder="none", clock=clock, state_rules=RULES, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    taken = told(memory, chat)
    summary = chat.summary()
    window = [m for m in chat.messages(view="window") if m.id.startswith("m")]
    options = {"embedder": "none", "clock": clock, "state_rules": RULES, "pruning": SMALL}
    for again in range(2):
        with opened(tmp_path / "elsewhere", **options) as other:
            there = other.session("moved", user_id="bob")
            there.restore(json.loads(json.dumps(taken)))
            other.flush()
        with opened(tmp_path / "elsewhere", **options) as other:
            there = other.session("moved", user_id="bob")
            found = [m for m in there.messages(view="window") if m.id.startswith("m")]
            assert found == window
            assert there.entries.get("m1").pinned
            assert there.summary() == summary
            assert [(t.name, t.status) for t in there.tasks()] == [("trip", "open"), ("part of it", "open")]
            assert there.tasks()[0].values() == {"seats": 2}
            assert there.tasks()[0].notes() == ["aisle"]
            assert "50% done" in str(there.context("harbour").messages[0].text)
            state = there.state.get()
            assert (state.fields, state.version, state.act) == (taken["state"]["fields"], again + 1, "restore")
            assert there.search("Sea")[0].entry.id == "m3"
            assert [e.metadata["kind"] for e in there.entries.list(types=["episodic"])].count("summary") == 1
    with opened(tmp_path / "elsewhere", **options) as other:
        there = other.session("moved", user_id="bob")
        there.add([f"Later turn {n}" for n in range(9)])  # folds on top of the summary that was brought
        other.flush()
        assert there.summary()
        assert other.stats()["last_error"] is None


def test_a_session_goes_back_to_its_snapshot(opened, clock):
    """What came later leaves the window and stays in the transcript; what was changed or deleted is as it was."""
    memory = opened(embedder="none", clock=clock, state_rules=RULES)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"Turn {n}", id=f"t{n}") for n in range(3)], state={"city": "Lisbon"})
    with chat.task("trip") as trip:
        trip.set("seats", 2)
        taken = chat.snapshot()
        trip.set("seats", 3)
    chat.add(Message("user", "Later", id="late"), state={"stage": "checking"})
    chat.entries.update("t0", content="Changed")
    chat.entries.delete("t1")
    chat.state.transition(life="closed")
    assert [t.status for t in chat.tasks()] == ["completed"]
    chat.restore(taken)
    assert [(m.id, m.content) for m in chat.messages(view="window")] == [(f"t{n}", f"Turn {n}") for n in range(3)]
    assert "late" in [m.id for m in chat.messages()]
    assert [(t.name, t.status, t.values()) for t in chat.tasks()] == [("trip", "open", {"seats": 2})]
    state = chat.state.get()
    assert (state.status, state.life, state.version) == ("asking", "active", 4)
    assert state.fields == taken["state"]["fields"]


def test_a_snapshot_of_nothing_makes_nothing(opened):
    """And one without a state takes back the state that came later, as a version."""
    memory = opened(embedder="none")
    chat = memory.session("chat")
    taken = chat.snapshot()
    chat.restore(taken)
    assert chat.state.history() == []
    chat.state.update(a=1)
    chat.restore(taken)
    assert (chat.state.get().fields, chat.state.get().version) == ({}, 2)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {},
        {"format": 2},
        {"state": {"version": 1, "fields": {"seats": 0}, "life": "active"}},
        {"state": {"version": 1, "fields": {}, "life": "dead"}},
        {"window": [{"id": "a", "role": "nobody", "content": "x", "created_at": "2026-01-01T00:00:00Z"}]},
        {"window": [{"id": "a", "role": "user", "content": "", "created_at": "2026-01-01T00:00:00Z"}]},
        {"window": [{"id": "a", "role": "user", "content": "x", "created_at": "2026-01-01T00:00:00Z"}] * 2},
        {"window": [{"id": "a", "role": "user", "content": "\ud800", "created_at": "2026-01-01T00:00:00Z"}]},
        {"tasks": [{"name": "x"}]},
        {"summary": {"text": "x"}},
    ],
)
def test_what_is_no_snapshot_restores_nothing(chat, broken):
    """It is told, and the session stands."""
    chat.add("Hello", state={"city": "Lisbon"})
    given = broken and {**chat.snapshot(), **broken} if broken != {} else broken
    with pytest.raises((InputError, StateError)):
        chat.restore(given)
    assert texts(chat.messages(view="window")) == ["Hello"]
    assert chat.state.get().version == 1


@pytest.mark.parametrize("name", ["change.applied", "change.committed"])
def test_a_restore_is_all_or_nothing(opened, tmp_path, monkeypatch, name):
    """Interrupted before its commit nothing is there, after it everything."""
    memory = opened(embedder="none", pruning=SMALL, state_rules=RULES)
    taken = told(memory, memory.session("chat", user_id="ada"))
    other = memory.session("other", user_id="ada")

    def fail(passed):
        if passed == name:
            raise KeyboardInterrupt

    monkeypatch.setattr("neuralflow_memory._failpoints.hook", fail)
    with pytest.raises(KeyboardInterrupt):
        other.restore(taken)
    monkeypatch.undo()
    there = name == "change.committed"
    assert bool(other.messages(view="window")) == bool(other.tasks()) == bool(other.summary()) == there
    assert other.state.get().version == there


def test_a_snapshot_shows_no_turn_without_its_state(opened, beside):
    """However fast others write: window and state are of one moment."""
    memory = opened(embedder="none", pruning={"summarization_threshold": 10_000, "max_context_items": 9_000})
    chat, reader = memory.session("chat", user_id="ada"), beside(memory).session("chat", user_id="ada")
    done = threading.Event()

    def write():
        for n in range(150):
            chat.add(Message("user", f"Turn {n}", id=f"t{n}"), state={"turns": n + 1})
        done.set()

    def read():
        while not done.is_set():
            taken = reader.snapshot()
            assert len(taken["window"]) == taken["state"]["fields"].get("turns", 0)

    in_threads(write, read, read)


# -- the rest


async def test_the_twins_do_the_same(opened):
    """Each has one, off the loop."""
    chat = opened(embedder="none", state_rules=RULES).session("chat", user_id="ada")
    await chat.aadd("Hello", state={"city": "Lisbon"})
    await chat.state.aupdate(seats=2)
    await chat.state.achange(lambda f: {**f, "seats": f["seats"] + 1})
    await chat.state.atransition("checking")
    assert (await chat.state.aget()).fields["seats"] == 3
    assert (await chat.state.adiff(1)).changed == {"seats": (1, 3), "stage": ("asking", "checking")}
    await chat.state.arollback(1)
    assert len(await chat.state.ahistory()) == 5
    taken = await chat.asnapshot()
    await chat.arestore(taken)
    assert chat.state.get().fields["seats"] == 1


def test_a_folder_without_states_gets_their_tables(opened, folder):
    """One from before is brought up to date when it is opened."""
    memory = opened(embedder="none")
    memory.session("chat").add("Hello")
    memory.close()
    db = sqlite3.connect(folder / "ledger.sqlite3")
    db.execute("DROP TABLE states")
    db.execute("DROP TABLE state_versions")
    db.execute(f"PRAGMA user_version = {schema.MIGRATIONS.index(schema._m008_states)}")
    db.close()
    chat = opened(embedder="none").session("chat")
    assert chat.add("More", state={"a": 1})
    assert (chat.state.get().version, texts(chat.messages())) == (1, ["Hello", "More"])


def test_an_add_without_a_state_asks_for_nothing_more(opened):
    """The statements of an add name no table of states, whether the session has a state or not."""
    memory = opened(embedder="none")
    chat = memory.session("chat", user_id="ada")
    writer, said = memory._core.parts.ledger._db._writer, []
    counts = []
    for state in (None, {"a": 1}):
        chat.add("Before", state=state)
        memory.flush()
        said.clear()
        with memory._core.parts.ledger._db.lock:
            writer.set_trace_callback(said.append)
        chat.add("Hello")
        with memory._core.parts.ledger._db.lock:
            writer.set_trace_callback(None)
        counts.append(len(said))
        assert [s for s in said if "state" in s] == []
    assert counts[0] == counts[1] > 5


def test_a_version_can_be_shown(chat):
    """And names its session."""
    assert isinstance(chat.state.get(), StateVersion)
    assert chat.state.get().scope.session_id == "chat"
    assert repr(chat.state) == "State(Session('chat', user_id='ada'))"
    assert os.path.exists(chat.memory.path)
