"""Export and import: what leaves comes back the same, once, whole, and without what was deleted."""

import base64
import hashlib
import json
import multiprocessing
import os
import threading
import tracemalloc
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime, timedelta

import pytest
from conftest import SMALL, CountingEmbedder, index_keys, live_keys, rows, texts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import (
    Extraction,
    Finding,
    FormatError,
    InputError,
    MemoryType,
    Message,
    ScopeError,
    StateError,
    StorageError,
    ToolCall,
    open_memory,
)
from neuralflow_memory.pipeline.records import EntryLine, VersionLine
from neuralflow_memory.testing import HashingEmbedder, ManualClock
from neuralflow_memory.types import Entry

PLAIN = {"embedder": "none", "pruning": SMALL}


class Reader:
    """Finds in each message that says "fact" what comes after it."""

    name = "reader"

    def __init__(self):
        self.read = []

    def extract(self, messages):
        self.read += [m.id for m in messages]
        facts = [Finding(m.content.split("fact: ")[1], (m.id,)) for m in messages if "fact: " in m.content]
        return Extraction(tuple(facts))


def records(file):
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def body(file):
    """The file's records, without the first line and the last, which are of one export only."""
    return file.read_bytes().splitlines()[1:-1]


def rewritten(file, lines):
    """Put *lines* (bytes) between first and last line, with a last line that is right."""
    first = file.read_bytes().splitlines()[0]
    text = b"".join(line + b"\n" for line in (first, *lines))
    end = {"kind": "end", "lines": len(lines) + 1, "blake2b": hashlib.blake2b(text, digest_size=32).hexdigest()}
    file.write_bytes(text + json.dumps(end).encode() + b"\n")


def fill(memory):
    """Something of every kind."""
    clock = memory._core.parts.clock
    chat = memory.session("chat", user_id="ada", agent_id="planner")
    for n in range(12):
        clock.advance(minutes=1)
        call = ToolCall(f"call-{n}", "weigh", {"n": n, "in": ["kg", None, 1.5]})
        said = [{"type": "text", "text": f"Bed {n} holds {n * 7} beans."}, {"type": "image", "url": "https://x/y.png"}]
        chat.add(
            [
                Message("user", said, id=f"u{n}", name="Ada", metadata={"n": n, "deep": {"er": [1, 2]}}),
                Message("assistant", "", tool_calls=[call], payload={"host": "x", "raw": "ü\u2028"}),
                Message("tool", "done", tool_call_id=call.id),
                Message("assistant", f"I counted {n * 7}.", created_at=datetime(1999, 1, 1, 1, 2, 3, 4, tzinfo=UTC)),
            ]
        )
        memory.flush()
        if n % 4 == 1:
            chat.state.update({"bed": {"n": n}, "ü": None}, why="counted")
    chat.add(Message("system", "Be brief."), state={"brief": True})
    chat.pin("u3")
    chat.entries.update("u1", content=[{"type": "text", "text": "Bed 1 is empty."}])
    chat.entries.update("u1", metadata={})
    chat.entries.update("u11", tags=["beans", "ü"], importance=0.125, metadata={"changed": True})
    chat.remember("Ada likes the south wall.", tags=["a"], category="garden/beds", importance=0.75)
    south = next(e.id for e in chat.entries.list(types=["long_term"]) if "south wall" in e.content)
    chat.entries.update(south, content="Ada likes any south wall.", tags=[])
    chat.remember("Ada likes the north wall.", supersedes=south)
    chat.remember("Until May.", expires_at=datetime(2040, 5, 1, tzinfo=UTC), type=MemoryType.EPISODIC)
    with chat.task("over") as task:
        task.note("it was done")
    task = chat.task("open")
    task.start()
    task.set("bed", {"n": 4})
    chat.report_usage("some-model", 2 * chat.context("And now?").tokens)
    memory.values(user_id="ada").put(("notes", "x"), "k", {"v": [1, {"ü": None}]}, texts=["Quince", "Pear"], ttl=90)
    memory.values().put((), "root", {})
    memory.session("chat").add("Of nobody.")
    memory.session("x", user_id="ada", tenant="other").add("Elsewhere.")
    memory.session("gone", user_id="bob").add(["One.", Message("user", "Two.", id="two")])
    memory.session("gone", user_id="bob").entries.delete("two")
    told = memory.session("told", user_id="bob")
    for n in range(3):
        told.add([Message("user", f"This is a fact: Bob has {n % 2} hens.", id=f"t{n}"), "Nothing much", "I see"])
        memory.flush()
    told.state.update(hens=1)
    told.state.transition(life="closed", why="all said")
    memory.session("cleared").state.update(x=1)
    memory.session("cleared").clear()
    memory.flush()
    return chat


def shown(memory):
    """What a memory shows of its sessions, entries and values, with everything that can be read from outside."""
    own = {"key", "number"}  # of a folder
    found = {}
    for user, tenant in (("ada", None), ("ada", "other"), ("bob", None), (None, None)):
        for info in memory.sessions(user_id=user, tenant=tenant):
            chat = memory.session(info.session_id, user_id=user, tenant=tenant)
            entries = [
                {f.name: getattr(e, f.name) for f in fields(e) if f.name not in own} for e in chat.entries.list()
            ]
            window = [m.id for m in chat.messages(view="window")]
            before = {
                e.id: [(v.version, v.content, v.tags, v.tokens) for v in chat.entries.history(e.key)]
                for e in chat.entries.list()
            }
            state = [chat.state.get(), chat.state.history()]
            found[user, tenant, info.session_id] = [
                info,
                entries,
                window,
                chat.messages(),
                chat.summary(),
                before,
                state,
            ]
        values = memory.values(user_id=user, tenant=tenant)
        found[user, tenant] = sorted(
            (v.namespace, v.key, v.value, v.created_at, v.updated_at, v.expires_at) for v in values.search((), limit=99)
        )
    return found


