"""Where an entry belongs: warm, with its text and vector at hand, or cold, in the archive.

What nobody uses becomes cold; a cold entry that was used since comes back. Ages count from the last use, or from the writing
where that came later, so that an old chat that is imported today is new.
"""

from __future__ import annotations

from ..config import Cold, Tiers
from ..protocols import Standing

DAY = 86_400_000_000
"""Microseconds."""


def idle_days(standing: Standing, *, now: int) -> float:
    """Days since it was used or written."""
    return max(0, now - standing.used_at) / DAY


def faded(standing: Standing, *, now: int, days: float) -> float:
    """How often it was used, where each so many *days* since its last use halve what that counts."""
    return float(standing.uses * 0.5 ** (idle_days(standing, now=now) / days))


def cooled(standing: Standing, tiers: Tiers, archive: Cold, *, now: int) -> tuple[str, str] | None:
    """The option by which a warm entry is to become cold, and the reason in words; None while it stays warm."""
    idle = idle_days(standing, now=now)
    oldest = tiers.warm_tier_max_age_days
    if oldest is not None and idle > oldest:
        uses = faded(standing, now=now, days=oldest)
        if uses < tiers.min_access_count_warm:
            return "tiers.warm_tier_max_age_days", f"not used for {idle:.0f} days, {_times(uses)} of late"
    if archive.after_days is not None and idle > archive.after_days:
        if standing.importance < archive.below_importance:
            return "archive.after_days", f"not used for {idle:.0f} days, and of importance {standing.importance:.2f}"
        if ended(standing, now=now):
            return "archive.after_days", f"not used for {idle:.0f} days, and holds no longer"
    return None


def ended(standing: Standing, *, now: int) -> bool:
    """Whether it holds no longer: something else was said since, or says the same."""
    return standing.ended_at is not None and standing.ended_at <= now


def warmed(standing: Standing) -> tuple[str, str] | None:
    """Why a cold entry is to come back; None while it stays cold."""
    assert standing.archived_at is not None
    if standing.uses and standing.used_at >= standing.archived_at:
        return "tiers", "used since it was archived"
    return None


def _times(uses: float) -> str:
    return "not used" if uses < 0.05 else f"counted as used {uses:.1f} times"


__all__ = ["DAY", "cooled", "ended", "faded", "idle_days", "warmed"]
