"""Nothing acknowledged is lost: a process is killed at every dangerous place and at random ones, over and over."""

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import crash_child
import pytest

from neuralflow_memory._failpoints import FAILPOINTS

RANDOM_KILLS = 200
FOLDERS = 8  # each is killed many times in a row
PASSINGS = (1, 4)


class Server:
    """A process that has imported everything and forks the ones to be killed."""

    def __init__(self, scratch):
        self.process = subprocess.Popen(
            [sys.executable, crash_child.__file__, str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.line() == "serving"

    def line(self):
        return self.process.stdout.readline().strip()

    def kill(self, folder, seed, **when):
        """Run a child until it is killed (see crash_child); anything but SIGKILL is what went wrong."""
        self.process.stdin.write(json.dumps({"folder": str(folder), "seed": seed, **when}) + "\n")
        number, said = json.loads(self.line())
        return said if "broken" in said or "missed" in said else number

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    found = [Server(tmp_path_factory.mktemp("warm") / "memory") for _ in range(2)]
    yield found
    for server in found:
        server.close()


def in_parallel(servers, jobs):
    """Run jobs (each takes a server) on both servers; the results, in order."""
    results = [None] * len(jobs)

    def run(server, own):
        for n in own:
            results[n] = jobs[n](server)

    threads = [threading.Thread(target=run, args=(s, range(i, len(jobs), len(servers)))) for i, s in enumerate(servers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results


def acknowledged(folder):
    """Turns that were acknowledged, ever."""
    return len(crash_child.truth(folder).seq)


def verified(folder):
    """Open what is left, in this process, and check all of it."""
    with crash_child.opened(folder) as memory:
        known = crash_child.check(memory, folder)
        assert memory.stats(verify=True)["integrity"] == "ok"
        parts, chat = memory._core.parts, memory.session("chat", user_id="ada")
        for turn in chat.messages(last=5):
            nearest = parts.store.query(
                parts.embedder.embed_query(turn.content), partition=parts.ledger.partition(chat.scope), k=3
            )
            assert chat.entries.get(turn.id).key in dict(nearest), "Chroma's own index doesn't find it"
    return known


def test_a_kill_at_every_failpoint_loses_nothing_acknowledged(servers, tmp_path, capsys):
    """Whatever step of writing, indexing, folding or changing is cut short, the next open finds all of it or none."""

    def job(n, name):
        folder = tmp_path / str(n)
        # The migration is passed once an open; the others are met while there is something to lose.
        passings = (1, 1) if name == "open.migrated" else PASSINGS
        return lambda server: [server.kill(folder, 10 * n + i, at=(name, p)) for i, p in enumerate(passings)]

    ends = in_parallel(servers, [job(n, name) for n, name in enumerate(FAILPOINTS)])
    assert dict(zip(FAILPOINTS, ends, strict=True)) == dict.fromkeys(FAILPOINTS, [signal.SIGKILL] * len(PASSINGS))
    total = sum(len(verified(tmp_path / str(n)).seq) for n in range(len(FAILPOINTS)))
    kills = len(FAILPOINTS) * len(PASSINGS)
    with capsys.disabled():
        print(f"\n  failpoints: {len(FAILPOINTS)} places, {kills} kills, {total} turns acknowledged, 0 lost")


def test_kills_at_random_instants_lose_nothing_acknowledged(servers, tmp_path, capsys):
    """200 kills, many in a row on one folder, while it opens, indexes, folds, adds, updates and deletes."""
    rng = random.Random(20261120)

    def job(n):
        folder = tmp_path / str(n)
        plan = []
        for i in range(RANDOM_KILLS // FOLDERS):
            opening = i % 4 == 3
            plan.append(
                {"seed": 1000 * n + i, "ready": not opening, "after": rng.uniform(0, 0.06 if opening else 0.25)}
            )
        return lambda server: [server.kill(folder, **run) for run in plan]

    ends = in_parallel(servers, [job(n) for n in range(FOLDERS)])
    assert [e for own in ends for e in own] == [signal.SIGKILL] * RANDOM_KILLS
    known = [verified(tmp_path / str(n)) for n in range(FOLDERS)]
    total = sum(len(k.seq) for k in known)
    with capsys.disabled():
        deleted = total - sum(len(k.live) for k in known)
        print(f"\n  random: {RANDOM_KILLS} kills, {total} turns acknowledged, {deleted} deleted, 0 lost, 0 came back")
    assert total > RANDOM_KILLS


def test_the_check_itself_sees_a_loss(tmp_path):
    """A turn that the journal acknowledged and the ledger lacks is noticed, so the checks above can fail."""
    folder: Path = tmp_path / "memory"
    crash_child.note(folder, "begin", "add", [("a", "worda of sailing")])
    crash_child.note(folder, "done")
    with crash_child.opened(folder) as memory, pytest.raises(AssertionError, match="transcript"):
        crash_child.check(memory, folder)
