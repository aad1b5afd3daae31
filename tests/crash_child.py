"""What the killed process runs, and what must be true of the folder that it leaves.

`python tests/crash_child.py` imports everything, then forks a child for each line on its standard input: a JSON object
with `folder`, `seed` and when to kill it: `at` (the name of a failpoint, and how often it is passed), or `after` (so many
seconds) from the start or, if `ready`, from when it has checked what its predecessor left. It works until then. What it
begins and what was acknowledged stands in a journal beside the folder.

With `act` it does one thing to a chat that is always the same (see `ACTS`), and is killed as it passes the failpoint `at`,
the number of those passed since; with none it writes down, beside the folder, what was committed at each.
"""

import json
import os
import random
import re
import signal
import sqlite3
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import MemoryType, Message, SummarizerError, open_memory
from neuralflow_memory.testing import HashingEmbedder, ManualClock

PRUNING = {"max_context_items": 3, "summarization_threshold": 6}
STEPS = 600


@dataclass
class Truth:
    """What the journal says: live turns in order, what was ever added, what is gone, pins, and the step in flight."""

    live: dict[str, str] = field(default_factory=dict)
    seq: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    pinned: set[str] = field(default_factory=set)
    returned: set[str] = field(default_factory=set)
    """What was ever pinned, and so may be in the window and covered by a segment."""
    flight: list | None = None
    states: list[str] = field(default_factory=list)
    """The turns that a version of the state was written with."""

    def apply(self, step):
        verb, *what = step
        if verb == "add":
            for own, content in what[0]:
                self.live[own] = content
                self.seq[own] = len(self.seq) + 1
            if len(what) > 1:
                self.states.append(what[1]["last"])
        elif verb == "update":
            self.gone.append(self.live[what[0]])
            self.live[what[0]] = what[1]
        elif verb == "pin":
            self.pinned.add(what[0])
            self.returned.add(what[0])
        elif verb == "unpin":
            self.pinned.discard(what[0])
        else:
            self.gone.append(self.live.pop(what[0]))
            self.pinned.discard(what[0])


def journal(folder):
    return Path(f"{folder}.journal")


def truth(folder):
    found = Truth()
    if journal(folder).exists():
        for line in journal(folder).read_text().splitlines():
            kind, *step = json.loads(line)
            if kind == "begin":
                found.flight = step
            else:
                if kind == "done":
                    found.apply(found.flight)
                found.flight = None
    return found


def note(folder, *what):
    with journal(folder).open("a") as file:
        file.write(json.dumps(what) + "\n")
        file.flush()
        if what[0] == "done":
            os.fsync(file.fileno())


class Notes:
    """A model that notes the first word of all that it is told, the last forty of them; it may be down."""

    name = "notes"

    def __init__(self, *, up):
        self.up = up

    def summarize(self, messages, *, previous, max_tokens):
        if not self.up:
            raise SummarizerError("down")
        told = [words(m.content) if m.role == "system" else words(m.content)[:1] for m in messages]
        return " ".join(list(dict.fromkeys(sum(told, words(previous))))[-40:])


def words(text):
    return re.findall(r"\w+", text)


def opened(folder, *, up=True, **options):
    options = {"embedder": HashingEmbedder(), "pruning": PRUNING, "context": {"context_overlap": 16}, **options}
    return open_memory(folder, summarizer=Notes(up=up), **options)


