"""Each fold writes segments, and one summary of them all: what they cover, in which order, and what becomes of facts."""

import asyncio
import random
import threading
from contextlib import suppress

import crash_child
import pytest
from conftest import SMALL, found, index_keys, live_keys, texts, wait_until
from test_folding import APART, Quoting, raises, said, summaries

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import ConflictError, Message, NotFound, SummarizerError
from neuralflow_memory.rules import coverage
from neuralflow_memory.testing import ManualClock

ANIMALS = ["lynx", "heron", "otter", "badger", "marten", "stoat", "curlew", "plover", "adder", "newt", "vole", "hare"]
"""Words that hold no fact, so that nothing is pinned beside a summary."""


def grown(chat, names, *, say="I saw a {} today"):
    """Add a turn for each name, and let each fold that is due happen before the next."""
    for name in names:
        chat.add(Message("user", say.format(name), id=name))
        chat.memory.flush()


def covered(chat):
    """Ids of the turns that segments were made from."""
    return {i for s in summaries(chat, kind="segment") for i in s.sources}


def everything(chat):
    """All that is stored of a chat, and all that a prompt shows."""
    stored = [(e.content, e.metadata, e.sources) for e in chat.entries.list(within="session")]
    return f"{stored} {chat.summary()} {texts(chat.context('I saw', max_tokens=4000).messages)}"


def all_is_there(chat):
    """Every turn is in the window or covered by a segment, and the summary is that of the segments."""
    inside = covered(chat)
    window = [m.id for m in chat.messages(view="window")]
    assert [m.id for m in chat.messages() if m.id not in inside] == window
    segments, (summary,) = summaries(chat, kind="segment"), summaries(chat, kind="summary")
    assert {*summary.sources} == {s.id for s in segments}
    return segments, summary


class Measuring:
    """A summarizer that says the same of everything, and keeps the turns that it was given."""

    name = "measuring"

    def __init__(self):
        self.given, self.previous = [], []

    def summarize(self, messages, *, previous, max_tokens):
        if messages[0].role != "system":
            self.given.append(messages)
            self.previous.append(previous)
        return "They spoke."


# -- what a segment is --


def test_a_segment_says_what_it_covers_and_the_summary_of_what_it_is(opened):
    """Ids of turns and of segments, in order; entries that any listing shows, the turns' order untouched."""
    clock = ManualClock()
    chat = opened(pruning=SMALL, summarizer=Quoting(), context=APART, clock=clock).session("chat", user_id="ada")
    for name in ANIMALS[:8]:
        clock.advance(minutes=1)
        grown(chat, [name])
    segments, summary = all_is_there(chat)
    assert [s.sources for s in segments] == [tuple(ANIMALS[n : n + 2]) for n in (0, 2, 4)]
    assert [s.metadata["first"] for s in segments] == [1, 3, 5]
    assert {(s.metadata["by"], s.metadata["plain"], s.version, s.provenance) for s in segments} == {
        ("quoting", False, 1, "derived")
    }
    assert [s.created_at for s in segments] == [chat.entries.get(s.sources[-1]).created_at for s in segments]
    assert summary.sources == tuple(s.id for s in segments)
    assert (summary.version, summary.metadata["fresh"], summary.created_at) == (3, 3, segments[-1].created_at)
    assert summary.content.splitlines() == [f"I saw a {name} today" for name in ANIMALS[:6]]
    assert all(s.seq < 0 and s.role is None for s in (*segments, summary))
    turns = chat.entries.list(within="session", types=["short_term"])
    assert [e.seq for e in turns] == list(range(1, 9))
    parts = chat.memory._core.parts
    assert parts.ledger.segments(chat.scope) == segments
    assert parts.ledger.segments(chat.scope, last=2) == segments[1:]


def test_the_summary_stays_one_entry_with_a_new_version_for_each_fold(opened):
    """Its id and key never change, and what search reads of it is what it says now."""
    chat = opened(pruning=SMALL, summarizer=Quoting()).session("chat", user_id="ada")
    seen = []
    for name in ANIMALS:
        grown(chat, [name])
        seen += [(s.id, s.key, s.version) for s in summaries(chat, kind="summary")]
    assert len({(own, key) for own, key, _ in seen}) == 1
    assert sorted({version for *_, version in seen}) == [1, 2, 3, 4, 5]
    newest = summaries(chat, kind="segment")[-1].sources[-1]
    assert newest in chat.search(newest, types=["episodic"], k=1)[0].entry.content
    assert index_keys(chat.memory) == live_keys(chat.memory)


