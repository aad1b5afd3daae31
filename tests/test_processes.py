"""One process at a time, forks, and many threads in one process."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
from conftest import in_threads, index_keys, live_keys

from neuralflow_memory import FolderInUse, ForkedError, Message, open_memory
from neuralflow_memory.testing import HashingEmbedder


def python(code, *arguments):
    """Run *code* in a new interpreter; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def forked(call):
    """Run *call* in a forked child; how the child ended: 0 when *call* returned."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
        except BaseException:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


HOLD = """
    import sys
    from neuralflow_memory import open_memory
    memory = open_memory(sys.argv[1], embedder="none")
    memory.session("chat").add("Hello")
    print("open", flush=True)
    sys.stdin.read()
"""
OPEN = """
    import sys
    from neuralflow_memory import FolderInUse, open_memory
    try:
        with open_memory(sys.argv[1], embedder="none") as memory:
            print(len(memory.session("chat").messages()))
    except FolderInUse as error:
        print(error.pid, str(error.pid) in str(error), "close it" in str(error))
"""


def test_a_second_process_is_told_who_has_the_folder(memory, folder):
    """FolderInUse names the pid; after close the folder is free."""
    memory.session("chat").add("Hello")
    assert python(OPEN, folder) == f"{os.getpid()} True True"
    memory.close()
    assert python(OPEN, folder) == "1"


def test_this_process_is_told_too(folder):
    """The folder of another process can't be opened here; its death frees it."""
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(HOLD),
            str(folder),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(FolderInUse) as error:
            open_memory(folder, embedder="none")
        assert error.value.pid == other.pid
        other.kill()
    with open_memory(folder, embedder="none") as memory:
        assert len(memory.session("chat").messages()) == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_told_to_open_its_own(memory, chat, folder):
    """Every first call raises ForkedError; the parent goes on."""
    chat.add("Hello")
    memory.flush()

    def child():
        for call in (chat.messages, lambda: chat.add("x"), memory.flush, memory.stats, lambda: memory.session("y")):
            with pytest.raises(ForkedError, match="open_memory"):
                call()
        with pytest.raises(FolderInUse) as error:
            open_memory(folder, embedder="none")
        assert error.value.pid == os.getppid()
        memory.close()

    assert forked(child) == 0
    chat.add("Still here")
    memory.flush()
    assert len(chat.messages()) == 2
    assert index_keys(memory) == live_keys(memory)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_can_open_another_folder(memory, tmp_path):
    """Only the parent's memory is out of reach."""

    def child():
        with open_memory(tmp_path / "childs", embedder=HashingEmbedder()) as own:
            own.session("chat").add("Hello")
            own.flush()

    assert forked(child) == 0
    with open_memory(tmp_path / "childs", embedder="none") as own:
        assert len(own.session("chat").messages()) == 1


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
