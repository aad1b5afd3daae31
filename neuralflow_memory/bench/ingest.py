"""Ingest: what `add` and `flush` take beyond the embedding and Chroma's own upserts; and the memory of a long import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from .chroma import RawChroma
from .embedding import default_embedder
from .measure import interleaved
from .processes import child
from .rows import Goal, Row, compared
from .sizes import Bench
from .texts import Texts

SECTION = "ingest"
_ROUNDS = 3
_LONGEST_ROUND = 5_000
_SESSION = 20
_MB = 1_000_000


def ingest(bench: Bench) -> Iterator[Row]:
    """The same words, in another order, three ways in turns; then the peak of a bulk import."""
    yield _speed(bench)
    yield from _peak(bench)


def _speed(bench: Bench) -> Row:
    from neuralflow_memory import open_memory

    folder, texts = bench.folder / "ingest", Texts(3)
    folder.mkdir()
    rounds = max(_ROUNDS, bench.sizes.ingest // _LONGEST_ROUND)
    said = [[texts.chatty() for _ in range(max(1, bench.sizes.ingest // rounds))] for _ in range(rounds + 1)]
    others = [[texts.shuffled(text) for text in part] for part in said]
    vectors: dict[int, Any] = {}
    with ExitStack() as stack:
        embedder, note = stack.enter_context(default_embedder(bench))
        memory = stack.enter_context(open_memory(folder / "memory", embedder=embedder))
        raw = stack.enter_context(RawChroma(folder / "chroma"))

        def ours(number: int) -> None:
            for start in range(0, len(said[number]), _SESSION):
                memory.session(f"{number}-{start}", user_id="ada").add(said[number][start : start + _SESSION])
            memory.flush()

        def apart(number: int) -> None:
            vectors[number] = embedder.embed_documents(others[number])
            raw.upsert(others[number], vectors[number], user="ada")

        took = interleaved({"ours": ours, "apart": apart}, rounds=rounds, warm_up=1, most=float("inf"))
    return compared(
        SECTION,
        f"add and flush, {len(said[0]):,} messages at a time",
        took["ours"],
        against="the embedder alone, then Chroma's upserts",
        peer=took["apart"],
        at=bench.sizes.ingest,
        size="messages",
        goal=Goal("at most 1.1 x", most=1.1, of="ratio"),
        note=note,
    )


def _peak(bench: Bench) -> Iterator[Row]:
    """How much the peak grows while the last three quarters of an import are written."""
    grown: dict[str, float] = {}
    for name in ("bulk", "bulk-raw"):
        found = child(name, bench.folder / name, bench.sizes.bulk)
        grown[name] = (found["all"] - found["quarter"]) / _MB
    yield compared(
        SECTION,
        "bulk import: growth of the peak of RAM after the first quarter",
        [grown["bulk"]],
        unit="MB",
        against="Chroma's upserts alone",
        peer=[grown["bulk-raw"]],
        at=bench.sizes.bulk,
        size="messages",
        note="vectors that cost nothing; Chroma keeps its index in RAM",
    )


__all__ = ["ingest"]
