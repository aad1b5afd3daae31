"""Many processes at work on one folder, and what must be true of it in the end.

`python tests/many_processes_child.py` imports everything, then, for each line on its standard input (JSON: `folder`, and the
options of `together`), forks processes that add turns to shared sessions, kills half of them at random and starts them again,
and prints what went wrong. What a process begins and what was acknowledged stands in a journal of its own beside the folder,
and what was embedded, by whom, in one of all.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from crash_child import warm

from neuralflow_memory import Message, open_memory
from neuralflow_memory.testing import HashingEmbedder

SESSIONS = 20
USERS = 5
ROOMY = {"max_context_items": 1900, "summarization_threshold": 2000, "max_context_tokens": 60_000}
"""So much stays in the window that it shows every turn of the run."""
OPTIONS = {"pruning": ROOMY, "budget": {"total": 80_000, "conversation": 60_000}, "tokenizer": "approx"}


class Noting(HashingEmbedder):
    """Notes who embedded what, in one write, which is whole or not there."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def embed_documents(self, texts):
        found = super().embed_documents(texts)
        with open(self.path, "ab", buffering=0) as file:
            file.write("".join(f"{json.dumps([os.getpid(), t])}\n" for t in texts).encode())
        return found


def embedded(folder):
    path = Path(f"{folder}.embedded")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def opened(folder):
    return open_memory(folder, embedder=Noting(f"{folder}.embedded"), **OPTIONS)


def session(memory, number):
    return memory.session(f"s{number}", user_id=f"user{number % USERS}")


def journal(folder, own):
    return Path(f"{folder}.journal{own}")


def acknowledged(folder, own):
    """Session and id of the turns of a process that were acknowledged, in order, and the one in flight, if there is one."""
    path = journal(folder, own)
    done, flight = [], None
    for line in path.read_text().splitlines() if path.exists() else ():
        if line == "done":
            done.append(flight)
            flight = None
        elif line.endswith("]"):  # or it was cut short
            flight = tuple(json.loads(line))
    return done, flight


def text(own_id):
    return f"word{own_id.replace('-', 'x')} of sailing"


def work(folder, own, *, workers, turns, seed, pause):
    """Add turns until there are as many as asked for, *pause* seconds apart; see those of all others in between."""
    rng = random.Random(f"{seed}-{os.getpid()}")
    memory = opened(folder)
    done, flight = acknowledged(folder, own)
    with journal(folder, own).open("a") as file:
        while len(done) < turns:
            number, own_id = flight or (rng.randrange(SESSIONS), f"{own}-{len(done)}")
            if flight is None:
                file.write(json.dumps([number, own_id]) + "\n")
                file.flush()
            session(memory, number).add(Message("user", text(own_id), id=own_id))
            file.write("done\n")
            file.flush()
            done.append((number, own_id))
            flight = None
            time.sleep(pause)
            if rng.random() < 0.15:
                see(folder, memory, workers, rng)
    see(folder, memory, workers, rng)
    memory.close()


def see(folder, memory, workers, rng):
    """What anybody was told is there, is in the window and found by the next call here."""
    known = [turn for own in range(workers) for turn in acknowledged(folder, own)[0]]
    number, own_id = rng.choice(known)
    chat = session(memory, number)
    here = {own for n, own in known if n == number}
    if rng.random() < 0.5:
        missing = here - {m.id for m in chat.messages(view="window")}
        assert not missing, f"{missing} not in the window of {number}"
    else:
        hits = chat.search(text(own_id).split()[0], k=5000)  # the first, unless too many wait to be embedded
        assert own_id in {h.entry.id for h in hits}, f"{own_id} is not found"


def start(folder, own, **options):
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            work(folder, own, **options)
        except BaseException:
            Path(f"{folder}.broken.{own}").write_text(traceback.format_exc())
            code = 7
        finally:
            os._exit(code)
    return pid


def together(folder, *, workers, turns, kills, seed=1, pause=0.0):
    """Let them work; half of them are killed so many times each. Who was killed, and how each has ended."""
    rng = random.Random(seed)
    options = {"workers": workers, "turns": turns, "seed": seed, "pause": pause}
    running = {start(folder, own, **options): own for own in range(workers)}
    doomed = rng.sample(range(workers), workers // 2)
    # After so many turns acknowledged: early enough that it is alive still when that is seen.
    due = {own: sorted(rng.sample(range(1, turns * 3 // 4), kills)) for own in doomed}
    killed = []
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            own = running.pop(pid)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                running[start(folder, own, **options)] = own
            elif status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                raise AssertionError(Path(f"{folder}.broken.{own}").read_text())
            continue
        for pid, own in running.items():
            if due.get(own) and len(acknowledged(folder, own)[0]) >= due[own][0]:
                due[own].pop(0)
                time.sleep(rng.uniform(0, 0.02))
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(0.002)
    return killed


def serve():
    warm(sys.argv[1])
    print("serving", flush=True)
    for line in sys.stdin:
        try:
            print(json.dumps({"killed": together(**json.loads(line))}), flush=True)
        except BaseException as error:
            print(json.dumps({"broken": str(error)}), flush=True)


if __name__ == "__main__":
    serve()