def test_a_long_fold_writes_several_segments(opened):
    """Each reads at most `max_context_length` tokens in whole turns; a longer turn is one alone."""
    summarizer = Measuring()
    memory = opened(
        embedder="none",
        summarizer=summarizer,
        pruning={"summarization_threshold": 100},
        context={"max_context_length": 256, "context_overlap": 0},
    )
    chat = memory.session("chat")
    says = [f"I saw a {n} today " * (60 if n == "otter" else 8) for n in ANIMALS]
    chat.add([Message("user", text, id=name) for name, text in zip(ANIMALS, says, strict=True)])
    report = chat.compact(max_tokens=60)
    assert report.folded == tuple(ANIMALS[:-1])
    assert max(memory.count_tokens(m) - 3 for m in summarizer.given if m[0].id != "otter") <= 256
    given = [[m.id for m in messages] for messages in summarizer.given]
    given = [ids for n, ids in enumerate(given) if ids != ["otter"] or given[n - 1] != ids]  # read in several calls
    assert [i for ids in given for i in ids] == ANIMALS[:-1]
    segments, _ = all_is_there(chat)
    assert [list(s.sources) for s in segments] == given
    assert memory.stats()["folds"] == 1


@pytest.mark.parametrize("text", ["I saw a lynx today " * 100, "I saw a lynx " * 60 + "我看見了一隻山貓" * 60])
def test_a_turn_that_is_too_long_for_a_call_is_read_in_pieces(opened, text):
    """All of it, in order, each piece upon what was made of those before, and no longer than a call may be."""
    summarizer = Measuring()
    memory = opened(embedder="none", summarizer=summarizer, context={"max_context_length": 256, "context_overlap": 0})
    chat = memory.session("chat")
    chat.add([Message("user", text, id="long"), "And?"])
    chat.compact(max_tokens=10)
    assert len(summarizer.given) > 1
    assert "".join(m.content for messages in summarizer.given for m in messages) == text
    assert summarizer.previous == ["", *["They spoke."] * (len(summarizer.given) - 1)]
    segments, _ = all_is_there(chat)
    assert [(s.sources, s.content) for s in segments] == [(("long",), "They spoke.")]
    assert max(map(memory.count_tokens, summarizer.given)) - 3 <= 256


@pytest.mark.parametrize(("overlap", "shared"), [(0, 0), (10, 1), (25, 2), (128, 12)])
def test_a_segment_reads_the_end_of_the_one_before(opened, overlap, shared):
    """Whole messages within `context_overlap`, also from a fold that was long ago; they count as covered once."""
    summarizer = Quoting()
    memory = opened(pruning=SMALL, summarizer=summarizer, context={"context_overlap": overlap})
    chat, other = memory.session("chat", user_id="ada"), memory.session("other", user_id="ada")
    for name in ANIMALS[:8]:
        grown(chat, [name])
        other.add(f"Elsewhere, a {name}")
    segments, _ = all_is_there(chat)
    assert [s.sources for s in segments] == [tuple(ANIMALS[max(0, n - shared) : n + 2]) for n in (0, 2, 4)]
    assert [s.metadata["first"] for s in segments] == [1, 3, 5]
    assert "Elsewhere" not in str([s.content for s in segments])
    memory.close()
    memory = opened(pruning=SMALL, summarizer=summarizer, context={"context_overlap": overlap})
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[8:10])
    segments, _ = all_is_there(chat)
    assert segments[-1].sources == tuple(ANIMALS[max(0, 6 - shared) : 8])


@pytest.mark.parametrize("history", ["folds", "a deleted turn", "a pinned turn"])
def test_a_turn_is_counted_once(opened, history):
    """`covered` is how many turns the summary covers, however often a segment was made from one."""
    chat = opened(pruning=SMALL, summarizer=Quoting(), context={"context_overlap": 10}).session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    if history == "a deleted turn":  # badger is covered only as the overlap of the next segment now
        chat.entries.delete("otter")
    elif history == "a pinned turn":
        chat.pin("lynx")
        chat.unpin("lynx")
    grown(chat, ANIMALS[8:])
    _, summary = all_is_there(chat)
    assert summary.metadata["covered"] == chat.compact().covered == len(covered(chat))


# -- after deletes --


