"""Cold entries: their texts leave for blocks of the archive, and everything shows them as before."""

import json
import threading

import pytest
from conftest import SMALL, CountingEmbedder, found, in_threads, index_keys, live_keys, texts, wait_until

from neuralflow_memory import ArchiveError, InputError, MemoryType, Message, NotFound, StorageError, ToolCall
from neuralflow_memory.pipeline import archive as pipeline_archive
from neuralflow_memory.storage.archive import FileArchive
from neuralflow_memory.testing import ManualClock

WORDS = ["sailing", "tomatoes", "invoice", "harbour", "Berlin", "garden", "engine", "storm", "letter", "violin"]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def memory(opened, clock):
    return opened(pruning=SMALL, clock=clock)


def said(n):
    """A message with every part that a message may have."""
    about = f"Turn {n} speaks of {WORDS[n % 10]} and number{n}, naïve 🙂 記憶"
    if n % 10 == 3:
        return Message("assistant", about, id=f"t{n}", tool_calls=[ToolCall(f"c{n}", "look", {"x": [1, None]})])
    if n % 10 == 4:
        return Message("tool", about, id=f"t{n}", tool_call_id=f"c{n - 1}", name="look")
    if n % 10 == 5:
        picture = {"type": "image", "url": "a.png"}
        return Message("user", [{"type": "text", "text": about}, picture], id=f"t{n}", metadata={"n": n})
    return Message("user" if n % 2 else "assistant", about, id=f"t{n}", payload={"host": [n, "é"]} if n % 3 else None)


def talk(chat, turns=40):
    chat.add([said(n) for n in range(turns)])
    chat.memory.flush()
    return chat.messages()


def files(memory):
    return sorted((memory.path / "archive").glob("*")) if (memory.path / "archive").exists() else []


def stored(memory, number):
    """What the ledger's row says of an entry's text."""
    with memory._core.parts.ledger._db.read() as db:
        return db.execute("SELECT content, body, payload, metadata FROM entries WHERE no = ?", (number,)).fetchone()


def warm(chat):
    return chat.entries.count(filter={"tier": "warm", "type": "short_term"})


# -- what stays the same


def test_a_cold_entry_reads_as_it_did_and_is_nowhere_else(memory, chat):
    """Equal in every field; its text has left the ledger, its vector the ledger, Chroma and RAM."""
    before = talk(chat)
    chat.search("sailing")
    entries = {e.id: e for e in chat.entries.list()}
    old = [e.id for e in entries.values() if e.position is None and e.type == "short_term"]
    assert chat.entries.archive(old) == len(old) > 20
    memory.flush()
    assert chat.messages() == before
    cold = chat.entries.list(filter={"tier": "cold"})
    assert [e.id for e in cold] == old
    for e in cold:
        same = {name: getattr(e, name) for name in e.__slots__ if name != "tier"}
        assert same == {name: getattr(entries[e.id], name) for name in same}
        assert stored(memory, e.number) == ("", None, None, None)
        assert chat.entries.get(e.id) == e
    state = memory.stats()
    assert (state["cold"], state["dirty"]) == (len(old), 0)
    assert state["vectors"] == len(entries) - len(old)
    assert index_keys(memory) == live_keys(memory)
    assert not {e.key for e in cold} & index_keys(memory)
    index = memory._core.parts.resident(chat.scope).index
    assert not any(index.vectors.of(index.number.searchsorted([e.number for e in cold])).any(axis=1))


@pytest.mark.parametrize("embedder", ["none", None])
def test_full_text_ranks_as_if_nothing_were_cold(opened, clock, embedder):
    """By words alone: the same hits with the same scores before and after, also after reopening."""
    options = {"pruning": SMALL, "clock": clock} | ({"embedder": "none"} if embedder else {})
    memory = opened(**options)
    chat = memory.session("chat", user_id="ada")
    talk(chat)
    queries = ["number7", "sailing", "garden harbour", "number31 storm", "speaks of violin"]

    def ranking():
        hits = [chat.search(q, k=50) for q in queries]
        if embedder:
            return [[(h.entry.id, h.score) for h in own] for own in hits]
        return [[h.entry.id for h in own if h.signals["lexical"] > 0][:1] for own in hits[:1]]

    before = ranking()
    assert chat.entries.archive([f"t{n}" for n in range(30)]) >= 20
    memory.flush()
    assert ranking() == before
    memory.close()
    chat = opened(**options).session("chat", user_id="ada")
    assert ranking() == before


