"""Folding loses nothing: in the background, with any summarizer, whatever happens meanwhile."""

import threading

import pytest
from conftest import SMALL, found, in_threads, index_keys, live_keys, texts, wait_until

from neuralflow_memory import Message, SummarizerError
from neuralflow_memory.pipeline import summarize

APART = {"context_overlap": 0}
"""Segments that share no turn, so that each turn is known to one of them only."""


class Scripted:
    """A summarizer that does as it is told, and keeps what it was given: turns, or segments of them."""

    name = "scripted"

    def __init__(self, act):
        self.act, self.given, self.worked_in = act, [], []

    def summarize(self, messages, *, previous, max_tokens):
        kept = self.worked_in if messages[0].metadata.get("kind") == "segment" else self.given
        kept.append((texts(messages), previous))
        return self.act(messages)


def said(chat):
    """The summary without what is pinned beside it."""
    return chat.summary().partition("\nWord for word:\n")[0]


def pinned(chat):
    """What is pinned beside the summary."""
    return chat.summary().partition("\nWord for word:\n")[2].splitlines()


def summaries(chat, *, kind):
    """The session's segments in order, or its summary."""
    found = chat.entries.list(within="session", types=["episodic"], filter={"metadata.kind": kind})
    return sorted(found, key=lambda e: e.metadata.get("first", 0))


def folded(chat, *, turns=10):
    for n in range(turns):
        chat.add(f"Turn {n} about {'sailing' if n % 2 else 'tomatoes'}")
    chat.memory.flush()


def test_folding_happens_by_itself_and_loses_nothing(opened):
    """Old turns leave the window in the background; they stay in `all` and in search, and the summary covers them."""
    summarizer = Scripted(lambda messages: "They spoke of sailing.")
    memory = opened(pruning=SMALL, summarizer=summarizer)
    chat = memory.session("chat")
    folded(chat)
    assert texts(chat.messages()) == [f"Turn {n} about {'sailing' if n % 2 else 'tomatoes'}" for n in range(10)]
    window = texts(chat.messages(view="window"))
    assert 1 <= len(window) < 4
    seen = list(dict.fromkeys(t for given, _ in summarizer.given for t in given))
    assert seen + window == texts(chat.messages())
    assert {previous for _, previous in summarizer.given} == {""}
    assert said(chat) == "They spoke of sailing."
    assert pinned(chat) == [f"user: {t}" for t in seen]  # each has a number that the summary misses
    segments = summaries(chat, kind="segment")
    assert [s.content for s in segments] == ["They spoke of sailing."] * len(summarizer.given)
    turns = {m.id: m.content for m in chat.messages()}
    assert list(dict.fromkeys(turns[i] for s in segments for i in s.sources)) == seen
    (summary,) = summaries(chat, kind="summary")
    assert (list(summary.sources), summary.metadata["covered"]) == ([s.id for s in segments], len(seen))
    assert "Turn 0 about tomatoes" in found(chat.search("Turn 0 tomatoes", k=20))
    context = chat.context(max_tokens=600)
    assert "They spoke of sailing." in context.messages[0].content
    assert memory.stats()["folds"] >= 1  # as many as there was time for between the turns


def hang(_):
    threading.Event().wait(3)
    return "Too late"


def raises(error):
    def act(_):
        raise error

    return act


@pytest.mark.parametrize(
    "act",
    [
        raises(SummarizerError("no quota")),
        raises(KeyError("a bug of the model's client")),
        lambda _: "",
        lambda _: " \n",
        lambda _: None,
        lambda _: "word " * 5000,
        hang,
    ],
    ids=["refuses", "crashes", "empty", "blank", "none", "too long", "hangs"],
)
def test_a_summarizer_that_fails_means_a_plainer_summary(opened, monkeypatch, act):
    """Never a lost turn, never a failed chat: sentences are picked instead, and stats() say why."""
    monkeypatch.setattr(summarize, "PATIENCE", 0.05)
    memory = opened(pruning=SMALL, summarizer=Scripted(act))
    chat = memory.session("chat")
    folded(chat)
    assert len(chat.messages()) == 10
    assert len(chat.messages(view="window")) < 4
    assert "Turn" in said(chat)
    segments = summaries(chat, kind="segment")
    assert {(s.metadata["by"], s.metadata["plain"]) for s in segments} == {("extractive", True)}
    assert summaries(chat, kind="summary")[0].metadata["plain"]
    covered = [i for s in segments for i in s.sources]
    assert list(dict.fromkeys(covered)) + [m.id for m in chat.messages(view="window")] == [
        m.id for m in chat.messages()
    ]
    stats = memory.stats()
    assert stats["summarizer_fallbacks"] >= 1
    assert "scripted" in stats["last_error"]


