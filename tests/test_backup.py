"""Backup and restore: a whole copy while others write, and back to it, all or nothing."""

import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import threading
from datetime import UTC, datetime

import pytest
from chroma_server import ChromaServer
from conftest import SMALL, CountingEmbedder, found, index_keys, live_keys, rows
from test_export import fill, shown

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import (
    BackupError,
    FolderInUse,
    InputError,
    Message,
    ModelMismatch,
    StorageError,
    open_memory,
)
from neuralflow_memory.settings import read_settings
from neuralflow_memory.storage.ledger import schema
from neuralflow_memory.testing import HashingEmbedder, ManualClock

PLAIN = {"embedder": "none", "pruning": SMALL}


@pytest.fixture
def filled(opened):
    memory = opened(clock=ManualClock(), pruning=SMALL)
    fill(memory)
    return memory


def stored(folder):
    """What every table holds that says something about content, of a folder that may be open."""
    db = sqlite3.connect(f"file:{folder / 'ledger.sqlite3'}?mode=ro", uri=True)
    try:
        names = [n for (n,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        kept = {n: sorted(db.execute(f"SELECT * FROM {n}"), key=repr) for n in names if n not in ("dirty", "changes")}
        kept["meta"] = [row for row in kept["meta"] if row[0] not in ("collection", "id")]
        kept["owners"] = [row[:5] for row in kept["owners"]]
        return kept
    finally:
        db.close()


# -- out


def test_a_backup_is_a_folder_that_says_what_is_in_it(filled, tmp_path):
    """One file of the ledger, with its size and hash, and the rows of each table; nothing is left beside it."""
    done = filled.backup(tmp_path / "backups" / "one")
    assert done.path == tmp_path / "backups" / "one"
    assert {p.name for p in done.path.iterdir()} == {"ledger.sqlite3", "manifest.json"}
    assert [p.name for p in done.path.parent.iterdir()] == ["one"]
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["rows"]["entries"] == done.entries == rows(filled)["entries"]
    assert manifest["files"][0]["bytes"] == done.bytes == (done.path / "ledger.sqlite3").stat().st_size
    assert stored(done.path) == stored(filled.path)


def test_a_backup_never_replaces_anything(filled, tmp_path):
    """Neither another backup nor a file."""
    filled.backup(tmp_path / "one")
    with pytest.raises(InputError, match="new folder"):
        filled.backup(tmp_path / "one")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file"):
        filled.backup(tmp_path / "file" / "one")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_backup_while_others_write_is_of_one_moment(opened, tmp_path):
    """Each chat is whole in it, and nobody had to wait."""
    memory = opened(**PLAIN)
    for n in range(20):
        memory.session(f"s{n}").add([f"turn {i}" for i in range(10)])
    stop, written = threading.Event(), []

    def write():
        n = 0
        while not stop.is_set():
            written.append(memory.session(f"s{n % 25}").add([f"late {n} a", f"late {n} b"]))
            n += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for run in range(3):
            before = len(written)
            memory.backup(tmp_path / str(run))
            assert len(written) >= before
            db = sqlite3.connect(tmp_path / str(run) / "ledger.sqlite3")
            uneven = "SELECT count(*) FROM entries WHERE content LIKE 'late%'"
            assert db.execute(uneven).fetchone()[0] % 2 == 0
            heads = (
                "SELECT count(*) FROM sessions s WHERE last_seq != (SELECT max(seq) FROM entries WHERE session = s.id)"
            )
            assert db.execute(heads).fetchone()[0] == 0
            db.close()
    finally:
        stop.set()
        writer.join()


# -- back


def test_going_back_is_exact(filled, tmp_path):
    """What was added and changed since is gone, what was there is as it was; open handles and sessions go on."""
    chat = filled.session("chat", user_id="ada")
    before, content = shown(filled), stored(filled.path)
    filled.backup(tmp_path / "one")
    chat.add([Message("user", f"Later {n}.", id=f"later{n}") for n in range(9)])
    chat.entries.update("u2", content="Changed.")
    chat.unpin("u3")
    filled.session("new", user_id="carol").add("New.")
    filled.values(user_id="ada").put(("notes", "x"), "k", {"v": "other"}, texts=["Apple"])
    filled.flush()
    done = filled.restore(tmp_path / "one")
    assert (done.entries, done.left_out) == (len(content["entries"]), 0)
    after = stored(filled.path)
    for table in content.keys() - {"owners", "tombstones", "items", "questions"}:
        assert after[table] == content[table], table
    assert shown(filled) == before
    assert filled.sessions(user_id="carol") == []
    assert not (filled.path / "restoring").exists()
    (own,) = chat.add("Go on.")
    assert chat.messages(last=1)[0].id == own
    filled.flush()
    assert index_keys(filled) == live_keys(filled)
    assert "Later 1." not in found(chat.search("Later 1."))


def test_nothing_is_embedded_again(opened, tmp_path):
    """Chroma is filled from the ledger's vectors, also in another folder."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder, clock=ManualClock(), pruning=SMALL)
    fill(memory)
    memory.backup(tmp_path / "one")
    memory.session("chat", user_id="ada").add("Later.")
    memory.flush()
    embedder.texts.clear()
    memory.restore(tmp_path / "one")
    memory.flush()
    assert embedder.texts == []
    assert index_keys(memory) == live_keys(memory) != set()
    fresh = CountingEmbedder()
    other = opened(tmp_path / "other", embedder=fresh, clock=ManualClock(), pruning=SMALL)
    other.restore(tmp_path / "one")
    other.flush()
    assert fresh.texts == []
    assert index_keys(other) == live_keys(other) == index_keys(memory)
    assert shown(other) == shown(memory)
    other.session("chat", user_id="ada").add(Message("user", "With the new folder's keys.", id="key"))
    other.close()
    again = opened(tmp_path / "other", embedder=fresh, clock=ManualClock(), pruning=SMALL)
    assert again.session("chat", user_id="ada").entries.get("key").content == "With the new folder's keys."


def test_what_was_deleted_since_stays_deleted(filled, tmp_path):
    """With what was made from it; unless it is asked for."""
    chat = filled.session("chat", user_id="ada")
    known = next(e for e in chat.entries.list(types=["long_term"]) if "south wall" in e.content)
    filled.backup(tmp_path / "one")
    before = shown(filled)
    chat.entries.delete(["u1", "u10"])
    chat.entries.delete(known.key)
    filled.values(user_id="ada").delete(("notes", "x"), "k")
    filled.values().delete((), "root")
    done = filled.restore(tmp_path / "one")
    assert done.left_out == 5
    assert {"u1", "u10"}.isdisjoint(m.id for m in chat.messages())
    assert all(known.content != e.content for e in chat.entries.list())
    assert filled.values(user_id="ada").get(("notes", "x"), "k") is filled.values().get((), "root") is None
    filled.flush()
    said = chat.summary() + "".join(e.content for e in chat.entries.list(types=["episodic"]))
    assert "Bed 1 holds" not in said
    covered = {i for e in chat.entries.list(filter={"metadata.kind": "segment"}) for i in e.sources}
    assert covered | {m.id for m in chat.messages(view="window")} == {m.id for m in chat.messages()}
    assert index_keys(filled) == live_keys(filled)
    assert filled.restore(tmp_path / "one", restore_deleted=True).left_out == 0
    assert shown(filled) == before
    assert filled.import_(exported(filled, tmp_path)).left_out == 0


def exported(memory, tmp_path):
    memory.export(tmp_path / "x.jsonl")
    return tmp_path / "x.jsonl"


def test_what_was_deleted_and_said_again_is_there(filled, tmp_path):
    """Only what nobody put back counts as deleted."""
    chat = filled.session("chat", user_id="ada")
    filled.backup(tmp_path / "one")
    chat.entries.delete("u11")
    chat.add(Message("user", "Said again.", id="u11"))
    filled.values().delete((), "root")
    filled.values().put((), "root", {"again": True})
    assert filled.restore(tmp_path / "one").left_out == 0
    assert "Bed 11" in chat.entries.get("u11").content
    assert filled.values().get((), "root").value == {}


def test_what_went_by_itself_comes_back(filled, tmp_path):
    """A summary that was made anew, a task that was ended since, the text of a value that was replaced."""
    chat = filled.session("chat", user_id="ada")
    before = shown(filled)
    filled.backup(tmp_path / "one")
    chat.entries.update("u1", content="Bed 1 holds nothing.")
    task = chat.task("open")
    task.start()
    task.complete("done")
    filled.values(user_id="ada").put(("notes", "x"), "k", {"v": 3}, texts=["Fig"])
    filled.flush()
    assert filled.restore(tmp_path / "one").left_out == 0
    assert shown(filled) == before
    assert filled.values(user_id="ada").search(("notes",), "Quince")[0].score > 0


def test_numbers_are_never_used_twice(opened, tmp_path):
    """What was handed out after the backup stays unused, so that no late writer takes one entry for another."""
    memory = opened(**PLAIN)
    chat = memory.session("chat", user_id="ada")
    chat.add("First.")
    memory.backup(tmp_path / "one")
    later = chat.entries.get(chat.add("Later.")[0])
    memory.session("b", user_id="bob").add("His.")
    memory.restore(tmp_path / "one")
    new = chat.entries.get(chat.add("New.")[0])
    assert new.number > later.number
    memory.session("c", user_id="carol").add("Hers.")
    assert memory.session("b", user_id="bob").messages() == []


def test_a_fold_under_way_does_not_commit_into_the_past(opened, tmp_path):
    """It began with what is gone: its summary is dropped, and the turns that are there now are folded later."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        name = "slow"

        def summarize(self, messages, *, previous, max_tokens):
            begun.set()
            assert go_on.wait(20)
            return "A summary of " + " ".join(m.content for m in messages)

    memory = opened(summarizer=Slow(), **PLAIN)
    chat = memory.session("chat", user_id="ada")
    chat.add(["One.", "Two."])
    memory.backup(tmp_path / "one")
    chat.add([f"Secret {n}." for n in range(6)])
    assert begun.wait(20)
    memory.restore(tmp_path / "one")
    go_on.set()
    memory.flush()
    assert [m.content for m in chat.messages()] == ["One.", "Two."]
    assert chat.summary() == ""
    assert [m.content for m in chat.messages(view="window")] == ["One.", "Two."]


def test_a_memory_that_others_have_open_is_not_restored(opened, beside, tmp_path):
    """It is refused, by an error that says what to do; the other goes on, and once it is closed it works."""
    memory = opened(**PLAIN)
    chat = memory.session("chat", user_id="ada")
    chat.add("First.")
    memory.backup(tmp_path / "one")
    other = beside(memory)
    other.session("chat", user_id="ada").add("Second.")
    with pytest.raises(FolderInUse, match="close it there"):
        memory.restore(tmp_path / "one")
    other.session("chat", user_id="ada").add("Third.")
    assert len(chat.messages()) == 3
    other.close()
    memory.restore(tmp_path / "one")
    assert len(chat.messages()) == 1
    assert len(beside(memory).session("chat", user_id="ada").messages()) == 1


def test_a_backup_of_another_memory_goes_into_an_empty_one_only(opened, filled, tmp_path):
    """It would replace what is there; the error names the way for both."""
    filled.backup(tmp_path / "one")
    other = opened(tmp_path / "other", **PLAIN)
    other.session("s").add("Mine.")
    with pytest.raises(BackupError, match=r"another memory.*export and import"):
        other.restore(tmp_path / "one")
    assert other.session("s").messages()[0].content == "Mine."
    assert not (other.path / "restoring").exists()


def test_a_backup_by_another_model_is_refused_or_embedded_anew(opened, filled, tmp_path):
    """As opening such a folder is."""
    filled.backup(tmp_path / "one")
    embedder = CountingEmbedder()
    embedder.model_id = "another"
    other = opened(tmp_path / "other", embedder=embedder, pruning=SMALL)
    with pytest.raises(ModelMismatch, match="hashing-64"):
        other.restore(tmp_path / "one")
    other.close()
    again = read_settings(tmp_path / "other", embedder={"on_change": "reindex"})
    with open_memory(again, embedder=embedder) as other:
        other.restore(tmp_path / "one")
        other.flush()
        assert embedder.texts
        assert index_keys(other) == live_keys(other) == live_keys(filled)


def test_a_new_folder_of_a_backup_has_an_index_of_its_own(opened, tmp_path):
    """On a Chroma server as well: each folder keeps its collection, and finds it when it is opened again."""
    server = ChromaServer(tmp_path / "server").start()
    url = server.url
    try:
        one = opened(chroma={"url": url, "collection": "first"})
        one.session("s").add(["One.", "Two."])
        one.flush()
        one.backup(tmp_path / "one")
        options = {"embedder": HashingEmbedder(), "chroma": {"url": url, "collection": "second"}}
        for _ in range(2):
            with open_memory(tmp_path / "other", **options) as other:
                other.flush()
                other.restore(tmp_path / "one")
                other.session("s").add("Three.")
                other.flush()
                assert index_keys(other) == live_keys(other)
                assert len(index_keys(other)) == 3
        with open_memory(tmp_path / "other", **options) as other:
            other.session("s").add("Four.")
            other.flush()
            assert index_keys(other) == live_keys(other)
        assert index_keys(one) == live_keys(one)
        assert len(index_keys(one)) == 2
        one.close()
    finally:
        server.kill()


# -- broken backups


def damaged(folder, how):
    ledger, manifest = folder / "ledger.sqlite3", folder / "manifest.json"
    told = json.loads(manifest.read_text())
    match how:
        case "no folder":
            shutil.rmtree(folder)
        case "a file":
            shutil.rmtree(folder)
            folder.write_text("x")
        case "no manifest":
            manifest.unlink()
        case "a manifest that is cut":
            manifest.write_text(manifest.read_text()[:50])
        case "a manifest that is no text":
            manifest.write_bytes(b"\xff\xff")
        case "a newer version":
            manifest.write_text(json.dumps(told | {"format": 99, "more": 1}))
        case "a file elsewhere":
            told["files"][0]["name"] = "../memory/ledger.sqlite3"
            manifest.write_text(json.dumps(told))
        case "no ledger":
            ledger.unlink()
        case "a ledger that is cut":
            os.truncate(ledger, ledger.stat().st_size - 4096)
        case "a byte changed":
            with ledger.open("rb+") as file:
                file.seek(ledger.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte[0] ^ 1]))
        case "a ledger of a newer version" | "another ledger":
            db = sqlite3.connect(ledger)
            if how == "another ledger":
                db.execute("UPDATE meta SET value = x'00' WHERE name = 'secret'")
            else:
                db.execute("PRAGMA user_version = 99")
            db.commit()
            db.close()
            from neuralflow_memory.pipeline.backup import _synced

            size, digest = _synced(ledger)
            told["files"][0] |= {"bytes": size, "blake2b": digest}
            manifest.write_text(json.dumps(told))