def test_cold_entries_are_not_embedded_again_until_they_are_warm(opened, clock):
    """Neither by the background, nor by a search, nor by a new index, nor after reopening."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder, pruning=SMALL, clock=clock)
    chat = memory.session("chat", user_id="ada")
    talk(chat, 20)
    number = chat.entries.archive([f"t{n}" for n in range(10)])
    assert number > 5
    memory.flush()
    memory.close()
    embedder.texts.clear()
    memory = opened(embedder=embedder, pruning=SMALL, clock=clock)
    chat = memory.session("chat", user_id="ada")
    assert found(chat.search("number1", k=1)) == [said(1).text]
    memory.reindex()
    memory.flush()
    assert embedder.texts == []
    assert index_keys(memory) == live_keys(memory)
    chat.entries.get("t1")
    assert memory.sweep().count("warm") == 1
    memory.flush()
    assert embedder.texts == [said(1).text]
    assert index_keys(memory) == live_keys(memory)


def test_what_was_never_embedded_does_not_wait_for_it_once_it_is_cold(opened, clock):
    """Without an embedder entries wait for one; those that are cold don't."""
    memory = opened(embedder="none", pruning=SMALL, clock=clock)
    chat = memory.session("chat", user_id="ada")
    talk(chat, 20)
    waiting = memory.stats()["dirty"]
    number = chat.entries.archive([f"t{n}" for n in range(10)])
    assert memory.stats()["dirty"] == waiting - number


def test_what_is_archived_while_it_waits_for_the_index_leaves_it(opened, clock):
    """A version of it may be there: a changed entry that is not embedded yet is taken out of Chroma."""
    memory = opened(pruning=SMALL, clock=clock)
    chat = memory.session("chat", user_id="ada")
    talk(chat, 20)
    with memory._core._indexing:
        chat.entries.update("t1", tags=["x"])
        assert chat.entries.archive("t1") == 1
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats()["dirty"] == 0


def test_each_block_is_opened_once(memory, chat, monkeypatch):
    """A transcript of many blocks, a listing, and a search with many hits."""
    monkeypatch.setattr(pipeline_archive, "BLOCK_ENTRIES", 16)
    monkeypatch.setattr(pipeline_archive, "_AT_ONCE", 16)
    before = talk(chat, 200)
    chat.entries.archive(filter={"type": "short_term"})
    blocks = memory.stats()["blocks"]
    assert blocks >= 10
    archive = memory._core.parts.archive
    for call in (chat.messages, chat.entries.list, lambda: chat.search("speaks", k=200)):
        archive._unpacked.clear()
        opened = archive.opened
        call()
        assert archive.opened == opened + blocks
        call()
        assert archive.opened == opened + blocks  # they are in RAM now
    assert chat.messages() == before


def test_ram_keeps_only_so_much_of_what_was_unpacked(tmp_path):
    """The blocks read last, up to eight megabytes."""
    archive = FileArchive(tmp_path / "archive")
    names = [archive.write({n: bytes(3_000_000)}) for n in range(5)]
    for name in names:
        archive.read(name)
    assert list(archive._unpacked) == names[-2:]
    assert archive._bytes == 6_000_000


# -- by hand


def test_archiving_by_hand(memory, chat):
    """By id, key or filter, with a label to list it by; what has to stay warm is left, and nothing moves twice."""
    talk(chat)
    fact = chat.remember("Ida plays the violin", tags=["music"])
    key = chat.entries.get("t1").key
    assert chat.entries.archive(["t0", key]) == 2
    assert chat.entries.archive(["t0", key]) == 0
    assert chat.entries.archive(filter={"content": {"$contains": "sailing"}}, label="boats") > 0
    assert chat.entries.archive(filter={"tags": {"$contains": "music"}}, within="user", label="boats") == 1
    boats = chat.entries.list(filter={"archive_label": "boats"})
    assert fact in {e.id for e in boats}
    assert all(e.id == fact or "sailing" in e.content for e in boats)
    assert {e.archive_label for e in chat.entries.list(filter={"tier": "cold"})} == {None, "boats"}
    window = [m.id for m in chat.messages(view="window")]
    assert chat.entries.archive(window) == 0
    chat.pin("t7")
    chat.unpin("t7")
    assert chat.entries.get("t7").tier == "warm"
    memory.sweep()
    assert {e.id for e in chat.entries.list(filter={"archive_label": "boats"})} == {e.id for e in boats}


