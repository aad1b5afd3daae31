"""What is kept in RAM of a user equals what the ledger says of it, whatever was done, and whoever else was let in."""

import gc
import random
import threading
from collections import Counter
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
from conftest import SMALL, index_keys, live_keys, texts, wait_until

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import Message, NotFound, ToolCall
from neuralflow_memory.pipeline.parts import Parts
from neuralflow_memory.pipeline.resident import Resident
from neuralflow_memory.pipeline.scope_index import ScopeIndex, every
from neuralflow_memory.pipeline.search import _model
from neuralflow_memory.rules.lexical import term_ids
from neuralflow_memory.types import Scope

WORDS = [
    "cat",
    "dog",
    "Berlin",
    "number",
    "seven",
    "secret",
    "train",
    "likes",
    "the",
    "in",
    "Rome",
    "never",
    "42",
    "Monday",
]
COLUMNS = (
    "session",
    "seq",
    "kind",
    "speaker",
    "agent",
    "created",
    "expires",
    "importance",
    "words",
    "traits",
    "called",
    "user",
)
ACTIONS = [
    *["add", "add", "add", "tool", "update", "mark", "delete", "delete by filter", "replace", "conflict", "add again"],
    *["search", "context", "remember", "forget knowledge", "clear", "compact", "delete summary", "edit summary"],
    *["pin", "pin", "unpin", "task", "end a task"],
]


def shown(index, *, vectors):
    """Everything that search reads of the entries that are alive, by number; scores with the neighbours as well."""
    terms = term_ids(" ".join(WORDS))
    alone = index.postings.bm25(terms)
    rows = np.arange(index.rows)
    around = index.postings.around(terms, partial(index.neighbours, reach=4), rows)
    known = index.vectors.of(rows) if vectors and index.vectors.dimensions else None
    near = alone if known is None else index.near(rows, known[:, 0] * index.alive, counted=index.alive)
    found = {}
    for row in np.flatnonzero(index.alive).tolist():
        number = int(index.number[row])
        assert index.row(number) == row
        links = [int(index.number[r]) if r >= 0 else None for r in (index.before[row], index.after[row])]
        vector = known[row].tolist() if vectors and index.embedded[row] else None
        scores = [pytest.approx(float(s[row]), rel=1e-4, abs=1e-6) for s in (alone, around, near)]
        columns = [getattr(index, name)[row] for name in COLUMNS]
        found[number] = [*columns, links, index.postings.ids_of(row).tolist(), vector, scores]
    assert index.labels == Counter(index.speaker[index.alive].tolist())
    return found


def seen(window):
    """What a window holds; not `sent`, which is in RAM only, nor `due`, which is of the ledger only in part."""
    entries = [  # without their importance: it is left open when a turn is written, and its window never asks for it
        (e.number, e.version, e.content, e.position, e.tokens, e.tags, e.pinned) for e in window.entries
    ]
    tasks = {e.number: e for e in window.tasks}  # in no order
    others = {f.name for f in fields(window)} - {"entries", "tasks", "sent", "due"}
    return entries, tasks, {name: getattr(window, name) for name in others}


def test_a_scope_is_weighed_while_it_is_searched():
    """Who weighs it does not hold its lock."""
    index = ScopeIndex([], dimensions=0, max_bytes=1_000_000)

    class Searched:
        @property
        def nbytes(self):
            index.kept(every)  # as a search would, at this moment
            return 8

    before = index.nbytes
    index.kept(lambda _: Searched())
    assert index.nbytes == before + 8


def test_what_is_worked_out_of_a_scope_is_no_reason_to_read_it_anew():
    index = ScopeIndex([], dimensions=8, max_bytes=1_000_000)
    index.kept(lambda _: np.zeros(1_000_000))
    assert index.nbytes > 1_000_000
    assert not index.too_large


