"""What models take: tokens and money spent on summaries, and how their token counts compare with ours."""

from __future__ import annotations

import sqlite3

from ...types import Summary

_SUMS = ("calls", "input_tokens", "output_tokens", "cost")


def spend(db: sqlite3.Connection, session: int, *, day: int, summary: Summary) -> None:
    """Count one call of the summarizer for *session* on *day*."""
    db.execute(
        "INSERT INTO spending VALUES (?, ?, 1, ?, ?, ?) ON CONFLICT (day, session) DO UPDATE SET calls = calls + 1, "
        "input_tokens = input_tokens + excluded.input_tokens, output_tokens = output_tokens + excluded.output_tokens, "
        "cost = cost + excluded.cost",
        (day, session, summary.input_tokens, summary.output_tokens, summary.cost),
    )


def spent(db: sqlite3.Connection, *, day: int | None, session: int | None) -> dict[str, float]:
    """Sums over all that was counted, or over a day's or a session's."""
    given = {name: value for name, value in (("day", day), ("session", session)) if value is not None}
    where = f"WHERE {' AND '.join(f'{name} = :{name}' for name in given)}" if given else ""
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in _SUMS)
    row = db.execute(f"SELECT {sums} FROM spending {where}", given).fetchone()
    return dict(zip(_SUMS, row, strict=True))


def calibrate(db: sqlite3.Connection, *, tenant: str, model: str, ratio: float) -> tuple[int, float, float]:
    """Take in one ratio of *model*: count, mean and squared deviations after it (Welford, Technometrics 4, 1962)."""
    known = {row[1]: row[2:] for row in calibration(db, tenant=tenant)}
    n, mean, m2 = known.get(model, (0, 0.0, 0.0))
    away = ratio - mean
    mean += away / (n + 1)
    row = (n + 1, mean, m2 + away * (ratio - mean))
    db.execute("INSERT OR REPLACE INTO calibration VALUES (?, ?, ?, ?, ?)", (tenant, model, *row))
    return row


def calibration(db: sqlite3.Connection, *, tenant: str | None) -> list[tuple[str, str, int, float, float]]:
    """Tenant, model, and the count, mean and squared deviations of its ratios: of all tenants or of one."""
    where, given = ("", ()) if tenant is None else ("WHERE tenant = ?", (tenant,))
    return db.execute(f"SELECT tenant, model, n, mean, m2 FROM calibration {where}", given).fetchall()
