"""How a process gets at a folder: beside others, after forks, on which file systems; and many threads in one process."""

import faulthandler
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from conftest import in_threads, index_keys, live_keys

from neuralflow_memory import ClosedError, FolderError, FolderInUse, ForkedError, Message, open_memory
from neuralflow_memory.storage.ledger import schema
from neuralflow_memory.storage.lock import FolderLocks, network_file_system
from neuralflow_memory.testing import HashingEmbedder


def python(code, *arguments):
    """Run *code* in a new interpreter; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def forked(call):
    """Run *call* in a forked child; how the child ended: 0 when *call* returned."""
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(60, exit=True)  # a child that hangs says where
        try:
            call()
        except BaseException:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


OPEN = """
    import sys
    from neuralflow_memory import open_memory
    with open_memory(sys.argv[1], embedder="none") as memory:
        print(len(memory.session("chat").messages()))
"""
OLDER = """
    import fcntl, os, sys
    lock = open(sys.argv[1] + "/lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    print(os.getpid(), file=lock, flush=True)
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_opens_the_folder_too(memory, folder):
    """While the first has it open, and afterwards."""
    memory.session("chat").add("Hello")
    assert python(OPEN, folder) == "1"
    memory.close()
    assert python(OPEN, folder) == "1"


def test_a_process_of_an_older_version_keeps_the_folder_for_itself(opened, folder, monkeypatch):
    """It locks the folder and knows nothing of others: FolderInUse names it, and its death frees the folder."""
    monkeypatch.setattr("neuralflow_memory.storage.lock._LEAVING", 0.1)
    opened().close()
    told = [sys.executable, "-c", textwrap.dedent(OLDER), str(folder)]
    other = subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(FolderInUse, match="older version") as error:
            opened()
        assert error.value.pid == other.pid
        other.kill()
    opened().session("chat").add("Hello")


@pytest.mark.parametrize("what", ["tables", "words"])
def test_nothing_is_changed_under_the_feet_of_others(opened, folder, what):
    """Tables and full text of another version are brought up to date by a process that is alone, or not at all."""
    with opened() as memory:
        memory.session("chat").add("Hello")
        ledger = memory._core.parts.ledger._db
        with ledger.lock, ledger.write() as db:
            if what == "tables":
                db.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) - 1}")
            else:
                db.execute("UPDATE meta SET value = 'other rules' WHERE name = 'lexical'")
        told = [sys.executable, "-c", textwrap.dedent(OPEN), str(folder)]
        done = subprocess.run(told, capture_output=True, text=True, timeout=60)
        assert "FolderInUse" in done.stderr
        assert "close it there first" in done.stderr
        if what == "tables":
            with ledger.lock, ledger.write() as db:
                db.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS)}")
    assert python(OPEN, folder) == "1"


@pytest.mark.parametrize("moment", ["opening", "open"])
def test_who_opens_waits_for_who_is_just_opening(folder, moment, monkeypatch):
    """Not for ever: FolderInUse says who does not come to an end."""
    monkeypatch.setattr("neuralflow_memory.storage.lock._OPENING", 0.2)
    folder.mkdir()
    first = FolderLocks(folder)
    assert first.alone
    if moment == "open":
        first.settled()
        second = FolderLocks(folder)
        assert not second.alone
        assert not second.index.take()
        first.release()
        assert second.index.take()
        second.release()
    else:
        with pytest.raises(FolderInUse, match="opening it") as error:
            FolderLocks(folder)
        assert error.value.pid == os.getpid()
        first.release()
        assert not (folder / "open").exists()


