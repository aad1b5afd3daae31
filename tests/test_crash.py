"""Nothing acknowledged is lost: a process is killed at every dangerous place and at random ones, over and over."""

import json
import random
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import crash_child
import pytest

from neuralflow_memory import Message
from neuralflow_memory._failpoints import FAILPOINTS
from neuralflow_memory.testing import ManualClock

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

    def kill(self, folder, seed=0, **when):
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
        partition, missed = parts.ledger.partition(chat.scope), []
        for turn in chat.messages(last=5):
            nearest = parts.store.query(parts.embedder.embed_query(turn.content), partition=partition, k=3)
            if chat.entries.get(turn.id).key not in dict(nearest):
                missed.append(turn.content)
        # HNSW is approximate: of 400 small collections with deleted rows, one did not lead to a row that it held.
        assert len(missed) <= 1, f"Chroma's own index doesn't find {missed}"
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
    """200 kills, many in a row on one folder, while it opens, indexes, folds, adds, updates, deletes and pins."""
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


def left_by_an_act(folder, act, expected):
    """Open what a kill during *act* left: as *expected*, and the work goes on with the next turn."""
    assert crash_child.state(folder) == expected
    clock = ManualClock(datetime(2026, 1, 1, 12, tzinfo=UTC))
    with crash_child.scene(folder, clock) as memory:
        assert crash_child.state(folder) == expected
        chat = memory.session("chat", user_id="ada")
        turns = chat.entries.list(types=["short_term"], within="session")
        known = crash_child.Truth(
            live={e.id: e.content for e in turns},
            gone=[f"Word{own} " for own in ("t1", "t7", "t13") if own not in {e.id for e in turns}],
            pinned={e.id for e in turns if e.pinned},
            returned={"t1"} if "pin" in act else set(),
        )
        if "Redacted" in known.live.values():
            known.gone.append("Wordt1")
        assert known.pinned <= known.returned
        assert [e.id for e in turns if e.position is not None] == [m.id for m in chat.messages(view="window")]
        crash_child.check_window(chat, known)
        memory.flush()
        assert crash_child.state(folder) == expected  # reading changes nothing
        chat.add(Message("user", "Wordu9 of nothing", id="u9"))
        known.live["u9"] = "Wordu9 of nothing"
        memory.flush()
        crash_child.check_window(chat, known)
        crash_child.check_work_done(chat)
        assert memory.stats()["last_error"] is None


@pytest.mark.parametrize("act", crash_child.ACTS)
def test_a_kill_leaves_the_old_window_or_the_new_one(servers, tmp_path, act):
    """At whatever place: what is committed is exactly what an undisturbed run had committed there, and is resumed."""
    whole = tmp_path / "whole"
    assert servers[0].kill(whole, act=act) == 0
    states = json.loads(Path(f"{whole}.states").read_text())
    assert len({json.dumps(s) for _, s in states}) > 1
    assert {name.partition(".")[0] for name, _ in states} & {"fold", "change"}
    folders = [tmp_path / str(at) for at in range(1, len(states) - 1)]
    jobs = [lambda server, f=f: server.kill(f, act=act, at=int(f.name)) for f in folders]
    assert in_parallel(servers, jobs) == [signal.SIGKILL] * len(jobs)
    for folder in folders:
        left_by_an_act(folder, act, states[int(folder.name)][1])


def test_the_check_itself_sees_a_loss(tmp_path):
    """A turn that the journal acknowledged and the ledger lacks is noticed, so the checks above can fail."""
    folder: Path = tmp_path / "memory"
    crash_child.note(folder, "begin", "add", [("a", "worda of sailing")])
    crash_child.note(folder, "done")
    with crash_child.opened(folder) as memory, pytest.raises(AssertionError, match="transcript"):
        crash_child.check(memory, folder)
