"""The commands that take a memory elsewhere and back: `export`, `backup`, `restore`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import render
from .importing import shown_progress
from .options import JsonOption, PathOption, UserOption, opened


def export(
    file: Annotated[Path, typer.Argument(help="The file to write; one that is there is replaced.", show_default=False)],
    *,
    user: UserOption = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only of this tenant.", show_default=False)] = None,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="With the vectors, so that nothing has to be embedded again.")
    ] = False,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a memory, or what is of a user or a tenant, to a file of JSON lines, which `import` takes in."""
    with shown_progress() as progress, opened(path, words_only=not vectors) as memory:
        task = progress.add_task("exporting", total=None)
        done = memory.export(
            file,
            user_id=user,
            tenant=tenant,
            vectors=vectors,
            progress=lambda n, total: progress.update(task, completed=n, total=total),
        )
    if json_:
        typer.echo(render.as_json(asdict(done)))
    else:
        typer.echo(
            f"Exported {done.entries:,} entries and {done.values:,} values of {done.sessions:,} conversations: "
            f"{done.bytes:,} bytes in {file}."
        )
        if done.unread:
            render.err().print(
                f"{done.unread:,} entries could not be read from the archive and are not in it; run neuralflow-memory doctor"
            )


def backup(
    to: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    *,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Copy a memory into a new folder, also while it is in use; the copy is checked."""
    with shown_progress() as progress, opened(path, words_only=True) as memory:
        task = progress.add_task("copying", total=None)
        done = memory.backup(to, progress=lambda n, total: progress.update(task, completed=n, total=total))
    if json_:
        typer.echo(render.as_json({**asdict(done), "path": str(done.path)}))
    else:
        typer.echo(
            f"Backed up {done.entries:,} entries of {done.sessions:,} conversations: {done.bytes:,} bytes in {done.path}."
        )
        _tell(done.damaged)


def restore(
    backup: Annotated[Path, typer.Argument(help="What `backup` has made.", show_default=False)],
    *,
    restore_deleted: Annotated[
        bool, typer.Option("--restore-deleted", help="Bring back also what was deleted since.")
    ] = False,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Go back to a backup, or make a new folder of one. What was added since is gone; what was deleted stays deleted."""
    with shown_progress() as progress, opened(path, create=True) as memory:
        task = progress.add_task("reading", total=None)
        done = memory.restore(
            backup,
            restore_deleted=restore_deleted,
            progress=lambda n, total: progress.update(task, completed=n, total=total),
        )
    if json_:
        typer.echo(render.as_json(asdict(done)))
    else:
        left_out = f"; {done.left_out:,} left out, as they were deleted since" if done.left_out else ""
        typer.echo(
            f"Restored {done.entries:,} entries of {done.sessions:,} conversations, as of "
            f"{done.created_at:%Y-%m-%d %H:%M:%S} UTC{left_out}."
        )
        _tell(done.damaged)


def _tell(damaged: Mapping[str, str]) -> None:
    """Say which blocks of the archive can't be read."""
    for why in damaged.values():
        render.err().print(render.said(why))