@pytest.mark.parametrize("edit", ["delete", "update", "conflict", "replace"])
def test_a_change_takes_back_only_the_segments_that_knew_of_it(opened, edit):
    """The others stay, the summary is made anew from them, and what none of them covers is verbatim again."""
    calls = iter(range(1, 9))
    memory = opened(pruning=SMALL, context=APART, summarizer=Scripted(lambda _: f"Part {next(calls)}"))
    chat = memory.session("chat")
    for ids in (["t0", "t1", "t2", "t3"], ["t4", "t5"]):
        chat.add([Message("user", f"Turn {i}", id=i) for i in ids])
        memory.flush()
    assert (said(chat), texts(chat.messages(view="window"))) == ("Part 1\nPart 2", ["Turn t4", "Turn t5"])
    assert [s.sources for s in summaries(chat, kind="segment")] == [("t0", "t1"), ("t2", "t3")]
    stays = summaries(chat, kind="segment")[edit in ("update", "conflict")]
    if edit == "delete":
        chat.entries.delete("t3")
        window = ["Turn t2", "Turn t4", "Turn t5"]
    elif edit == "replace":
        window = ["Changed", "Turn t5"]
        chat.replace([Message("user", "Changed", id="t3"), Message("user", "Turn t5", id="t5")])
    else:
        if edit == "update":
            chat.entries.update("t0", content="Changed")
        else:
            chat.add(Message("user", "Changed", id="t0"), on_conflict="replace")
        window = ["Turn t4", "Turn t5"]
    memory.flush()
    assert texts(chat.messages(view="window")) == window
    assert said(chat) == ("Part 1" if edit in ("delete", "replace") else "Part 3\nPart 2")
    segments = summaries(chat, kind="segment")
    assert stays in segments
    assert [s.content for s in segments] == said(chat).splitlines()
    assert [s.sources for s in segments] == [("t0", "t1"), ("t2", "t3")][: len(segments)]
    (summary,) = summaries(chat, kind="summary")
    assert ({*summary.sources}, summary.metadata["covered"]) == ({s.id for s in segments}, 2 * len(segments))
    everything = str([(e.content, e.metadata) for e in chat.entries.list()])
    assert ("Turn t0" if edit in ("update", "conflict") else "Turn t3") not in everything
    chat.add("Next")
    assert texts(chat.messages(view="window")) == [*window, "Next"]
    memory.flush()
    assert index_keys(memory) == live_keys(memory)


def test_changing_a_tag_of_a_folded_turn_leaves_the_summary(opened):
    """Only what the summary may have read makes it stale."""
    memory = opened(pruning=SMALL)
    chat = memory.session("chat")
    chat.add([Message("user", f"Turn {n}", id=f"t{n}") for n in range(5)])
    memory.flush()
    before = chat.summary(), chat.messages(view="window")
    chat.entries.update("t0", tags=["first"])
    memory.flush()
    assert (chat.summary(), chat.messages(view="window")) == before
    assert memory.stats()["folds"] == 1


def test_a_turn_replaced_in_the_batch_that_fills_the_window_holds_up_no_fold(opened):
    """The limits are looked at after all of the batch, not at the next add."""
    memory = opened(pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"Turn {n}", id=f"t{n}") for n in range(3)])
    batch = [Message("user", "I sail instead", id="t0"), *(Message("user", f"Turn {n}", id=f"t{n}") for n in (3, 4))]
    chat.add(batch, on_conflict="replace")
    memory.flush()
    assert texts(chat.messages(view="window")) == ["Turn 3", "Turn 4"]
    assert "I sail instead" in chat.summary()


def gate():
    """A summarizer's act that waits, what says that it began, and what lets it go on."""
    began, go = threading.Event(), threading.Event()

    def act(_):
        began.set()
        assert go.wait(30)
        return "A summary."

    return act, began, go


def test_add_never_waits_for_the_summarizer(opened):
    """Turns added, read, searched and put into contexts while the summarizer is at work."""
    act, began, go = gate()
    memory = opened(pruning=SMALL, summarizer=Scripted(act))
    chat = memory.session("chat", user_id="ada")
    chat.add([f"Turn {n}" for n in range(5)])
    assert began.wait(30)
    in_threads(*[lambda n=n: chat.add(f"Late {n}") for n in range(6)], lambda: chat.search("Turn"), chat.context)
    assert len(chat.messages(view="window")) == 11
    go.set()
    memory.flush()
    assert len(chat.messages()) == 11
    assert len(chat.messages(view="window")) < 4
    assert said(chat) == "A summary."