@pytest.mark.parametrize("overlap", [0, 10])
def test_segments_keep_the_order_of_their_turns(opened, overlap):
    """Turns that come back and are folded anew make a segment that was written late and stands early."""
    memory = opened(pruning=SMALL, summarizer=Quoting(), context={"context_overlap": overlap})
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    ledger = memory._core.parts.ledger
    late = []
    for doomed in ("heron", "badger"):
        chat.entries.delete(doomed)
        memory.flush()
        segments, _ = all_is_there(chat)
        assert doomed not in everything(chat)
        assert ledger.segments(chat.scope) == segments
        late.append([s.number for s in segments] != sorted(s.number for s in segments))
    assert any(late)
    grown(chat, ANIMALS[8:])
    segments, summary = all_is_there(chat)
    assert ledger.segments(chat.scope) == segments
    assert [s.metadata["first"] for s in segments] == sorted({s.metadata["first"] for s in segments})
    assert "heron" not in everything(chat)
    left = [m.id for m in chat.messages() if m.id in covered(chat)]
    assert {*summary.content.splitlines()} == {f"I saw a {name} today" for name in left}
    memory.close()
    chat = opened(pruning=SMALL, summarizer=Quoting()).session("chat", user_id="ada")
    assert chat.memory._core.parts.ledger.segments(chat.scope) == segments


def test_a_summary_made_anew_tells_things_in_their_order(opened):
    """Also where the segments of old turns are the newest."""
    memory = opened(pruning=SMALL, summarizer=Quoting(), context=APART)
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    chat.entries.delete(summaries(chat, kind="segment")[0].key)  # its turns are folded again at once
    memory.flush()
    segments, _ = all_is_there(chat)
    assert segments[0].number > segments[1].number
    assert said(chat).splitlines() == [m.content for m in chat.messages() if m.id in covered(chat)]


def test_a_summary_made_anew_needs_no_turns_to_fold(opened):
    """Only the summary is deleted: it comes back from its segments by itself, without a call of the model."""
    memory = opened(pruning=SMALL, summarizer=Quoting())
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    before, calls = said(chat), memory.stats()["summarizer_calls"]
    (old,) = summaries(chat, kind="summary")
    chat.entries.delete(old.key)
    memory.flush()
    segments, summary = all_is_there(chat)
    assert (said(chat), len(segments), summary.version) == (before, 3, 1)
    assert summary.id != old.id
    stats = memory.stats()
    assert (stats["summarizer_calls"], stats["last_error"]) == (calls, None)
    assert not memory._core.parts.window(chat.scope).due


def at(monkeypatch, name, act):
    """Do *act* when the failpoint *name* is passed next."""
    waiting = [act]

    def hook(passed):
        if passed == name and waiting:
            waiting.pop()()

    monkeypatch.setattr(failpoints, "hook", hook)


@pytest.mark.parametrize("act", ["delete", "update", "segment", "edit of a segment"])
def test_a_summary_is_not_made_anew_from_what_changes_meanwhile(opened, monkeypatch, act):
    """What is deleted while the summary of the other segments is written stands in it no more."""
    memory = opened(pruning=SMALL, summarizer=Quoting(), context=APART)
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    (summary,) = summaries(chat, kind="summary")
    second = summaries(chat, kind="segment")[1]
    acts = {
        "delete": lambda: chat.entries.delete("otter"),
        "update": lambda: chat.entries.update("otter", content="Redacted"),
        "segment": lambda: chat.entries.delete(second.key),
        "edit of a segment": lambda: chat.entries.update(second.key, content="Redacted"),
    }
    at(monkeypatch, "fold.summarized", acts[act])
    chat.entries.delete(summary.key)
    memory.flush()
    all_is_there(chat)
    if act != "segment":
        assert "saw a otter" not in said(chat)
    assert index_keys(memory) == live_keys(memory)


@pytest.mark.parametrize("act", ["delete", "update", "segment"])
def test_a_segment_is_not_made_from_an_overlap_that_changes_meanwhile(opened, act):
    """Also while there is no summary that would fall with the segment before it."""
    waiting = []

    class Interrupted(Quoting):
        def summarize(self, messages, *, previous, max_tokens):
            if waiting:
                waiting.pop()()
            return super().summarize(messages, previous=previous, max_tokens=max_tokens)

    memory = opened(pruning=SMALL, summarizer=Interrupted(), context={"context_overlap": 10})
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    (summary,) = summaries(chat, kind="summary")
    last = summaries(chat, kind="segment")[-1]
    assert last.sources[-1] == "stoat"
    lock = memory._core.parts.folding(chat.scope)
    with lock:  # the fold finds turns to fold, and a summary to be made anew
        chat.entries.delete(summary.key)
        chat.add([Message("user", f"I saw a {name} today", id=name) for name in ANIMALS[8:10]])
        acts = {
            "delete": lambda: chat.entries.delete("stoat"),
            "update": lambda: chat.entries.update("stoat", content="Redacted"),
            "segment": lambda: chat.entries.delete(last.key),
        }
        waiting.append(acts[act])
    memory.flush()
    assert not waiting
    if act != "segment":
        assert "saw a stoat" not in everything(chat)
    all_is_there(chat)


