"""Options that several commands share, and how a command opens the memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neuralflow_memory.config import Settings
from neuralflow_memory.errors import FolderError

from . import render

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory

PathOption = Annotated[
    Path | None,
    typer.Option(
        "--path",
        help="The memory's folder, or a .toml or .yaml file of options; otherwise NEURALFLOW_PATH, or ./memory.",
        show_default=False,
    ),
]
UserOption = Annotated[str | None, typer.Option("--user", help="Whose memory.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def settings(path: Path | None) -> Settings:
    """Return what arguments, `NEURALFLOW_*` and a file of options say."""
    from neuralflow_memory.sources import read_settings

    return read_settings(path)


@contextmanager
def opened(path: Path | None, *, create: bool = False, words_only: bool = False) -> Iterator[Memory]:
    """Open the memory, and close it at the end.

    *words_only* leaves the embedding model unloaded, for commands that neither search nor embed: what they write waits, and
    is embedded when the memory is next opened with its model.

    Raises:
        FolderError: There is no such folder and *create* is false: a command that reads must not leave an
            empty memory behind a mistyped path.
    """
    from neuralflow_memory import open_memory

    chosen = settings(path)
    if not create and not chosen.path.exists():
        raise FolderError(
            f"there is no memory at {chosen.path}; give its folder with --path, or make one with `add` or `import`",
            path=str(chosen.path),
        )
    with warnings.catch_warnings(record=True) as notes:
        memory = open_memory(chosen, embedder="none") if words_only else open_memory(chosen)
    for note in notes:
        render.err().print(render.said(f"Note: {note.message}", style="yellow"), soft_wrap=True)
    with memory:
        yield memory


def somebody(path: Path | None, *, user: str | None, session: str | None) -> None:
    """Make sure that a user or a session is named, here or in the settings."""
    if user is None and session is None and settings(path).user_id is None:
        raise typer.BadParameter("say whose memory is meant: --user, --session, or both")
