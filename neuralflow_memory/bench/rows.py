"""One line of the result: what was measured, against what, and whether a goal is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison, or one figure that stands alone.

    Attributes:
        section: Which section of the bench.
        what: What of ours was measured.
        at: The size at which it was measured; None where there is none.
        size: What is counted by *at*, e.g. "turns".
        unit: The unit of *ours* and *peer*.
        ours: The median; None where it can't be measured here.
        against: What it is compared with.
        peer: The peer's median; None where there is no peer, or it was not measured.
        ratio: The median of ours over the peer's, pair by pair.
        goal: The goal in words.
        met: Whether it is met; None without a goal, or where the goal is for another size.
        note: What else there is to say, such as why a peer is missing.
    """

    section: str
    what: str
    at: int | None = None
    size: str = ""
    unit: str = "ms"
    ours: float | None = None
    against: str = ""
    peer: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit, and what holds if it is met.

    Attributes:
        text: The goal in words.
        most: The most that the value may be.
        least: The least that the value must be.
        of: The value: our own figure, the ratio, or by how much ours exceeds the peer's.
        applies: Whether the sizes measured are those that the goal is about.
    """

    text: str
    most: float | None = None
    least: float | None = None
    of: Literal["ours", "ratio", "beyond"] = "ours"
    applies: bool = True

    def met(self, *, ours: float | None, peer: float | None, ratio: float | None) -> bool | None:
        """Whether the goal is met; None where that was not measured."""
        beyond = None if ours is None or peer is None else ours - peer
        value = {"ours": ours, "ratio": ratio, "beyond": beyond}[self.of]
        if not self.applies or value is None:
            return None
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


def at_most(factor: float, *, applies: bool = True) -> Goal:
    """No more than *factor* times what the peer takes."""
    return Goal(f"at most {factor:g} x", most=factor, of="ratio", applies=applies)


def faster(factor: float, *, applies: bool = True) -> Goal:
    """At least *factor* times as fast as the peer."""
    return Goal(f"at least {factor:g} x faster", most=1 / factor, of="ratio", applies=applies)


def paired(ours: Sequence[float], peer: Sequence[float]) -> float | None:
    """The median of the ratios of what was measured side by side."""
    ratios = [a / b for a, b in zip(ours, peer, strict=False) if b > 0]
    return median(ratios) if ratios else None


def compared(
    section: str,
    what: str,
    ours: Sequence[float],
    *,
    against: str = "",
    peer: Sequence[float] = (),
    at: int | None = None,
    size: str = "",
    unit: str = "ms",
    goal: Goal | None = None,
    note: str = "",
) -> Row:
    """A row of medians: of seconds (shown in milliseconds), or of whatever *unit* says.

    *ours* and *peer* are pairs as far as both go.
    """
    scale = 1000.0 if unit == "ms" else 1.0
    middle = median(ours) * scale if ours else None
    theirs = median(peer) * scale if peer else None
    ratio = paired(ours, peer)
    return Row(
        section,
        what,
        at=at,
        size=size,
        unit=unit,
        ours=middle,
        against=against,
        peer=theirs,
        ratio=ratio,
        goal="" if goal is None else goal.text,
        met=None if goal is None else goal.met(ours=middle, peer=theirs, ratio=ratio),
        note=note,
    )


__all__ = ["Goal", "Row", "at_most", "compared", "faster", "paired"]
