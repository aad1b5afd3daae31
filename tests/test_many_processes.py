"""Several processes on one folder: all write and search, one indexes, and nothing is lost or done twice when some are killed."""

import json
import os
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter

import many_processes_child as child
import pytest
from chroma_server import ChromaServer
from conftest import CountingEmbedder, index_keys, live_keys, texts, wait_until

from neuralflow_memory import FolderInUse, IndexingError, Message, ModelMismatch, open_memory
from neuralflow_memory.testing import HashingEmbedder


class Other:
    """Another process that has the folder open, and does what it is told: expressions, by lines."""

    CODE = """
        import sys, time
        from neuralflow_memory import Message, open_memory
        from neuralflow_memory.testing import HashingEmbedder
        import many_processes_child as child
        {before}
        memory = open_memory(sys.argv[1], **dict({options}))
        chat = memory.session("chat", user_id="ada")
        print("open", flush=True)
        for line in sys.stdin:
            print(repr(eval(line)), flush=True)
        memory.close()
    """

    def __init__(self, folder, options="embedder=HashingEmbedder()", before=""):
        code = textwrap.dedent(self.CODE.format(options=options, before=before))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.path.dirname(child.__file__)},
        )
        assert self.process.stdout.readline() == "open\n"

    @property
    def pid(self):
        return self.process.pid

    def tell(self, expression):
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def said(self):
        return eval(self.process.stdout.readline())

    def ask(self, expression):
        self.tell(expression)
        return self.said()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def others():
    made = []

    def start(*arguments, **options):
        made.append(Other(*arguments, **options))
        return made[-1]

    yield start
    for other in made:
        other.close()


def test_two_processes_see_each_other_at_the_next_call(opened, others, folder):
    """Turns, windows, search by words and by meaning, edits, deletions, pins, summaries: both ways."""
    other = others(folder)
    memory = opened()
    chat = memory.session("chat", user_id="ada")
    assert memory.stats()["indexer"] == other.pid == other.ask("memory.stats()['indexer']")
    chat.add(Message("user", "My cat is called Tom", id="a"))
    assert other.ask("[m.content for m in chat.messages(view='window')]") == ["My cat is called Tom"]
    assert other.ask("[h.entry.content for h in chat.search('cat')]") == ["My cat is called Tom"]
    other.ask("chat.add(Message('user', 'The dog is Rex', id='b'))")
    assert texts(chat.messages(view="window")) == ["My cat is called Tom", "The dog is Rex"]
    hit = chat.search("dog")[0]
    assert (hit.entry.id, hit.signals["dense"] > 0) == ("b", True)
    other.ask("chat.entries.update('a', content='My cat is called Kitty').version")
    assert "Kitty" in chat.search("cat")[0].entry.content
    other.ask("chat.pin('b')")
    chat.messages(view="window")
    assert [e.pinned for e in memory._core.parts.window(chat.scope).entries] == [False, True]
    other.ask("chat.entries.delete('b')")
    assert texts(chat.messages(view="window")) == ["My cat is called Kitty"]
    assert [h.entry.id for h in chat.search("dog")] != ["b"]
    chat.clear()
    assert other.ask("chat.messages(view='window') + chat.search('cat')") == []
    task = chat.task("sail")
    task.start()
    assert other.ask("[t.name for t in chat.tasks()]") == ["sail"]


def test_a_process_without_the_lock_never_touches_chroma(opened, others, folder, monkeypatch):
    """It holds all vectors, though its share of the RAM is small, and waits for the other with flush()."""
    other = others(folder, "embedder=HashingEmbedder(), **child.OPTIONS")
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder, ram_mb=1, **child.OPTIONS)
    monkeypatch.setattr("neuralflow_memory.storage.chroma.ChromaStore.__init__", lambda *_, **__: pytest.fail("opened"))
    chat = memory.session("chat", user_id="ada")
    chat.add([f"Turn {n} about sailing" for n in range(1900)])
    memory.session("other", user_id="ada").add([f"Turn {n} about gliding" for n in range(1900)])
    memory.flush()
    assert memory._core.parts.store is None
    assert (memory.stats()["dirty"], memory.stats()["vectors"]) == (0, 3800)
    assert embedder.texts == []
    assert other.ask("memory.stats()['chroma']") == 3800
    assert chat.search("Turn 77")[0].signals["dense"] > 0
    index = memory._core.parts.resident(chat.scope).index
    assert index.holds_vectors
    assert index.nbytes > 1024 * 1024