def agree(memory, chat, *, sessions, vectors=True):
    """Compare the loaded resident of the chat's user with one that is read from the ledger now.

    Of a new version RAM has no vector until it is indexed, and a fold under way is due no more: compare *vectors*, and what
    is due, after flush().
    """
    parts, scope = memory._core.parts, chat.scope
    held = parts.resident(scope)
    with held.lock:
        fresh = Resident(Scope(scope.tenant, scope.user_id), parts.ledger, max_bytes=held._max_bytes)
        if held.index is not None:
            for work, kept in held.index._kept.items():
                np.testing.assert_equal(kept, work(held.index), f"{work.__name__} is not what it was")
            loaded = fresh.load(_model(parts))
            assert shown(held.index, vectors=vectors) == shown(loaded, vectors=vectors)
        for name in sessions:
            if name in held._windows:
                own = Scope(scope.tenant, scope.user_id, name)
                window = fresh.window(own, count=parts.count, expiry=parts.settings.context.expiry_time)
                assert seen(held._windows[name]) == seen(window)
                if vectors:  # no fold is under way
                    assert held._windows[name].due or not window.due, "a fold is due, and nobody knows"


class Life:
    """Random acts upon three chats of one user."""

    def __init__(self, memory, *, seed):
        self.random = random.Random(seed)
        self.chats = {name: memory.session(name, user_id="ada", agent_id=name) for name in ("a", "b", "c")}
        self.calls = 0

    def text(self):
        words = self.random.choices(WORDS, k=self.random.randint(1, 9))
        return " ".join(words) + self.random.choice(["", "?", "."])

    def act(self):
        rng, chat = self.random, self.random.choice(list(self.chats.values()))
        ids = [m.id for m in chat.messages()]
        what = rng.choice(ACTIONS)
        if what == "add" or not ids:
            chat.add([Message("user", self.text()), Message("assistant", self.text())])
        elif what == "tool":
            self.calls += 1
            call = ToolCall(f"c{self.calls}", "look_up", {"n": 1})
            chat.add([Message("user", self.text()), Message("assistant", "", tool_calls=[call])])
            chat.add(Message("tool", self.text(), tool_call_id=call.id))
        elif what == "update":
            chat.entries.update(rng.choice(ids), content=self.text())
        elif what == "mark":
            chat.entries.update(rng.choice(ids), importance=rng.random(), tags=[self.text()])
        elif what == "delete":
            chat.entries.delete(rng.sample(ids, min(len(ids), 2)))
        elif what == "delete by filter":
            within = rng.choice(["session", "session", "user"])
            chat.entries.delete(
                filter={"content": {"$contains": rng.choice(WORDS)}, "role": rng.choice(["user", None])}
                if rng.random() < 0.7
                else {"content": {"$contains": f"{rng.choice(WORDS)} {rng.choice(WORDS)}"}},
                within=within,
            )
        elif what == "replace":
            window = chat.messages(view="window")
            kept = window[: rng.randint(0, len(window))]
            back = rng.choice(ids)
            if back not in [m.id for m in kept] and rng.random() < 0.4:
                kept.append(Message("user", self.text(), id=back))
            chat.replace([*kept, Message("user", self.text())])
        elif what == "conflict":
            changed = [Message("user", self.text(), id=rng.choice(ids)), Message("user", self.text())]
            chat.add(changed, on_conflict="replace")
        elif what == "add again":
            gone = rng.choice(ids)
            chat.entries.delete(gone)
            chat.search("cat")
            chat.add(Message("user", self.text(), id=gone))
        elif what == "search":
            chat.search(self.text())
        elif what == "context":
            chat.context(self.text())
        elif what == "remember":
            chat.remember(self.text())
        elif what == "forget knowledge":
            for entry in chat.entries.list(types=["long_term"])[:1]:
                chat.entries.delete(entry.key)
        elif what == "clear" and rng.random() < 0.2:
            chat.clear()
        elif what == "compact":
            chat.compact(max_tokens=rng.randint(0, 100))
        elif what in ("pin", "unpin"):
            getattr(chat, what)(rng.choice(ids))
        elif what == "task":
            task = chat.task(rng.choice(WORDS))
            task.start()
            task.note(self.text(), temporary=rng.random() < 0.5)
        elif what == "end a task":
            open_tasks = chat.entries.list(within="session", types=["working"], filter={"metadata.status": "open"})
            for entry in open_tasks[:1]:
                task = chat.task(entry.metadata["name"])
                task.start()
                task.complete(self.text())
        elif what in ("delete summary", "edit summary"):
            for entry in rng.sample(s := chat.entries.list(within="session", types=["episodic"]), min(1, len(s))):
                if what == "delete summary":
                    chat.entries.delete(entry.key)
                else:
                    chat.entries.update(entry.key, content=self.text())
        return what


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ram_equals_the_ledger_after_anything(opened, seed):
    """Rows, neighbours, words, vectors, windows, token counts and summaries are those of a fresh load."""
    memory = opened(pruning=SMALL, tokenizer="approx")
    life = Life(memory, seed=seed)
    chat = life.chats["a"]
    chat.add("cat")
    chat.search("cat")
    for step in range(100):
        what = life.act()
        try:
            agree(memory, chat, sessions=life.chats, vectors=False)
        except AssertionError as error:
            pytest.fail(f"after step {step}, {what!r}: {error}")
        if step % 25 == 24:
            memory.flush()
            agree(memory, chat, sessions=life.chats)
            assert index_keys(memory) == live_keys(memory)


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_ram_equals_the_ledger_whoever_else_writes(opened, beside, seed):
    """Two cores on one folder, each with RAM of its own, as two processes have them: both see what either did."""
    memory = opened(pruning=SMALL, tokenizer="approx")
    other = beside(memory)
    lives = [Life(memory, seed=seed), Life(other, seed=seed + 100)]
    lives[1].calls = 1000
    for life in lives:
        life.chats["a"].add("cat")
        life.chats["a"].search("cat")
    held = [
        m._core.parts.resident(lives[0].chats["a"].scope) for m in (memory, other)
    ]  # or it is let go, and read anew
    compared = 0
    for step in range(120):
        life = lives[life_of := lives[0].random.randrange(2)]
        try:
            what = life.act()
        except NotFound:  # what is done in the background of the other was faster
            continue
        wait_until(lambda: not memory._core._folding and not other._core._folding)
        compared += sum(resident._index is not None for resident in held)  # `index` needs the lock
        for each in lives:
            try:
                agree(each.chats["a"].memory, each.chats["a"], sessions=each.chats, vectors=False)
            except AssertionError as error:
                pytest.fail(f"after step {step}, {what!r} by {life_of}: {error}")
        if step % 30 == 29:
            for each in lives:
                each.chats["a"].memory.flush()
            for each in lives:
                agree(each.chats["a"].memory, each.chats["a"], sessions=each.chats)
            assert index_keys(memory) == live_keys(memory)
    assert compared > 50