def test_the_last_segments_may_go_before_the_summary_is_made_anew(opened, monkeypatch):
    """Then there is nothing to make it of, which is no trouble."""
    memory = opened(pruning=SMALL, summarizer=Quoting(), context=APART)
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:5])
    ledger, (summary,) = memory._core.parts.ledger, summaries(chat, kind="summary")
    real, waiting = ledger.segments, [s.key for s in summaries(chat, kind="segment")]

    def segments(scope, *, last=None):
        if last is None and waiting:
            chat.entries.delete([waiting.pop()])
        return real(scope, last=last)

    monkeypatch.setattr(ledger, "segments", segments)
    chat.entries.delete(summary.key)
    memory.flush()
    assert not waiting
    assert memory.stats()["last_error"] is None
    assert texts(chat.messages()) == [f"I saw a {name} today" for name in ANIMALS[:5]]
    all_is_there(chat)


@pytest.mark.parametrize("kind", ["segment", "summary"])
def test_metadata_of_ones_own_on_a_summary_stops_no_fold(opened, kind):
    """A host may mark summaries as any entry; what folds read of them stays."""
    memory = opened(pruning=SMALL, summarizer=Quoting())
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    entry = summaries(chat, kind=kind)[0]
    changed = chat.entries.update(entry.key, metadata={"reviewed": True})
    assert changed.metadata["reviewed"]
    grown(chat, ANIMALS[8:])
    chat.entries.delete("stoat")
    memory.flush()
    assert memory.stats()["last_error"] is None
    assert len(chat.messages(view="window")) < 4
    all_is_there(chat)


def test_clearing_a_chat_takes_its_segments(opened):
    """And another chat's stay."""
    memory = opened(pruning=SMALL, summarizer=Quoting())
    chat, other = memory.session("chat", user_id="ada"), memory.session("other", user_id="ada")
    for session in (chat, other):
        grown(session, ANIMALS[:6])
    kept = all_is_there(other)
    chat.clear()
    memory.flush()
    assert chat.entries.list(within="session") == []
    assert (chat.summary(), chat.messages(view="window")) == ("", [])
    assert all_is_there(other) == kept
    grown(chat, ANIMALS[6:])
    assert "heron" not in said(chat)
    all_is_there(chat)


class Random:
    """Whatever may be done to a chat, at any time, whether the model is up or down; and what must be true then."""

    def __init__(self, opened, *, seed):
        self.random, self.clock, self.model = random.Random(seed), ManualClock(), crash_child.Notes(up=True)
        self.memory = opened(
            embedder="none",
            summarizer=self.model,
            clock=self.clock,
            pruning=crash_child.PRUNING,
            context={"context_overlap": seed * 16 % 64, "max_context_length": 256 if seed % 2 else 4096},
        )
        self.chat = self.memory.session("chat", user_id="ada")
        self.known, self.roles, self.said = crash_child.Truth(), {}, 0

    def text(self):
        self.said += 1
        return f"word{self.said} of {self.random.choice(crash_child.TOPICS)}"

    def add(self):
        new = [Message(self.random.choice(["user", "user", "assistant"]), self.text()) for _ in range(3)]
        ids = self.chat.add(new[: self.random.randint(1, 3)])
        self.roles |= dict(zip(ids, (m.role for m in new), strict=False))
        self.known.apply(["add", [(i, m.content) for i, m in zip(ids, new, strict=False)]])

    def change(self):
        own, text = self.random.choice(list(self.known.live)), self.text()
        if self.random.random() < 0.5:
            self.chat.entries.update(own, content=text)
        else:
            self.chat.add(Message(self.roles[own], text, id=own), on_conflict="replace")
        self.known.apply(["update", own, text])

    def delete(self):
        for own in self.random.sample(list(self.known.live), 2):
            self.chat.entries.delete(own)
            self.known.apply(["delete", own])

    def pin(self):
        own = self.random.choice(sorted(self.known.pinned) or list(self.known.live))
        if self.roles[own] == "user":
            verb = "unpin" if own in self.known.pinned else "pin"
            getattr(self.chat, verb)(own)
            self.known.apply([verb, own])

    def forget(self):
        made = self.chat.entries.list(types=["episodic"], within="session")
        with suppress(NotFound):  # a fold that ends meanwhile may have taken it away
            self.chat.entries.delete([e.key for e in made[:1]])

    def act(self):
        self.clock.advance(seconds=self.random.choice([1, 1, 20, 40, 4000 * (self.random.random() < 0.1)]))
        acts = [*[self.add] * 10, self.change, self.change, self.delete, self.delete, self.pin, self.forget]
        act = self.random.choice(acts) if len(self.known.live) > 8 else self.add
        act()
        if self.random.random() < 0.1:
            self.model.up = not self.model.up
        if self.random.random() < 0.1:
            self.chat.compact(max_tokens=self.random.randint(0, 60))

    def check(self):
        self.memory.flush()
        assert {m.id: m.content for m in self.chat.messages()} == self.known.live
        crash_child.check_window(self.chat, self.known)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_while_it_is_folded(opened, seed):
    """Every turn in the window or in a segment, nothing that is gone quoted, pins kept; at the end nothing is left to do."""
    life = Random(opened, seed=seed)
    for _ in range(100):
        life.act()
        if life.random.random() < 0.3:
            life.check()
    life.check()
    life.model.up = True
    life.clock.advance(minutes=30)
    life.add()
    life.check()
    crash_child.check_work_done(life.chat)


