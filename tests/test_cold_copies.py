"""Cold entries leave and come back: exports, imports, backups, restores, also beside damaged blocks and killed processes."""

import json
import multiprocessing
import os
import shutil
import threading

import pytest
from conftest import SMALL, found, index_keys, live_keys, texts
from test_export import body, fill, shown
from typer.testing import CliRunner

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import (
    ArchiveError,
    BackupError,
    Extraction,
    Finding,
    MemoryType,
    Message,
    NotFound,
    StorageError,
    open_memory,
)
from neuralflow_memory.cli import app
from neuralflow_memory.testing import ManualClock

PLAIN = {"embedder": "none", "pruning": SMALL}


@pytest.fixture
def filled(opened):
    memory = opened(clock=ManualClock(), pruning=SMALL)
    fill(memory)
    return memory


def freeze(memory, user="ada"):
    """Archive all that may become cold; how many entries did."""
    return sum(
        memory.session(info.session_id, user_id=user).entries.archive(filter={"version": {"$gte": 1}}, within="session")
        for info in memory.sessions(user_id=user)
    ) + memory.session("chat", user_id=user).entries.archive(filter={"tier": "warm"}, within="user")


def blocks(folder):
    return sorted((folder / "archive").glob("*.block"))


def voyage(turns):
    return [Message("user" if n % 2 else "assistant", f"turn {n} of the voyage", id=f"t{n}") for n in range(turns)]


def old_chat(memory, turns=30):
    chat = memory.session("s", user_id="ada")
    chat.add(voyage(turns))
    memory.flush()
    old = [e.id for e in chat.entries.list(types=[MemoryType.SHORT_TERM]) if e.position is None]
    assert chat.entries.archive(old) == len(old) > 15
    memory.flush()
    return chat


# -- export and import


def test_an_export_holds_what_is_cold_and_it_arrives_warm(opened, filled, tmp_path):
    """The same file as before it became cold; where it goes there is nothing in the archive."""
    filled.export(tmp_path / "before.jsonl")
    before = shown(filled)
    assert freeze(filled) > 10
    filled.flush()
    done = filled.export(tmp_path / "after.jsonl")
    assert done.unread == 0
    assert body(tmp_path / "after.jsonl") == body(tmp_path / "before.jsonl")
    other = opened(tmp_path / "other", clock=ManualClock(), pruning=SMALL)
    taken = other.import_(tmp_path / "after.jsonl")
    assert (taken.entries, taken.left_out) == (done.entries, 0)
    assert (other.stats()["cold"], other.stats()["dirty"] > 0) == (0, True)
    assert shown(other) == before
    other.flush()
    assert index_keys(other) == live_keys(other)
    assert filled.import_(tmp_path / "after.jsonl").entries == 0
    assert filled.stats()["cold"] > 10


def test_an_export_while_blocks_are_replaced(opened, tmp_path):
    """A sweep waits, and the file is whole."""
    memory = opened(**PLAIN)
    chat = old_chat(memory, turns=400)
    done = []

    def wear():
        for n in range(6):
            chat.entries.update(f"t{3 * n}", tags=["x"])
            memory.sweep()
            chat.entries.archive([f"t{3 * n}"])
            done.append(n)

    thread = threading.Thread(target=wear)
    thread.start()
    sizes = set()
    while thread.is_alive():
        report = memory.export(tmp_path / "a.jsonl")
        sizes.add((report.unread, report.entries))
    thread.join()
    assert len(done) == 6
    assert {unread for unread, _ in sizes} == {0}
    assert len(chat.messages()) == 400


def test_an_export_beside_a_damaged_block_says_so(opened, tmp_path):
    """The rest is in it; so it says on the command line."""
    memory = opened(**PLAIN)
    old_chat(memory)
    cold = memory.stats()["cold"]
    total = memory.export(tmp_path / "a.jsonl").entries
    (block,) = blocks(memory.path)
    block.unlink()
    memory._core.parts.archive._unpacked.clear()
    report = memory.export(tmp_path / "b.jsonl", user_id="ada")
    assert (report.unread, report.entries) == (cold, total - cold)
    assert block.stem in memory.stats()["archive_damaged"]
    memory.close()
    told = CliRunner().invoke(app, ["export", str(tmp_path / "c.jsonl"), "--path", str(memory.path)])
    assert told.exit_code == 0
    assert f"{cold} entries could not be read" in " ".join(told.output.split())