def check(memory, folder):
    """Raise AssertionError unless the folder holds what was acknowledged; the truth, with the step in flight settled."""
    chat = memory.session("chat", user_id="ada")
    expected = truth(folder)
    found = {m.id: m.content for m in chat.messages()}
    if expected.flight is not None:
        if settled(chat, expected.flight, found):
            expected.apply(expected.flight)
            note(folder, "done")
        else:
            note(folder, "void")
        expected.flight = None
    assert list(found.items()) == list(expected.live.items()), "the transcript is not what was acknowledged"
    turns = chat.entries.list(types=[MemoryType.SHORT_TERM], within="session")
    assert [e.seq for e in turns] == [expected.seq[e.id] for e in turns], "seq has a gap"
    state = chat.state.get()
    assert (state.version, state.turn) == (len(expected.states), (expected.states or [None])[-1]), (
        "state and turns differ"
    )
    assert state.fields == ({"last": state.turn} if state.version else {})
    some = random.Random(len(turns))
    for own in list(expected.live)[-2:] + some.sample(list(expected.live), min(2, len(turns))):
        word = expected.live[own].split()[0]
        # By this word, wherever vectors that are near by accident may stand.
        hits = [h.entry.id for h in chat.search(word, k=len(turns), types=["short_term"]) if h.signals["lexical"] > 0]
        assert own in hits, f"{word} isn't found"
    for content in some.sample(expected.gone, min(2, len(expected.gone))):
        word = content.split()[0]
        assert all(word not in h.entry.content for h in chat.search(word, types=["short_term"])), f"{word} came back"
    check_window(chat, expected)
    resume(memory, folder, expected)
    live = {e.key for e in chat.entries.list(filter={"tier": "warm"})}
    assert set(memory._core.parts.store.keys()) == live, "Chroma and the ledger differ"
    state = memory.stats(verify=True)
    assert state["parked"] == []
    assert state["archive_damaged"] == {}
    return expected


def settled(chat, flight, found):
    """Whether the step in flight happened; a part of it is an error that the comparison of transcripts will show."""
    verb, *what = flight
    if verb == "add":
        return any(own in found for own, _ in what[0])
    if verb in ("pin", "unpin"):
        return chat.entries.get(what[0]).pinned == (verb == "pin")
    return found.get(what[0]) == what[1] if verb == "update" else what[0] not in found


def resume(memory, folder, expected):
    """Add a turn: what was cut off is done then, and nothing is left to do."""
    chat = memory.session("chat", user_id="ada")
    own = f"again-{len(expected.seq)}"
    step = ["add", [[own, f"{own.replace('-', 'x')} of nothing"]]]
    note(folder, "begin", *step)
    chat.add(Message("user", step[1][0][1], id=own))
    note(folder, "done")
    expected.apply(step)
    memory.flush()
    check_window(chat, expected)
    check_work_done(chat)


def check_window(chat, expected):
    """Each turn is in the window or covered by a segment: never neither, nor both; nothing that is gone is quoted."""
    turns = chat.entries.list(types=[MemoryType.SHORT_TERM], within="session")
    summaries = chat.entries.list(types=[MemoryType.EPISODIC], within="session")
    segments = {e.id: e for e in summaries if e.metadata["kind"] == "segment"}
    covered = {source for e in segments.values() for source in e.sources}
    window = [m.id for m in chat.messages(view="window")]
    assert covered <= expected.live.keys(), "a segment was made from a turn that is gone"
    assert {e.id for e in turns if e.pinned} == expected.pinned <= {*window}, (
        f"pins are not what was acknowledged {sorted(e.id for e in turns if e.pinned)} {sorted(expected.pinned)} {window}"
    )
    stays = {*window} & covered
    assert stays <= expected.returned, "a turn is in both window and segment"
    assert [e.id for e in turns if e.id not in covered - stays] == window, "a turn is in neither window nor segment"
    whole = [e for e in summaries if e.id not in segments]
    assert len(whole) <= 1
    assert all({*e.sources} == segments.keys() for e in whole), "a summary of other segments than there are"
    assert bool(chat.summary()) == bool(whole)
    said = words(chat.summary() + "".join(f" {e.content} {e.metadata}" for e in summaries))
    assert {content.split()[0] for content in expected.gone}.isdisjoint(said), "what is gone is quoted"


def check_work_done(chat):
    """No fold is due; where the model is up, all that the floor wrote in its place is written again."""
    parts = chat.memory._core.parts
    segments = parts.ledger.segments(chat.scope)
    window = parts.window(chat.scope)
    assert bool(window.summary) == bool(segments), "the summary was not made anew"
    assert not window.due, "a fold is due still"
    assert window.turns < parts.settings.pruning.summarization_threshold, "the window is full still"
    if parts.summarizer.up:
        plain = [e.id for e in (*segments, window.summary) if e and e.metadata["plain"]]
        assert plain == [], f"the model did not write again what it could not: {plain}"


