"""A sweep: plans, does it in batches, is resumed, and runs in the background when asked for."""

import json
import subprocess
import sys
from datetime import timedelta

import pytest
from conftest import SMALL, in_threads, index_keys, live_keys, rows, wait_until
from typer.testing import CliRunner

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import MemoryType, Message, MissingDependency, Move, SweepReport, open_memory
from neuralflow_memory.cli import app
from neuralflow_memory.pipeline import archive as pipeline_archive
from neuralflow_memory.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def memory(opened, clock):
    return opened(pruning=SMALL, clock=clock)


def talk(chat, turns=20, first=0):
    chat.add([Message("user", f"Turn {n} of sailing, number{n}", id=f"t{n}") for n in range(first, first + turns)])
    chat.memory.flush()


def tiers(chat):
    found = {"warm": set(), "cold": set()}
    for e in chat.entries.list(types=["short_term"]):
        found[e.tier].add(e.id)
    return found


def window(chat):
    return {m.id for m in chat.messages(view="window")}


def test_what_nobody_uses_becomes_cold(memory, chat, clock):
    """After thirty days, the window excepted; not before, and nothing moves twice."""
    talk(chat)
    clock.advance(days=29)
    assert memory.sweep().moves == ()
    clock.advance(days=2)
    report = memory.sweep()
    assert (report.count("archive"), report.done) == (len(report.moves), len(report.moves))
    assert tiers(chat)["warm"] == window(chat)
    assert tiers(chat)["cold"] == {m.id for m in report.moves}
    assert memory.sweep().moves == ()


def test_a_dry_run_moves_nothing_and_says_all(memory, chat, clock):
    """The same moves with the same reasons as the real one, in print and as HTML."""
    talk(chat)
    clock.advance(days=31)
    before = rows(memory)
    plan = memory.sweep(dry_run=True)
    assert (rows(memory), tiers(chat)["cold"]) == (before, set())
    assert memory.stats()["last_sweep"] is None
    report = memory.sweep()
    assert plan.moves == report.moves
    for shown in (str(plan), plan._repr_html_()):
        for move in plan.moves:
            assert move.id in shown
        assert "to archive" in shown
        assert "not used for 31 days" in " ".join(shown.split())
    assert "<script" not in plan._repr_html_()
    assert all(move.session_id == "chat" and move.user_id == "ada" for move in plan.moves)


def test_a_report_of_thousands_is_cut_and_says_so():
    """A thousand moves are shown, the rest is counted."""
    move = Move("archive", "t1", MemoryType.SHORT_TERM, None, None, "tiers", "because")
    report = SweepReport("sweep-1", ManualClock()(), dry_run=True, moves=(move,) * 1500, complete=False)
    assert "1,500 to archive" in str(report)
    assert "and 500 more" in str(report)
    assert "cut short" in str(report)


def test_what_is_used_comes_back(memory, chat, clock):
    """Read by `get`, or quoted in a prompt; a search, a listing or a transcript is no use."""
    talk(chat)
    clock.advance(days=31)
    memory.sweep()
    chat.search("number3", k=5)
    chat.messages()
    chat.entries.list()
    assert memory.sweep().moves == ()
    chat.entries.get("t3")
    quoted = {c.id for c in chat.context("number5").report if c.part == "hit" and c.included}
    report = memory.sweep()
    assert {m.id for m in report.moves} == {"t3"} | (quoted - window(chat))
    assert "t5" in {m.id for m in report.moves}
    assert all(m.what == "warm" for m in report.moves)
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    clock.advance(days=29)
    assert memory.sweep().moves == ()
    clock.advance(days=2)
    assert {m.id for m in memory.sweep().moves} >= {"t3", "t5"}


def test_what_is_used_often_stays(memory, chat, clock):
    """Of importance enough, it is not cold before its uses have faded."""
    talk(chat)
    chat.entries.update("t1", importance=0.9)
    for _ in range(5):
        chat.entries.get("t1")
    clock.advance(days=31)
    memory.sweep()
    assert tiers(chat)["warm"] == window(chat) | {"t1"}
    clock.advance(days=30)
    memory.sweep()
    assert tiers(chat)["warm"] == window(chat)