# -- search --


def test_search_finds_turns_and_segments_only_when_asked(opened):
    """What a summary says stands in its turns; `types=["episodic"]` looks into summaries."""

    class Zebra(Quoting):
        def summarize(self, messages, *, previous, max_tokens):
            return f"They spoke of a zebra and a {messages[0].id}."

    memory = opened(pruning=SMALL, summarizer=Zebra())
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:8])
    assert found(chat.search("lynx", k=20))[0] == "I saw a lynx today"
    assert {h.entry.type for h in chat.search("zebra lynx today", k=50)} == {"short_term"}
    hits = [c for c in chat.context("zebra lynx").report if c.part == "hit"]
    assert {c.id for c in hits} <= {*ANIMALS}
    asked = [h.entry for h in chat.search("zebra", k=20, types=["episodic"])]
    segments, summary = all_is_there(chat)
    assert {e.id for e in asked} == {summary.id, *(s.id for s in segments)}
    (first,) = chat.search("zebra", types=["episodic"], filter={"metadata.kind": "segment"}, k=1)
    assert (first.entry.metadata["kind"], chat.entries.get(first.entry.key)) == ("segment", first.entry)
    assert {h.entry.type for h in chat.search("zebra lynx", k=50, types=["episodic", "short_term"])} == {
        "episodic",
        "short_term",
    }


# -- a summary of summaries --


class Model:
    """A model that says little: of turns one line, of segments how many. It fails as *trouble* says."""

    name = "model"

    def __init__(self):
        self.turns, self.parts, self.trouble = [], [], {}

    def summarize(self, messages, *, previous, max_tokens):
        kind = "segments" if messages[0].metadata.get("kind") == "segment" else "turns"
        if kind in self.trouble:
            return self.trouble[kind](messages)
        if kind == "turns":
            self.turns.append([m.id for m in messages])
            return f"On {' and '.join(m.id for m in messages)}."
        assert {(m.role, m.metadata["kind"]) for m in messages} == {("system", "segment")}
        self.parts.append((texts(messages), previous))
        return f"All of it, {sum(len(p) for p, _ in self.parts)} parts."


def test_thirty_folds_take_thirty_six_calls(opened):
    """One a fold, and one for each five segments: each is worked in once, in order, upon what the summary said."""
    model = Model()
    memory = opened(embedder="none", pruning=SMALL, summarizer=model, context=APART)
    chat = memory.session("chat", user_id="ada")
    before = []
    for n in range(62):
        before.append(said(chat))
        grown(chat, [f"t{n}"], say="I saw {} then")
    stats = memory.stats()
    assert stats["folds"] == len(model.turns) == 30
    assert stats["summarizer_calls"] == len(model.turns) + len(model.parts) <= 1.2 * stats["folds"]
    assert [i for ids in model.turns for i in ids] == [f"t{n}" for n in range(60)]
    segments, summary = all_is_there(chat)
    assert [text for given, _ in model.parts for text in given] == [s.content for s in segments]
    assert {len(given) for given, _ in model.parts} == {5}
    assert [previous for _, previous in model.parts] == [before[n] for n in range(11, 62, 10)]
    assert (summary.content, summary.metadata["fresh"], summary.version) == ("All of it, 30 parts.", 0, 30)


def test_until_then_the_lines_of_new_segments_stand_beside_it(opened):
    """Nothing waits for the model to be said: each fold's lines are in the summary at once, and once."""
    model = Model()
    chat = opened(embedder="none", pruning=SMALL, summarizer=model, context=APART).session("chat")
    grown(chat, [f"t{n}" for n in range(16)], say="I saw {} then")
    assert said(chat).splitlines() == ["All of it, 5 parts.", "On t10 and t11.", "On t12 and t13."]


