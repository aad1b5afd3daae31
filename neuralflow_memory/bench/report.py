"""Running the sections, and the result as JSON or as Markdown."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .crowd import processes
from .embedding import embedding
from .event_loop import event_loop
from .footprint import footprint
from .ingest import ingest
from .rows import Row
from .scopes import search
from .sizes import Bench, Sizes
from .turn import turn

SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "turn": turn,
    "search": search,
    "ingest": ingest,
    "embedding": embedding,
    "loop": event_loop,
    "processes": processes,
    "footprint": footprint,
}
_TITLES = {
    "turn": "The turn",
    "search": "Search in a scope",
    "ingest": "Ingest",
    "embedding": "Embedding",
    "event loop": "The event loop",
    "processes": "Many processes",
    "footprint": "Footprint",
}
_PACKAGES = (
    "neuralflow-memory",
    "chromadb",
    "numpy",
    "tiktoken",
    "sentence-transformers",
    "torch",
    "onnxruntime",
    "langchain-core",
    "llama-index-core",
)
_MET = {True: "met", False: "not met", None: ""}


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured, and where."""

    machine: Mapping[str, str]
    versions: Mapping[str, str]
    rows: Sequence[Row]
    seconds: Mapping[str, float]
    """What each section took, filling included."""


def measured(names: Sequence[str], sizes: Sizes, *, begun: Callable[[str], object] = lambda _: None) -> Result:
    """Run the sections *names*, in a folder that goes away; *begun* is told the name of each."""
    rows: list[Row] = []
    seconds = {}
    for name in names:
        begun(name)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="neuralflow-bench-") as folder:
            rows += SECTIONS[name](Bench(sizes, Path(folder)))
        seconds[name] = round(time.perf_counter() - start, 1)
    return Result(_machine(), _versions(), rows, seconds)


def as_json(result: Result) -> dict[str, Any]:
    """The result as JSON values."""
    return {
        "machine": dict(result.machine),
        "versions": dict(result.versions),
        "rows": [asdict(row) for row in result.rows],
        "seconds": dict(result.seconds),
    }


def as_markdown(result: Result) -> str:
    """The result as Markdown: a table for each section."""
    lines = [", ".join(result.machine.values()) + ".", _listed(result.versions) + "."]
    for section, rows in sections(result.rows).items():
        lines += [
            "",
            f"## {section}",
            "",
            "| what | at | ours | against | theirs | ratio | goal | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def sections(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by the titles of their sections."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_TITLES[row.section], []).append(row)
    return found


def cells(row: Row) -> list[str]:
    """A row as text: what, at which size, ours, against what, theirs, the ratio, the goal, whether it is met or what to note."""
    at = "" if row.at is None else f"{row.at:,} {row.size}"
    said = "; ".join(filter(None, (_MET[row.met], row.note)))
    if row.goal and row.met is None:
        said = "; ".join(filter(None, ("not judged at this size" if row.ours is not None else "", row.note)))
    return [
        row.what,
        at,
        figure(row.ours, row.unit),
        row.against,
        figure(row.peer, row.unit),
        ratio(row.ratio),
        row.goal,
        said,
    ]


def figure(value: float | None, unit: str) -> str:
    """A value with its unit."""
    if value is None:
        return ""
    digits = (
        4 if unit in ("cosine", "share") else 0 if abs(value) >= 100 or value == 0 else 1 if abs(value) >= 10 else 2
    )
    return f"{value:,.{digits}f} {unit}"


def ratio(value: float | None) -> str:
    """How many times as much ours is; "1/50" for a fiftieth."""
    if value is None:
        return ""
    if 0 < value < 0.5:
        return f"1/{1 / value:,.0f}"
    return f"{value:.2f}"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _machine() -> dict[str, str]:
    """Processor, cores, RAM, system and Python."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    found = {"processor": processor, "cores": f"{os.cpu_count()} cores"}
    with suppress(OSError, ValueError, AttributeError):
        found["ram"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB of RAM"
    return {**found, "system": platform.system(), "python": f"Python {platform.python_version()}"}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


__all__ = ["SECTIONS", "Result", "as_json", "as_markdown", "cells", "figure", "measured", "ratio", "sections"]