@pytest.mark.parametrize(
    "how",
    [
        "no folder",
        "a file",
        "no manifest",
        "a manifest that is cut",
        "a manifest that is no text",
        "a newer version",
        "a file elsewhere",
        "no ledger",
        "a ledger that is cut",
        "a byte changed",
        "a ledger of a newer version",
        "another ledger",
    ],
)
def test_a_broken_backup_is_refused_and_nothing_changes(opened, tmp_path, how):
    """Typed, with what to do; the memory goes on as it was, and nothing is left in its folder."""
    memory = opened(**PLAIN)
    memory.session("s").add([f"turn {n}" for n in range(40)])
    memory.backup(tmp_path / "one")
    memory.session("s").add("Later.")
    memory.flush()
    damaged(tmp_path / "one", how)
    before = stored(memory.path)
    with pytest.raises(BackupError) as caught:
        memory.restore(tmp_path / "one")
    assert isinstance(caught.value, StorageError)
    assert "backup" in str(caught.value)
    assert stored(memory.path) == before
    assert not (memory.path / "restoring").exists()
    memory.session("s").add("It goes on.")


def test_a_backup_by_an_older_version_is_brought_up_to_date(opened, tmp_path):
    """The backup itself stays as it was."""
    memory = opened(**PLAIN)
    memory.session("s").add("Hello.")
    memory.backup(tmp_path / "one")
    ledger = tmp_path / "one" / "ledger.sqlite3"
    db = sqlite3.connect(ledger)
    db.execute("ALTER TABLE tombstones DROP COLUMN asked")
    db.execute("UPDATE meta SET value = 'older rules' WHERE name = 'lexical'")
    db.execute("UPDATE features SET terms = x''")
    db.execute(f"PRAGMA user_version = {schema.MIGRATIONS.index(schema._m011_transfer)}")
    db.commit()
    db.close()
    from neuralflow_memory.pipeline.backup import _synced

    size, digest = _synced(ledger)
    manifest = tmp_path / "one" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["files"][0] |= {"bytes": size, "blake2b": digest}
    manifest.write_text(json.dumps(told))
    bytes_ = ledger.read_bytes()
    memory.restore(tmp_path / "one")
    assert found(memory.session("s").search("hello")) == ["Hello."]
    assert ledger.read_bytes() == bytes_


