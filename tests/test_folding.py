"""Folding loses nothing: in the background, with any summarizer, whatever happens meanwhile."""

import threading

import pytest
from conftest import SMALL, found, in_threads, index_keys, live_keys, texts, wait_until

from neuralflow_memory import Message, SummarizerError
from neuralflow_memory.pipeline import compact as folding


class Scripted:
    """A summarizer that does as it is told, and keeps what it was given."""

    name = "scripted"

    def __init__(self, act):
        self.act, self.given = act, []

    def summarize(self, messages, *, previous, max_tokens):
        self.given.append((texts(messages), previous))
        return self.act(messages)


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
    assert chat.summary() == "They spoke of sailing."
    seen = list(dict.fromkeys(t for given, _ in summarizer.given for t in given))
    assert seen + window == texts(chat.messages())
    assert summarizer.given[-1][1] == "They spoke of sailing."
    assert "Turn 0 about tomatoes" in found(chat.search("Turn 0 tomatoes", k=20))
    context = chat.context(max_tokens=600)
    assert "They spoke of sailing." in context.messages[0].content
    assert memory.stats()["folds"] >= 2


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
    monkeypatch.setattr(folding, "PATIENCE", 0.05)
    memory = opened(pruning=SMALL, summarizer=Scripted(act))
    chat = memory.session("chat")
    folded(chat)
    assert len(chat.messages()) == 10
    assert len(chat.messages(view="window")) < 4
    assert "Turn" in chat.summary()
    stats = memory.stats()
    assert stats["summarizer_fallbacks"] >= 1
    assert "scripted" in stats["last_error"]


@pytest.mark.parametrize("edit", ["delete", "update", "conflict", "replace"])
def test_a_change_takes_back_only_the_summaries_that_knew_of_it(opened, edit):
    """The summary before them is the session's again, and what it does not cover is verbatim again."""
    calls = iter(range(1, 9))
    memory = opened(pruning=SMALL, summarizer=Scripted(lambda _: f"Summary {next(calls)}"))
    chat = memory.session("chat")
    for ids in (["t0", "t1", "t2", "t3"], ["t4", "t5"]):
        chat.add([Message("user", f"Turn {i}", id=i) for i in ids])
        memory.flush()
    assert (chat.summary(), texts(chat.messages(view="window"))) == ("Summary 2", ["Turn t4", "Turn t5"])
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
        memory.flush()
        window = ["Turn t4", "Turn t5"]
    assert texts(chat.messages(view="window")) == window
    first = edit in ("delete", "replace")
    assert chat.summary() == ("Summary 1" if first else "Summary 3")
    assert [e.content for e in chat.entries.list(types=["episodic"])] == [chat.summary()]
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
    assert chat.summary() == "A summary."


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
    wait_until(lambda: quick.summary() == "Quick.")
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
    for text in (chat.summary(), everything, str([e.content for e in chat.entries.list()])):
        assert "147111" not in text
        assert "247112" not in text
    assert texts(chat.messages())[:2] == ["My secret number 0 is 047110", "Nothing to see"]


class Quoting:
    """A summarizer that quotes every turn, so that what it covers can be read from what it says."""

    name = "quoting"

    def summarize(self, messages, *, previous, max_tokens):
        return "\n".join(([previous] if previous else []) + texts(messages))


@pytest.mark.parametrize("how", ["filter", "filter of the user", "summary", "first summary", "all summaries"])
def test_a_deleted_summary_gives_back_the_turns_it_covered(opened, how):
    """Every turn that is left is in the window or in the summary, also where a turn goes with its summary."""
    memory = opened(pruning=SMALL, summarizer=Quoting())
    chat, other = (memory.session(name, user_id="ada") for name in ("chat", "other"))
    places = ["Paris", "Rome", "Berlin", "Oslo", "Wien", "Bonn", "Prague", "Athens"]
    for session in (chat, other):
        for place in places:
            session.add(f"Once I lived in {place}")
            memory.flush()
    summaries = chat.entries.list(within="session", types=["episodic"])
    assert len(summaries) > 1
    gone = set()
    if how == "filter":
        chat.entries.delete(filter={"content": {"$contains": "Berlin"}})
        gone = {("chat", "Berlin")}
    elif how == "filter of the user":
        chat.entries.delete(filter={"content": {"$contains": "Berlin"}}, within="user")
        gone = {("chat", "Berlin"), ("other", "Berlin")}
    elif how == "all summaries":
        chat.entries.delete([e.key for e in summaries])
    else:
        chat.entries.delete(min(summaries, key=lambda e: e.number).key if how == "first summary" else summaries[-1].key)
    memory.flush()
    for session in (chat, other):
        left = [f"Once I lived in {p}" for p in places if (session.session_id, p) not in gone]
        assert texts(session.messages()) == left
        summary = session.summary().splitlines()
        window = texts(session.messages(view="window"))
        assert summary + window == left
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

    memory = opened(pruning=SMALL, summarizer=Slow())
    chat = memory.session("chat", user_id="ada")
    chat.add([f"Secret {n}" for n in range(4)])
    memory.flush()
    assert "Secret 0" in chat.summary()
    (entry,) = chat.entries.list(within="session", types=["episodic"])
    slow.set()
    chat.add([f"Plain {n}" for n in range(3)])
    assert began.wait(30)
    chat.entries.update(entry.key, content="Redacted")
    assert chat.summary() == "Redacted"
    go.set()
    memory.flush()
    assert "Secret 0" not in chat.summary()
    assert chat.summary().startswith("Redacted\n")
    assert chat.summary().splitlines()[1:] + texts(chat.messages(view="window")) == texts(chat.messages())[2:]
