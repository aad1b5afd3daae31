"""The command that builds the vector index anew: `reindex`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import render
from .importing import shown_progress
from .options import JsonOption, PathOption, opened

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def reindex(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Another embedding model to take up; by default the one in use.", show_default=False
        ),
    ] = None,
    compare_only: Annotated[
        bool, typer.Option("--compare-only", help="Embed with the other model and compare, but leave this one in use.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", min=0, help="How many questions to compare by.")] = 50,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Build the vector index anew, from the vectors there are or with another embedding model, also while the memory is in use.

    With another model nothing is in its way: search goes on with the one in use until all is embedded and both were compared.
    Stopped, it goes on where it was when it is run again.
    """
    if compare_only and model is None:
        raise typer.BadParameter("say which other model is meant: --model NAME", param_hint="--compare-only")
    with shown_progress() as progress, opened(path) as memory:
        bars = _Bars(
            progress,
            ["indexing"] if model is None or memory.stats()["embedder"] == model else ["embedding", "indexing"],
        )
        try:
            done = memory.reindex(model, progress=bars, samples=samples, switch=not compare_only)
        except KeyboardInterrupt:
            progress.stop()
            typer.echo("stopped; nothing is lost, run it again to go on", err=True)
            raise typer.Exit(130) from None
    if json_:
        typer.echo(render.as_json(asdict(done)))
        return
    render.out().print(render.said(str(done)), soft_wrap=True)
    if done.switched and done.previous is not None:
        render.out().print(
            render.said(
                f"Open it with this model from now on: NEURALFLOW_EMBEDDER__MODEL={model}, or embedder={model!r}."
            ),
            soft_wrap=True,
        )


class _Bars:
    """A bar for each of several things that are done one after the other."""

    def __init__(self, progress: Progress, names: list[str]) -> None:
        self._progress = progress
        self._names = names
        self._bar: TaskID | None = None
        self._last = 0

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None or (done < self._last and self._names):
            self._bar = self._progress.add_task(self._names.pop(0), total=total)
        self._last = done
        self._progress.update(self._bar, completed=done, total=total)


__all__ = ["reindex"]
