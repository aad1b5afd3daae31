"""Folders, settings, missing libraries and full disks: typed errors, and nothing of anybody's is touched."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap

import pytest
from conftest import rows

from neuralflow_memory import ConfigError, FolderError, StorageError, StorageFull, open_memory
from neuralflow_memory import Message as M
from neuralflow_memory.sources import read_settings
from neuralflow_memory.testing import HashingEmbedder


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    """FolderError, and not a file more or less."""
    (tmp_path / "thesis.txt").write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(FolderError, match=r"thesis\.txt"):
        open_memory(tmp_path, embedder="none")
    assert files(tmp_path) == before


def test_a_database_of_another_program_is_left_alone(tmp_path):
    """Even one under our file's name: not a byte of it changes."""
    db = sqlite3.connect(tmp_path / "ledger.sqlite3")
    db.execute("CREATE TABLE accounts (id)")
    db.execute("INSERT INTO accounts VALUES (1)")
    db.commit()
    db.close()
    before = files(tmp_path)["ledger.sqlite3"]
    with pytest.raises(FolderError, match="not a memory"):
        open_memory(tmp_path, embedder="none")
    assert files(tmp_path)["ledger.sqlite3"] == before
    assert set(files(tmp_path)) <= {"ledger.sqlite3", "lock"}


def test_a_folder_of_a_newer_version_is_left_alone(opened, folder):
    """It says to upgrade."""
    opened().close()
    db = sqlite3.connect(folder / "ledger.sqlite3")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FolderError, match="upgrade"):
        opened()
    db = sqlite3.connect(folder / "ledger.sqlite3")
    assert db.execute("PRAGMA user_version").fetchone() == (99,)
    db.close()


@pytest.mark.parametrize("damage", ["garbage", "header", "middle"])
def test_a_damaged_ledger_is_a_folder_error(opened, folder, damage):
    """At open or at the first read that meets the damage; stats(verify=True) finds it too."""
    with opened() as memory:
        memory.session("chat").add([f"Turn {n} " + "word " * 200 for n in range(50)])
    file = folder / "ledger.sqlite3"
    whole = file.read_bytes()
    if damage == "garbage":
        file.write_bytes(os.urandom(len(whole)))
    elif damage == "header":
        file.write_bytes(b"\0" * 100 + whole[100:])
    else:
        file.write_bytes(whole[:8192] + os.urandom(len(whole) - 3 * 8192) + whole[-2 * 8192 :])
    with pytest.raises(FolderError, match=r"backup|not a memory") as error:
        memory = opened()
        memory.session("chat").messages()
    assert isinstance(error.value, OSError)
    assert error.value.path == str(file)


def test_a_damaged_chroma_folder_is_a_typed_error_and_can_be_thrown_away(opened, folder):
    """What it held comes back from the ledger."""
    with opened() as memory:
        memory.session("chat").add("Sailing")
        memory.flush()
    (folder / "chroma" / "chroma.sqlite3").write_bytes(os.urandom(50_000))
    with pytest.raises(StorageError, match="Chroma"):
        opened()
    shutil.rmtree(folder / "chroma")
    memory = opened()
    memory.flush()
    assert memory.stats()["chroma"] == 1


def test_a_file_in_place_of_the_folder(tmp_path):
    """FolderError for the folder itself, StorageError for a file on the way to it."""
    file = tmp_path / "memory"
    file.write_text("a file")
    with pytest.raises(FolderError, match="is a file"):
        open_memory(file, embedder="none")
    with pytest.raises(StorageError):
        open_memory(file / "below", embedder="none")
    assert file.read_text() == "a file"


def test_a_failed_open_keeps_nothing_open(opened, folder, tmp_path):
    """After the cause is mended, the same process opens the folder."""
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    for _ in range(3):
        with pytest.raises(FolderError):
            opened()
    (folder / "thesis.txt").unlink()
    (folder / "ledger.sqlite3").write_text("not a database, but long enough to look like one" * 100)
    with pytest.raises(FolderError):
        opened()
    (folder / "ledger.sqlite3").unlink()
    assert opened().session("chat").add("Hello")


# -- settings


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": {"totl": 5}}, "totl"),
        ({"budget": {"total": -5}}, "budget.total"),
        ({"pruning": {"max_context_items": 30}}, "summarization_threshold"),
        ({"pruning": {"max_context_tokens": 5000}}, "conversation"),
        ({"durability": "eternal"}, "durability"),
        ({"colour": "blue"}, "colour"),
        ({"tokenizer": "no-such-encoding"}, "no-such-encoding"),
    ],
)
def test_a_wrong_setting_is_named(folder, options, named):
    """ConfigError, and no folder is made."""
    with pytest.raises(ConfigError, match=named):
        open_memory(folder, embedder="none", **options)


