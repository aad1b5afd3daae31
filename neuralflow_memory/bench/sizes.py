"""How much is measured: a little in two minutes, or all of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the sections measure. A tuple of sizes is a curve."""

    turns: tuple[int, ...] = (100, 1_000)
    """Turns that a conversation has when the next one is measured."""
    turn_rounds: int = 30
    totals: tuple[int, ...] = (1_000, 10_000)
    """Entries of all users together."""
    scope: int = 100
    """Entries of each of these users."""
    owners: tuple[int, ...] = (5_000,)
    """Entries of one user."""
    chroma: int = 100_000
    """Entries that a Chroma of its own is filled with, at most."""
    searches: int = 60
    ingest: int = 360
    """Messages, in three rounds."""
    bulk: int = 2_000
    """Messages of the import whose memory is watched."""
    embedded: int = 160
    """Texts."""
    loop_runs: int = 5
    loop_calls: int = 200
    loop_entries: int = 1_000
    crowd_rounds: int = 4
    crowd_turns: int = 30
    """A round, while others write."""
    sessions: int = 10_000
    """Idle ones."""
    loop_model: bool = False
    """Whether those calls embed with the default model, or with vectors that cost nothing."""
    real_model: bool = True
    """Whether the default embedding model is loaded at all."""

    def scaled(self, factor: float) -> Sizes:
        """As many times so much of everything that is counted in entries, messages, turns and rounds; at least a few."""
        new: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                new[field.name] = tuple(dict.fromkeys(max(8, int(n * factor)) for n in value))
            elif not isinstance(value, bool) and field.name != "loop_runs":
                new[field.name] = max(4, int(value * factor))
        return replace(self, **new)


QUICK = Sizes()
FULL = Sizes(
    turns=(100, 1_000, 10_000),
    turn_rounds=200,
    totals=(1_000, 10_000, 100_000, 1_000_000),
    owners=(5_000, 50_000, 200_000),
    searches=200,
    ingest=100_000,
    bulk=100_000,
    embedded=2_048,
    loop_entries=5_000,
    crowd_turns=300,
    loop_model=True,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every section is given."""

    sizes: Sizes
    folder: Path
    """An empty folder for what they write."""


__all__ = ["FULL", "QUICK", "Bench", "Sizes"]