def test_reindex_is_done_by_whom_the_index_is(opened, others, folder):
    """What is in Chroma and should not be, goes; nothing is embedded again."""
    other = others(folder)
    memory = opened(embedder=(embedder := CountingEmbedder()))
    chat = memory.session("chat", user_id="ada")
    chat.add(["One", "Two"])
    memory.flush()
    other.ask("memory._core.parts.store.upsert(['stray'], [[1.0] * 64], ['x'], [{'partition': 'p'}])")
    memory.reindex()
    assert set(other.ask("memory._core.parts.store.keys()")) == live_keys(memory)
    assert embedder.texts == []


@pytest.mark.parametrize("how", ["kill", "close"])
def test_another_takes_over_within_two_seconds(opened, others, folder, how):
    """What waits is indexed by who is left, and nothing that the first had embedded is embedded again."""
    other = others(folder, "embedder=HashingEmbedder(), **child.OPTIONS")
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder, **child.OPTIONS)
    chat = memory.session("chat", user_id="ada")
    other.ask("chat.add([f'Turn {n}' for n in range(100)])")
    other.ask("memory.flush()")
    start = time.monotonic()
    getattr(other, how)()
    gone = time.monotonic()
    chat.add("After")
    wait_until(lambda: memory._core.parts.store is not None)
    took = time.monotonic() - gone
    memory.flush()
    assert took < 10.0, (took, gone - start)
    assert memory.stats()["indexer"] == os.getpid()
    assert index_keys(memory) == live_keys(memory)
    assert len(index_keys(memory)) == 101
    assert embedder.texts == ["After"]


def test_several_processes_share_a_chroma_server(opened, others, folder, tmp_path):
    """One indexes for all; it is killed, then the server: what was written meanwhile is there in the end, embedded once."""
    server = ChromaServer(tmp_path / "server").start()
    try:
        options = f"embedder=child.Noting(sys.argv[1] + '.embedded'), chroma={{'url': '{server.url}'}}, **child.OPTIONS"
        first, second = others(folder, options), others(folder, options)
        memory = opened(embedder=child.Noting(f"{folder}.embedded"), chroma={"url": server.url}, **child.OPTIONS)
        chat = memory.session("chat", user_id="ada")
        assert memory.stats()["indexer"] == first.pid
        for n, process in enumerate((first, second)):
            process.ask(f"chat.add([f'Turn {{n}} of {n}' for n in range(40)])")
        memory.flush()
        assert index_keys_of(second) == live_keys(memory)
        assert len(chat.search("Turn 7", k=100)) == 80
        first.kill()
        server.kill()
        second.ask("chat.add([f'Turn {n} of 2' for n in range(40)])")
        chat.add([f"Turn {n} of 3" for n in range(40)])
        assert "of 2" in " ".join(h.entry.content for h in chat.search("Turn 7 of 2"))
        server.start()
        memory.flush()
        second.ask("memory.flush()")
        assert memory.stats()["indexer"] in (second.pid, os.getpid())
        assert index_keys(memory) == index_keys_of(second) == live_keys(memory)
        assert len(live_keys(memory)) == 160
        assert max(Counter(t for pid, t in child.embedded(folder) if pid != first.pid).values()) == 1
    finally:
        server.kill()