def test_one_at_a_time_is_in_a_block_of_one_name(folder):
    """Others wait for it, and leave nothing behind; waiting ends when nobody wants to any more."""
    folder.mkdir()
    locks = FolderLocks(folder)
    inside, most = [], []

    def enter():
        for _ in range(50):
            with locks.hold("fold-1", given_up=lambda: False):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    in_threads(*[enter] * 4)
    assert (max(most), len(most)) == (1, 200)
    with locks.hold("fold-1", given_up=lambda: False), locks.hold("fold-2", given_up=lambda: False):
        with pytest.raises(ClosedError):
            with locks.hold("fold-1", given_up=lambda: True):
                pass
    assert {p.name for p in folder.iterdir()} == {"lock", "open"}
    locks.release()


MOUNTS = """\
22 1 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 27 0:40 / /home rw,relatime shared:5 master:2 - nfs4 server:/home rw,vers=4.2
32 31 0:41 / /home/ada/local rw - xfs /dev/vdb rw
33 27 0:42 / /mnt/my\\040share rw - cifs //server/share rw
34 27 0:43 / /mnt/c rw - 9p drvfs rw
35 27 0:44 / /mnt/ssh rw - fuse.sshfs ada@server: rw
36 27 0:45 / /mnt/twice rw - nfs server:/twice rw
37 27 0:46 / /mnt/twice rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/data/memory", None),
        ("/home/ada/memory", "nfs4"),
        ("/home/ada/local/memory", None),
        ("/home/ada/localized", "nfs4"),
        ("/mnt/my share/memory", "cifs"),
        ("/mnt/c/memory", "9p"),
        ("/mnt/ssh", "fuse.sshfs"),
        ("/mnt/twice/memory", None),
    ],
)
def test_a_network_file_system_is_known_by_its_mount(folder, kind):
    """The nearest mount point counts, of several at one place the last."""
    assert network_file_system(Path(folder), MOUNTS) == kind


def test_a_folder_on_a_network_file_system_is_refused(folder, tmp_path, monkeypatch):
    """FolderError says why, and nothing is left there."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS + f"38 27 0:47 / {folder.parent} rw - nfs server:/ rw\n")
    monkeypatch.setattr("neuralflow_memory.storage.lock._MOUNTS", mounts)
    with pytest.raises(FolderError, match=r"network file system \(nfs\).*disk of this machine"):
        open_memory(folder, embedder="none")
    assert list(folder.iterdir()) == []
    monkeypatch.setattr("neuralflow_memory.storage.lock._MOUNTS", tmp_path / "none")
    open_memory(folder, embedder="none").close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_told_to_open_its_own(memory, chat, folder):
    """Every first call raises ForkedError; the parent goes on."""
    chat.add("Hello")
    memory.flush()

    def child():
        for call in (chat.messages, lambda: chat.add("x"), memory.flush, memory.stats, lambda: memory.session("y")):
            with pytest.raises(ForkedError, match="open_memory"):
                call()
        with pytest.raises(ForkedError, match="post_fork"):
            open_memory(folder, embedder="none")
        memory.close()

    assert forked(child) == 0
    chat.add("Still here")
    memory.flush()
    assert len(chat.messages()) == 2
    assert index_keys(memory) == live_keys(memory)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_can_open_another_folder_without_chroma(memory, tmp_path):
    """Whose threads did not come with it: with an embedder it is told to be started otherwise, rather than to hang."""

    def child():
        with pytest.raises(ForkedError, match="spawn"):
            open_memory(tmp_path / "childs", embedder=HashingEmbedder())
        with open_memory(tmp_path / "childs", embedder="none") as own:
            own.session("chat").add("Hello")
            own.flush()

    assert forked(child) == 0
    with open_memory(tmp_path / "childs", embedder=HashingEmbedder()) as own:
        own.flush()
        assert len(own.session("chat").messages()) == len(index_keys(own)) == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_forks_while_nobody_is_inside_sqlite(opened, tmp_path):
    """Whose locks would stay locked in the child, which could open nothing."""
    memory = opened(embedder="none")
    over, busy = threading.Event(), []

    def work(user):
        chat = memory.session("chat", user_id=user)
        while not over.is_set():
            chat.add("Hello there")
            chat.messages(last=3)
            busy.append(chat.search("hello"))

    def child(n):
        with open_memory(tmp_path / f"child{n}", embedder="none") as own:
            own.session("chat").add("Hello")

    threads = [threading.Thread(target=work, args=(user,)) for user in ("ada", "bob", "eve")]
    for thread in threads:
        thread.start()
    try:
        assert [forked(lambda n=n: child(n)) for n in range(25)] == [0] * 25
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(busy) > 25


