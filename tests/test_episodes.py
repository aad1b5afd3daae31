"""A conversation by hours, by days, or as a whole: episodes that name their turns, written once."""

from datetime import UTC, datetime, timedelta

import pytest
from conftest import SMALL, found, texts

from neuralflow_memory import InputError, MemoryType, Message, NotFound, _failpoints
from neuralflow_memory.testing import ManualClock

MORNING = datetime(2024, 5, 3, 9, 30, tzinfo=UTC)
TURNS = [
    (MORNING, "ada", "The boat Aurora needs a new sail"),
    (MORNING + timedelta(minutes=10), "bo", "It costs 400 crowns"),
    (MORNING + timedelta(hours=2), "ada", "We meet at the harbour on Sunday"),
    (MORNING + timedelta(days=1), "bo", "The sail has arrived"),
    (MORNING + timedelta(days=3, hours=15), "ada", "We sailed to Oslo"),
]


class Scribe:
    """A model that notes what it was given, and fails while it is down."""

    name = "scribe"

    def __init__(self):
        self.read, self.down = [], False

    def summarize(self, messages, *, previous, max_tokens):
        if self.down:
            raise RuntimeError("out of order")
        self.read.append([m.content for m in messages])
        return "\n".join([*([previous] if previous else []), *(f"noted: {m.content}" for m in messages)])


@pytest.fixture
def scribe():
    return Scribe()


@pytest.fixture
def chat(opened, scribe):
    chat = opened(summarizer=scribe, clock=ManualClock(MORNING + timedelta(days=9))).session("chat", user_id="ada")
    chat.add(
        [Message("user", text, name=name, created_at=when, id=f"t{n}") for n, (when, name, text) in enumerate(TURNS)]
    )
    return chat


def sources(episodes):
    return [e.sources for e in episodes]


@pytest.mark.parametrize(
    ("by", "windows"),
    [
        ("hour", [("t0", "t1"), ("t2",), ("t3",), ("t4",)]),
        ("day", [("t0", "t1", "t2"), ("t3",), ("t4",)]),
        ("session", [("t0", "t1", "t2", "t3", "t4")]),
    ],
)
def test_each_window_is_an_episode_of_its_turns(chat, by, windows):
    """In order, with what was said, when, and who said it."""
    made = chat.episodes(by=by)
    assert sources(made) == windows
    said = {f"t{n}": (when, name, text) for n, (when, name, text) in enumerate(TURNS)}
    for episode, own in zip(made, windows, strict=True):
        assert (episode.type, episode.provenance, episode.scope.session_id) == (MemoryType.EPISODIC, "derived", "chat")
        assert episode.content == "\n".join(f"noted: {said[i][2]}" for i in own)
        assert episode.created_at == said[own[-1]][0]
        about = episode.metadata
        assert (about["kind"], about["window"], about["covered"], about["plain"]) == ("episode", by, len(own), False)
        assert datetime.fromisoformat(about["from"]) <= said[own[0]][0] <= said[own[-1]][0]
        assert said[own[-1]][0] <= datetime.fromisoformat(about["until"])
        assert about["participants"] == list(dict.fromkeys(said[i][1] for i in own))
    assert chat.messages() == [chat.entries.get(i).message for i in said]


def test_nothing_is_written_twice(chat, scribe):
    """Not even read by the model; a new turn touches its own window only."""
    first = chat.episodes(by="day")
    calls = len(scribe.read)
    assert chat.episodes(by="day") == first
    assert len(scribe.read) == calls
    chat.add(Message("user", "It was windy", created_at=TURNS[4][0], id="t5"))
    again = chat.episodes(by="day")
    assert again[:2] == first[:2]
    assert (again[2].id, again[2].version, again[2].sources) == (first[2].id, 2, ("t4", "t5"))
    assert len(scribe.read) == calls + 1
    assert len(chat.entries.history(again[2].id)) == 2


def test_the_lengths_have_episodes_of_their_own(chat):
    """Days beside hours beside the whole; also after reopening."""
    hours, days, whole = (chat.episodes(by=by) for by in ("hour", "day", "session"))
    assert len({e.id for e in (*hours, *days, *whole)}) == 8
    assert [chat.episodes(by=by) for by in ("hour", "day", "session")] == [hours, days, whole]