def ties(memory):
    """Turn and knowledge of each tie between them, and what is known of the segments that were looked through."""
    with memory._core.parts.ledger._db.read() as db:
        found = "SELECT t.id, k.id FROM derivations d JOIN entries t ON t.no = d.source JOIN entries k ON k.no = d.no ORDER BY 1, 2"
        looked = "SELECT e.id, x.found, x.attempts FROM extractions x JOIN entries e USING (no) ORDER BY 1"
        return db.execute(found).fetchall(), db.execute(looked).fetchall()


@pytest.fixture
def filled(opened, folder):
    memory = opened(clock=ManualClock(), pruning=SMALL, extractor=Reader())
    fill(memory)
    return memory


def test_a_round_trip_is_exact(opened, filled, tmp_path):
    """Order, windows, summaries, pins, tasks, values, times, versions, payloads, sessions: all as they were."""
    done = filled.export(tmp_path / "a.jsonl")
    assert done.bytes == (tmp_path / "a.jsonl").stat().st_size
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL)
    taken = other.import_(tmp_path / "a.jsonl")
    assert (taken.sessions, taken.entries, taken.values) == (done.sessions, done.entries, done.values)
    assert (taken.present, taken.left_out, taken.vectors) == (0, 0, 0)
    other.export(tmp_path / "b.jsonl")
    assert body(tmp_path / "b.jsonl") == body(tmp_path / "a.jsonl")
    assert shown(other) == shown(filled)
    assert ties(other) == ties(filled)
    assert [turn for turn, _ in ties(other)[0]] == ["t0", "t1", "t2"]
    assert other.stats()["margins"] == filled.stats()["margins"] != {}
    kinds = {r["kind"] for r in records(tmp_path / "a.jsonl")[1:-1]}
    assert kinds == {"session", "state", "entry", "version", "value", "derivation", "margin"}
    kinds = {e["type"] for e in records(tmp_path / "a.jsonl") if e["kind"] == "entry"}
    assert kinds == {"short_term", "working", "long_term", "episodic"}


def test_what_was_imported_is_used_as_if_it_had_never_moved(opened, filled, tmp_path):
    """Search, context, the open task, the next turn and the next fold go on."""
    filled.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", clock=ManualClock(filled._core.parts.clock()), pruning=SMALL)
    other.import_(tmp_path / "a.jsonl")
    before, after = (m.session("chat", user_id="ada") for m in (filled, other))
    for chat in (before, after):
        chat.memory.flush()
        chat.add([Message("user", f"And bed {n}?", id=f"next{n}") for n in range(4)])
        chat.memory.flush()
    assert texts(after.context("How many beans in bed 3?").messages) == texts(
        before.context("How many beans in bed 3?").messages
    )
    assert [e.seq for e in after.entries.list(within="session")] == [
        e.seq for e in before.entries.list(within="session")
    ]
    task = after.task("open")
    task.start()
    assert task.get("bed") == {"n": 4}
    assert after.summary() == before.summary() != ""
    assert index_keys(other) == live_keys(other)


def test_what_was_found_in_turns_goes_with_them_elsewhere_too(opened, filled, tmp_path):
    """Nothing is looked through twice, and knowledge goes with the last turn that says it."""
    filled.export(tmp_path / "a.jsonl")
    reader = Reader()
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL, extractor=reader)
    other.import_(tmp_path / "a.jsonl")
    other.flush()
    told = other.session("told", user_id="bob")
    left = {m.id for m in told.messages()} - set(filled._core.parts.extractor.read)
    assert set(reader.read) <= left
    known = {e.content for e in told.entries.list(types=["long_term"])}
    assert {"Bob has 0 hens.", "Bob has 1 hens."} <= known
    told.entries.update("t1", content="Nothing.")
    assert {e.content for e in told.entries.list(types=["long_term"])} == known - {"Bob has 1 hens."}
    assert other.import_(tmp_path / "a.jsonl").entries == 0
    assert {e.content for e in told.entries.list(types=["long_term"])} == known - {"Bob has 1 hens."}


def test_a_tie_that_was_cut_here_stays_cut(opened, filled, tmp_path):
    """Also where its turn reads again as it does in the file: what was said anew was not looked through."""
    filled.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL)
    other.import_(tmp_path / "a.jsonl")
    told = other.session("told", user_id="bob")
    said = told.entries.get("t0").content
    told.entries.update("t0", content="Nothing.")
    told.entries.update("t0", content=said)
    before = ties(other)[0]
    assert [turn for turn, _ in before] == ["t1", "t2"]
    other.import_(tmp_path / "a.jsonl")
    assert ties(other)[0] == before


def test_a_file_of_the_format_before_stays_readable(opened, filled, tmp_path):
    """It says nothing of states, earlier versions and what was found where; all else is as ever."""
    filled.export(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    older = [json.loads(line) for line in lines[:-1]]
    older[0]["format"] = 1
    older = [r for r in older if r["kind"] not in ("state", "version", "derivation")]
    for record in older:
        record.pop("extraction", None)
    (tmp_path / "a.jsonl").write_bytes(json.dumps(older[0]).encode() + b"\n")
    rewritten(tmp_path / "a.jsonl", [json.dumps(r).encode() for r in older[1:]])
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL)
    assert other.import_(tmp_path / "a.jsonl").entries == rows(filled)["entries"]
    there, here = shown(filled), shown(other)
    assert here.keys() == there.keys()
    assert all(here[k][:5] == there[k][:5] for k in here if len(k) == 3)
    assert other.session("told", user_id="bob").state.get().version == 0
    assert ties(other) == ([], [])