def test_who_follows_makes_no_collection(opened, others, folder, tmp_path, monkeypatch):
    """One that asks the server in the moment between the old collection and the new would make one that is nobody's."""
    monkeypatch.setattr("neuralflow_memory.core._REOPENING_PAUSE", 0.02)
    slow = (
        "from neuralflow_memory.storage.chroma import ChromaStore\n"
        "        real = ChromaStore._open\n"
        "        ChromaStore._open = lambda self, **more: (time.sleep(1.0 if 'model_id' in more else 0), real(self, **more))[1]"
    )
    server = ChromaServer(tmp_path / "server").start()
    try:
        other = others(folder, f"embedder=HashingEmbedder(), chroma={{'url': '{server.url}'}}", before=slow)
        memory = opened(embedder=HashingEmbedder(), chroma={"url": server.url})
        memory.session("chat", user_id="ada").add([f"Turn {n}" for n in range(10)])
        memory.flush()
        made = other.ask("str(memory._core.parts.store._collection.metadata['model_id'])")
        assert made == memory._core.parts.model_id
        assert index_keys_of(other) == live_keys(memory)
    finally:
        server.kill()


def index_keys_of(other):
    wait_until(lambda: other.ask("memory._core.parts.store.down") is None)  # it asks the server in the background
    return set(other.ask("memory._core.parts.store.keys()"))


def test_two_who_would_embed_the_same_do_it_once(others, folder, opened):
    """A search waits for whoever is embedding its user's entries, and finds their vectors; also if that is the other way."""
    slow = "child.Noting.embed_documents = (lambda real: lambda self, texts: (time.sleep(0.5), real(self, texts))[1])"
    before = f"{slow}(child.Noting.embed_documents)"
    other = others(folder, "embedder=child.Noting(sys.argv[1] + '.embedded')", before=before)
    memory = opened(embedder=child.Noting(f"{folder}.embedded"))
    chat = memory.session("chat", user_id="ada")
    for n in range(6):
        chat.add(f"Turn {n} of sailing")
        if n % 2:
            other.tell("[h.signals['dense'] for h in chat.search('sailing')]")
        assert chat.search(f"Turn {n}")[0].signals["dense"] > 0
        if n % 2:
            assert len(other.said()) == n + 1
    memory.flush()
    counted = Counter(t for _, t in child.embedded(folder))
    assert counted == {f"Turn {n} of sailing": 1 for n in range(6)}


def test_a_claim_dies_with_who_made_it(others, folder, opened):
    """Killed while it embeds: another embeds it instead, without waiting for anything but the end of the process."""
    before = "child.Noting.embed_documents = lambda self, texts: (open(sys.argv[1] + '.begun', 'w'), time.sleep(600))"
    other = others(folder, "embedder=child.Noting(sys.argv[1] + '.embedded')", before=before)
    memory = opened(embedder=(embedder := CountingEmbedder()))
    chat = memory.session("chat", user_id="ada")
    chat.add("Sailing")
    wait_until(lambda: os.path.exists(f"{folder}.begun"))
    other.kill()
    start = time.monotonic()
    assert chat.search("Sailing")[0].signals["dense"] > 0
    assert time.monotonic() - start < 2.0
    assert embedder.texts == ["Sailing"]
    memory.flush()
    assert index_keys(memory) == live_keys(memory)


class Slow:
    """A model that takes its time, and counts."""

    name = "slow"

    def __init__(self):
        self.calls = 0

    def summarize(self, messages, *, previous, max_tokens):
        self.calls += 1
        time.sleep(1.0)
        return "They talked."