def test_changes_by_others_are_taken_in_one_by_one(opened, beside):
    """What RAM holds is not read anew because of a few turns of another process, and is because of many."""
    memory = opened(embedder="none", pruning={"max_context_items": 900, "summarization_threshold": 1000})
    other = beside(memory, embedder=None)
    chat, theirs = (m.session("chat", user_id="ada") for m in (memory, other))
    chat.add([f"Turn {n} about sailing" for n in range(300)])
    chat.search("sailing")
    resident = memory._core.parts.resident(chat.scope)
    before = resident.index
    for n in range(20):
        theirs.add(f"Their turn {n} about gliding")
        chat.add(f"My turn {n} about walking")
    theirs.entries.delete(theirs.messages()[0].id)
    found = {h.entry.content for h in chat.search("gliding", k=100)}
    assert {f"Their turn {n} about gliding" for n in range(20)} <= found
    assert resident.index is before
    assert len(chat.messages(view="window")) == len(theirs.messages(view="window")) == 339
    theirs.add([f"Turn {n} about gliding" for n in range(300)])
    assert sum("gliding" in h.entry.content for h in chat.search("gliding", k=700)) == 320
    assert resident.index is not before
    agree(memory, chat, sessions=["chat"], vectors=False)


def test_of_two_who_write_at_once_each_takes_in_the_other_first(opened, beside, monkeypatch):
    """Another's turn that comes between the beginning of an add and its transaction has its place before it, in RAM too."""
    memory = opened(embedder="none")
    other = beside(memory, embedder=None)
    chat, theirs = (m.session("chat", user_id="ada") for m in (memory, other))
    chat.add("One")
    chat.search("One")
    resident = memory._core.parts.resident(chat.scope)
    before = resident.index
    real = memory._core.parts.ledger.append

    def late(*arguments, **options):
        theirs.add("Two")
        return real(*arguments, **options)

    monkeypatch.setattr(memory._core.parts.ledger, "append", late)
    chat.add("Three")
    assert resident.index is before
    assert before.number[before.alive].tolist() == [e.number for e in chat.entries.list()]
    agree(memory, chat, sessions=["chat"], vectors=False)
    assert texts(chat.messages(view="window")) == ["One", "Two", "Three"]