@pytest.mark.parametrize(
    "act",
    [raises(SummarizerError("no quota")), lambda _: " ", lambda _: None, lambda _: "word " * 5000],
    ids=["refuses", "blank", "none", "too long"],
)
def test_a_failure_while_segments_are_worked_in_loses_nothing(opened, act):
    """The lines stay as they are until the model is back; then it has them all."""
    clock, model = ManualClock(), Model()
    memory = opened(embedder="none", pruning=SMALL, summarizer=model, context=APART, clock=clock)
    chat = memory.session("chat", user_id="ada")
    model.trouble = {"segments": act}
    grown(chat, [f"t{n}" for n in range(16)], say="I saw {} then")
    segments, summary = all_is_there(chat)
    assert said(chat) == "\n".join(s.content for s in segments)
    assert (len(segments), summary.metadata["plain"], len(model.parts)) == (7, True, 0)
    assert memory.stats()["summarizer_fallbacks"] >= 1
    assert "model" in memory.stats()["last_error"]
    model.trouble = {}
    clock.advance(hours=0.5)
    grown(chat, ["t16"], say="I saw {} then")
    segments, summary = all_is_there(chat)
    assert [s.content for s in segments] == [f"On t{n} and t{n + 1}." for n in range(0, 14, 2)]
    assert (summary.metadata["plain"], summary.metadata["fresh"]) == (False, 0)
    told = "\n".join([*(text for given, _ in model.parts for text in given), *(p for _, p in model.parts)])
    assert all(s.content in told for s in segments)
    calls = len(model.turns) + len(model.parts)
    chat.compact()
    assert len(model.turns) + len(model.parts) == calls


def test_a_model_that_is_back_writes_again_only_what_it_could_not(opened):
    """The same turns, the same entry, a new version; what it wrote itself stays."""
    clock, model = ManualClock(), Model()
    memory = opened(pruning=SMALL, summarizer=model, context=APART, clock=clock)
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:4])
    model.trouble = dict.fromkeys(("turns", "segments"), raises(SummarizerError("down")))
    grown(chat, ANIMALS[4:8])
    before, _ = all_is_there(chat)
    assert [s.metadata["plain"] for s in before] == [False, True, True]
    assert "I saw a otter today" in before[1].content
    model.trouble = {}
    model.turns.clear()
    clock.advance(hours=0.5)
    grown(chat, ANIMALS[8:9])
    after, summary = all_is_there(chat)
    assert model.turns == [list(s.sources) for s in before[1:]]
    assert [(s.id, s.number, s.sources, s.metadata["first"]) for s in after] == [
        (s.id, s.number, s.sources, s.metadata["first"]) for s in before
    ]
    assert [(s.version, s.metadata["plain"], s.metadata["by"]) for s in after] == [
        (1, False, "model"),
        (2, False, "model"),
        (2, False, "model"),
    ]
    assert [s.content for s in after] == ["On lynx and heron.", "On otter and badger.", "On marten and stoat."]
    assert not summary.metadata["plain"]
    assert found(chat.search("otter badger", types=["episodic"], filter={"metadata.kind": "segment"}, k=1)) == [
        "On otter and badger."
    ]
    assert index_keys(memory) == live_keys(memory)


def test_a_turn_deleted_while_it_is_summed_up_again_is_in_nothing(opened, monkeypatch):
    """What the returned model wrote of it is not kept."""
    clock, model = ManualClock(), Model()
    memory = opened(pruning=SMALL, summarizer=model, context=APART, clock=clock)
    chat = memory.session("chat", user_id="ada")
    model.trouble = dict.fromkeys(("turns", "segments"), raises(SummarizerError("down")))
    grown(chat, ANIMALS[:8])
    model.trouble = {"segments": lambda _: chat.entries.delete("otter") and "On otter, too."}
    clock.advance(hours=0.5)
    grown(chat, ANIMALS[8:9])
    model.trouble = {}
    grown(chat, ANIMALS[9:])
    assert "otter" not in everything(chat)
    assert not any(s.metadata["plain"] for s in summaries(chat, kind="segment"))
    all_is_there(chat)


def test_summary_and_pins_stay_within_their_budget(opened):
    """Over many folds of long turns, whoever writes; the segments within half the summary's limit."""
    for summarizer in (Quoting(), None):
        memory = opened(":memory:", embedder="none", pruning=SMALL, budget={"summary": 200}, summarizer=summarizer)
        chat = memory.session("chat", user_id="ada")
        count = memory._core.parts.counter.count
        for n in range(40):
            chat.add(f"On day {n} I paid {n * 17} euros to Kim, and I will not pay {n * 3} more before June {n % 28}.")
            memory.flush()
            assert count(said(chat)) <= 150
            assert count(chat.summary()) <= 200
        segments, _ = all_is_there(chat)
        assert all(count(s.content) <= 75 for s in segments)
        assert "Word for word:" in chat.summary()