@pytest.mark.parametrize("size", [1, 7])
def test_versions_come_with_what_they_are_of(opened, filled, tmp_path, monkeypatch, size):
    """However small the transactions are, none ends between an entry, or a session, and what it was before."""
    filled.export(tmp_path / "a.jsonl")
    import neuralflow_memory.pipeline.import_ as module

    monkeypatch.setattr(module, "_BATCH", size)
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL)
    other.import_(tmp_path / "a.jsonl")
    other.export(tmp_path / "b.jsonl")
    assert body(tmp_path / "b.jsonl") == body(tmp_path / "a.jsonl")


def test_a_state_that_is_here_stays(opened, filled, tmp_path):
    """Also one that was cleared, unless it is asked for; then it is the next version, with those before, once."""
    filled.export(tmp_path / "a.jsonl")
    chat, told = filled.session("chat", user_id="ada"), filled.session("told", user_id="bob")
    was = chat.state.history()
    told.state.transition(life="active")
    changed = told.state.update(hens=7)
    chat.clear()
    filled.import_(tmp_path / "a.jsonl")
    assert told.state.get() == changed
    assert [(v.act, v.fields) for v in chat.state.history()] == [("clear", {})]
    for _ in range(2):
        filled.import_(tmp_path / "a.jsonl", restore_deleted=True)
        history = chat.state.history()
        assert history[: len(was) - 1] == was[:-1]
        assert [v.version for v in history] == [*range(1, len(was)), len(was) + 1, len(was) + 2]
        assert chat.state.get().fields == was[-1].fields
        assert chat.state.get().version == len(was) + 2
        assert told.state.get() == changed
    assert filled.session("cleared").state.get().fields == {}


def test_a_state_comes_into_a_chat_that_has_none(opened, filled, tmp_path):
    """The turns are here, the state is not: it is taken whole, as many versions as are kept here."""
    filled.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", clock=ManualClock(), state={"max_states": 2}, **PLAIN)
    other.session("chat", user_id="ada").add("Hello.")
    other.import_(tmp_path / "a.jsonl")
    there, here = (m.session("chat", user_id="ada").state for m in (filled, other))
    assert here.history() == there.history()[-2:]
    assert here.update(more=1).version == there.get().version + 1
    assert [v.version for v in here.history()] == [there.get().version, there.get().version + 1]


def test_states_that_are_not_kept_in_the_folder_stay_out_of_files(opened, filled, tmp_path):
    """They are in RAM only: neither written to a file nor taken from one."""
    filled.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", clock=ManualClock(), state={"persistence": False}, **PLAIN)
    other.session("own").state.update(secret=1)
    other.import_(tmp_path / "a.jsonl")
    assert other.session("told", user_id="bob").state.get().version == 0
    other.export(tmp_path / "b.jsonl")
    assert "state" not in {r["kind"] for r in records(tmp_path / "b.jsonl")}


def test_earlier_versions_of_what_was_deleted_here_do_not_come_back(opened, filled, tmp_path):
    """Not even where somebody has written something new under its id."""
    filled.export(tmp_path / "a.jsonl")
    chat = filled.session("chat", user_id="ada")
    chat.entries.delete("u1")
    chat.add(Message("user", "Something new.", id="u1"))
    filled.import_(tmp_path / "a.jsonl", restore_deleted=True)
    assert [v.content for v in chat.entries.history("u1")] == ["Something new."]
    chat.entries.delete("u1")
    filled.import_(tmp_path / "a.jsonl")
    filled.export(tmp_path / "b.jsonl")
    assert b"Bed 1 holds" not in b"".join(line for line in body(tmp_path / "b.jsonl") if b'"version"' in line[:20])
    filled.import_(tmp_path / "a.jsonl", restore_deleted=True)
    assert [v.content for v in chat.entries.history("u1")] == ["Bed 1 holds 7 beans.", *["Bed 1 is empty."] * 2]


def test_what_knowledge_was_by_a_turn_that_was_deleted_here_is_left_out(opened, filled, tmp_path):
    """What is said elsewhere, too, comes in; what only such a turn says does not, be it an earlier version."""
    there = filled.session("told", user_id="bob")
    there.entries.update("t0", content="Nothing.")
    filled.flush()
    filled.export(tmp_path / "a.jsonl")
    known = next(e for e in there.entries.list(types=["long_term"]) if "0 hens" in e.content)
    assert [v.sources for v in there.entries.history(known.key)] == [("t0",), ("t2",)]
    other = opened(tmp_path / "other", clock=ManualClock(), **PLAIN)
    here = other.session("told", user_id="bob")
    here.add(Message("user", "Mine.", id="t0"))
    here.entries.delete("t0")
    here.add(Message("user", "Mine.", id="t1"))
    here.entries.delete("t1")
    other.import_(tmp_path / "a.jsonl")
    assert [e.content for e in here.entries.list(types=["long_term"]) if "hens" in e.content] == [known.content]
    assert [v.sources for v in here.entries.history(known.id)] == [("t2",)]


def test_vectors_travel_and_nothing_is_embedded_again(opened, filled, tmp_path):
    """With vectors, the new folder's search and its index are filled without a call of the embedder."""
    filled.export(tmp_path / "a.jsonl", vectors=True)
    embedder = CountingEmbedder()
    other = opened(tmp_path / "other", embedder=embedder, pruning=SMALL, clock=ManualClock())
    taken = other.import_(tmp_path / "a.jsonl")
    other.flush()
    assert embedder.texts == []
    assert taken.vectors == rows(filled)["vectors"] == rows(other)["vectors"] > 20
    assert index_keys(other) == live_keys(other)
    other.export(tmp_path / "b.jsonl", vectors=True)
    assert body(tmp_path / "b.jsonl") == body(tmp_path / "a.jsonl")


