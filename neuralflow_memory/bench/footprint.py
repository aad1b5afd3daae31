"""Footprint: what an import loads, and what RAM a memory and its sessions take."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .processes import child, imported
from .rows import Goal, Row, compared
from .sizes import Bench

SECTION = "footprint"
_ALLOWED = ("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection")
"""pydantic, and what it loads."""
_MB = 1_000_000
_IMPORTS = 3


def footprint(bench: Bench) -> Iterator[Row]:
    """Imports; RAM beyond Chroma, embedder and tokenizer; RAM of idle sessions."""
    yield from _imports()
    yield _beyond(bench)
    yield from _idle(bench)


def _imports() -> Iterator[Row]:
    ours = [imported("neuralflow_memory") for _ in range(_IMPORTS)]
    peer = [imported("pydantic.main") for _ in range(_IMPORTS)]
    others = _others(ours[0]["modules"])
    yield compared(
        SECTION,
        "import neuralflow_memory: packages beyond the standard library and pydantic",
        [float(len(others))],
        unit="packages",
        goal=Goal("none", most=0),
        note=", ".join(others[:8]),
    )
    yield compared(
        SECTION,
        "import neuralflow_memory",
        [found["seconds"] for found in ours],
        against="import pydantic.main",
        peer=[found["seconds"] for found in peer],
        note=f"{len(ours[0]['modules'])} modules",
    )


def _others(modules: Sequence[str]) -> list[str]:
    """The packages among *modules* that are neither the standard library's, nor pydantic's, nor ours."""
    packages = {module.partition(".")[0] for module in modules}
    known = {*sys.stdlib_module_names, *_ALLOWED, "neuralflow_memory"}
    return sorted(p for p in packages - known if not p.startswith(("_sysconfigdata", "__")))


def _beyond(bench: Bench) -> Row:
    folder, messages = bench.folder / "footprint", bench.sizes.bulk
    child("bulk", folder, messages)
    alone = child("parts-alone", folder, messages)["resident"]
    ours = child("searching", folder, messages)["resident"]
    what = "RAM after a search for each user, beyond Chroma, embedder and tokenizer"
    here: dict[str, Any] = {"at": messages, "size": "entries", "unit": "MB"}
    goal = Goal("at most 200 MB", most=200.0)
    if alone is None or ours is None:
        return Row(SECTION, what, goal=goal.text, note="this system doesn't say what a process holds", **here)
    note = f"{ours / _MB:,.0f} MB in all, {alone / _MB:,.0f} without us"
    return compared(SECTION, what, [(ours - alone) / _MB], goal=goal, note=note, **here)


def _idle(bench: Bench) -> Iterator[Row]:
    found = child("idle", bench.folder / "idle", bench.sizes.sessions)
    goal = Goal(f"at most 10 MB for {_SESSIONS:,}", most=10.0, applies=bench.sizes.sessions == _SESSIONS)
    for what, name, limit in (
        ("sessions idle for an hour after a turn of 85 words, beside as many in use", "idle", goal),
        ("sessions in use, after a turn of 85 words", "used", None),
        ("session objects without a turn", "objects", None),
    ):
        if found[name] is None:
            yield Row(SECTION, what, unit="MB", note="this system doesn't say what a process holds")
            continue
        yield compared(
            SECTION, what, [found[name] / _MB], unit="MB", at=bench.sizes.sessions, size="sessions", goal=limit
        )


_SESSIONS = 10_000

__all__ = ["footprint"]
