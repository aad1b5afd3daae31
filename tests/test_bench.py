"""`neuralflow-memory bench`: what it prints, and that a goal that is missed is shown as missed. Not how fast anything is."""

import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from typer.testing import CliRunner

from neuralflow_memory import open_memory
from neuralflow_memory.bench import filling, peers, scopes
from neuralflow_memory.bench.measure import interleaved
from neuralflow_memory.bench.plot import curves, svg
from neuralflow_memory.bench.report import SECTIONS, Result, as_json, as_markdown, cells
from neuralflow_memory.bench.rows import Goal, Row, at_most, compared, faster
from neuralflow_memory.bench.sizes import FULL, QUICK, Bench, Sizes
from neuralflow_memory.bench.texts import Texts
from neuralflow_memory.bench.vectors import PreparedEmbedder, nearest, recall
from neuralflow_memory.cli import app

FIELDS = {"section", "what", "at", "size", "unit", "ours", "against", "peer", "ratio", "goal", "met", "note"}


@pytest.fixture
def run(monkeypatch):
    """Run the command as a user would, at a hundredth of its sizes, without the embedding model."""
    from neuralflow_memory.bench import sizes

    monkeypatch.setattr(sizes, "QUICK", sizes.replace(QUICK, real_model=False))
    monkeypatch.setenv("COLUMNS", "250")

    def call(*args, code=0):
        result = CliRunner().invoke(app, ["bench", "--scale", "0.01", *map(str, args)])
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.mark.slow
def test_every_section_yields_rows_that_are_json(run, tmp_path):
    """All of it, tiny: each row has every field, medians are numbers, and each section has one that was measured."""
    drawn = tmp_path / "curves.svg"
    found = json.loads(run("--json", "--plot", drawn).stdout)
    assert set(found) == {"machine", "versions", "rows", "seconds"}
    assert found["machine"]["cores"]
    assert found["versions"]["chromadb"]
    assert all(set(row) == FIELDS for row in found["rows"])
    measured = {row["section"] for row in found["rows"] if row["ours"] is not None}
    assert measured == {"turn", "search", "ingest", "event loop", "processes", "footprint"}
    (embedding,) = [row for row in found["rows"] if row["section"] == "embedding"]
    assert "without the model" in embedding["note"]
    assert all(math.isfinite(row["ours"]) for row in found["rows"] if row["ours"] is not None)
    paired = {row["against"] for row in found["rows"] if row["ratio"] is not None}
    assert {peers.BareSqlite.name, peers.TrimMessages.name, peers.LlamaIndexMemory.name} <= paired
    assert {scopes._FILTERED, scopes._UNFILTERED} <= paired
    titles = [e.text for e in ET.parse(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert any("length of the conversation" in t for t in titles)
    assert any("entries of all users" in t for t in titles)


def test_search_by_meaning_alone_is_exact(run):
    """What the bench calls exact is compared with a plain product."""
    found = json.loads(run("--json", "--only", "search").stdout)
    shares = [row["ours"] for row in found["rows"] if row["unit"] == "share"]
    assert shares == [1.0] * len(shares)
    assert len(shares) >= 2


def test_beyond_what_chroma_is_given_the_ledger_is_filled_directly(tmp_path):
    """Its entries are found by meaning and by words, and nothing is left to be indexed."""
    sizes = Sizes(totals=(40, 80), chroma=40, scope=10, owners=(30,), searches=4)
    found = [(row.what, row.at, row.ours) for row in scopes.search(Bench(sizes, tmp_path))]
    (ours,) = [ours for what, at, ours in found if what == "hybrid search, ledger only" and at == 80]
    assert ours > 0
    with open_memory(tmp_path / "search" / "total-80", embedder=PreparedEmbedder()) as memory:
        stats = memory.stats()
        said = memory.session("s0", user_id=filling.name(5)).messages()
        hits = memory.session("ask", user_id=filling.name(5)).search(said[3].text, k=3)
    assert (stats["entries"], stats["vectors"], stats["dirty"]) == (80, 80, 0)
    assert len(said) == 10
    assert hits[0].entry.content == said[3].text
    assert "dense" in hits[0].signals


def test_sections_are_chosen_and_shown(run):
    """As a table, and as Markdown; a wrong name says which there are."""
    shown = run("--only", "turn").stdout
    assert "The turn" in shown
    assert "Search in a scope" not in shown
    assert "goals are met" in shown
    printed = run("--only", "turn", "--markdown").stdout
    assert "## The turn" in printed
    assert "| core |" in printed
    assert "turn, search, ingest" in run("--only", "speed", code=2).output


def test_a_goal_that_is_missed_is_shown_as_missed():
    """And one that is met as met; one for another size is not judged; ratios are medians of pairs."""
    slow = compared("turn", "core", [0.004, 0.004], against="bare", peer=[0.001, 0.0005], goal=at_most(3))
    assert (slow.ours, slow.peer, slow.ratio, slow.met) == (4.0, 0.75, 6.0, False)
    assert cells(slow)[-1] == "not met"
    assert compared("turn", "core", [0.002], peer=[0.001], goal=at_most(3)).met is True
    assert compared("search", "x", [0.001], peer=[0.050], goal=faster(50)).met is True
    assert compared("search", "x", [0.001], peer=[0.049], goal=faster(50)).met is False
    elsewhere = compared("search", "x", [0.001], peer=[0.049], goal=faster(50, applies=False))
    assert elsewhere.met is None
    assert "not judged" in cells(elsewhere)[-1]
    beyond = Goal("at most 10 ms more", most=10.0, of="beyond")
    assert compared("event loop", "x", [0.031], peer=[0.020], goal=beyond).met is False
    assert compared("event loop", "x", [0.029], peer=[0.020], goal=beyond).met is True
    assert compared("event loop", "x", [], peer=[0.020], goal=beyond).met is None
    text = as_markdown(Result({"cores": "2 cores"}, {"numpy": "2"}, [slow], {}))
    assert "| core |  | 4.00 ms | bare | 0.75 ms | 6.00 | at most 3 x | not met |" in text
    assert as_json(Result({}, {}, [slow], {}))["rows"][0]["met"] is False


def test_a_peer_that_is_missing_says_so():
    """Its row stays, with what is to be installed."""

    def make():
        import nowhere_to_be_found  # noqa: F401

    assert peers.installed(make) == (None, "not installed: nowhere_to_be_found")
    assert cells(Row("turn", "core", against="them", note="not installed: them"))[-1] == "not installed: them"


def test_calls_are_taken_in_turns_and_slow_ones_drop_out():
    """Each round begins with another one; the warm-up doesn't count; what took too long in all is left out."""
    order = []
    took = interleaved(
        {"a": lambda n: order.append(("a", n)), "b": lambda n: order.append(("b", n))}, rounds=3, warm_up=1
    )
    assert {name: len(seconds) for name, seconds in took.items()} == {"a": 3, "b": 3}
    assert [name for name, n in order if n == 0] == ["a", "b"]
    assert [name for name, n in order if n == 1] == ["b", "a"]
    assert min(n for _, n in order) == -1
    once = interleaved({"slow": lambda n: sum(range(10_000))}, rounds=50, most=0.0)
    assert len(once["slow"]) == 1


@pytest.mark.parametrize("peer", [peers.TrimMessages, peers.ChatMemoryBuffer])
def test_the_hosts_memories_hold_what_fits(peer):
    """A peer that kept nothing would be fast: each returns the newest turns, within the budget."""
    texts = Texts(9)
    before = [(texts.sentence(30), texts.sentence(30)) for _ in range(20)]
    encode = peers.encoder()
    with peer(before, encode=encode, max_tokens=1_000) as memory:
        kept = memory.turn(("What now?", "This."))
    assert [str(m.content) for m in kept[-2:]] == ["What now?", "This."]
    tokens = sum(len(encode(str(m.content))) for m in kept)
    assert 400 < tokens <= 1_000


def test_llama_index_keeps_its_turns_in_its_file(tmp_path):
    """What it is measured at is durable, and returned."""
    file = tmp_path / "theirs.sqlite3"
    with peers.LlamaIndexMemory([("One", "Two")], file=file, encode=peers.encoder(), max_tokens=500) as memory:
        assert [m.content for m in memory.turn(("Three", "Four"))] == ["One", "Two", "Three", "Four"]
    assert b"Three" in file.read_bytes()


def test_a_bare_transaction_writes_all_that_it_is_said_to(tmp_path):
    """Two rows, their full text, their outbox rows."""
    with peers.BareSqlite(tmp_path / "bare.sqlite3", encode=peers.encoder()) as bare:
        bare.turn(("Where are the beans?", "By the wall."))
        counts = [bare._db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("messages", "words", "outbox")]
        found = bare._db.execute("SELECT rowid FROM words WHERE words MATCH 'beans'").fetchall()
        assert bare._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert counts == [2, 2, 2]
    assert found == [(1,)]


def test_prepared_vectors_are_spread_as_a_models_are():
    """Unit length, the same for the same text; cosines vary by a tenth; the exact search finds what a sort does."""
    embedder, texts = PreparedEmbedder(), Texts(10)
    said = [texts.chatty() for _ in range(500)]
    assert len(set(said)) == 500
    vectors = embedder.embed_documents(said)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(PreparedEmbedder().embed_documents(said[:3]), vectors[:3])
    question = embedder.embed_query("where?")
    products = vectors @ question
    assert 0.07 < products.std() < 0.14
    best = np.argsort(-products)[:10]
    assert nearest(vectors, question, k=10).tolist() == best.tolist()
    assert recall(vectors[best], vectors, question, k=10) == 1.0
    assert recall(vectors[best[:4]], vectors, question, k=10) == 0.4
    embedder.prepare(["where?"])
    assert np.array_equal(embedder.embed_query("where?"), question)


def test_curves_are_drawn_of_what_was_measured_at_several_sizes():
    """Ours and each peer a line; a comparison with ourselves is none; without rows the drawing is empty, and still one."""
    rows = [
        Row("turn", "core", at=n, size="turns", ours=0.2, against="bare", peer=0.1 * n, ratio=1.0) for n in (100, 1000)
    ]
    rows.append(Row("turn", "core, flat", at=1000, size="turns", ours=0.2, against="the same at 100 turns", peer=0.2))
    assert curves(rows, "turns") == {
        "ours: core": [(100, 0.2), (1000, 0.2)],
        "bare": [(100, 10.0), (1000, 100.0)],
    }
    assert len(list(ET.fromstring(svg(rows)).iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    assert list(ET.fromstring(svg([])).iter("{http://www.w3.org/2000/svg}polyline")) == []


def test_sizes_are_those_of_the_goals():
    """A full run judges every goal: the sizes that they are about are among those measured."""
    assert {100, 10_000} <= set(FULL.turns)
    assert {100_000, 1_000_000} <= set(FULL.totals)
    assert FULL.chroma == 100_000
    assert set(scopes._LIMITS) <= set(FULL.owners)
    assert FULL.sessions == 10_000
    assert (FULL.loop_calls, FULL.loop_runs) == (200, 5)
    assert set(SECTIONS) == {"turn", "search", "ingest", "embedding", "loop", "processes", "footprint"}
    assert QUICK.scaled(0.001).turns == (8,)
