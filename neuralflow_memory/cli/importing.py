"""The command `import`: conversations from a file, checked whole before the first one is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from neuralflow_memory.errors import IndexingError
from neuralflow_memory.types import Message

from . import render
from .formats import READERS, Turn
from .options import JsonOption, PathOption, opened

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory

_BATCH = 512
_POLL = 0.2  # seconds between two looks at what is indexed
_PATIENCE = 60.0  # seconds without progress after which a reported error is believed


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
    with shown_progress() as progress:
        checking = progress.add_task("checking", total=None)
        total = sum(1 for _ in read(file, user_id=user))
        progress.update(checking, total=total, completed=total)
        with opened(path, create=True) as memory:
            done = Done()
            before = int(memory.stats()["added"])
            try:
                add_all(memory, read(file, user_id=user), progress=progress, total=total, done=done)
                added = int(memory.stats()["added"]) - before
                trouble = wait(memory, progress=progress)
            except KeyboardInterrupt:
                progress.stop()
                typer.echo(
                    f"stopped; {done.messages:,} messages are stored, the rest is indexed when the memory is next opened; "
                    "run it again to go on",
                    err=True,
                )
                raise typer.Exit(130) from None
    sessions = len(done.conversations)
    if json_:
        typer.echo(render.as_json({"messages": total, "added": added, "sessions": sessions}))
    else:
        already = f"; {total - added:,} were there already" if added < total else ""
        typer.echo(f"Added {added:,} of {total:,} messages in {sessions:,} conversations{already}.")
    if trouble is not None:
        raise IndexingError(
            f"the messages are stored, but indexing stands still ({trouble}); mend the cause, and it goes on when the memory "
            "is next opened",
            path=str(memory.path),
        )


@dataclass(slots=True)
class Done:
    """What is stored for certain, newly or before; the messages in hand when an import is broken off are not counted."""

    messages: int = 0
    conversations: set[tuple[str | None, str]] = field(default_factory=set)


def shown_progress() -> Progress:
    columns = TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = render.err()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def add_all(memory: Memory, turns: Iterator[Turn], *, progress: Progress, total: int, done: Done | None = None) -> None:
    """Write all *turns*, noting in *done* what is stored."""
    done = Done() if done is None else done
    adding = progress.add_task("adding", total=total)
    while batch := list(islice(turns, _BATCH)):
        for (user_id, session_id), messages in _by_conversation(batch).items():
            memory.session(session_id, user_id=user_id).add(messages)
            done.messages += len(messages)
            done.conversations.add((user_id, session_id))
            progress.advance(adding, len(messages))


def _by_conversation(turns: Iterable[Turn]) -> dict[tuple[str | None, str], list[Message]]:
    groups: dict[tuple[str | None, str], list[Message]] = {}
    for turn in turns:
        groups.setdefault((turn.user_id, turn.session_id), []).append(turn.message)
    return groups


def wait(memory: Memory, *, progress: Progress, patience: float = _PATIENCE) -> str | None:
    """Wait until all is indexed, showing how far it is; without an embedder there is nothing to wait for.

    It looks on in this thread and never calls `flush`, so that Ctrl-C ends the waiting at once.

    Returns:
        The error that keeps indexing from going on, if nothing moved for *patience* seconds; None when all is done. Parked
        entries count as done: they are `doctor`'s to tell.
    """
    facts = memory.stats()
    if facts["embedder"] is None:
        return None
    first = left = _waiting(facts)
    indexing = progress.add_task("indexing", total=first)
    moved = time.monotonic()
    while left:
        time.sleep(_POLL)
        facts = memory.stats()
        now = _waiting(facts)
        if now != left:
            left, moved = now, time.monotonic()
        elif facts["last_error"] and time.monotonic() - moved > patience:
            return str(facts["last_error"])
        progress.update(indexing, completed=max(first - left, 0))
    return None


def _waiting(facts: Mapping[str, Any]) -> int:
    return int(facts["dirty"]) - int(facts["parked_count"])