def test_wrong_input_archives_nothing(memory, chat):
    """Neither or both of ids and filter, an empty filter, a label that is none, an unknown id."""
    talk(chat)
    for wrong in (
        {},
        {"ids": ["t0"], "filter": {"role": "user"}},
        {"filter": {}},
        {"ids": 7},
        {"ids": "t0", "label": ""},
        {"ids": "t0", "label": 7},
        {"ids": "t0", "label": "x" * 201},
    ):
        with pytest.raises(InputError):
            chat.entries.archive(**wrong)
    with pytest.raises(NotFound):
        chat.entries.archive(["t0", "nobody"])
    assert memory.stats()["cold"] == 0


def test_nobody_archives_what_is_another_users(memory, chat):
    """Ids and keys of others are unknown, and a filter sees one's own."""
    talk(chat)
    other = memory.session("chat", user_id="eve")
    other.add("Mine")
    with pytest.raises(NotFound):
        other.entries.archive(chat.entries.get("t0").key)
    assert other.entries.archive(filter={"role": "assistant"}, within="user") == 0
    assert memory.stats()["cold"] == 0


async def test_archiving_has_a_twin(memory, chat):
    """`aarchive` does the same."""
    talk(chat)
    assert await chat.entries.aarchive(["t0", "t1"]) == 2


# -- changing and deleting what is cold


def test_an_update_makes_it_warm_and_keeps_what_it_does_not_change(memory, chat):
    """Tags only: its text is as it was, no summary goes for it, and the vector comes back."""
    talk(chat)
    chat.entries.archive(["t5", "t7"])
    memory.flush()
    summary = chat.summary()
    tagged = chat.entries.update("t5", tags=["kept"])
    assert (tagged.tier, tagged.version) == ("warm", 2)
    assert chat.summary() == summary
    assert chat.entries.get("t5") == tagged
    assert chat.entries.get("t5").message == said(5) or chat.entries.get("t5").content == said(5).text
    changed = chat.entries.update("t7", content="Something else entirely")
    assert (changed.content, changed.tier) == ("Something else entirely", "warm")
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert found(chat.search("entirely", k=1)) == ["Something else entirely"]


def test_adding_what_is_cold_again_changes_nothing_and_a_conflict_is_one(memory, chat):
    """An equal id and content is no error; other content is, or replaces."""
    before = talk(chat)
    chat.entries.archive([f"t{n}" for n in range(10)])
    assert chat.add([said(n) for n in range(10)]) == [f"t{n}" for n in range(10)]
    with pytest.raises(ValueError, match="taken"):
        chat.add(Message("user", "Other", id="t1"))
    assert chat.messages() == before
    assert memory.stats()["cold"] > 5
    chat.add(Message("user", "Other", id="t1"), on_conflict="replace")
    assert chat.entries.get("t1").content == "Other"
    assert chat.entries.get("t1").tier == "warm"


def test_what_is_deleted_leaves_its_block_with_the_next_sweep(opened, memory, chat):
    """Its bytes are in no file of the archive; the others of the block are as they were."""
    plain = {"pruning": SMALL, "clock": ManualClock(), "tiers": {"enable_compression": False}}
    memory.close()
    memory = opened(**plain)
    chat = memory.session("chat", user_id="ada")
    before = talk(chat)
    chat.entries.archive([f"t{n}" for n in range(20)])
    (old,) = files(memory)
    assert b"number7," in old.read_bytes()
    chat.entries.delete("t7")
    chat.entries.update("t8", content="No more of it")
    with pytest.raises(NotFound):
        chat.entries.get("t7")
    report = memory.sweep()
    assert report.rewritten == 1
    (new,) = files(memory)
    assert new != old
    assert b"number7," not in new.read_bytes()
    assert b"number8," not in new.read_bytes()
    assert b"number9," in new.read_bytes()
    assert [m for m in chat.messages() if m.id != "t8"] == [m for m in before if m.id not in ("t7", "t8")]
    chat.clear()
    memory.sweep()
    assert files(memory) == []
    assert memory.stats()["blocks"] == memory.stats()["cold"] == 0


def test_small_blocks_become_larger_ones(memory, chat):
    """What becomes cold by and by does not end up in a file each."""
    before = talk(chat)
    for n in range(20):
        chat.entries.archive(f"t{n}")
    assert len(files(memory)) == memory.stats()["blocks"] == 1
    assert chat.messages() == before


def test_blocks_hold_entries_of_one_user_and_one_label(memory, chat):
    """So that none is written anew for somebody else."""
    talk(chat)
    other = memory.session("chat", user_id="eve")
    talk(other)
    for who in (chat, other):
        who.entries.archive([f"t{n}" for n in range(5)])
        who.entries.archive([f"t{n}" for n in range(5, 10)], label="old")
    assert len(files(memory)) == 4
    assert texts(chat.messages()) == texts(other.messages())


