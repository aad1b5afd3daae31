"""The command `sweep`: entries to where they belong, and back."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from neuralflow_memory import _report
from neuralflow_memory.types import SweepReport

from . import render
from .options import JsonOption, PathOption, opened


def sweep(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be moved, and why.")] = False,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Then give freed room back to the disk; nobody can write meanwhile.")
    ] = False,
    undo: Annotated[
        str | None,
        typer.Option("--undo", help="Instead, bring back what this sweep (its name) deleted.", show_default=False),
    ] = None,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Merge knowledge that says the same, move what nobody uses into the archive, bring back what is used again, and do what
    retention asks for.
    """
    with opened(path, words_only=not vacuum) as memory:
        if undo is not None:
            back = memory.undo(undo)
            typer.echo(render.as_json({"back": back}) if json_ else f"{back:,} entries are back")
            return
        report = memory.sweep(dry_run=dry_run)
        if vacuum and not dry_run:
            memory.vacuum()
    if json_:
        typer.echo(render.as_json(_plain(report)))
    else:
        render.out().print(_view(report))


def _plain(report: SweepReport) -> dict[str, object]:
    moves = [
        {
            "what": m.what,
            "id": m.id,
            "type": str(m.type),
            "user_id": m.user_id,
            "session_id": m.session_id,
            "rule": m.rule,
            "reason": m.reason,
        }
        for m in report.moves
    ]
    return {
        "run": report.run,
        "dry_run": report.dry_run,
        "done": report.done,
        "expired": report.expired,
        "refused": report.refused,
        "complete": report.complete,
        "rewritten": report.rewritten,
        "damaged": dict(report.damaged),
        "moves": moves,
    }


def _view(report: SweepReport) -> Group:
    lines = [render.said(line) for line in _report.swept(report)]
    rows = _report.move_rows(report)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in rows[0] if rows else ():
        table.add_column(name, overflow="fold", no_wrap=name in ("do", "part"))
    for row in rows:
        table.add_row(*(render.said(cell) for cell in row.values()))
    return Group(*lines, *([table] if rows else ()))