# -- backup and restore


def test_a_backup_holds_the_archive_and_a_new_folder_is_made_of_it(opened, filled, tmp_path):
    """Each block as it is, with size and hash; all reads as before, in the folder it was made of and in a new one."""
    assert freeze(filled) > 10
    filled.flush()
    before = shown(filled)
    report = filled.backup(tmp_path / "one")
    assert [b.name for b in blocks(tmp_path / "one")] == [b.name for b in blocks(filled.path)]
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert report.bytes == sum(f["bytes"] for f in manifest["files"])
    assert {f["name"] for f in manifest["files"]} == {"ledger.sqlite3"} | {
        f"archive/{b.name}" for b in blocks(filled.path)
    }
    assert report.damaged == {}
    other = opened(tmp_path / "new", clock=ManualClock(), pruning=SMALL)
    done = other.restore(tmp_path / "one")
    assert (done.entries, done.damaged) == (report.entries, {})
    other.flush()
    assert shown(other) == before
    assert (other.stats(verify=True)["archive_damaged"], other.stats()["cold"]) == ({}, filled.stats()["cold"])
    assert (other.stats()["dirty"], index_keys(other)) == (0, live_keys(other))
    filled.session("chat", user_id="ada").clear()
    filled.sweep()
    filled.restore(tmp_path / "one", restore_deleted=True)
    filled.flush()
    assert shown(filled) == before
    filled.sweep()
    assert shown(filled) == before


def test_going_back_to_before_and_after_it_became_cold(opened, tmp_path):
    """Blocks that nobody knows any more go with the next sweep; those that were gone are there again."""
    memory = opened(**PLAIN)
    chat = memory.session("s", user_id="ada")
    chat.add(voyage(30))
    memory.flush()
    memory.backup(tmp_path / "warm")
    old_chat(memory)
    memory.backup(tmp_path / "cold")
    everything = chat.messages()
    memory.restore(tmp_path / "warm")
    assert (memory.stats()["cold"], chat.messages()) == (0, everything)
    memory.sweep()
    assert blocks(memory.path) == []
    memory.restore(tmp_path / "cold")
    assert (memory.stats()["cold"] > 15, chat.messages()) == (True, everything)
    assert found(chat.search("turn 3 of the voyage", k=1)) == ["turn 3 of the voyage"]


def test_going_back_to_where_nothing_is_to_be_indexed(opened, tmp_path):
    """All was cold then: the vector index holds nothing of what was added since."""
    memory = opened(pruning=SMALL)
    chat = memory.session("s", user_id="ada")
    own = chat.remember("Ada keeps bees")
    memory.flush()
    chat.entries.archive([own])
    memory.backup(tmp_path / "one")
    chat.remember("Ada keeps goats")
    memory.flush()
    assert len(index_keys(memory)) == 1
    memory.restore(tmp_path / "one")
    memory.flush()
    assert index_keys(memory) == set()
    assert found(chat.search("bees", k=5)) == ["Ada keeps bees"]
    other = chat.remember("Ada keeps ducks")
    memory.flush()
    assert index_keys(memory) == {chat.entries.get(other).key}


def test_a_damaged_block_of_a_backup_restores_nothing(opened, tmp_path):
    """It is named, and no block is left in the folder."""
    memory = opened(**PLAIN)
    chat = old_chat(memory)
    memory.backup(tmp_path / "one")
    (block,) = blocks(tmp_path / "one")
    kept = block.read_bytes()
    chat.clear()
    memory.sweep()
    other = tmp_path / "other"
    for broken in (kept[:-1], kept[:50] + b"x" + kept[51:], None):
        if broken is None:
            block.unlink()
        else:
            block.write_bytes(broken)
        for target in (memory, opened(other, **PLAIN)):
            with pytest.raises(BackupError, match=f"archive/{block.name}"):
                target.restore(tmp_path / "one")
            assert (blocks(target.path), target.stats()["entries"]) == ([], 0)
    block.write_bytes(kept)
    assert opened(other, **PLAIN).restore(tmp_path / "one").damaged == {}