@pytest.mark.parametrize("race", ["delete", "update", "replace", "clear", "conflict", "delete and add again"])
def test_a_summary_of_what_changed_meanwhile_is_not_kept(opened, race):
    """A fold overtaken by a change starts again; what was deleted is in no later summary."""
    act, began, go = gate()
    summarizer = Scripted(act)
    memory = opened(pruning=SMALL, summarizer=summarizer)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"Turn {n}", id=f"t{n}") for n in range(5)])
    assert began.wait(30)
    if race == "delete":
        chat.entries.delete("t0")
    elif race == "update":
        chat.entries.update("t0", content="Changed")
    elif race == "replace":
        chat.replace(["Only this"])
    elif race == "clear":
        chat.clear()
    elif race == "conflict":
        chat.add(Message("user", "Changed", id="t0"), on_conflict="replace")
    else:
        chat.entries.delete("t0")
        chat.add(Message("user", "Turn 0", id="t0"))
    go.set()
    memory.flush()
    covered = [t for given, _ in summarizer.given[1:] for t in given]
    if race in ("clear", "replace"):
        assert chat.summary() == ""
        assert texts(chat.messages(view="window")) == ([] if race == "clear" else ["Only this"])
    else:
        assert sorted({*covered, *texts(chat.messages(view="window"))}) == sorted(texts(chat.messages()))
        assert covered[0] == ("Changed" if race in ("update", "conflict") else "Turn 1")
    memory.flush()
    assert index_keys(memory) == live_keys(memory)


def test_sessions_fold_beside_each_other(opened):
    """One chat's slow summary holds up no other chat."""
    act, began, go = gate()
    slow = []

    def first_waits(messages):
        if not slow:
            slow.append(1)
            return act(messages)
        return "Quick."

    memory = opened(pruning=SMALL, summarizer=Scripted(first_waits))
    memory.session("slow").add([f"Turn {n}" for n in range(5)])
    assert began.wait(30)
    quick = memory.session("quick")
    quick.add([f"Turn {n}" for n in range(5)])
    wait_until(lambda: said(quick) == "Quick.")
    go.set()
    memory.flush()


def test_compact_says_what_it_did(opened):
    """Nothing to do is said too; max_tokens folds a window that is within its limits."""
    chat = opened(pruning=SMALL).session("chat")
    assert not chat.compact().needed
    chat.add([Message("user", f"Turn {n} " + "word " * 20, id=f"t{n}") for n in range(3)])
    report = chat.compact()
    assert (report.needed, report.folded) == (False, ())
    report = chat.compact(max_tokens=40)
    assert (report.needed, report.folded, report.covered) == (True, ("t0", "t1"), 2)
    assert report.after < report.before
    assert len(chat.messages()) == 3


def test_a_deleted_turn_is_not_quoted_by_the_summary(opened):
    """The summary covers turns that are there; one that was deleted or changed speaks through it no more."""
    memory = opened(pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"My secret number {n} is {n}4711{n}", id=f"t{n}") for n in range(8)])
    memory.flush()
    assert "147111" in chat.summary()
    chat.entries.delete("t1")
    chat.entries.update("t2", content="Nothing to see")
    memory.flush()
    everything = "".join(str(m.content) for m in chat.context("secret number", max_tokens=4000).messages)
    for text in (chat.summary(), everything, str([(e.content, e.metadata) for e in chat.entries.list()])):
        assert "147111" not in text
        assert "247112" not in text
    assert texts(chat.messages())[:2] == ["My secret number 0 is 047110", "Nothing to see"]


class Quoting:
    """A summarizer that quotes every turn, so that what it covers can be read from what it says."""

    name = "quoting"

    def summarize(self, messages, *, previous, max_tokens):
        return "\n".join(dict.fromkeys("\n".join([previous, *texts(messages)]).strip().splitlines()))