def test_all_problems_of_settings_are_told_at_once(monkeypatch):
    """Also those from the environment; and a file that is not there or can't be read."""
    monkeypatch.setenv("NEURALFLOW_BUDGET__TOTAL", "many")
    with pytest.raises(ConfigError) as error:
        read_settings("x", durability="eternal")
    assert "budget.total" in str(error.value)
    assert "durability" in str(error.value)


def test_a_settings_file_that_is_not_there_or_broken(tmp_path):
    """ConfigError names it."""
    with pytest.raises(ConfigError, match="nope"):
        read_settings(tmp_path / "nope.toml")
    (tmp_path / "bad.toml").write_text("[budget\n")
    with pytest.raises(ConfigError):
        read_settings(tmp_path / "bad.toml")


# -- what is missing


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_the_embedding_library_search_is_by_words_and_one_warning_says_so(folder):
    """The pip line is in it; embedder='none' is silent."""
    code = """
        import json, sys, warnings
        sys.modules["sentence_transformers"] = None
        from neuralflow_memory import open_memory
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open_memory(sys.argv[1]) as memory:
                memory.session("chat").add("Sailing")
                found = len(memory.session("chat").search("sailing"))
            told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
            with open_memory(sys.argv[1], embedder="none"):
                pass
        print(json.dumps([found, told, len(caught)]))
    """
    found, told, warned = run(code, folder)
    assert found == 1
    assert len(told) == warned == 1
    assert "pip install" in told[0]


def test_a_missing_cloud_library_is_named_with_the_pip_line(folder):
    """MissingDependency, which is an ImportError; nothing stays open."""
    code = """
        import json, sys
        sys.modules["google.genai"] = None
        from neuralflow_memory import MissingDependency, open_memory
        try:
            open_memory(sys.argv[1], embedder="none", gemini={"project": "p"})
        except ImportError as error:
            assert isinstance(error, MissingDependency)
            told = str(error)
        with open_memory(sys.argv[1], embedder="none") as memory:
            memory.session("chat").add("Hello")
        print(json.dumps(told))
    """
    assert "pip install 'neuralflow-memory[gemini]'" in run(code, folder)


# -- no space


def test_no_space_is_told_and_nothing_is_half_written(memory, chat):
    """StorageFull from every write; reads go on, and so do writes once there is space."""
    chat.add([M("user", "Hello", id="a"), "Second"])
    memory.flush()
    db = memory._core.parts.ledger._db._writer
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    before = rows(memory), chat.messages(), chat.messages(view="window")
    big = "word " * 100_000
    calls = [
        lambda: chat.add(["fine", big]),
        lambda: chat.remember(big),
        lambda: chat.replace(["fine", big]),
        lambda: chat.entries.update("a", content=big),
    ]
    for call in calls:
        with pytest.raises(StorageFull, match="free some space"):
            call()
        assert (rows(memory), chat.messages(), chat.messages(view="window")) == before
    db.execute("PRAGMA max_page_count = 1000000")
    chat.add(big)
    memory.flush()
    assert len(chat.messages()) == 3


def test_a_disk_that_fills_up_loses_nothing_acknowledged(folder):
    """A process whose files may not grow gets StorageError; what it had acknowledged is there, and whole."""
    code = """
        import json, resource, sys
        from neuralflow_memory import StorageError, open_memory
        from neuralflow_memory.testing import HashingEmbedder
        memory = open_memory(sys.argv[1], embedder=HashingEmbedder())
        chat = memory.session("chat")
        acknowledged = chat.add("First")
        memory.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
        told = None
        try:
            for n in range(100_000):
                acknowledged += chat.add([f"Turn {n} " + "word " * 200, f"Answer {n} " + "word " * 200])
        except StorageError as error:
            told = str(error)
        assert [m.id for m in chat.messages()] == acknowledged
        print(json.dumps([acknowledged, told]), flush=True)
        import os
        os._exit(0)
    """
    acknowledged, told = run(code, folder)
    assert told
    assert len(acknowledged) % 2 == 1
    with open_memory(folder, embedder=HashingEmbedder()) as memory:
        memory.flush()
        assert [m.id for m in memory.session("chat").messages()] == acknowledged
        assert memory.stats(verify=True)["integrity"] == "ok"