def test_options_change_what_moves(opened, clock):
    """Other ages, and never."""
    memory = opened(
        pruning=SMALL,
        clock=clock,
        tiers={"warm_tier_max_age_days": 5, "min_access_count_warm": 1},
        archive={"after_days": None},
    )
    chat = memory.session("chat", user_id="ada")
    talk(chat)
    chat.entries.get("t1")
    clock.advance(days=6)
    memory.sweep()
    assert "t1" in tiers(chat)["cold"]  # one use counts less than one now
    memory.close()
    memory = opened(pruning=SMALL, clock=clock, tiers={"warm_tier_max_age_days": None}, archive={"after_days": None})
    chat = memory.session("chat", user_id="ada")
    talk(chat, first=20)
    clock.advance(days=9999)
    assert memory.sweep().moves == ()


@pytest.mark.parametrize("kind", ["zlib", "zstd", None])
def test_compression_is_an_option(opened, clock, kind):
    """Blocks of any kind are read whatever the option is now."""
    named = {"enable_compression": False} if kind is None else {"compression": kind}
    memory = opened(pruning=SMALL, clock=clock, tiers=named)
    chat = memory.session("chat", user_id="ada")
    talk(chat, 60)
    clock.advance(days=31)
    memory.sweep()
    (block,) = (memory.path / "archive").glob("*.block")
    assert (b"number7" in block.read_bytes()) is (kind is None)
    assert block.read_bytes()[4] == [None, "zlib", "zstd"].index(kind)
    memory.close()
    memory = opened(pruning=SMALL, clock=clock, tiers={"compression": "zstd" if kind == "zlib" else "zlib"})
    assert len(memory.session("chat", user_id="ada").messages()) == 60