def test_two_processes_fold_a_session_once(opened, others, folder):
    """Both see that the window is full; one asks the model, and the other finds the summary."""
    pruning = "{'max_context_items': 2, 'summarization_threshold': 4}"
    before = "from test_many_processes import Slow\nslow = Slow()"
    other = others(folder, f"embedder='none', summarizer=slow, pruning={pruning}", before=before.replace("\n", "; "))
    memory = opened(embedder="none", summarizer=(slow := Slow()), pruning=eval(pruning))
    chat = memory.session("chat", user_id="ada")
    chat.add([f"Turn {n}" for n in range(4)])
    other.tell("chat.compact().folded")
    folded = [*chat.compact().folded, *other.said()]
    memory.flush()
    other.ask("memory.flush()")
    assert slow.calls + other.ask("slow.calls") == 1
    assert len(folded) <= 2
    assert len(chat.messages(view="window")) == 2
    assert "They talked." in chat.summary()
    assert "They talked." in other.ask("chat.summary()")


def test_a_process_that_cannot_embed_lets_one_that_can(opened, others, folder):
    """It was first, and holds the index; as soon as another comes that has an embedder, that one indexes."""
    with opened() as memory:
        memory.session("chat", user_id="ada").add("One")
        memory.flush()
    other = others(folder, "embedder='none'")
    other.ask("chat.add('Two')")
    memory = opened()
    memory.flush()
    assert memory.stats()["indexer"] == os.getpid()
    assert index_keys(memory) == live_keys(memory)
    assert len(index_keys(memory)) == 2


def test_flush_does_not_wait_for_ever_for_another_process(opened, others, folder, monkeypatch):
    """One that indexes and does not come on is named."""
    monkeypatch.setattr("neuralflow_memory.core._STALLED", 0.5)
    other = others(folder, "embedder=child.Noting('/nowhere/at/all')")
    memory = opened()
    memory.session("chat", user_id="ada").add("One")
    with pytest.raises(IndexingError, match=f"process {other.pid} indexes"):
        memory.flush()


def test_another_model_is_refused_beside_others(others, folder, opened):
    """Both before anything was embedded and after; and nobody can take up another model while it is in use."""
    other = others(folder)
    other.ask("chat.add('One')")
    other.ask("memory.flush()")
    with pytest.raises(ModelMismatch):
        opened(embedder=HashingEmbedder(dimensions=32))
    with pytest.raises(FolderInUse, match="another embedding model"):
        memory_with(folder, on_change="reindex", dimensions=32)
    assert other.ask("[h.signals['dense'] > 0 for h in chat.search('One')]") == [True]
    other.close()
    memory = memory_with(folder, on_change="reindex", dimensions=32)
    memory.flush()
    memory.close()


def memory_with(folder, *, on_change, dimensions):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("neuralflow_memory.settings._embedder", lambda _: HashingEmbedder(dimensions=dimensions))
        return open_memory(folder, embedder={"on_change": on_change})