@pytest.mark.parametrize("overlap", [0, 128])
@pytest.mark.parametrize(
    "how", ["filter", "filter of the user", "summary", "first segment", "last segment", "segments", "everything"]
)
def test_a_deleted_summary_gives_back_the_turns_it_covered(opened, how, overlap):
    """Every turn that is left is in the window or in the summary, also where a turn goes with its segment."""
    memory = opened(pruning=SMALL, summarizer=Quoting(), context={"context_overlap": overlap})
    chat, other = (memory.session(name, user_id="ada") for name in ("chat", "other"))
    places = ["Paris", "Rome", "Berlin", "Oslo", "Wien", "Bonn", "Prague", "Athens"]
    for session in (chat, other):
        for place in places:
            session.add(f"Once I lived in {place}")
            memory.flush()
    segments, (summary,) = summaries(chat, kind="segment"), summaries(chat, kind="summary")
    assert len(segments) == 3
    gone = set()
    if how == "filter":
        chat.entries.delete(filter={"content": {"$contains": "Berlin"}})
        gone = {("chat", "Berlin")}
    elif how == "filter of the user":
        chat.entries.delete(filter={"content": {"$contains": "Berlin"}}, within="user")
        gone = {("chat", "Berlin"), ("other", "Berlin")}
    else:
        doomed = {
            "summary": [summary],
            "first segment": segments[:1],
            "last segment": segments[-1:],
            "segments": segments,
            "everything": [*segments, summary],
        }[how]
        assert chat.entries.delete([e.key for e in doomed]) == len(doomed)
    memory.flush()
    for session in (chat, other):
        left = [f"Once I lived in {p}" for p in places if (session.session_id, p) not in gone]
        assert texts(session.messages()) == left
        covered = {i for s in summaries(session, kind="segment") for i in s.sources}
        window = texts(session.messages(view="window"))
        assert said(session).splitlines() == [m.content for m in session.messages() if m.id in covered]
        assert window == [m.content for m in session.messages() if m.id not in covered]
        assert len(window) < 4
    assert index_keys(memory) == live_keys(memory)


def test_a_summary_that_was_edited_meanwhile_is_not_overwritten(opened):
    """A fold that read the older text starts again from the new one."""
    began, go, slow = threading.Event(), threading.Event(), threading.Event()

    class Slow(Quoting):
        def summarize(self, messages, *, previous, max_tokens):
            if slow.is_set():
                began.set()
                assert go.wait(30)
            return super().summarize(messages, previous=previous, max_tokens=max_tokens)

    memory = opened(pruning=SMALL, summarizer=Slow(), context=APART)
    chat = memory.session("chat", user_id="ada")
    chat.add([f"Secret {n}" for n in range(4)])
    memory.flush()
    assert "Secret 0" in chat.summary()
    (summary,) = summaries(chat, kind="summary")
    slow.set()
    chat.add([f"Plain {n}" for n in range(3)])
    assert began.wait(30)
    chat.entries.update(summary.key, content="Redacted")
    assert chat.summary() == "Redacted"
    go.set()
    memory.flush()
    assert "Secret 0" not in chat.summary()
    assert chat.summary().startswith("Redacted\n")
    assert chat.summary().splitlines()[1:] + texts(chat.messages(view="window")) == texts(chat.messages())[2:]


@pytest.mark.parametrize(
    ("options", "max_tokens"),
    [({"budget": {"total": 2000}}, None), ({}, 1000), ({}, 600), ({}, None)],
    ids=["a small total", "1,000 tokens a prompt", "600 tokens a prompt", "the defaults"],
)
def test_what_prompts_have_no_room_for_is_in_the_summary(opened, options, max_tokens):
    """However far the budget is below the window's limits, no turn is in neither the prompt nor a summary."""
    memory = opened(embedder="none", **options)
    chat = memory.session("chat", user_id="ada")
    for n in range(50):
        chat.add(
            [f"{n}: " + "what about the boats out there tonight? " * 4, Message("assistant", f"{n}: back soon. " * 9)]
        )
        memory.flush()
        chat.add(f"And {n}?")
        sent = {m.id for m in chat.context(max_tokens=max_tokens, search=False).messages}
        memory.flush()
        covered = {i for s in summaries(chat, kind="segment") for i in s.sources}
        assert [m.content for m in chat.messages() if m.id not in sent | covered] == []
    assert 20 * memory.stats()["folds"] / 150 < (2.5 if max_tokens == 600 else 1.5)


def test_one_small_prompt_folds_nothing(opened):
    """A title, a quick question on the side: the window stays as the other prompts need it."""
    memory = opened(embedder="none")
    chat = memory.session("chat", user_id="ada")
    for n in range(10):
        chat.add([f"{n}: " + "what about the boats? " * 10, Message("assistant", "Back soon.")])
        chat.context(search=False)
        chat.context(max_tokens=200, search=False)
        memory.flush()
    assert memory.stats()["folds"] == 0
