"""Many processes change one session's state, some of them killed on the way: every change is a version, and none is half.

Run as a script, this file imports everything, then, for each line on its standard input (JSON: the options of `together`),
forks processes that change the state, kills some of them at random and starts them again, and prints how many it has killed.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import settings

from neuralflow_memory import Message, open_memory

NIGHTLY = settings.get_current_profile_name() == "nightly"
PROCESSES, UPDATES = 8, 500
OPTIONS = {"embedder": "none", "tokenizer": "approx"}


def opened(folder, max_states):
    return open_memory(folder, state={"max_states": max_states}, **OPTIONS)


def work(folder, own, *, updates, max_states, kind):
    """Begin where a process of this number was killed, if one was; say what was acknowledged."""
    with opened(folder, max_states) as memory, Path(f"{folder}.{own}").open("a") as journal:
        chat = memory.session("chat", user_id="ada", agent_id=own)
        begun = chat.state.get().fields.get(own, 0)  # what was committed, perhaps without having been acknowledged
        for n in range(begun + 1, updates + 1):
            if kind == "turn":
                chat.add(Message("user", f"Turn {n} of {own}", id=f"{own}-{n}"), state={own: n})
            elif kind == "count":
                chat.state.change(lambda f, n=n: {**f, own: n, "all": f.get("all", 0) + 1})
            else:
                chat.state.update({own: n}, why=f"{own}-{n}")
            journal.write(f"{n}\n")
            journal.flush()


def start(folder, own, **options):
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            work(folder, f"p{own}", **options)
        except BaseException:
            Path(f"{folder}.broken").write_text(traceback.format_exc())
            code = 7
        finally:
            os._exit(code)
    return pid


def together(folder, *, processes, kills=0, seed=1, **options):
    """Let them work; some are killed, and started again. How many were, and how long it took."""
    rng = random.Random(seed)
    began = time.monotonic()
    running = {start(folder, own, **options): own for own in range(processes)}
    killed, due = 0, time.monotonic() + rng.uniform(0.0, 0.1)
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            own = running.pop(pid)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                killed += 1
                running[start(folder, own, **options)] = own
            elif status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                raise AssertionError(Path(f"{folder}.broken").read_text())
        elif kills and time.monotonic() > due:
            os.kill(rng.choice(list(running)), signal.SIGKILL)  # it was not waited for yet, so the number is its own
            kills, due = kills - 1, time.monotonic() + rng.uniform(0.0, 0.1)
        time.sleep(0.001)
    return killed, time.monotonic() - began


@pytest.fixture(scope="module")
def run():
    """`together`, in a process that has no threads to be forked with."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:

        def ask(folder, **options):
            server.stdin.write(json.dumps({"folder": str(folder), **options}) + "\n")
            server.stdin.flush()
            found = json.loads(server.stdout.readline())
            assert isinstance(found, list), found
            return found

        yield ask
        server.stdin.close()


def acknowledged(folder, own):
    return [int(line) for line in Path(f"{folder}.p{own}").read_text().split("\n") if line]


def checked(folder, *, processes, updates, max_states):
    """The history: as many as there were changes, or the newest of them; no gap, no half state, nothing unsaid."""
    with opened(folder, max_states) as memory:
        assert memory.stats(verify=True)["integrity"] == "ok"
        chat = memory.session("chat", user_id="ada")
        history, state = chat.state.history(), chat.state.get()
    total = processes * updates
    assert state.version == total
    assert [v.version for v in history] == list(range(max(1, total - max_states + 1), total + 1))
    assert {own: n for own, n in state.fields.items() if own != "all"} == {
        f"p{own}": updates for own in range(processes)
    }
    for own in range(processes):
        said = acknowledged(folder, own)
        assert len(said) == len(set(said)), "a change was made twice"
    for before, after in itertools.pairwise(history):
        own = after.agent_id
        changed = {k for k in after.fields if after.fields[k] != before.fields.get(k)} - {"all"}
        assert changed == {own}, "a version with more or less than one change"
        assert after.fields[own] == before.fields.get(own, 0) + 1, "an update was lost"
    return history, state


@pytest.mark.timeout(540)
@pytest.mark.parametrize("max_states", [5000, 100])
def test_many_processes_change_one_state(run, tmp_path, max_states, capsys):
    """All of their changes are in the history, at the default the newest 100; the version counts them all."""
    size = {"processes": PROCESSES, "updates": UPDATES if NIGHTLY else 40, "max_states": max_states}
    _, took = run(tmp_path / "memory", kind="update", **size)
    history, state = checked(tmp_path / "memory", **size)
    assert len(history) == min(max_states, state.version)
    with capsys.disabled():
        print(f"\n  {PROCESSES} processes, {state.version} versions, {len(history)} kept, in {took:.1f} s", end="")


@pytest.mark.timeout(540)
@pytest.mark.parametrize("kind", ["update", "count", "turn"])
def test_killed_processes_leave_no_half_state(run, tmp_path, kind, capsys):
    """Those that are started again go on; counted together, the changes are as many as the versions."""
    size = {"processes": PROCESSES if NIGHTLY else 4, "updates": UPDATES if NIGHTLY else 150, "max_states": 5000}
    killed, _ = run(tmp_path / "memory", kind=kind, kills=60 if NIGHTLY else 8, **size)
    assert killed > 0
    history, state = checked(tmp_path / "memory", **size)
    with capsys.disabled():
        print(f"\n  {kind}: {killed} kills, {state.version} versions, 0 lost, 0 half", end="")
    if kind == "count":
        assert [v.fields["all"] for v in history] == list(range(1, state.version + 1))
    if kind == "turn":
        with opened(tmp_path / "memory", 5000) as memory:
            chat = memory.session("chat", user_id="ada")
            assert [v.turn for v in history] == [m.id for m in chat.messages()]


def serve():
    from crash_child import warm

    with tempfile.TemporaryDirectory() as scratch:
        warm(f"{scratch}/memory")
    for line in sys.stdin:
        try:
            print(json.dumps(together(**json.loads(line))), flush=True)
        except BaseException as error:
            print(json.dumps(str(error)), flush=True)


if __name__ == "__main__":
    serve()
