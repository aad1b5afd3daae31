"""Options that several commands share, and how a command opens the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuralflow_memory.errors import FolderError

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory

PathOption = Annotated[
    Path | None,
    typer.Option("--path", help="The memory's folder; otherwise NEURALFLOW_PATH, or ./memory.", show_default=False),
]
UserOption = Annotated[str | None, typer.Option("--user", help="Whose memory.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def folder(path: Path | None) -> Path:
    """Return the folder that is meant: *path*, or what the settings say."""
    from neuralflow_memory.settings import load_settings

    return load_settings(path).path


@contextmanager
def opened(path: Path | None, *, create: bool = False, **options: Any) -> Iterator[Memory]:
    """Open the memory, and close it at the end.

    Raises:
        FolderError: There is no such folder and *create* is false: a command that reads must not leave an
            empty memory behind a mistyped path.
    """
    from neuralflow_memory import open_memory

    where = folder(path)
    if not create and not where.exists():
        raise FolderError(
            f"there is no memory at {where}; give its folder with --path, or make one with `add` or `import`",
            path=str(where),
        )
    with open_memory(where, **options) as memory:
        yield memory