def test_what_was_changed_too_long_ago_to_be_known_is_read_anew(opened, beside):
    """Ten thousand changes are remembered; a process that has not looked for longer forgets what it has."""
    memory = opened(embedder="none")
    other = beside(memory, embedder=None)
    chat, theirs = (m.session("chat", user_id="ada") for m in (memory, other))
    chat.add("One")
    chat.search("One")
    theirs.add("Two")
    with other._core.parts.ledger._db.lock, other._core.parts.ledger._db.write() as db:
        db.execute("UPDATE changes SET id = id + 11000")
        db.execute("DELETE FROM changes WHERE id < (SELECT max(id) FROM changes)")
    assert texts(chat.messages(view="window")) == ["One", "Two"]
    assert len(chat.search("Two")) == 1
    agree(memory, chat, sessions=["chat"], vectors=False)
    big = memory.session("big", user_id="bob")
    for n in range(13):
        big.add([f"{n}-{i}" for i in range(1000)])
    with memory._core.parts.ledger._db.read() as db:
        kept = db.execute("SELECT count(*), max(id) FROM changes").fetchone()
    assert 10_000 <= kept[0] <= 11_000 < kept[1]


def test_what_a_model_charges_is_learned_from_others(opened, beside):
    """A margin that one process has learned holds in the next prompt of the other."""
    memory = opened(embedder="none")
    other = beside(memory, embedder=None)
    chat, theirs = (m.session("chat", user_id="ada") for m in (memory, other))
    chat.add("One")
    assert chat.context().margin == 1.0
    for _ in range(5):
        theirs.report_usage("a model", 2 * theirs.context().tokens)
    assert chat.context().margin == theirs.context().margin > 1.5


def grown(opened):
    """A chat of nine turns whose summary is made of three segments or more, with all of it in RAM."""
    chat = opened(pruning=SMALL, context={"context_overlap": 0}).session("chat", user_id="ada")
    for n in range(9):
        chat.add(Message("user", f"Turn {n} about Rome", id=f"t{n}"))
        chat.memory.flush()
    chat.search("Rome")
    return chat


def segments(chat):
    found = chat.entries.list(within="session", filter={"metadata.kind": "segment"})
    return sorted(found, key=lambda e: e.metadata["first"])


def index_is_that_of_the_ledger(chat):
    agree(chat.memory, chat, sessions=["chat"], vectors=False)
    chat.memory.flush()
    chat.search("Rome")
    agree(chat.memory, chat, sessions=["chat"])
    left = {e.number for e in chat.entries.list()}
    index = chat.memory._core.parts.resident(chat.scope).index
    assert set(index.number[index.alive].tolist()) == left
    found = {h.entry.number for h in chat.search("Rome Redacted", k=50, types=["episodic"])}
    assert found <= left


@pytest.mark.parametrize("act", ["edit", "delete", "delete its turn"])
def test_a_summary_that_fell_with_a_segment_leaves_ram(opened, act):
    """Changing one of several segments removes the summary made from them, from what search reads too."""
    chat = grown(opened)
    first = segments(chat)[0]
    before = chat.summary()
    assert (first.sources, "Turn 0 about Rome" in before) == (("t0", "t1"), True)
    if act == "edit":
        chat.entries.update(first.key, content="Redacted")
    else:
        chat.entries.delete(first.key if act == "delete" else "t0")
    index_is_that_of_the_ledger(chat)
    told = chat.summary().partition("Word for word:")[0]
    assert told.count("Turn 0 about Rome") == (act == "delete")  # then it is a turn again, and folded anew
    assert told.count("Turn 2 about Rome") == 1
    assert told.count("Redacted") == (act == "edit")


def change(chat, act, own):
    if act == "delete":
        chat.entries.delete(own)
    elif act == "update":
        chat.entries.update(own, content="Redacted")
    elif act == "conflict":
        chat.add(Message("user", "Redacted", id=own), on_conflict="replace")
    else:
        chat.replace([*chat.messages(view="window"), Message("user", "Redacted", id=own)])