@pytest.mark.parametrize("missing", [False, True])
def test_a_backup_beside_a_damaged_block_says_so(opened, tmp_path, missing):
    """It holds the rest; what is restored of it says which block is missing, unless it was brought back here."""
    memory = opened(**PLAIN)
    chat = old_chat(memory)
    (block,) = blocks(memory.path)
    kept = block.read_bytes()
    if missing:
        block.unlink()
    else:
        block.write_bytes(kept[:-1])
    memory._core.parts.archive._unpacked.clear()
    report = memory.backup(tmp_path / "one")
    assert report.damaged.keys() == {block.stem}
    assert blocks(tmp_path / "one") == []
    other = opened(tmp_path / "other", **PLAIN)
    done = other.restore(tmp_path / "one")
    assert done.damaged.keys() == {block.stem}
    assert done.entries == report.entries
    with pytest.raises(ArchiveError):
        other.session("s", user_id="ada").entries.get("t0")
    block.write_bytes(kept)
    assert memory.restore(tmp_path / "one").damaged == {}
    assert chat.entries.get("t0").content == "turn 0 of the voyage"


def test_the_command_line_tells_of_damaged_blocks(opened, tmp_path):
    """Both of them."""
    memory = opened(**PLAIN)
    old_chat(memory)
    memory.close()
    (block,) = blocks(memory.path)
    block.unlink()
    run = CliRunner().invoke
    backup = run(app, ["backup", str(tmp_path / "one"), "--path", str(memory.path)])
    restore = run(app, ["restore", str(tmp_path / "one"), "--path", str(tmp_path / "new")])
    for told in (backup, restore):
        assert told.exit_code == 0
        assert f"block {block.stem}" in " ".join(told.output.split())


def test_a_restore_mends_a_damaged_block(opened, tmp_path):
    """The backup has it whole."""
    memory = opened(**PLAIN)
    chat = old_chat(memory)
    memory.backup(tmp_path / "one")
    (block,) = blocks(memory.path)
    block.write_bytes(b"nothing")
    memory._core.parts.archive._unpacked.clear()
    assert memory.restore(tmp_path / "one").damaged == {}
    assert chat.entries.get("t0").content == "turn 0 of the voyage"


def test_what_was_deleted_since_leaves_the_blocks_of_a_backup(opened, tmp_path):
    """A cold turn, and facts that were found in it; and what retention had deleted and somebody purged."""

    class Reader:
        name = "reader"

        def extract(self, messages):
            return Extraction(tuple(Finding(f"Said: {m.text}", (m.id,)) for m in messages))

    clock = ManualClock()
    memory = opened(**PLAIN, clock=clock, extractor=Reader())
    chat = memory.session("s", user_id="ada")
    chat.add([Message("user", f"turn {n} of the voyage", id=f"t{n}") for n in range(30)])
    memory.flush()
    chat.extract()
    assert chat.entries.archive([f"t{n}" for n in range(10)]) == 10
    facts = {e.content: e for e in chat.entries.list(types=[MemoryType.LONG_TERM])}
    chat.entries.archive([facts["Said: turn 3 of the voyage"].id])
    links = "SELECT count(*) FROM derivations"
    with memory._core.parts.ledger._db.read() as db:
        linked = db.execute(links).fetchone()
    memory.backup(tmp_path / "one")
    chat.entries.delete(["t3"])
    done = memory.restore(tmp_path / "one")
    assert done.left_out == 1
    assert "Said: turn 3 of the voyage" not in {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])}
    with pytest.raises(NotFound):
        chat.entries.get("t3")
    with memory._core.parts.ledger._db.read() as db:
        assert db.execute(links).fetchone() == (linked[0] - 1,)
    chat.entries.delete(["t4"])
    assert "Said: turn 4 of the voyage" not in {e.content for e in chat.entries.list(types=[MemoryType.LONG_TERM])}
    memory.sweep()
    archive = memory._core.parts.archive
    kept = b"".join(text for name in archive.names() for text in archive.read(name).values())
    assert b"turn 5" in kept
    assert b"turn 3" not in kept
    assert b"turn 4" not in kept