def serve(folder, own):
    """What a worker of a server does."""
    with open_memory(folder, embedder=HashingEmbedder()) as memory:
        chat = memory.session("chat", user_id="ada")
        for n in range(5):
            chat.add(f"Worker {own} turn {n}")
            assert f"Worker {own} turn {n}" in [m.content for m in chat.messages(view="window")]
        memory.flush()


def is_whole(folder, workers):
    with open_memory(folder, embedder=HashingEmbedder()) as memory:
        chat = memory.session("chat", user_id="ada")
        memory.flush()
        said = Counter(m.content for m in chat.messages())
        assert said == {f"Worker {own} turn {n}": 1 for own in range(workers) for n in range(5)}
        assert index_keys(memory) == live_keys(memory)


@pytest.mark.parametrize("before", ["pass", "open_memory(sys.argv[1], embedder='none').close()"])
def test_forked_workers_open_their_own(folder, before):
    """As gunicorn with preload and Celery do: the application is imported, then forked, then opened in each worker."""
    code = f"""
        import os, sys
        from neuralflow_memory import open_memory
        from test_processes import serve
        {before}
        pids = []
        for own in range(3):
            pids.append(os.fork())
            if pids[-1] == 0:
                serve(sys.argv[1], own)
                sys.exit(0)
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    """
    assert python(code, folder) == "[0, 0, 0]"
    is_whole(folder, 3)


def test_multiprocessing_by_spawn_needs_no_care(memory, folder):
    """The parent may have the folder open."""
    code = """
        import multiprocessing, sys
        from test_processes import serve
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            running = [context.Process(target=serve, args=(sys.argv[1], own)) for own in range(2)]
            for process in running:
                process.start()
            for process in running:
                process.join()
            print([process.exitcode for process in running])
    """
    script = folder.parent / "application.py"
    script.write_text(textwrap.dedent(code))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.strip() == "[0, 0]", done.stderr
    memory.close()
    is_whole(folder, 2)


DOCUMENTED = {
    "multiprocessing": ("", "begin('./memory'); print(len(memory.session('chat').messages()))"),
    "celery": (
        """
        import os, sys, types
        signals = types.ModuleType("celery.signals")
        class Signal(list):
            def connect(self, handler):
                self.append(handler)
                return handler
        signals.worker_process_init, signals.worker_process_shutdown = Signal(), Signal()
        sys.modules["celery"], sys.modules["celery.signals"] = types.ModuleType("celery"), signals
        """,
        """
        for own in range(3):
            if os.fork() == 0:
                signals.worker_process_init[0](sender=None)
                memory.session("chat").add(f"Turn {own}")
                signals.worker_process_shutdown[0](sender=None)
                sys.exit(0)
        assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
        print(len(open_memory("./memory").session("chat").messages()))
        """,
    ),
    "post_fork": (
        """
        import os, sys, types
        application = sys.modules["application"] = types.ModuleType("application")
        from neuralflow_memory import open_memory  # --preload: all is imported in the parent
        """,
        """
        for own in range(3):
            if os.fork() == 0:
                post_fork(None, None)
                application.memory.session("chat").add(f"Turn {own}")
                worker_exit(None, None)
                sys.exit(0)
        assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
        print(len(open_memory("./memory").session("chat").messages()))
        """,
    ),
}