# -- facts --


class Saying(Quoting):
    """A summarizer that says the same of everything."""

    def __init__(self, text):
        self.text = text

    def summarize(self, messages, *, previous, max_tokens):
        return self.text


CHAT = [
    Message("user", "My flat costs 1250 euros.", id="flat"),
    Message("user", "I will call Kim before the meeting.", id="call"),
    Message("user", "The gate code is 4711.", id="code"),
    Message("user", "88", id="bare"),
    Message("user", "I do not eat fish.", id="fish"),
    Message("user", "Fine weather today.", id="weather"),
]


@pytest.mark.parametrize(
    ("summary", "says", "fates"),
    [
        (1000, "My flat costs 1250 euros.", {"pinned"}),
        (100, "My flat costs 1250 euros.", {"reachable", "lost"}),
        (100, "They spoke.", {"reachable", "lost"}),
        (170, "My flat costs 1250 euros.", {"pinned", "reachable", "lost"}),
    ],
)
def test_the_report_counts_each_fact_of_the_folded_turns_once(opened, summary, says, fates):
    """Kept, pinned, reachable and lost add up; the totals are in stats()."""
    memory = opened(embedder="none", budget={"summary": summary}, summarizer=Saying(says))
    chat = memory.session("chat", user_id="ada")
    chat.add(CHAT)
    report = chat.compact(max_tokens=10)
    assert report.folded == tuple(m.id for m in CHAT[:-1])
    told = coverage.facts(CHAT[:-1])
    assert report.kept + report.pinned + report.reachable + report.lost == len(told) >= 5
    assert report.kept == len(coverage.check(told, says).kept)
    assert (report.kept > 0) == ("1250" in says)
    assert {name for name in ("pinned", "reachable", "lost") if getattr(report, name)} == fates
    assert (report.pinned > 0) == ("Word for word:" in chat.summary())
    pins = chat.summary().partition("Word for word:\n")[2]
    assert report.pinned == len(coverage.check(coverage.check(told, says).missing, pins).kept)
    assert report.by == "quoting"
    stats = memory.stats()
    assert [stats[f"facts_{n}"] for n in ("kept", "pinned", "reachable", "lost")] == [
        report.kept,
        report.pinned,
        report.reachable,
        report.lost,
    ]
    chat.add(["And 12 more.", "Good night."])
    second = chat.compact(max_tokens=10)
    assert second.folded[0] == "weather"
    assert memory.stats()["facts_kept"] == report.kept + second.kept
    told = coverage.facts([*CHAT[-1:], Message("user", "And 12 more.")])
    assert second.kept + second.pinned + second.reachable + second.lost == len(told) == 1


def test_what_is_pinned_beside_a_summary_outlives_the_deletion_of_another_turn(opened):
    """A fact that the model left out stays, though the summary is made anew."""
    memory = opened(pruning=SMALL, summarizer=Saying("They spoke."), context=APART)
    chat = memory.session("chat", user_id="ada")
    grown(chat, ["1250", "4711", "88", "17", "350", "62", "99", "5"], say="The invoice {} is open")
    assert "The invoice 88 is open" in chat.summary()
    chat.entries.delete("1250")
    memory.flush()
    assert "1250" not in everything(chat)
    all_is_there(chat)
    assert "The invoice 88 is open" in chat.summary()


@pytest.mark.parametrize("answers", [True, False], ids=["other texts", "nothing"])
def test_a_summary_that_the_model_always_refuses_is_not_asked_for_at_every_turn(opened, answers):
    """It is tried a few times; then the lines that were picked have to do, until there are as many new ones."""
    clock, model, asked = ManualClock(), Model(), []

    def refuse(messages):
        asked.append(messages)
        return ""

    memory = opened(embedder="none", pruning=SMALL, summarizer=model, context=APART, clock=clock)
    chat = memory.session("chat", user_id="ada")
    model.trouble = {"segments": refuse} if answers else dict.fromkeys(("segments", "turns"), refuse)
    grown(chat, [f"t{n}" for n in range(12)], say="I saw {} then")
    asked.clear()
    for n in range(12, 52):  # twenty folds
        clock.advance(minutes=6)
        grown(chat, [f"t{n}"], say="I saw {} then")
    segments, _ = all_is_there(chat)
    assert len(asked) <= 20
    assert {s.metadata["plain"] for s in segments} == {not answers}
    model.trouble = {}
    clock.advance(hours=1)
    grown(chat, [f"t{n}" for n in range(52, 62)], say="I saw {} then")
    segments, summary = all_is_there(chat)
    assert not summary.metadata["plain"]
    assert "tries" not in summary.metadata
    assert said(chat).startswith("All of it")