def test_two_models_never_mix_though_both_came_first(opened, beside, folder):
    """Opened before anything was embedded: the first to embed decides, the other is told."""
    memory = opened()
    other = beside(memory, embedder=HashingEmbedder(dimensions=32))
    chat = memory.session("chat", user_id="ada")
    chat.add("One")
    memory.flush()
    theirs = other.session("chat", user_id="ada")
    theirs.add("Two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert {h.entry.content for h in theirs.search("One Two")} == {"One", "Two"}
    memory.flush()
    assert memory._core.parts.ledger.models() == [("hashing-64", 64)]


RACES = {
    "update": (
        lambda chat: chat.entries.update("a", content="Updated here"),
        lambda chat: chat.entries.update("a", tags=["there"]),
        lambda chat: (chat.entries.get("a").content, chat.entries.get("a").tags) == ("Updated here", ("there",)),
    ),
    "replace": (
        lambda chat: chat.replace([Message("user", "Replaced here", id="a"), Message("user", "New", id="n")]),
        lambda chat: chat.add(Message("user", "New", id="n")),
        lambda chat: texts(chat.messages(view="window")) == ["Replaced here", "New"],
    ),
    "begin": (
        lambda chat: chat.task("sail").start(),
        lambda chat: chat.task("sail").start(),
        lambda chat: [t.name for t in chat.tasks()] == ["sail"],
    ),
}


@pytest.mark.parametrize("race", RACES)
def test_what_another_process_was_faster_with_is_taken_into_account(opened, beside, monkeypatch, race):
    """It comes between reading and writing: the change is made again, from what is there by then."""
    memory = opened(embedder="none")
    chat, theirs = (m.session("chat", user_id="ada") for m in (memory, beside(memory, embedder=None)))
    chat.add(Message("user", "One", id="a"))
    here, there, expected = RACES[race]
    method = {"update": "revise", "replace": "set_window", "begin": "work"}[race]
    real, first = getattr(memory._core.parts.ledger, method), []

    def late(*arguments, **options):
        if not first:
            first.append(there(theirs))
        return real(*arguments, **options)

    monkeypatch.setattr(memory._core.parts.ledger, method, late)
    here(chat)
    assert expected(chat)
    assert expected(theirs)


def test_commands_work_beside_a_running_application(opened, others, folder):
    """`stats` and `doctor` say who indexes, what waits and since when."""
    other = others(folder, "embedder='none'")
    other.ask("chat.add('One')")

    def command(*arguments):
        told = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "neuralflow_memory.cli",
            *arguments,
            "--path",
            str(folder),
            "--json",
        ]
        env = {**os.environ, "NEURALFLOW_EMBEDDER__MODEL": "none"}
        done = subprocess.run(told, capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    memory = opened()
    facts = command("stats")
    assert (facts["entries"], facts["indexer"]) == (1, os.getpid())
    memory.flush()
    doctor = {f["detail"] for f in command("doctor")}
    assert any(f"process {os.getpid()} indexes" in detail for detail in doctor)


def crowd(tmp_path, **options):
    """Run many processes, and check what they leave."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", child.__file__, str(tmp_path / "warm")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "memory"
    with server:
        assert server.stdout.readline() == "serving\n"
        server.stdin.write(json.dumps({"folder": str(folder), **options}) + "\n")
        server.stdin.flush()
        said = json.loads(server.stdout.readline())
        server.stdin.close()
    assert "broken" not in said, said["broken"]
    workers, turns = options["workers"], options["turns"]
    assert len(said["killed"]) == workers // 2 * options["kills"]
    expected = Counter(turn for own in range(workers) for turn in child.acknowledged(folder, own)[0])
    assert set(expected.values()) == {1}
    assert len(expected) == workers * turns
    with child.opened(folder) as memory:
        memory.flush()
        there = []
        for number in range(child.SESSIONS):
            entries = child.session(memory, number).entries.list(within="session")
            assert [e.seq for e in entries] == list(range(1, len(entries) + 1))
            there += [(number, e.id) for e in entries]
        assert Counter(there) == expected
        assert index_keys(memory) == live_keys(memory)
        assert len(index_keys(memory)) == workers * turns
        assert memory.stats(verify=True)["integrity"] == "ok"
    embedded = child.embedded(folder)
    assert {t for _, t in embedded} == {child.text(own_id) for _, own_id in expected}
    # What was embedded by one who was killed may not have been stored; what anybody else has embedded was.
    lived = Counter(t for pid, t in embedded if pid not in said["killed"])
    assert max(lived.values()) == 1
    after = {}
    for pid, t in embedded:
        assert after.get(t) in (None, *said["killed"]), f"{t} was stored, and was embedded again"
        after[t] = pid
    return len(embedded) - len(expected)


def test_killed_and_restarted_processes_lose_nothing_and_do_nothing_twice(tmp_path):
    """4 processes, 60 turns each, on 20 shared sessions; half of them are killed twice."""
    assert crowd(tmp_path, workers=4, turns=60, kills=2, pause=0.01) <= 4 * 64


@pytest.mark.nightly
@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="takes a minute: `make nightly` runs it")
def test_many_killed_and_restarted_processes_lose_nothing(tmp_path):
    """8 processes, 500 turns each, on 20 shared sessions; half of them are killed six times."""
    assert crowd(tmp_path, workers=8, turns=500, kills=6) <= 24 * 64