def test_what_retention_deleted_and_a_backup_from_before(opened, tmp_path):
    """It comes back with the backup, since nobody asked for it to go; what somebody deleted after that does not."""
    clock = ManualClock()
    memory = opened(**PLAIN, clock=clock, retention={"delete": True, "max_delete_share": 1.0})
    chat = memory.session("s", user_id="ada")
    ids = [chat.remember(f"Fact {n}", importance=0.2) for n in range(3)]
    memory.backup(tmp_path / "before")
    clock.advance(days=91)
    report = memory.sweep()
    assert report.count("delete") == 3
    memory.backup(tmp_path / "between")
    chat.entries.delete([ids[0]])
    memory.restore(tmp_path / "between")
    assert memory.stats()["discarded"] == 2
    assert memory.undo(report.run) == 2
    memory.restore(tmp_path / "before")
    assert {e.id for e in chat.entries.list()} == set(ids[1:])


def test_a_backup_while_blocks_are_replaced(opened, tmp_path):
    """Each backup is whole, whatever moves meanwhile."""
    memory = opened(**PLAIN)
    chat = old_chat(memory, turns=200)
    stop = threading.Event()

    def move():
        n = 0
        while not stop.is_set():
            n = (n + 7) % 150
            chat.entries.update(f"t{n}", tags=[str(n)])
            memory.sweep()
            chat.entries.archive([f"t{n}"])

    thread = threading.Thread(target=move)
    thread.start()
    try:
        for n in range(3):
            assert memory.backup(tmp_path / str(n)).damaged == {}
    finally:
        stop.set()
        thread.join()
    for n in range(3):
        with open_memory(tmp_path / f"new{n}", **PLAIN) as other:
            assert other.restore(tmp_path / str(n)).damaged == {}
            assert len(other.session("s", user_id="ada").messages()) == 200
            assert other.stats(verify=True)["archive_damaged"] == {}


def test_no_space_left_for_blocks(opened, tmp_path, monkeypatch):
    """A restore that fails on the way leaves the folder as it was."""
    memory = opened(**PLAIN)
    old_chat(memory)
    memory.backup(tmp_path / "one")
    other = opened(tmp_path / "other", **PLAIN)
    other.session("mine").add("Hello")
    archive = type(other._core.parts.archive)
    other.close()
    other = opened(tmp_path / "third", **PLAIN)

    def full(self, name, content):
        raise StorageError("no space left", path="here")

    monkeypatch.setattr(archive, "_store", full)
    with pytest.raises(StorageError):
        other.restore(tmp_path / "one")
    assert (other.stats()["entries"], blocks(other.path)) == (0, [])


# -- crashes


def _restore_and_die(folder, source, name):
    def die(passed):
        if passed == name:
            os.kill(os.getpid(), 9)

    with open_memory(folder, **PLAIN) as memory:
        failpoints.hook = die
        memory.restore(source)


@pytest.mark.parametrize("name", ["archive.written", "restore.copied", "restore.applied", "restore.committed"])
def test_a_restore_that_was_killed_among_its_blocks(folder, tmp_path, name):
    """The old memory or the new one, each with its blocks; what is left over goes with the next sweep."""
    with open_memory(folder, **PLAIN) as memory:
        old_chat(memory)
        memory.backup(tmp_path / "one")
        chat = memory.session("s", user_id="ada")
        whole = chat.messages()
        for n in range(10):
            chat.entries.delete([f"t{n}"])
        memory.sweep()
        chat.add("late")
        late = chat.messages()
        now_there = blocks(folder)
    child = multiprocessing.get_context("fork").Process(target=_restore_and_die, args=(folder, tmp_path / "one", name))
    child.start()
    child.join(60)
    assert child.exitcode == -9
    with open_memory(folder, **PLAIN) as memory:
        chat = memory.session("s", user_id="ada")
        assert memory.stats(verify=True)["archive_damaged"] == {}
        if name == "restore.committed":
            assert chat.messages() == whole[10:]
        else:
            assert chat.messages() == late
            memory.sweep()
            assert blocks(folder) == now_there


def test_copied_by_hand(opened, tmp_path):
    """A backup's folder has the layout of a memory's: it can be opened as one."""
    memory = opened(**PLAIN)
    chat = old_chat(memory)
    memory.backup(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    other = opened(tmp_path / "copy", **PLAIN)
    assert texts(other.session("s", user_id="ada").messages()) == texts(chat.messages())