def test_vectors_of_another_model_are_not_taken(opened, filled, tmp_path):
    """They would mix with those that are here: the texts are embedded by the model that is."""
    filled.export(tmp_path / "a.jsonl", vectors=True)
    embedder = CountingEmbedder()
    embedder.model_id = "another"
    other = opened(tmp_path / "other", embedder=embedder, pruning=SMALL, clock=ManualClock())
    assert other.import_(tmp_path / "a.jsonl").vectors == 0
    other.flush()
    assert embedder.texts


def test_a_second_import_adds_nothing(opened, filled, tmp_path):
    """Into the same folder, or twice into another: not a row more, and what was changed since stays changed."""
    filled.export(tmp_path / "a.jsonl")
    before, counted = shown(filled), rows(filled)
    again = filled.import_(tmp_path / "a.jsonl")
    assert (again.sessions, again.entries, again.values, again.left_out) == (0, 0, 0, 0)
    assert (shown(filled), rows(filled)) == (before, counted)
    other = opened(tmp_path / "other", clock=ManualClock(), **PLAIN)
    other.import_(tmp_path / "a.jsonl")
    chat = other.session("chat", user_id="ada")
    chat.entries.update("u11", content="Nobody knows.")
    chat.add("One more.")
    other.values(user_id="ada").put(("notes", "x"), "k", {"v": 2})
    before = shown(other)
    assert other.import_(tmp_path / "a.jsonl").entries == 0
    assert shown(other) == before


def test_what_was_deleted_here_does_not_come_back(filled, tmp_path):
    """Neither turns nor knowledge nor values, nor summaries that quote them; unless it is asked for."""
    filled.export(tmp_path / "a.jsonl")
    chat = filled.session("chat", user_id="ada")
    known = next(e for e in chat.entries.list(types=["long_term"]) if "south wall" in e.content)
    chat.entries.delete(["u1", "u10"])
    chat.entries.delete(known.key)
    filled.values(user_id="ada").delete(("notes", "x"), "k")
    filled.values().delete((), "root")
    filled.flush()
    before = shown(filled)
    taken = filled.import_(tmp_path / "a.jsonl")
    assert taken.left_out > 5
    assert (taken.entries, taken.values) == (0, 0)
    assert shown(filled) == before
    asked = filled.import_(tmp_path / "a.jsonl", restore_deleted=True)
    assert asked.values == 2
    assert {"u1", "u10"} <= {m.id for m in chat.messages()}
    assert chat.entries.get(known.id).content == known.content
    assert chat.entries.get("u1").version > 1
    assert filled.values(user_id="ada").get(("notes", "x"), "k").value == {"v": [1, {"ü": None}]}
    filled.flush()
    assert index_keys(filled) == live_keys(filled)


def test_a_summary_of_something_deleted_is_left_out_and_its_turns_return(opened, tmp_path):
    """A file from a copy of the folder may hold summaries that this one never saw."""
    one = opened(**PLAIN)
    chat = one.session("chat", user_id="ada")
    chat.add([Message("user", "The safe opens with 4711.", id="secret"), Message("user", "Noted.", id="noted")])
    one.export(tmp_path / "early.jsonl")
    copy = opened(tmp_path / "copy", **PLAIN)
    copy.import_(tmp_path / "early.jsonl")
    theirs = copy.session("chat", user_id="ada")
    theirs.add([Message("user", f"Bed {n}.", id=f"b{n}") for n in range(6)])
    copy.flush()
    assert "4711" in theirs.summary()
    copy.export(tmp_path / "late.jsonl")
    chat.entries.delete("secret")
    done = one.import_(tmp_path / "late.jsonl")
    assert done.left_out >= 3  # the turn, its segment, the summary
    one.flush()
    said = chat.summary() + "".join(e.content for e in chat.entries.list())
    assert "4711" not in said
    assert [m.id for m in chat.messages()] == ["noted", *(f"b{n}" for n in range(6))]
    covered = {i for e in chat.entries.list(types=["episodic"]) for i in e.sources}
    assert covered | {m.id for m in chat.messages(view="window")} >= {m.id for m in chat.messages()}


def test_turns_whose_segment_is_left_out_stand_in_a_new_sessions_window(opened, tmp_path):
    """As when a segment is deleted: each turn is covered or verbatim, never neither."""
    one = opened(**PLAIN)
    chat = one.session("chat", user_id="ada")
    chat.add([Message("user", f"Bed {n}.", id=f"b{n}") for n in range(6)])
    one.flush()
    window = [m.id for m in chat.messages(view="window")]
    one.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", **PLAIN)
    kept = other.session("chat", user_id="ada")
    kept.add(Message("user", "Bed 0.", id="b0"))
    kept.entries.delete("b0")
    with other._core.parts.ledger._db.lock, other._core.parts.ledger._db.write() as db:
        db.execute("DELETE FROM sessions")  # as if all of it had gone with the user
    other.import_(tmp_path / "a.jsonl")
    assert [m.id for m in kept.messages(view="window")] == [f"b{n}" for n in range(1, 6)] != window
    assert kept.summary() == ""