def test_the_whole_session_is_one_however_early_a_turn_is_dated(chat):
    """Its beginning moves, and the episode with it."""
    (first,) = chat.episodes(by="session")
    chat.add(Message("user", "We talked before", created_at=MORNING - timedelta(days=99), id="old"))
    (again,) = chat.episodes(by="session")
    assert (again.id, again.version) == (first.id, 2)
    assert again.metadata["from"] < first.metadata["from"]


def test_episodes_are_found_where_they_are_asked_for(chat):
    """They repeat what their turns say: else only those are hits, and prompts don't hold them."""
    chat.episodes()
    assert all(h.entry.type is MemoryType.SHORT_TERM for h in chat.search("sail"))
    hits = chat.search("Aurora", types=[MemoryType.EPISODIC], filter={"kind": "episode"})
    assert found(hits)[0].startswith("noted: The boat Aurora")
    assert [e.id for e in chat.entries.list(filter={"participants": {"$contains": "bo"}})] == [
        h.id for h in chat.episodes()[:2]
    ]
    assert not any("noted" in m.text for m in chat.context("sail").messages)


@pytest.mark.parametrize("how", ["delete", "update", "replace", "add"])
def test_a_turn_takes_its_episodes_with_it(chat, how):
    """Deleted or changed: what was noted of it is gone from ledger, search and RAM, and is made anew when asked for."""
    chat.episodes(by="day")
    chat.episodes(by="session")
    chat.search("sail", types=[MemoryType.EPISODIC])
    if how == "delete":
        chat.entries.delete("t1")
    elif how == "update":
        chat.entries.update("t1", content="It costs nothing")
    elif how == "replace":
        chat.replace([replaced(m) for m in chat.messages()])
    else:
        chat.add(Message("user", "It costs nothing", name="bo", id="t1"), on_conflict="replace")
    left = chat.entries.list(types=[MemoryType.EPISODIC])
    assert sources(left) == [("t3",), ("t4",)]
    assert not any("400" in e for e in found(chat.search("400 crowns", types=[MemoryType.EPISODIC])))
    index = chat.memory._core.parts.resident(chat.scope).index
    assert index is None or all(index.row(n) >= 0 for n in index.number[index.alive])
    again = chat.episodes(by="day")
    assert [e.id for e in again[1:]] == [e.id for e in left]
    assert "400" not in again[0].content
    assert ("t1" in again[0].sources) == (how != "delete")


def replaced(message):
    if message.id != "t1":
        return message
    return Message("user", "It costs nothing", name="bo", id="t1", created_at=message.created_at)


def test_clear_takes_all_of_them(chat):
    """With the turns."""
    chat.episodes()
    chat.clear()
    assert chat.entries.list() == []
    assert chat.episodes() == []


def test_deleting_an_episode_leaves_its_turns(chat):
    """In the window, in the transcript; the next call writes it again."""
    first, *_ = chat.episodes()
    window = chat.messages(view="window")
    chat.entries.delete(first.id)
    assert chat.messages(view="window") == window
    again, *_ = chat.episodes()
    assert again.id != first.id
    assert again.content == first.content


def test_folds_and_episodes_leave_each_other_alone(opened, scribe):
    """A fold reads no episode, makes none stale, and an episode covers turns that were folded as well."""
    memory = opened(summarizer=scribe, pruning=SMALL, clock=ManualClock(MORNING))
    chat = memory.session("chat", user_id="ada")
    for n in range(6):
        chat.add([f"Question {n} about boats", Message("assistant", f"Answer {n}")])
        memory.flush()
        made = chat.episodes(by="day")
        assert made[0].metadata["covered"] == 2 * (n + 1)
    summary, window = chat.summary(), chat.messages(view="window")
    assert "noted" in summary
    assert len(window) < 12
    assert chat.episodes(by="day") == made
    chat.entries.delete(made[0].id)
    assert chat.summary() == summary
    assert chat.messages(view="window") == window
    chat.episodes(by="day")
    memory._core.parts.residents.forget()
    assert chat.summary() == summary
    memory.flush()
    report = chat.compact(max_tokens=0)
    assert all("episode" not in i for i in report.folded)
    assert len(texts(chat.messages())) == 12


def test_a_session_with_episodes_only_has_nothing_to_sum_up(chat):
    """Read anew, it is not taken for one whose summary was lost."""
    chat.episodes()
    memory = chat.memory
    memory._core.parts.residents.forget()
    assert chat.summary() == ""
    assert not chat.compact().needed
    assert len(chat.entries.list(types=[MemoryType.EPISODIC])) == 3