def test_without_its_library_zstd_is_refused_by_name(folder, monkeypatch):
    """Before anything is written."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependency, match=r"neuralflow-memory\[zstd\]"):
        open_memory(folder, embedder="none", tiers={"compression": "zstd"})
    open_memory(folder, embedder="none").close()


def test_every_message_stays_reachable_by_default(opened, clock):
    """Ten years, a sweep each quarter: in the transcript, by `get`, and by its words; nothing is deleted."""
    memory = opened(embedder="none", pruning=SMALL, clock=clock, retention={"max_entries": 3})
    chat = memory.session("chat", user_id="ada")
    facts = [chat.remember(f"Known fact number{1000 + n}", importance=0.1) for n in range(10)]
    for quarter in range(40):
        talk(chat, 6, first=6 * quarter)
        clock.advance(days=91)
        report = memory.sweep()
        assert report.count("delete") == 0
    ids = [f"t{n}" for n in range(240)]
    assert [m.id for m in chat.messages()] == ids
    assert memory.stats()["cold"] > 200
    for n in (0, 1, 77, 239):
        assert chat.entries.get(f"t{n}").content == f"Turn {n} of sailing, number{n}"
        assert f"t{n}" in {h.entry.id for h in chat.search(f"number{n}", k=3)}
    for n, own in enumerate(facts):
        assert chat.entries.get(own).content == f"Known fact number{1000 + n}"
        assert own in {h.entry.id for h in chat.search(f"number{1000 + n}", k=2)}


def test_each_user_by_themselves(memory, clock):
    """One user's number of entries takes nothing of another's; users without a session are swept, too."""
    for user in ("ada", "eve", None):
        talk(memory.session("chat", user_id=user), 10)
    clock.advance(days=31)
    report = memory.sweep()
    assert {m.user_id for m in report.moves} == {"ada", "eve", None}
    assert {m.session_id for m in report.moves} == {"chat"}
    for user in ("ada", "eve", None):
        assert len(memory.session("chat", user_id=user).messages()) == 10


class CutShort(BaseException):
    """Ends a sweep where a killed process would end."""


PLACES = [(name, n) for n in (1, 2) for name in failpoints.FAILPOINTS if name.startswith("archive.")]
PLACES.remove(("archive.replaced", 2))  # only one block is replaced, the one that was not full


@pytest.mark.parametrize("place", PLACES)
def test_a_sweep_that_is_cut_short_is_resumed(memory, chat, clock, monkeypatch, place):
    """At whatever place: everything is there, and the next sweep does the rest."""
    name, passing = place
    monkeypatch.setattr(pipeline_archive, "BLOCK_ENTRIES", 4)
    monkeypatch.setattr(pipeline_archive, "_AT_ONCE", 3)
    talk(chat, 30)
    before = chat.messages()
    chat.entries.archive("t0")
    clock.advance(days=31)
    left = [passing]

    def cut(passed):
        left[0] -= passed == name
        if left[0] == 0 and passed == name:
            raise CutShort

    failpoints.hook = cut
    try:
        with pytest.raises(CutShort):
            memory.sweep()
    finally:
        failpoints.hook = None
    assert chat.messages() == before
    memory.sweep()
    memory.flush()
    assert chat.messages() == before
    assert tiers(chat)["warm"] == window(chat)
    blocks = list((memory.path / "archive").iterdir())
    assert len(blocks) == memory.stats()["blocks"]
    assert index_keys(memory) == live_keys(memory)
    assert memory.stats(verify=True)["archive_damaged"] == {}


def test_writing_goes_on_beside_a_sweep(memory, chat, clock):
    """Adds, changes, deletes and reads by several threads: nothing is lost or comes back."""
    talk(chat, 100)
    clock.advance(days=31)

    def sweep():
        for _ in range(6):
            memory.sweep()

    def change():
        for n in range(0, 60, 3):
            chat.entries.update(f"t{n}", content=f"Changed {n}")
            chat.entries.delete(f"t{n + 1}")

    def add():
        for n in range(100, 130):
            chat.add(Message("user", f"Turn {n} of sailing, number{n}", id=f"t{n}"))

    in_threads(sweep, sweep, change, add)
    memory.flush()
    memory.sweep()
    memory.flush()
    expected = {f"t{n}": f"Turn {n} of sailing, number{n}" for n in range(130)}
    for n in range(0, 60, 3):
        expected[f"t{n}"] = f"Changed {n}"
        del expected[f"t{n + 1}"]
    assert {m.id: m.content for m in chat.messages()} == expected
    assert index_keys(memory) == live_keys(memory)


async def test_sweeping_has_twins(memory, chat, clock):
    """`asweep`, `aundo` and `avacuum` do the same."""
    talk(chat)
    clock.advance(days=31)
    assert (await memory.asweep(dry_run=True)).moves == (await memory.asweep()).moves
    with pytest.raises(LookupError):
        await memory.aundo("sweep-0")
    await memory.avacuum()


# -- in the background


def test_in_the_background_when_asked_for(opened, clock):
    """Every so many seconds; not by default."""
    options = {"pruning": SMALL, "clock": clock}
    memory = opened(**options)
    talk(memory.session("chat", user_id="ada"))
    assert memory._core._sweep_at is None
    memory.close()
    clock.advance(days=31)
    memory = opened(**options, tiers={"background": True, "tier_migration_interval": 0.1})
    chat = memory.session("chat", user_id="ada")
    wait_until(lambda: memory.stats()["cold"] > 0)
    chat.entries.get("t1")
    wait_until(lambda: tiers(chat)["warm"] >= {"t1"})


def test_the_interval_counts_from_the_last_sweep_by_anybody(opened, clock):
    """A process that starts again sweeps when it is time, not at once."""
    memory = opened(clock=clock)
    memory.sweep()
    memory.close()
    clock.advance(seconds=600)
    core = opened(clock=clock, tiers={"background": True})._core
    import time

    assert 2900 < core._sweep_at - time.monotonic() <= 3000


@pytest.mark.parametrize("embedder", ["none", "hashing"])
def test_only_the_process_that_indexes_sweeps_in_the_background(opened, beside, clock, embedder):
    """The other one does not; when the first has closed, it takes over."""
    options = {"embedder": "none"} if embedder == "none" else {}
    memory = opened(**options, pruning=SMALL, clock=clock, tiers={"tier_migration_interval": 0.05, "background": True})
    other = beside(memory, clock=clock)
    if embedder == "none":
        assert memory._core._lock.take()  # as if it were sweeping all the time
    talk(memory.session("chat", user_id="ada"))
    swept = []
    other._core._told = swept.append
    clock.advance(days=31)
    memory.sweep()
    for _ in range(3):
        before = other._core._sweep_at
        wait_until(lambda before=before: other._core._sweep_at != before)
    assert swept == []
    memory.close()
    wait_until(lambda: swept)


def test_a_refusal_in_the_background_is_told(opened, clock):
    """stats() has it as the last error."""
    tiers_ = {"tier_migration_interval": 0.05, "background": True}
    memory = opened(clock=clock, tiers=tiers_, retention={"delete": True, "max_delete_share": 0})
    memory.session("chat", user_id="ada").remember("Something", importance=0.1)
    clock.advance(days=91)
    wait_until(lambda: "max_delete_share" in (memory.stats()["last_error"] or ""))


# -- from a shell


@pytest.fixture
def folder_of_before(tmp_path, monkeypatch):
    """A folder whose entries were written two months ago, as the machine's clock has it."""
    from datetime import UTC, datetime

    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    monkeypatch.setenv("NEURALFLOW_RETENTION__MAX_DELETE_SHARE", "1")
    clock = ManualClock(datetime.now(UTC) - timedelta(days=100))
    with open_memory(tmp_path / "memory", embedder="none", pruning=SMALL, clock=clock) as memory:
        talk(memory.session("chat", user_id="ada"))
        memory.session("chat", user_id="ada").remember("Ada likes [bold]tea[/bold]", importance=0.1)
    return tmp_path / "memory"


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_sweeps(folder_of_before, monkeypatch):
    """The plan, then the moves; as a table and as JSON; deleted and brought back."""
    plan = run("sweep", "--path", folder_of_before, "--dry-run")
    assert "to archive" in plan
    assert "t3" in plan
    moves = json.loads(run("sweep", "--path", folder_of_before, "--dry-run", "--json"))["moves"]
    monkeypatch.setenv("NEURALFLOW_RETENTION__DELETE", "true")
    done = json.loads(run("sweep", "--path", folder_of_before, "--json", "--vacuum"))
    assert done["done"] == len(moves)
    assert [m["what"] for m in done["moves"]].count("delete") == 1
    facts = json.loads(run("stats", "--path", folder_of_before, "--json"))
    assert (facts["cold"], facts["discarded"]) == (len(moves) - 1, 1)
    assert "1 entries are back" in run("sweep", "--path", folder_of_before, "--undo", done["run"])
    assert "cold entries" in run("doctor", "--path", folder_of_before)
    assert "20 archived" not in run("sweep", "--path", folder_of_before)


def test_doctor_names_a_damaged_block(folder_of_before):
    """And what to do about it; the exit code says that something is wrong."""
    run("sweep", "--path", folder_of_before)
    (block,) = (folder_of_before / "archive").glob("*.block")
    block.write_bytes(block.read_bytes()[:-1])
    result = CliRunner().invoke(app, ["doctor", "--path", str(folder_of_before)])
    assert result.exit_code == 1
    assert block.stem in result.output.replace("\n", "").replace(" ", "")


# -- a long time


def test_a_sweep_imports_nothing_heavy():
    """The rules of tiers and retention know neither clock nor files; import-linter holds the rest."""
    code = (
        "import sys, neuralflow_memory.rules.retention; print([n for n in ('chromadb', 'sqlite3') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