# -- crashes


def _killed_at(name):
    def die(passed):
        if passed == name:
            os.kill(os.getpid(), 9)

    failpoints.hook = die


def _back_up_and_die(folder, target, name):
    with open_memory(folder, **PLAIN) as memory:
        _killed_at(name)
        memory.backup(target)


def _restore_and_die(folder, source, name):
    with open_memory(folder, **PLAIN) as memory:
        _killed_at(name)
        memory.restore(source)


def killed(target, *args):
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    child.join(60)
    assert child.exitcode == -9


@pytest.mark.parametrize("name", ["backup.copied", "backup.written"])
def test_a_backup_that_was_killed_is_not_there(folder, tmp_path, name):
    """Nobody takes a part of it for a backup, and the next one to the same place clears it away."""
    with open_memory(folder, **PLAIN) as memory:
        memory.session("s").add("Hello.")
    target = tmp_path / "backups" / "one"
    killed(_back_up_and_die, folder, target, name)
    assert not target.exists()
    with open_memory(folder, **PLAIN) as memory:
        memory.backup(target)
        assert [p.name for p in target.parent.iterdir()] == ["one"]
        memory.restore(target)
        assert len(memory.session("s").messages()) == 1


@pytest.mark.parametrize("name", ["restore.copied", "restore.applied", "restore.committed"])
def test_a_restore_that_was_killed_has_happened_or_not(folder, tmp_path, name):
    """The old memory or the new one, whole, and nothing of the copy is left in the folder."""
    with open_memory(folder, **PLAIN) as memory:
        chat = memory.session("s", user_id="ada")
        chat.add([f"turn {n}" for n in range(30)])
        memory.flush()
        memory.backup(tmp_path / "one")
        early = stored(folder)
        chat.add([f"late {n}" for n in range(30)])
        chat.entries.delete(chat.messages()[2].id)
        memory.flush()
        late = stored(folder)
    killed(_restore_and_die, folder, tmp_path / "one", name)
    with open_memory(folder, **PLAIN) as memory:
        assert not (folder / "restoring").exists()
        now = stored(folder)
        assert memory.stats(verify=True)["integrity"] == "ok"
        chat = memory.session("s", user_id="ada")
        if name == "restore.committed":
            assert len(chat.messages()) == 29
            assert len(early["sessions"]) == len(now["sessions"])
        else:
            assert now == late
        chat.add("It goes on.")
        memory.flush()