def test_a_cold_turn_that_returns_to_the_window_is_in_the_prompt(memory, chat):
    """Pinned, or given back by a summary: read from the archive, and out of it once it is changed."""
    talk(chat)
    chat.entries.archive([f"t{n}" for n in range(20)])
    chat.pin("t1")
    assert "t1" in [m.id for m in chat.messages(view="window")]
    assert said(1).text in texts(chat.context(max_tokens=2000).messages)
    memory._core.parts.residents.forget()  # as after reopening
    assert said(1).text in texts(chat.context(max_tokens=2000).messages)
    memory.sweep()
    assert "t1" in [m.id for m in chat.messages(view="window")]
    chat.entries.delete("t3")
    memory.flush()
    assert said(6).text in texts(chat.messages())
    chat.entries.update("t1", importance=0.9)
    assert chat.entries.get("t1").tier == "warm"
    assert "t1" in [m.id for m in chat.messages(view="window")]


def test_values_find_their_texts_however_old(memory):
    """What a keyed value is found by stays warm, by hand too."""
    values = memory.values(user_id="ada")
    values.put(("notes",), "a", {"x": 1}, texts=["Sailing on Sunday"])
    chat = memory.session("chat", user_id="ada")
    chat.add("Hello")
    assert chat.entries.archive(filter={"type": "long_term"}, within="user") == 0


# -- what can't be read


def damage(memory, how):
    (file,) = files(memory)
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    memory._core.parts.archive._unpacked.clear()
    return file


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "flipped"])
def test_a_damaged_block_is_named_and_the_rest_goes_on(memory, chat, how):
    """What reads just it raises; search, prompt, transcript and listing go on without it; it can be brought back."""
    before = talk(chat)
    chat.entries.archive([f"t{n}" for n in range(20)])
    cold = {e.id for e in chat.entries.list(filter={"tier": "cold"})}
    (file,) = files(memory)
    whole = file.read_bytes()
    damage(memory, how)
    with pytest.raises(ArchiveError) as error:
        chat.entries.get("t1")
    assert error.value.block == file.stem
    assert file.stem in str(error.value)
    assert isinstance(error.value, StorageError)
    with pytest.raises(ArchiveError):
        chat.entries.update("t1", tags=["x"])
    assert {m.id for m in chat.messages()} == {m.id for m in before} - cold
    assert {e.id for e in chat.entries.list(types=["short_term"])} == {m.id for m in before} - cold
    assert found(chat.search("number1", k=3, filter={"role": "user"})) is not None
    assert chat.context("number1", max_tokens=1000).messages
    chat.add(Message("user", "And on it goes", id="new"))
    state = memory.stats(verify=True)
    assert list(state["archive_damaged"]) == [file.stem]
    assert memory.sweep().damaged.keys() == {file.stem}
    assert chat.entries.delete("t2") == 1
    file.write_bytes(whole)
    assert {m.id for m in chat.messages()} == {m.id for m in before} - {"t2"} | {"new"}
    assert memory.stats(verify=True)["archive_damaged"] == {}
    assert memory.sweep().rewritten == 1
    assert chat.entries.get("t1").content == said(1).text


def test_a_filter_that_can_not_be_judged_deletes_nothing(memory, chat):
    """Where a block can't be read, deleting by a filter raises, and nothing has gone."""
    talk(chat)
    chat.entries.archive([f"t{n}" for n in range(20)])
    damage(memory, "flipped")
    with pytest.raises(ArchiveError):
        chat.entries.delete(filter={"content": {"$contains": "sailing"}})
    assert chat.entries.count() >= 40


def test_a_full_disk_moves_nothing(memory, chat, monkeypatch):
    """The error says so, no file is left, and every text is where it was."""
    before = talk(chat)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neuralflow_memory.storage.archive.os.fsync", full)
    with pytest.raises(StorageError, match="space"):
        chat.entries.archive(["t1"])
    monkeypatch.undo()
    assert files(memory) == []
    assert memory.stats()["cold"] == 0
    assert chat.messages() == before


def test_files_that_nobody_knows_go_with_the_next_sweep(memory, chat):
    """Left by a process that was killed between writing a block and telling the ledger."""
    talk(chat)
    chat.entries.archive(["t1", "t2"])
    archive = memory.path / "archive"
    (archive / "feed.part").write_bytes(b"half")
    name = memory._core.parts.archive.write({7: b"nobody's"})
    assert len(files(memory)) == 3
    memory.sweep()
    assert [f.stem for f in files(memory)] != [name]
    assert len(files(memory)) == 1
    assert chat.entries.get("t1").content == said(1).text