def test_without_a_model_sentences_are_picked(opened):
    """The floor writes them, and they stay."""
    chat = opened().session("chat", user_id="ada")
    chat.add([Message("user", text, created_at=when) for when, _, text in TURNS])
    made = chat.episodes()
    assert "Aurora" in made[0].content
    assert made[0].metadata["by"] == "extractive"
    assert chat.episodes() == made


def test_what_a_model_could_not_write_it_writes_later(chat, scribe):
    """Until then, picked sentences stand in its place."""
    scribe.down = True
    made = chat.episodes()
    assert all(e.metadata["plain"] for e in made)
    assert "Aurora" in made[0].content
    scribe.down = False
    chat.memory._core.parts.clock.advance(hours=1)
    again = chat.episodes()
    assert not any(e.metadata["plain"] for e in again)
    assert [e.id for e in again] == [e.id for e in made]
    assert again[0].content.startswith("noted: The boat")


def test_a_long_window_is_read_in_pieces(opened, scribe):
    """Each at most as long as the summarizer reads; all of it is worked in."""
    memory = opened(summarizer=scribe, context={"max_context_length": 256, "context_overlap": 0})
    chat = memory.session("chat", user_id="ada")
    chat.add(
        [Message("user", f"Turn {n} " + "about the boats in the harbour " * 5, created_at=MORNING) for n in range(20)]
    )
    (made,) = chat.episodes()
    assert len(scribe.read) > 3
    assert sum(map(len, scribe.read)) == 20
    assert made.metadata["covered"] == 20


def test_a_turn_deleted_while_the_model_writes_is_not_resurrected(opened, scribe):
    """The episode is made anew without it."""
    chat = opened(summarizer=scribe).session("chat", user_id="ada")
    chat.add([Message("user", text, created_at=MORNING, id=f"t{n}") for n, (_, _, text) in enumerate(TURNS)])
    summarize = scribe.summarize

    def slow(messages, *, previous, max_tokens):
        scribe.summarize = summarize
        chat.entries.delete("t1")
        return summarize(messages, previous=previous, max_tokens=max_tokens)

    scribe.summarize = slow
    (made,) = chat.episodes()
    assert made.sources == ("t0", "t2", "t3", "t4")
    assert "400" not in made.content
    assert not any("400" in e.content for e in chat.entries.list())


@pytest.mark.parametrize("passing", range(6))
def test_a_crash_leaves_whole_episodes(opened, scribe, monkeypatch, passing):
    """Some or none; done again, the rest, each once."""
    chat = opened(summarizer=scribe).session("chat", user_id="ada")
    chat.add([Message("user", text, created_at=when) for when, _, text in TURNS])
    passed = []

    def killed(name):
        if name.startswith("change."):
            passed.append(name)
            if len(passed) == passing + 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(_failpoints, "hook", killed)
    with pytest.raises(KeyboardInterrupt):
        chat.episodes()
    monkeypatch.setattr(_failpoints, "hook", None)
    assert len(chat.entries.list(types=[MemoryType.EPISODIC])) == (passing + 1) // 2
    assert len(chat.episodes()) == 3
    assert len(chat.entries.list(types=[MemoryType.EPISODIC])) == 3


def test_two_processes_write_each_once(opened, beside, scribe):
    """The second finds what the first has written."""
    memory = opened(summarizer=scribe)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", text, created_at=when) for when, _, text in TURNS])
    other = beside(memory, summarizer=scribe).session("chat", user_id="ada")
    assert chat.episodes() == other.episodes()
    assert len(scribe.read) == 3
    other.entries.delete(other.messages()[0].id)
    assert sources(chat.episodes())[0] == tuple(m.id for m in other.messages()[:2])


def test_only_known_lengths_can_be_asked_for(chat):
    """And the session of another user has none."""
    with pytest.raises(InputError):
        chat.episodes(by="week")
    (own, *_) = chat.episodes()
    with pytest.raises(NotFound):
        chat.memory.session("chat", user_id="bob").entries.get(own.key)


async def test_the_async_twin_does_the_same(chat):
    """Without blocking a storage worker."""
    assert len(await chat.aepisodes(by="hour")) == 4