def test_an_import_into_a_chat_that_went_on_keeps_both(opened, tmp_path):
    """Turns of both are there, those of the file after those that are here; nothing is folded twice or lost."""
    here, there = opened(**PLAIN), opened(tmp_path / "there", **PLAIN)
    for memory, name in ((here, "h"), (there, "t")):
        chat = memory.session("chat", user_id="ada")
        chat.add([Message("user", f"Said {name}{n}.", id=f"{name}{n}") for n in range(9)])
        chat.remember(f"Known {name}.")
        memory.flush()
    there.export(tmp_path / "t.jsonl")
    chat = here.session("chat", user_id="ada")
    own_window = [m.id for m in chat.messages(view="window")]
    their_window = [m.id for m in there.session("chat", user_id="ada").messages(view="window")]
    here.import_(tmp_path / "t.jsonl")
    assert [m.id for m in chat.messages()] == [*(f"h{n}" for n in range(9)), *(f"t{n}" for n in range(9))]
    assert [m.id for m in chat.messages(view="window")] == [*own_window, *their_window]
    assert chat.entries.count() == 18 + len(chat.entries.list(types=["episodic"]))
    chat.add(Message("user", "And now?", id="now"))
    here.flush()
    assert chat.summary().count("Said h0.") == chat.summary().count("Said t0.") == 1
    covered = {
        i for e in chat.entries.list(filter={"metadata.kind": "segment"}) for i in e.sources[-e.metadata["covered"] :]
    }
    assert covered.isdisjoint(m.id for m in chat.messages(view="window"))
    assert covered | {m.id for m in chat.messages(view="window")} == {m.id for m in chat.messages()}
    before = shown(here)
    assert here.import_(tmp_path / "t.jsonl").entries == 0
    assert shown(here) == before


def test_one_users_export_holds_nothing_of_others(opened, filled, tmp_path):
    """Neither their lines nor what is of the folder; and only the tenant that is meant."""
    filled.export(tmp_path / "ada.jsonl", user_id="ada")
    found = records(tmp_path / "ada.jsonl")
    assert {r.get("user_id") for r in found[1:-1]} == {"ada"}
    assert {r.get("tenant") for r in found[1:-1]} == {None}
    filled.export(tmp_path / "other.jsonl", tenant="other")
    assert {r["tenant"] for r in records(tmp_path / "other.jsonl")[1:-1]} == {"other"}
    filled.export(tmp_path / "nobody.jsonl", user_id="nobody")
    assert body(tmp_path / "nobody.jsonl") == []
    assert opened(tmp_path / "o", **PLAIN).import_(tmp_path / "nobody.jsonl").entries == 0


def test_an_import_for_another_user(opened, filled, tmp_path):
    """Everything is theirs then, beside what they have; the first user's stays out of their sight."""
    filled.export(tmp_path / "ada.jsonl", user_id="ada")
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL)
    other.session("own", user_id="eve").add("Mine.")
    other.import_(tmp_path / "ada.jsonl", user_id="eve", tenant="there")
    eve = other.session("chat", user_id="eve", tenant="there")
    chat = filled.session("chat", user_id="ada")
    assert eve.messages() == chat.messages()
    assert eve.messages(view="window") == chat.messages(view="window")
    assert eve.summary() == chat.summary()
    assert {e.content for e in eve.entries.list()} == {e.content for e in chat.entries.list()}
    assert other.sessions(user_id="ada") == other.sessions(user_id="ada", tenant="there") == []
    assert other.values(user_id="eve", tenant="there").get(("notes", "x"), "k") is not None
    other.flush()
    hits = eve.search("How many beans does bed 3 hold?")
    assert {h.entry.scope.user_id for h in hits} == {"eve"}


def test_nobodys_chats_can_be_given_to_a_user(opened, tmp_path):
    """The usual case after an application has learned who its users are."""
    one = opened(**PLAIN)
    one.session("a").add("First.")
    one.session("b").add("Second.")
    one.session("b").remember("Knowledge of that session.")
    one.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", **PLAIN)
    other.import_(tmp_path / "a.jsonl", user_id="ada")
    assert {s.session_id for s in other.sessions(user_id="ada")} == {"a", "b"}
    assert other.sessions() == []
    assert {e.content for e in other.session("c", user_id="ada").entries.list(within="user")} == {
        "First.",
        "Second.",
        "Knowledge of that session.",
    }


def test_several_users_do_not_become_one(filled, opened, tmp_path):
    """That would mix their chats: it is refused, before anything is written, and the error says what to do."""
    filled.export(tmp_path / "all.jsonl")
    other = opened(tmp_path / "other", **PLAIN)
    with pytest.raises(FormatError, match=r"'ada'.*(nobody|'bob').*user_id="):
        other.import_(tmp_path / "all.jsonl", user_id="eve")
    assert rows(other)["entries"] == 0
    with pytest.raises(ScopeError):
        other.import_(tmp_path / "all.jsonl", user_id="")


# -- broken files


AT = "2026-01-02T03:04:05Z"
STATE = {"kind": "state", "session_id": "s", "version": 1, "life": "active", "at": AT, "act": "update"}
VERSION = {"kind": "version", "session_id": "s", "id": "m", "version": 1, "provenance": "said"}
VERSION |= {"created_at": AT, "updated_at": AT}