# -- beside others


def test_another_process_sees_what_became_cold_and_warm(memory, chat, beside):
    """Its search finds it, it does not embed it, and reads it after its block was replaced."""
    other = beside(memory)
    theirs = other.session("chat", user_id="ada")
    before = talk(chat)
    theirs.search("sailing")
    chat.entries.archive([f"t{n}" for n in range(10)])
    memory.flush()
    assert theirs.messages() == before
    assert found(theirs.search("number7", k=1)) == [said(7).text]
    resident = other._core.parts.resident(theirs.scope)
    assert not resident.index.pending.any()
    assert resident.index.cold.any()
    chat.entries.delete("t3")
    memory.sweep()
    assert [m.id for m in theirs.messages()] == [m.id for m in before if m.id != "t3"]
    theirs.entries.get("t5")
    other._core.parts.write_uses()
    assert memory.sweep().count("warm") == 1
    memory.flush()
    assert theirs.entries.get("t5").tier == "warm"


def test_reading_goes_on_while_blocks_are_replaced(memory, chat):
    """Readers never meet the moment between a block and the one that takes its place."""
    before = talk(chat, 60)
    chat.entries.archive([f"t{n}" for n in range(50)])
    stop = threading.Event()

    def read():
        while not stop.is_set():
            memory._core.parts.archive._unpacked.clear()
            assert chat.messages() == before
            assert chat.entries.get("t1").content == said(1).text

    def write():
        try:
            for n in range(2, 42):
                chat.entries.update(f"t{n}", importance=0.5)
                chat.entries.archive(f"t{n}")
                if n % 4 == 0:
                    memory.sweep()
        finally:
            stop.set()

    in_threads(read, read, write)
    assert memory.stats()["archive_damaged"] == {}


def test_uses_are_written_in_batches_and_on_closing(opened, memory, chat):
    """Reads write nothing: so many entries at once do, in the background, or the end."""
    talk(chat)
    writes = memory._core.parts.ledger.data_version()
    for n in range(40):
        chat.entries.get(f"t{n}")
    assert memory._core.parts.ledger.data_version() == writes
    chat.context("number7 sailing")

    def counted(memory):
        with memory._core.parts.ledger._db.read() as db:
            return dict(db.execute("SELECT no, count FROM uses"))

    assert counted(memory) == {}
    number = chat.entries.get("t1").number
    memory.close()
    memory = opened(pruning=SMALL, clock=ManualClock())
    assert counted(memory)[number] >= 2
    chat = memory.session("many", user_id="ada")
    ids = chat.add([f"Turn {n}" for n in range(600)])
    for own in ids:
        chat.entries.get(own)
    wait_until(lambda: len(counted(memory)) > 500)


def test_stats_and_the_plan_are_json(memory, chat):
    """For monitoring: what is cold, in how many blocks and bytes, and when it was swept."""
    talk(chat)
    chat.entries.archive(["t1"])
    memory.sweep()
    state = json.loads(json.dumps(memory.stats(), default=str))
    assert state["cold"] == state["blocks"] == 1
    assert state["archive_bytes"] == files(memory)[0].stat().st_size
    assert state["last_sweep"]["archive"] == 0


def test_a_vacuum_gives_the_room_back(opened, clock, monkeypatch):
    """The ledger's file shrinks, and Chroma's folder is made anew without what has left it; all is found as before."""
    monkeypatch.setattr("neuralflow_memory.storage.chroma._WORTH_IT", 10)
    memory = opened(clock=clock, pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    before = talk(chat, 1200)
    chat.entries.archive(filter={"type": "short_term"})
    memory.flush()
    size = sum(f.stat().st_size for f in memory.path.glob("ledger.sqlite3*"))
    rows = sum(f.stat().st_size for f in (memory.path / "chroma").glob("*/data_level0.bin"))
    memory.vacuum()
    assert sum(f.stat().st_size for f in memory.path.glob("ledger.sqlite3*")) < size / 2
    assert sum(f.stat().st_size for f in (memory.path / "chroma").glob("*/data_level0.bin")) < rows / 2
    assert index_keys(memory) == live_keys(memory)
    assert chat.messages() == before
    assert chat.search("number77", k=1, types=[MemoryType.SHORT_TERM])[0].signals["lexical"] > 0