def test_the_index_is_filled_after_a_kill(folder, tmp_path):
    """What Chroma held of the later state is gone from it once the memory is open again."""
    with open_memory(folder, embedder=HashingEmbedder()) as memory:
        memory.session("s").add(["One.", "Two."])
        memory.flush()
        memory.backup(tmp_path / "one")
        memory.session("s").add(["Three.", "Four."])
        memory.flush()
        assert len(index_keys(memory)) == 4
    killed(_restore_and_die, folder, tmp_path / "one", "restore.committed")
    embedder = CountingEmbedder()
    with open_memory(folder, embedder=embedder) as memory:
        memory.flush()
        assert index_keys(memory) == live_keys(memory)
        assert len(index_keys(memory)) == 2
        assert embedder.texts == []


# -- at work


def test_writers_and_readers_meanwhile_see_the_old_or_the_new(opened, tmp_path):
    """Many threads at work while it is restored again and again: no error, and nothing half-way."""
    memory = opened(pruning=SMALL)
    chat = memory.session("s", user_id="ada")
    chat.add([Message("user", f"turn {n}", id=f"m{n}") for n in range(20)])
    memory.flush()
    memory.backup(tmp_path / "one")
    stop, errors = threading.Event(), []

    def work(seed):
        rng = random.Random(seed)
        while not stop.is_set():
            try:
                match rng.randrange(4):
                    case 0:
                        chat.add([f"late {seed} a", f"late {seed} b"])
                    case 1:
                        assert len(chat.messages()) % 2 == 0
                    case 2:
                        chat.search("turn")
                    case 3:
                        chat.context("turn?")
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        memory.restore(tmp_path / "one")
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    memory.restore(tmp_path / "one")
    memory.flush()
    assert [m.id for m in chat.messages()] == [f"m{n}" for n in range(20)]
    assert index_keys(memory) == live_keys(memory)


async def test_the_async_twins(opened, tmp_path):
    """They do the same, and progress is told."""
    memory = opened(**PLAIN)
    await memory.session("s").aadd([f"turn {n} {'x' * 500}" for n in range(300)])
    seen = []
    await memory.abackup(tmp_path / "one", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    seen.clear()
    done = await memory.arestore(tmp_path / "one", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert done.sessions == 1
    assert done.created_at < datetime.now(UTC)
