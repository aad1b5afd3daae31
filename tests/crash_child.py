"""What the killed process runs, and what must be true of the folder that it leaves.

`python tests/crash_child.py` imports everything, then forks a child for each line on its standard input: a JSON object
with `folder`, `seed` and when to kill it: `at` (the name of a failpoint, and how often it is passed), or `after` (so many
seconds) from the start or, if `ready`, from when it has checked what its predecessor left. It works until then. What it
begins and what was acknowledged stands in a journal beside the folder.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import MemoryType, Message, open_memory
from neuralflow_memory.testing import HashingEmbedder

PRUNING = {"max_context_items": 3, "summarization_threshold": 6}
STEPS = 600


@dataclass
class Truth:
    """What the journal says: live turns in order, what was ever added, what is gone, and the step in flight."""

    live: dict[str, str] = field(default_factory=dict)
    seq: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    flight: list | None = None

    def apply(self, step):
        verb, *what = step
        if verb == "add":
            for own, content in what[0]:
                self.live[own] = content
                self.seq[own] = len(self.seq) + 1
        elif verb == "update":
            self.gone.append(self.live[what[0]])
            self.live[what[0]] = what[1]
        else:
            self.gone.append(self.live.pop(what[0]))


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


def opened(folder):
    return open_memory(folder, embedder=HashingEmbedder(), pruning=PRUNING)


def check(memory, folder):
    """Raise AssertionError unless the folder holds what was acknowledged; the truth, with the step in flight settled."""
    chat = memory.session("chat", user_id="ada")
    expected = truth(folder)
    found = {m.id: m.content for m in chat.messages()}
    if expected.flight is not None:
        if settled(expected, found):
            expected.apply(expected.flight)
            note(folder, "done")
        else:
            note(folder, "void")
        expected.flight = None
    assert list(found.items()) == list(expected.live.items()), "the transcript is not what was acknowledged"
    turns = chat.entries.list(types=[MemoryType.SHORT_TERM], within="session")
    assert [e.seq for e in turns] == [expected.seq[e.id] for e in turns], "seq has a gap"
    some = random.Random(len(turns))
    for own in list(expected.live)[-2:] + some.sample(list(expected.live), min(2, len(turns))):
        word = expected.live[own].split()[0]
        assert own in [h.entry.id for h in chat.search(word, types=["short_term"])], f"{word} isn't found"
    for content in some.sample(expected.gone, min(2, len(expected.gone))):
        word = content.split()[0]
        assert all(word not in h.entry.content for h in chat.search(word, types=["short_term"])), f"{word} came back"
    memory.flush()
    live = {e.key for e in chat.entries.list()}
    assert set(memory._core.parts.store.keys()) == live, "Chroma and the ledger differ"
    check_window(chat, turns)
    assert memory.stats()["parked"] == []
    return expected


def settled(expected, found):
    """Whether the step in flight happened; a part of it is an error that the comparison of transcripts will show."""
    verb, *what = expected.flight
    if verb == "add":
        return any(own in found for own, _ in what[0])
    return found.get(what[0]) == what[1] if verb == "update" else what[0] not in found


def check_window(chat, turns):
    """Each turn is in the window or covered by the summary: one of them, never both, never neither."""
    with chat.memory._core.parts.ledger._db.read() as db:
        current = db.execute("SELECT e.id FROM sessions s JOIN entries e ON e.no = s.summary").fetchone()
    window = [m.id for m in chat.messages(view="window")]
    covered, following = set(), [current[0]] if current else []
    summaries = {e.id: e for e in chat.entries.list(types=[MemoryType.EPISODIC])}
    while following:
        for source in summaries[following.pop()].sources:
            (following.append if source in summaries else covered.add)(source)
    assert bool(chat.summary()) == bool(current)
    assert [e.id for e in turns if e.id not in covered] == window, "a turn is in neither window nor summary, or in both"


def work(folder, seed, at, say):
    """Check what is there, then add, update, delete and search until killed."""
    rng = random.Random(seed)
    if at and at[0].startswith("open."):
        arm(*at)
    memory = opened(folder)
    known = check(memory, folder)
    say("ready")
    if at:
        arm(*at)
    chat = memory.session("chat", user_id="ada")
    for n in range(STEPS):
        chance = rng.random()
        if chance < 0.7 or len(known.live) < 8:
            ids = [f"{seed}-{n}-{i}" for i in range(1 if chance < 0.45 else rng.randint(2, 5))]
            step = ["add", [(own, f"word{own.replace('-', 'x')} of {rng.choice(TOPICS)} in {n}") for own in ids]]
            roles = ["user" if rng.random() < 0.6 else "assistant" for _ in ids]
            call = lambda s=step, r=roles: chat.add([Message(q, c, id=i) for q, (i, c) in zip(r, s[1], strict=True)])
        elif chance < 0.9:
            own = rng.choice(list(known.live)[-12:])
            if chance < 0.8:
                step = ["update", own, f"new{seed}x{n} of {rng.choice(TOPICS)}"]
                call = lambda s=step: chat.entries.update(s[1], content=s[2])
            else:
                step = ["delete", own]
                call = lambda s=step: chat.entries.delete(s[1])
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
    left = [passings]

    def kill(passed):
        if passed == name:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    failpoints.hook = kill


def forked(folder, seed, *, at=None, after=None, ready=False):
    """Run a child until it is killed; the signal that ended it (0: none), and what it said."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
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
