"""The command `import`: conversations from a file, checked whole before the first one is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from neuralflow_memory.types import Message

from . import render
from .formats import READERS, Turn
from .options import JsonOption, PathOption, opened

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory

_BATCH = 512


class FileFormat(StrEnum):
    """How the file is written."""

    JSONL = "jsonl"
    LOCOMO = "locomo"


def import_(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="The file.", show_default=False)
    ],
    *,
    format_: Annotated[FileFormat, typer.Option("--format", help="How the file is written.")] = FileFormat.JSONL,
    user: Annotated[
        str | None,
        typer.Option("--user", help="The user of lines that name none; of all of a LoCoMo file.", show_default=False),
    ] = None,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Import conversations from a file. A wrong line stops it before anything is written; again adds nothing twice.

    JSONL: a message a line, {"session_id", "role", "content"} and, if you have them, user_id, id, name, created_at, metadata,
    tool_calls, tool_call_id. LoCoMo: the data set's own format.
    """
    read = READERS[format_]
    with _progress() as progress:
        checking = progress.add_task("checking", total=None)
        total = sum(1 for _ in read(file, user_id=user))
        progress.update(checking, total=total, completed=total)
        with opened(path, create=True) as memory:
            before = int(memory.stats()["entries"])
            sessions = _add(memory, read(file, user_id=user), progress=progress, total=total)
            added = int(memory.stats()["entries"]) - before
            _wait(memory, progress=progress)
    if json_:
        typer.echo(render.as_json({"messages": total, "added": added, "sessions": sessions}))
    else:
        already = f"; {total - added:,} were there already" if added < total else ""
        typer.echo(f"Added {added:,} of {total:,} messages in {sessions:,} conversations{already}.")


def _progress() -> Progress:
    columns = TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = render.err()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _add(memory: Memory, turns: Iterator[Turn], *, progress: Progress, total: int) -> int:
    adding = progress.add_task("adding", total=total)
    conversations: set[tuple[str | None, str]] = set()
    while batch := list(islice(turns, _BATCH)):
        for (user_id, session_id), messages in _by_conversation(batch).items():
            memory.session(session_id, user_id=user_id).add(messages)
            conversations.add((user_id, session_id))
            progress.advance(adding, len(messages))
    return len(conversations)


def _by_conversation(turns: Iterable[Turn]) -> dict[tuple[str | None, str], list[Message]]:
    groups: dict[tuple[str | None, str], list[Message]] = {}
    for turn in turns:
        groups.setdefault((turn.user_id, turn.session_id), []).append(turn.message)
    return groups


def _wait(memory: Memory, *, progress: Progress) -> None:
    """Wait until all is indexed, showing how far it is; without an embedder there is nothing to wait for."""
    facts = memory.stats()
    if facts["embedder"] is None:
        return
    waiting = int(facts["dirty"])
    indexing = progress.add_task("indexing", total=waiting)
    with ThreadPoolExecutor(1) as thread:
        flushed = thread.submit(memory.flush)
        while not flushed.done():
            progress.update(indexing, completed=max(waiting - int(memory.stats()["dirty"]), 0))
            time.sleep(0.1)
        flushed.result()
    progress.update(indexing, completed=waiting)