@pytest.mark.parametrize("when", ["before the summary is made anew", "while it is"])
@pytest.mark.parametrize("act", ["delete", "update", "conflict", "replace"])
def test_a_second_change_while_there_is_no_summary_leaves_ram_too(opened, monkeypatch, act, when):
    """Between the change of one segment and the new summary, another segment may fall, and give back its turns."""
    chat = grown(opened)
    parts = chat.memory._core.parts
    begun, done = [], []

    def meanwhile(passed="fold.summarized"):
        if passed == "fold.summarized" and not begun:
            begun.append(act)
            chat.search("Rome")
            change(chat, act, "t3")
            assert "t3" not in [i for s in segments(chat) for i in s.sources]
            agree(chat.memory, chat, sessions=["chat"], vectors=False)
            done.append(act)

    if when == "while it is":
        monkeypatch.setattr(failpoints, "hook", meanwhile)
        chat.entries.delete("t0")
        chat.memory.flush()
    else:
        lock = parts.folding(chat.scope)
        with lock:
            chat.entries.delete("t0")
            meanwhile()
    assert done == [act], chat.memory.stats()["last_error"]
    index_is_that_of_the_ledger(chat)


def crowd_out(memory):
    """Use so many other users that those before them are let go, where memory is short."""
    for n in range(70):
        memory.session("x", user_id=f"other {n}").messages(view="window")


READS = {
    "context": lambda chat: chat.context(search=False),
    "window": lambda chat: chat.messages(view="window"),
    "summary": lambda chat: chat.summary(),
    "compact": lambda chat: chat.compact(),
}


@pytest.mark.parametrize("read", READS)
def test_a_user_let_go_while_somebody_reads_misses_no_turn(opened, monkeypatch, read):
    """An acknowledged turn is in the window afterwards, though memory was short just as it was read from the ledger."""
    memory = opened(embedder="none")
    parts = memory._core.parts
    parts.residents._max_bytes = 1
    chat = memory.session("chat", user_id="ada")
    chat.add("Zero")
    parts.residents.forget()
    between, go, stored, added = (threading.Event() for _ in range(4))
    real_window, real_stored = Parts.window, parts.ledger.window

    def window(self, scope, *resident):
        if threading.current_thread() is reader and not between.is_set():
            between.set()
            assert go.wait(30)
        return real_window(self, scope, *resident)

    def from_ledger(scope):
        found = real_stored(scope)
        if threading.current_thread() is reader:
            stored.set()
            added.wait(0.3)  # an add that need not wait for the reader is done by then
        return found

    monkeypatch.setattr(Parts, "window", window)
    monkeypatch.setattr(parts.ledger, "window", from_ledger)
    reader = threading.Thread(target=READS[read], args=(chat,))
    reader.start()
    assert between.wait(30)
    crowd_out(memory)
    go.set()
    assert stored.wait(30)
    chat.add("One")
    added.set()
    reader.join(30)
    chat.add("Two")
    for view in ("all", "window"):
        assert texts(chat.messages(view=view)) == ["Zero", "One", "Two"]
    assert texts(chat.context(search=False).messages) == ["Zero", "One", "Two"]


def test_a_user_who_was_quiet_for_long_takes_no_ram_and_misses_nothing(opened):
    """What a user has in RAM goes once others are served and a quarter of an hour is over, and is read anew when asked for."""
    later = timedelta()
    memory = opened(embedder="none", clock=lambda: datetime.now(UTC) + later)
    quiet, busy = memory.session("chat", user_id="ada"), memory.session("chat", user_id="bob")
    quiet.add("My train leaves at seven.")
    quiet.search("train")
    before = quiet.messages(view="window"), quiet.context(search=False).messages
    kept = memory._core.parts.residents._all
    later += timedelta(minutes=14)
    busy.add("Still here.")
    gc.collect()
    assert len(kept) == 2
    later += timedelta(minutes=2)
    busy.add("And now.")
    gc.collect()
    assert [key[1] for key in kept] == ["bob"]
    assert (quiet.messages(view="window"), quiet.context(search=False).messages) == before
    assert [hit.entry.content for hit in quiet.search("train")] == ["My train leaves at seven."]