def broken(lines):
    """Names of damages, and what the error says."""
    entry = next(n for n, line in enumerate(lines) if b'"kind":"entry"' in line)
    whole = json.loads(lines[entry])
    number = entry + 1

    def changed(**new):
        return [*lines[:entry], json.dumps({**whole, **new}).encode(), *lines[entry + 1 :]]

    return {
        "cut between lines": (lines[:-1], rf"line {len(lines)}: the file ends here"),
        "cut within a line": ([*lines[:-3], lines[-3][:40]], rf"line {len(lines) - 2}: the file ends within"),
        "empty": ([], "line 1: the file ends here"),
        "a line lost": ([*lines[:5], *lines[6:]], "not as it was written"),
        "a letter changed": ([line.replace(b"beans", b"peas!") for line in lines], "not as it was written"),
        "not JSON": ([*lines[:4], b"{nonsense", *lines[5:]], "line 5: not a record"),
        "not an object": ([*lines[:4], b"[]", *lines[5:]], "line 5: not a record"),
        "an unknown kind": ([*lines[:4], b'{"kind": "dream"}', *lines[5:]], "line 5: .*'dream'"),
        "an unknown field": (changed(colour="red"), rf"line {number}: colour"),
        "a wrong type": (changed(seq="one"), rf"line {number}: seq"),
        "a wrong time": (changed(created_at="yesterday"), rf"line {number}: created_at"),
        "a wrong role": (changed(role="gardener"), rf"line {number}: role"),
        "a field missing": (changed(content=None), rf"line {number}: content"),
        "a huge number": (changed(seq=10**30), rf"line {number}: seq"),
        "no message": (changed(content=" ", blocks=None), rf"line {number}: the message is empty"),
        "half a character": (changed(content="\ud800"), rf"line {number}: not a record"),
        "no session": (changed(session_id=None), rf"line {number}: .*no session_id"),
        "a wrong session": (changed(session_id="x" * 600), rf"line {number}: session_id"),
        "a vector without a model": (changed(vector=base64.b64encode(b"1234").decode()), rf"line {number}: vector"),
        "half a state": ([*lines[:1], b'{"kind": "state", "session_id": "s"}', *lines[1:]], "line 2: version"),
        "a state of nobody": ([*lines[:1], b'{"kind": "state", "version": 1}', *lines[1:]], "line 2: session_id"),
        "a state that is too long": (
            [*lines[:1], json.dumps({**STATE, "fields": {"x": "y" * 200_000}}).encode(), *lines[1:]],
            "line 2: fields",
        ),
        "a version without a message": (
            [*lines[: entry + 1], json.dumps({**VERSION, "role": "user", "content": " "}).encode()],
            rf"line {number + 1}: the message is empty",
        ),
        "no vector": (changed(vector="%%%"), rf"line {number}: vector"),
        "more after the end": ([*lines, lines[1]], "records follow"),
        "a second first line": ([*lines[:3], lines[0], *lines[3:]], "line 4: .*first line"),
        "without its first line": (lines[1:], "line 1: this is no export"),
        "some other file": ([b'{"session_id": "s", "role": "user", "content": "x"}'], "line 1: this is no export"),
        "not text": ([b"\xff\xfe\x00SQLite"], "line 1: this is no export"),
        "of a newer version": (
            [json.dumps({**json.loads(lines[0]), "format": 99, "more": 1}).encode(), *lines[1:]],
            "line 1: a newer version",
        ),
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Lines of a file."""
    where = tmp_path_factory.mktemp("exported")
    with open_memory(where / "memory", clock=ManualClock(), extractor=Reader(), **PLAIN) as memory:
        fill(memory)
        memory.export(where / "a.jsonl")
    return (where / "a.jsonl").read_bytes().splitlines()


@pytest.mark.parametrize("damage", broken([b'{"kind":"entry"}'] * 7))
def test_a_broken_file_is_refused_whole(opened, exported, tmp_path, damage):
    """The error is typed, names file and line, and nothing at all was written."""
    lines, match = broken(exported)[damage]
    file = tmp_path / "broken.jsonl"
    file.write_bytes(b"\n".join(lines) + (b"" if damage in ("cut within a line", "empty") else b"\n"))
    memory = opened(**PLAIN)
    with pytest.raises(FormatError, match=match) as caught:
        memory.import_(file)
    assert caught.value.line >= 1
    assert caught.value.path == "broken.jsonl"
    assert "broken.jsonl" in str(caught.value)
    assert isinstance(caught.value, InputError)
    assert set(rows(memory).values()) == {0}


def test_a_file_that_is_not_there(opened, tmp_path):
    """Says so, on the way in and on the way out, and leaves nothing behind."""
    memory = opened(**PLAIN)
    with pytest.raises(InputError, match="can't be read"):
        memory.import_(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="can't be read"):
        memory.import_(tmp_path)
    with pytest.raises(StorageError, match="can't be written"):
        memory.export(tmp_path / "none" / "a.jsonl")
    with pytest.raises(InputError, match="folder"):
        memory.export(tmp_path)
    (tmp_path / "kept.jsonl").write_text("before")
    memory._core.parts.ledger.dump = None  # breaks it in the middle
    with pytest.raises(TypeError):
        memory.export(tmp_path / "kept.jsonl")
    assert (tmp_path / "kept.jsonl").read_text() == "before"
    assert {p.name for p in tmp_path.iterdir()} == {"memory", "kept.jsonl"}


def test_a_plain_entry_without_its_session_is_taken(opened, exported, tmp_path):
    """So that others can write such files: what is not said has its default."""
    file = tmp_path / "own.jsonl"
    file.write_bytes(exported[0] + b"\n")
    at = "2026-01-02T03:04:05Z"
    line = {"kind": "entry", "session_id": "s", "id": "m1", "type": "short_term", "seq": 1, "role": "user"}
    line |= {"content": "Hello.", "importance": 0.5, "provenance": "said", "created_at": at, "written_at": at}
    rewritten(file, [json.dumps({**line, "updated_at": at, "version": 1}).encode()])
    memory = opened(**PLAIN)
    assert memory.import_(file).entries == 1
    (said,) = memory.session("s").messages(view="window")
    assert (said.content, said.created_at) == ("Hello.", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert memory.session("s").entries.get("m1").tokens > 0


def test_tokens_are_counted_anew_by_another_counter(opened, tmp_path):
    """Numbers of another tokenizer would break budgets."""
    one = opened(**PLAIN)
    one.session("s").add(Message("user", "Antidisestablishmentarianism in Berlin.", id="m"))
    one.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", tokenizer="approx", **PLAIN)
    other.import_(tmp_path / "a.jsonl")
    message = one.session("s").messages()[0]
    assert other.session("s").entries.get("m").tokens == other._core.parts.count(message)


# -- at the same time, and in little memory


def test_an_export_while_others_write_is_of_one_moment(opened, tmp_path):
    """Every session is whole, with each turn that was there when it began and none that came after."""
    memory = opened(**PLAIN)
    for n in range(40):
        memory.session(f"s{n}").add([f"turn {i}" for i in range(10)])
    stop = threading.Event()

    def write():
        n = 0
        while not stop.is_set():
            memory.session(f"s{n % 50}").add([f"late {n} a", f"late {n} b"])
            n += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for run in range(4):
            done = memory.export(tmp_path / f"{run}.jsonl")
            found = records(tmp_path / f"{run}.jsonl")
            seqs = {}
            for record in found:
                if record["kind"] == "entry" and record["type"] == "short_term":
                    seqs.setdefault(record["session_id"], []).append(record["seq"])
            last = {r["session_id"]: r["last_seq"] for r in found if r["kind"] == "session"}
            assert {s: len(own) for s, own in seqs.items()} == last
            assert all(own == list(range(1, len(own) + 1)) for own in seqs.values())
            late = [r["content"] for r in found if r["kind"] == "entry" and r["content"].startswith("late")]
            assert len(late) % 2 == 0
            assert done.sessions >= 40
    finally:
        stop.set()
        writer.join()
    opened(tmp_path / "other", **PLAIN).import_(tmp_path / "3.jsonl")


def test_adding_goes_on_during_an_import(opened, filled, tmp_path):
    """Turns added to the very chat that comes in are kept, with numbers of their own."""
    filled.export(tmp_path / "a.jsonl")
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL, embedder="none")
    chat = other.session("chat", user_id="ada")
    ledger = other._core.parts.ledger
    load, added = ledger.load, []

    def slowly(owner, moved, **more):
        done = load(owner, moved, **more)
        if owner.user_id == "ada":
            added.extend(chat.add(f"Meanwhile {len(added)}."))
        return done

    ledger.load = slowly
    import neuralflow_memory.pipeline.import_ as module

    batch, module._BATCH = module._BATCH, 20
    try:
        other.import_(tmp_path / "a.jsonl")
    finally:
        module._BATCH = batch
        del ledger.load
    assert len(added) > 2
    turns = chat.entries.list(types=["short_term"], within="session")
    assert len({e.seq for e in turns}) == len(turns)
    old = filled.session("chat", user_id="ada").entries.list(types=["short_term"], within="session")
    assert [e.id for e in turns] == [*(e.id for e in old), *added]
    other.flush()
    covered = {i for e in chat.entries.list(filter={"metadata.kind": "segment"}) for i in e.sources}
    assert covered | {m.id for m in chat.messages(view="window")} == {e.id for e in turns}


def test_memory_stays_small_both_ways(opened, tmp_path):
    """Eight times the data takes no more than a bit more memory: records are streamed."""

    def peak(call):
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    unfolded = {
        "embedder": "none",
        "budget": {"total": 10**9, "conversation": 10**9},
        "pruning": {"summarization_threshold": 10**6, "max_context_tokens": 10**9},
    }
    memory = opened(**unfolded)
    chat = memory.session("s", user_id="ada")
    peaks = []
    for size in (250, 2000):
        chat.add([Message("user", f"Turn {n}", id=f"{size}-{n}", payload={"raw": "x" * 3000}) for n in range(size)])
        memory.flush()
        file = tmp_path / f"{size}.jsonl"
        out = peak(lambda f=file: memory.export(f))
        other = opened(tmp_path / f"o{size}", **unfolded)
        peaks.append((out, peak(lambda f=file, o=other: o.import_(f))))
    assert peaks[1][0] < peaks[0][0] + 1_000_000
    assert peaks[1][1] < peaks[0][1] + 6_000_000
    assert (tmp_path / "2000.jsonl").stat().st_size > 5_000_000


def test_progress_is_told(opened, tmp_path):
    """From little to all, never backwards."""
    memory = opened(**PLAIN)
    memory.session("s", user_id="ada").add([f"turn {n}" for n in range(1600)])
    for call in (memory.export, opened(tmp_path / "o", **PLAIN).import_):
        seen = []
        call(tmp_path / "a.jsonl", progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert [d for d, _ in seen] == sorted(d for d, _ in seen)
        assert len({t for _, t in seen}) == 1
        assert seen[-1][0] == seen[-1][1] > 0
        assert len(seen) > 2


async def test_the_async_twins(opened, tmp_path):
    """They do the same."""
    memory = opened(**PLAIN)
    await memory.session("s").aadd("Hello.")
    assert (await memory.aexport(tmp_path / "a.jsonl")).entries == 1
    assert (await opened(tmp_path / "o", **PLAIN).aimport_(tmp_path / "a.jsonl")).entries == 1


# -- crashes


def _import_and_die(folder, file, name, passing):
    left = [passing]

    def die(passed):
        if passed == name:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), 9)

    import neuralflow_memory.pipeline.import_ as module

    module._BATCH = 25
    failpoints.hook = die
    with open_memory(folder, clock=ManualClock(), **PLAIN) as memory:
        memory.import_(file)


@pytest.mark.parametrize("name", ["load.applied", "load.committed"])
@pytest.mark.parametrize("passing", [1, 3, 4])
def test_an_import_that_was_killed_is_finished_by_the_next(exported, opened, tmp_path, name, passing):
    """Wherever it was cut: after the second run all is exactly as it would have been."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(exported) + b"\n")
    child = multiprocessing.get_context("fork").Process(
        target=_import_and_die, args=(tmp_path / "memory", file, name, passing)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -9
    memory = opened(clock=ManualClock(), **PLAIN)
    there = rows(memory)["entries"]
    assert there < len(exported)
    assert memory.stats(verify=True)["integrity"] == "ok"
    memory.import_(file)
    memory.export(tmp_path / "b.jsonl")
    assert body(tmp_path / "b.jsonl") == exported[1:-1]


# -- anything at all

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
WHEN = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.just(UTC))
MESSAGES = st.builds(
    Message,
    st.sampled_from(["user", "assistant", "system", "developer"]),
    TEXT | st.lists(st.builds(lambda t, o: {**o, "type": "text", "text": t}, TEXT, OBJECT), min_size=1, max_size=2),
    name=st.none() | NAMES,
    created_at=st.none() | WHEN,
    metadata=OBJECT,
    payload=st.none() | OBJECT,
    tool_calls=st.lists(st.builds(ToolCall, NAMES, NAMES, OBJECT), max_size=2),
)
SCOPES = st.tuples(st.sampled_from(["s", "t", "ü"]), st.sampled_from([None, "ada", "bob"]))
STEPS = st.one_of(
    st.tuples(st.just("add"), SCOPES, st.lists(MESSAGES, min_size=1, max_size=4)),
    st.tuples(st.just("remember"), SCOPES, TEXT, st.lists(NAMES, max_size=2), st.none() | NAMES, st.floats(0, 1)),
    st.tuples(st.just("put"), st.sampled_from([None, "ada"]), st.lists(NAMES, max_size=2), NAMES, OBJECT, TEXT),
    st.tuples(st.just("pin"), SCOPES, st.integers(0, 9)),
    st.tuples(st.just("delete"), SCOPES, st.integers(0, 9)),
    st.tuples(st.just("update"), SCOPES, st.integers(0, 9), TEXT),
    st.tuples(st.just("state"), SCOPES, OBJECT, st.none() | TEXT),
    st.tuples(st.just("life"), SCOPES, st.sampled_from(["idle", "closed", "active"])),
    st.tuples(st.just("change"), SCOPES, st.integers(0, 9), TEXT, OBJECT),
    st.tuples(st.just("clear"), SCOPES),
    st.tuples(st.just("fact"), SCOPES, TEXT),
    st.tuples(st.just("note"), SCOPES, NAMES, TEXT),
)


def take(memory, step):
    verb, scope, *rest = step
    if verb == "put":
        namespace, key, value, text = rest
        memory.values(user_id=scope).put(tuple(namespace), key, value, texts=[text])
        return
    chat = memory.session(scope[0], user_id=scope[1])
    if verb == "add":
        chat.add(rest[0])
    elif verb == "remember":
        text, tags, category, importance = rest
        chat.remember(text, tags=tags, category=category, importance=importance)
    elif verb == "state":
        with suppress(StateError):  # it may be closed
            chat.state.update(rest[0], why=rest[1])
    elif verb == "life":
        with suppress(StateError):
            chat.state.transition(life=rest[0])
    elif verb == "clear":
        chat.clear()
    elif verb == "fact":
        chat.add([Message("user", f"fact: {rest[0]}"), *["I see."] * 5])
    elif verb == "change":
        known = chat.entries.list(types=["long_term"])
        if known:
            one = known[rest[0] % len(known)]
            chat.entries.update(one.key, content=rest[1], metadata=rest[2])
            if rest[0] % 3 == 0:
                chat.entries.restore(one.key, one.version)
    elif verb == "note":
        task = chat.task(f"{rest[0]} {len(chat.messages())}")
        task.start()
        task.note(rest[1])
    else:
        turns = chat.entries.list(types=["short_term"], within="session")
        if turns:
            one = turns[rest[0] % len(turns)]
            if verb == "pin":
                chat.pin(one.id)
            elif verb == "delete":
                chat.entries.delete(one.id)
            else:
                chat.entries.update(one.id, content=rest[1])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=max(15, settings().max_examples // 100),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(steps=st.lists(STEPS, min_size=1, max_size=15), vectors=st.booleans())
def test_any_memory_makes_the_round_trip(tmp_path_factory, steps, vectors):
    """Whatever was said in whatever script, with whatever JSON beside it; and a second time nothing is added."""
    where = tmp_path_factory.mktemp("any")
    options = {"embedder": HashingEmbedder() if vectors else "none", "pruning": SMALL}
    with open_memory(where / "a", extractor=Reader(), **options) as one, open_memory(where / "b", **options) as other:
        for step in steps:
            take(one, step)
        one.flush()
        one.export(where / "a.jsonl", vectors=vectors)
        other.import_(where / "a.jsonl")
        other.export(where / "b.jsonl", vectors=vectors)
        assert body(where / "b.jsonl") == body(where / "a.jsonl")
        again = other.import_(where / "a.jsonl")
        assert (again.sessions, again.entries, again.values, again.left_out) == (0, 0, 0, 0)
        other.export(where / "c.jsonl", vectors=vectors)
        assert body(where / "c.jsonl") == body(where / "a.jsonl")
        assert ties(other)[1] == ties(one)[1]


def test_every_field_of_an_entry_travels():
    """A field that is new in `Entry` has to go into the file, too."""
    kept = set(EntryLine.model_fields) - {"kind", "tenant", "user_id", "session_id", "agent_id"}
    kept -= {"knowledge", "summary", "value", "vector", "extraction"}
    assert kept == {f.name for f in fields(Entry)} - {"scope", "key", "number", "tier", "archive_label"}
    own = set(VersionLine.model_fields) - {"kind", "tenant", "user_id", "session_id", "knowledge"}
    assert own == kept - {"type", "seq", "written_at", "position", "pinned"}


def test_an_expired_value_does_not_come_back(opened, tmp_path):
    """Its time was over, wherever it is."""
    clock = ManualClock()
    one = opened(clock=clock, **PLAIN)
    one.values(user_id="ada").put(("a",), "k", {"v": 1}, ttl=10)
    one.export(tmp_path / "a.jsonl")
    later = ManualClock(clock() + timedelta(minutes=11))
    other = opened(tmp_path / "other", clock=later, **PLAIN)
    assert other.import_(tmp_path / "a.jsonl").left_out == 1
    assert other.values(user_id="ada").get(("a",), "k") is None