def work(folder, seed, at, say):
    """Check what is there, then add, update, delete, pin and search until killed. Of odd seeds the model is down."""
    rng = random.Random(seed)
    if at and at[0].startswith("open."):
        arm(*at)
    memory = opened(folder, up=seed % 2 == 0)
    known = check(memory, folder)
    say("ready")
    if at:
        arm(*at)
    chat = memory.session("chat", user_id="ada")
    for n in range(STEPS):
        chance = rng.random()
        if chance < 0.65 or len(known.live) < 8:
            ids = [f"{seed}-{n}-{i}" for i in range(1 if chance < 0.4 else rng.randint(2, 5))]
            step = ["add", [(own, f"word{own.replace('-', 'x')} of {rng.choice(TOPICS)} in {n}") for own in ids]]
            roles = ["user" if rng.random() < 0.6 else "assistant" for _ in ids]
            if n % 3:
                step.append({"last": ids[-1]})
            call = lambda s=step, r=roles: chat.add(
                [Message(q, c, id=i) for q, (i, c) in zip(r, s[1], strict=True)], state=(*s, None)[2]
            )
        elif chance < 0.92:
            some = list(known.live) if rng.random() < 0.4 else list(known.live)[-12:]  # folded ones, too
            own = rng.choice(some)
            if chance < 0.74:
                step = ["update", own, f"new{seed}x{n} of {rng.choice(TOPICS)}"]
                call = lambda s=step: chat.entries.update(s[1], content=s[2])
            elif chance < 0.85:
                step = ["delete", own]
                call = lambda s=step: chat.entries.delete(s[1])
            else:
                if known.pinned and rng.random() < 0.6:
                    own = rng.choice(sorted(known.pinned))
                if chat.entries.get(own).role != "user":
                    continue  # it would be pinned with its user turn, which the journal does not know
                step = ["unpin" if own in known.pinned else "pin", own]
                call = lambda s=step: getattr(chat, s[0])(s[1])
        elif chance < 0.96 and known.live:
            some = rng.sample(list(known.live), min(6, len(known.live)))
            chat.entries.archive(some)
            chat.entries.get(rng.choice(some))
            if chance < 0.94:
                memory.sweep()
            continue
        else:
            chat.search(rng.choice(TOPICS))
            continue
        note(folder, "begin", *step)
        call()
        note(folder, "done")
        known.apply(step)
    say(" missed")


TOPICS = ["sailing", "tomatoes", "invoices", "the number 42", "Berlin in 1989", "not sleeping", "Grandmother Ada"]


def arm(name, passings):
    """Be killed when a failpoint, or any at all, is passed so many times."""
    left = [passings]

    def kill(passed):
        if name in (None, passed):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.hook = kill


# -- one act, always the same --


def told(chat, names, *, minutes=1):
    for own in names:
        chat.memory._core.parts.clock.advance(minutes=minutes)
        chat.add(Message("user", f"Word{own} of {TOPICS[len(own) % 7]} on day {own[1:]}", id=own))
        chat.memory.flush()


def down(chat):
    """What is folded is summed up by the floor for now."""
    chat.memory._core.parts.summarizer.up = False
    told(chat, ["t20", "t21", "t22", "t23"])


def back(chat):
    chat.memory._core.parts.summarizer.up = True
    told(chat, ["u0"], minutes=60)


def kinds(chat, kind):
    return [e.key for e in chat.entries.list(types=["episodic"], filter={"metadata.kind": kind})]