class Waiting:
    """A model whose calls wait until they are let through, a number at a time."""

    name = "waiting"

    def __init__(self):
        self.calls, self.through = 0, threading.Semaphore(0)

    def summarize(self, messages, *, previous, max_tokens):
        self.calls += 1
        assert self.through.acquire(timeout=60)
        return f"Part {self.calls}."


def test_a_long_fold_is_stored_in_parts_and_closing_does_not_wait_for_all_of_it(opened):
    """What is paid for is kept, whole items at a time; the rest is folded after reopening."""
    context = {"max_context_length": 256, "context_overlap": 0}
    pruning = {"max_context_items": 2, "summarization_threshold": 4}
    model = Waiting()
    memory = opened(embedder="none", pruning=pruning, summarizer=model, context=context)
    chat = memory.session("chat", user_id="ada")
    turns = [
        m
        for n in range(40)
        for m in (Message("user", f"T{n} " + "word " * 90, id=f"t{n}"), Message("assistant", "Yes."))
    ]
    chat.add(turns)
    model.through.release(6)  # five segments, and the summary that is made of them
    wait_until(lambda: model.calls == 7)
    segments, _ = all_is_there(chat)
    assert len(segments) == 5
    assert 60 <= len(chat.messages(view="window")) < 80
    assert chat.messages(view="window")[0].role == "user"
    closing = threading.Thread(target=memory.close)
    closing.start()
    model.through.release(6)
    closing.join(30)
    assert not closing.is_alive()
    assert 7 <= model.calls <= 12
    model.through.release(100)
    memory = opened(embedder="none", pruning=pruning, summarizer=model, context=context)
    chat = memory.session("chat", user_id="ada")
    chat.add("One more")
    memory.flush()
    segments, _ = all_is_there(chat)
    assert len(chat.messages(view="window")) <= 5
    assert len(chat.messages()) == 81
    assert chat.compact().needed is False


def test_what_a_long_fold_did_is_reported_as_one(opened):
    """Before, after, ids and facts of all its parts."""
    context = {"max_context_length": 256, "context_overlap": 0}
    memory = opened(embedder="none", pruning={"summarization_threshold": 10_000}, context=context)
    chat = memory.session("chat", user_id="ada")
    chat.add(
        [Message("user", f"On day {n} I sold {n * 3} boats to Greta. " + "word " * 60, id=f"t{n}") for n in range(40)]
    )
    report = chat.compact(max_tokens=200)
    left = [m.id for m in chat.messages(view="window")]
    assert memory.stats()["folds"] > 1
    assert [*report.folded, *left] == [f"t{n}" for n in range(40)]
    assert report.needed
    assert report.before > 2500
    assert report.after == memory.count_tokens(chat.messages(view="window")) - 3 <= 200
    assert report.covered == len(report.folded)
    assert report.kept + report.pinned + report.reachable + report.lost > len(report.folded)


async def test_compacting_holds_up_nobody(opened):
    """While a model writes for as many sessions as there are workers and more, turns are added and prompts built."""
    model = Waiting()
    memory = opened(embedder="none", summarizer=model)
    chats = [memory.session(f"chat-{n}", user_id="ada") for n in range(6)]
    for chat in chats:
        chat.add(["word " * 50 for _ in range(5)])
    folds = [asyncio.create_task(chat.acompact(max_tokens=10)) for chat in chats]
    await asyncio.to_thread(wait_until, lambda: model.calls == 4)
    async with asyncio.timeout(20):
        await chats[0].aadd("Meanwhile")
        assert "Meanwhile" in texts((await chats[0].acontext(search=False)).messages)
    model.through.release(100)
    assert {report.by for report in await asyncio.gather(*folds)} == {"waiting"}


def test_no_turn_takes_the_place_of_a_summary(opened):
    """A message that comes with the id of a segment is refused, however conflicts are to be settled."""
    memory = opened(embedder="none", pruning=SMALL, summarizer=Model(), context=APART)
    chat = memory.session("chat", user_id="ada")
    grown(chat, ANIMALS[:6])
    segments, _ = all_is_there(chat)
    with pytest.raises(ConflictError):
        chat.add(Message("user", "Hello", id=segments[0].id), on_conflict="replace")
    assert all_is_there(chat)[0] == segments