@pytest.mark.parametrize("what", DOCUMENTED)
def test_the_documented_lines_work(tmp_path, what):
    """What docs/processes.md says of servers and pools, as their processes run it."""
    page = (Path(__file__).parent.parent / "docs" / "processes.md").read_text()
    (code,) = [c for c in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if what in c]
    before, after = map(textwrap.dedent, DOCUMENTED[what])
    script = tmp_path / "application.py"
    script.write_text(f"{before}\n{code}\n{after}")
    env = {**os.environ, "NEURALFLOW_EMBEDDER__MODEL": "none"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "3", done.stderr


def test_multiprocessing_by_fork_opens_in_the_child(folder):
    """A pool's initializer opens the memory once in each child, and its tasks use it."""
    code = """
        import multiprocessing, sys
        from neuralflow_memory import open_memory
        memory = None
        def begin(folder):
            global memory
            memory = open_memory(folder, embedder="none")
        def add(n):
            return len(memory.session("chat").add(f"Turn {n}"))
        if __name__ == "__main__":
            with multiprocessing.get_context("fork").Pool(3, initializer=begin, initargs=(sys.argv[1],)) as pool:
                print(sum(pool.map(add, range(30), chunksize=1)))
            begin(sys.argv[1])
            print(len(memory.session("chat").messages()))
    """
    assert python(code, folder) == "30\n30"


def test_a_child_that_ends_takes_nothing_with_it(folder):
    """A forked child that outlives its parent closes none of its files: what somebody else has written since stays."""
    code = """
        import os, subprocess, sys
        from neuralflow_memory import open_memory
        AFTER = "import os, sys; from neuralflow_memory import open_memory; " \\
            "open_memory(sys.argv[1], embedder='none').session('chat').add('Two'); os.kill(os.getpid(), 9)"
        memory = open_memory(sys.argv[1], embedder="none")
        memory.session("chat").add("One")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            database = memory._core.parts.ledger._db
            database._writer = database._watcher = None  # what the end of an interpreter may do, or not, in any order
            database._readers.clear()
            sys.exit(0)
        os.close(read)
        memory.close()
        subprocess.run([sys.executable, "-c", AFTER, sys.argv[1]])
        os.close(write)
        os.waitpid(child, 0)
        with open_memory(sys.argv[1], embedder="none") as memory:
            print([m.content for m in memory.session("chat").messages()])
    """
    assert python(code, folder) == "['One', 'Two']"


@pytest.mark.parametrize("order", list(permutations(["open", "use", "again"])))
def test_cells_of_a_notebook_may_run_in_any_order(folder, order):
    """Each opens the memory as it needs it; none closes it for another one, and all see the same."""
    cells = {
        "open": "memory = open_memory(folder, embedder=embedder)",
        "use": "chat = open_memory(folder, embedder=embedder).session('chat'); chat.add('Hello'); chat.search('Hello')",
        "again": "with open_memory(folder, embedder=embedder) as memory: n = len(memory.session('chat').messages())",
    }
    space = {"open_memory": open_memory, "folder": folder, "embedder": HashingEmbedder()}
    for name in order * 3:
        exec(cells[name], space)
    with open_memory(folder, embedder=space["embedder"]) as memory:
        assert len(memory.session("chat").messages()) == 3
        memory._core.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_that_lives_on_does_not_keep_the_folder_locked(memory, folder):
    """The lock is the parent's: when the parent closes, the folder is free, whatever children it has."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    try:
        memory.session("chat").add("Hello")
        memory.close()
        with open_memory(folder, embedder="none") as again:
            assert len(again.session("chat").messages()) == 1
        assert python(OPEN, folder) == "1"
    finally:
        os.close(write)
        os.waitpid(pid, 0)


def test_a_killed_parent_frees_the_folder_though_its_child_lives(folder):
    """A server's forked workers do not keep a dead process's lock."""
    code = """
        import os, signal, sys
        from neuralflow_memory import open_memory
        memory = open_memory(sys.argv[1], embedder="none")
        memory.session("chat").add("Hello")
        child = os.fork()
        if child == 0:
            print(os.getpid(), flush=True)
            os.close(1)
            signal.pause()
        signal.pause()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        child = int(parent.stdout.readline())
        parent.kill()
    try:
        with open_memory(folder, embedder="none") as memory:
            assert len(memory.session("chat").messages()) == 1
    finally:
        os.kill(child, 9)


def test_a_child_that_ends_leaves_its_parents_scratch_folder_alone():
    """ ":memory:" belongs to the process that opened it."""
    code = """
        import os, sys
        from neuralflow_memory import open_memory
        memory = open_memory(":memory:", embedder="none")
        memory.session("chat").add("Hello")
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
        print(memory.path.exists(), len(memory.session("chat").messages()))
        path = memory.path
        memory.close()
        print(path.exists())
    """
    assert python(code) == "True 1\nFalse"


def test_a_forked_child_exits_cleanly(folder):
    """Its interpreter ends as any other, without a word, and without waiting for its parent's threads."""
    code = """
        import os, sys
        from neuralflow_memory import ForkedError, open_memory
        from neuralflow_memory.testing import HashingEmbedder
        memory = open_memory(sys.argv[1], embedder=HashingEmbedder())
        memory.session("chat").add("Hello")
        memory.flush()
        pid = os.fork()
        if pid == 0:
            try:
                memory.session("chat")
            except ForkedError:
                sys.exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        memory.session("chat").add("Still here")
        memory.flush()
        print(memory.stats()["chroma"])
    """
    assert python(code, folder) == "3\n2"


def test_a_process_that_forgets_to_close_loses_nothing(folder):
    """Leaving the interpreter closes what is open, without a word."""
    code = """
        import sys
        from neuralflow_memory import open_memory
        from neuralflow_memory.testing import HashingEmbedder
        memory = open_memory(sys.argv[1], embedder=HashingEmbedder(), pruning={"max_context_items": 2,
                             "summarization_threshold": 4})
        memory.session("chat").add([f"Turn {n}" for n in range(300)])
    """
    assert python(code, folder) == ""
    with open_memory(folder, embedder=HashingEmbedder()) as memory:
        memory.flush()
        assert len(memory.session("chat").messages()) == 300


def test_many_threads_write_and_read_one_memory(opened):
    """8 writers and 4 readers, 800 messages: each is there once, every writer's own in its order, seq without a gap."""
    memory = opened(pruning={"max_context_items": 10, "summarization_threshold": 20})
    done = threading.Event()
    left = [8]
    lock = threading.Lock()

    def write(own):
        shared = memory.session("shared", user_id="ada")
        mine = memory.session(f"own-{own}", user_id="ada" if own % 2 else None)
        for n in range(50):
            shared.add(Message("user", f"Writer {own} turn {n} sailing", id=f"{own}-{n}"))
            mine.add(f"Private {own} turn {n}")
        with lock:
            left[0] -= 1
            if not left[0]:
                done.set()

    def read():
        chat = memory.session("shared", user_id="ada")
        while not done.is_set():
            context = chat.context(max_tokens=800)
            assert context.tokens <= 800
            seen = [m.id for m in chat.messages()]
            assert len(set(seen)) == len(seen)
            assert all("Private 0" not in h.entry.content for h in chat.search("sailing"))

    in_threads(*[lambda own=own: write(own) for own in range(8)], *[read] * 4)
    memory.flush()
    chat = memory.session("shared", user_id="ada")
    turns = chat.entries.list(types=["short_term"], within="session")
    assert [e.seq for e in turns] == list(range(1, 401))
    for own in range(8):
        assert [e.id for e in turns if e.id.startswith(f"{own}-")] == [f"{own}-{n}" for n in range(50)]
        mine = memory.session(f"own-{own}", user_id="ada" if own % 2 else None)
        assert [m.content for m in mine.messages()] == [f"Private {own} turn {n}" for n in range(50)]
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats(verify=True)["integrity"] == "ok"