ACTS = {
    "fold": (lambda chat: None, lambda chat: told(chat, ["u0"])),
    "delete": (lambda chat: None, lambda chat: chat.entries.delete("t1")),
    "delete several": (lambda chat: None, lambda chat: chat.entries.delete(["t1", "t7", "t13"])),
    "delete in the window": (lambda chat: None, lambda chat: chat.entries.delete("t19")),
    "delete a segment": (lambda chat: None, lambda chat: chat.entries.delete(kinds(chat, "segment")[0])),
    "delete the summary": (lambda chat: None, lambda chat: chat.entries.delete(kinds(chat, "summary"))),
    "update": (lambda chat: None, lambda chat: chat.entries.update("t1", content="Redacted")),
    "pin": (lambda chat: None, lambda chat: chat.pin("t1")),
    "unpin": (lambda chat: chat.pin("t1"), lambda chat: (chat.unpin("t1"), told(chat, ["u0", "u1", "u2"]))),
    "redo": (down, back),
    "silence": (lambda chat: None, lambda chat: told(chat, ["u0"], minutes=61)),
    "clear": (lambda chat: None, lambda chat: chat.clear()),
}
"""What is done before, and the act."""


def scene(folder, clock, *, up=True):
    """A memory without vectors, opened at *clock*."""
    return opened(folder, up=up, embedder="none", clock=clock)


def perform(folder, act, at):
    """Prepare a chat, then do *act* and all that follows from it; killed at failpoint number *at*, if one is given."""
    with scene(folder, ManualClock()) as memory:
        chat = memory.session("chat", user_id="ada")
        told(chat, [f"t{n}" for n in range(20)])
        before, act_itself = ACTS[act]
        before(chat)
        memory.flush()
        seen = [["start", state(folder)]]
        failpoints.hook = lambda name: seen.append([name, state(folder)])
        if at is not None:
            arm(None, at)
        act_itself(chat)
        memory.flush()
        failpoints.hook = None
    Path(f"{folder}.states").write_text(json.dumps([*seen, ["end", state(folder)]]))


def state(folder):
    """What is committed of the chat's window and summaries, without what differs from run to run."""
    db = sqlite3.connect(f"file:{folder}/ledger.sqlite3?mode=ro", uri=True)
    try:
        db.execute("BEGIN")
        window = db.execute(
            "SELECT id, content, pinned FROM entries WHERE position IS NOT NULL ORDER BY position"
        ).fetchall()
        made = db.execute("SELECT id, content, metadata, sources FROM entries WHERE type = 3 ORDER BY no").fetchall()
        summary = db.execute("SELECT e.id FROM sessions s LEFT JOIN entries e ON e.no = s.summary").fetchone()[0]
        turns = [own for (own,) in db.execute("SELECT id FROM entries WHERE type = 0 ORDER BY seq")]
    finally:
        db.close()
    place = {own: n for n, (own, *_) in enumerate(made)}
    summaries = [[c, json.loads(m), [place.get(s, s) for s in json.loads(f)], i == summary] for i, c, m, f in made]
    return json.loads(json.dumps([turns, window, summaries]))


def forked(folder, seed=0, *, at=None, after=None, ready=False, act=None):
    """Run a child until it is killed; the signal that ended it (0: none), and what it said."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if act is not None:
                perform(folder, act, at)
            else:
                work(folder, seed, at, lambda text: os.write(write, text.encode()))
        except BaseException as error:
            os.write(write, f" broken {type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    said = os.read(read, 5) if ready else b""
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)  # it was not waited for yet, so the number is still its own
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        said += pipe.read()
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, said.decode()


def warm(folder):
    """Import here what opening a memory imports, as a child's first use of it shows: children then start fast."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with opened(folder) as memory:
            memory.session("warm").add("Words that are stemmed: running 42 häuser")
            memory.flush()
            os.write(write, "\n".join(sys.modules).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        names = pipe.read().split("\n")
    os.waitpid(pid, 0)
    for name in names:
        try:
            import_module(name)
        except Exception:
            continue  # what can't be imported by name is no matter: this only saves time
    from neuralflow_memory.models.tokens import token_counter

    token_counter("cl100k_base").count("warm")


def serve():
    warm(sys.argv[1])
    print("serving", flush=True)
    for line in sys.stdin:
        print(json.dumps(forked(**json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
