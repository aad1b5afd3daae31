"""The command `bench`: what the memory costs on this machine, side by side with what it replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import render
from .options import JsonOption

if TYPE_CHECKING:
    from neuralflow_memory.bench.report import Result

_COLUMNS = ("what", "at", "ours", "against", "theirs", "ratio", "goal", "")
_NUMBERS = ("at", "ours", "theirs", "ratio")
_STYLES = {True: "green", False: "red", None: "dim"}


def bench(
    *,
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick", help="All sizes, up to a million entries: an hour, 10 GB of disk; or two minutes."
        ),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Sections: turn, search, ingest, embedding, loop, processes, footprint; with commas.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", dir_okay=False, help="Write the curves to this SVG file.", show_default=False),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    json_: JsonOption = False,
    scale: Annotated[float, typer.Option("--scale", hidden=True, help="Sizes times this, to try it out.")] = 1.0,
) -> None:
    """Measure the memory side by side with a bare transaction, Chroma, LangChain, LlamaIndex and sentence-transformers.

    It prints medians, ratios pair by pair, and whether the project's own goals are met on this machine. Times mean little on a
    machine that does something else meanwhile; the ratios still do.
    """
    from neuralflow_memory.bench.report import SECTIONS, as_json, as_markdown, measured
    from neuralflow_memory.bench.sizes import FULL, QUICK

    names = list(SECTIONS) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in SECTIONS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(SECTIONS)}", param_hint="--only")
    sizes = FULL if full else QUICK
    with render.err().status("measuring") as status:
        result = measured(
            names,
            sizes if scale == 1.0 else sizes.scaled(scale),
            begun=lambda name: status.update(f"measuring: {name}"),
        )
    if plot is not None:
        from neuralflow_memory.bench.plot import svg

        plot.write_text(svg(result.rows), encoding="utf-8")
    if json_:
        typer.echo(json.dumps(as_json(result), ensure_ascii=False, indent=2))
    elif markdown:
        typer.echo(as_markdown(result))
    else:
        _show(result)


def _show(result: Result) -> None:
    from neuralflow_memory.bench.report import cells, sections

    console = render.out()
    console.print(", ".join(result.machine.values()))
    console.print(", ".join(f"{name} {number}" for name, number in result.versions.items()), style="dim")
    for title, rows in sections(result.rows).items():
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for name in _COLUMNS:
            table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
        for row in rows:
            *shown, said = cells(row)
            table.add_row(*shown, render.said(said, style=_STYLES[row.met]))
        console.print("", table)
    goals = [row.met for row in result.rows if row.met is not None]
    console.print(f"\n{sum(goals)} of {len(goals)} goals are met; a goal is judged at the size that it is about.")
