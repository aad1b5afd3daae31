"""The command `import`: conversations from a file, checked whole before the first one is written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from neuralflow_memory._ids import new_id
from neuralflow_memory.errors import IndexingError
from neuralflow_memory.pipeline.records import sealed, written
from neuralflow_memory.types import ImportReport, Message

from . import foreign, render
from .formats import READERS, Turn
from .options import JsonOption, PathOption, opened

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory

_BATCH = 512
_POLL = 0.2  # seconds between two looks at what is indexed
_PATIENCE = 60.0  # seconds without progress after which a reported error is believed


class FileFormat(StrEnum):
    """How a file with questions is written."""

    JSONL = "jsonl"
    LOCOMO = "locomo"


class ImportFormat(StrEnum):
    """What is imported."""

    EXPORT = "export"
    JSONL = "jsonl"
    LOCOMO = "locomo"
    LANGCHAIN = "langchain"
    LLAMA_INDEX = "llama-index"
    MEM0 = "mem0"


def import_(
    file: Annotated[
        str,
        typer.Argument(
            help="The file or folder; for LangChain's histories in Redis, its address, as redis://host:6379/0.",
            show_default=False,
        ),
    ],
    *,
    format_: Annotated[
        ImportFormat,
        typer.Option("--format", help="What it is. A file that `export` wrote is known as such."),
    ] = ImportFormat.JSONL,
    user: Annotated[
        str | None,
        typer.Option(
            "--user",
            help="The user of what names none; of all of a LoCoMo file; whose an export of one user is to be.",
            show_default=False,
        ),
    ] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", help="What stands before a session's id in the keys of a Redis server.")
    ] = foreign.PREFIX,
    restore_deleted: Annotated[
        bool, typer.Option("--restore-deleted", help="Take in also what was deleted here; of an export.")
    ] = False,
    path: PathOption = None,
    json_: JsonOption = False,
) -> None:
    """Import an export, conversations, or memories of mem0. A wrong file stops it before anything is written; again adds nothing twice.

    JSONL: a message a line, {"session_id", "role", "content"} and, if you have them, user_id, id, name, created_at, metadata,
    tool_calls, tool_call_id. LoCoMo: the data set's own format. langchain: a SQLite file of SQLChatMessageHistory, a JSON file
    of FileChatMessageHistory or a folder of them, a Redis address. llama-index: a SimpleChatStore's JSON, a SQLite file of
    Memory, SQLAlchemyChatStore or SQLiteChatStore. mem0: what get_all() returned as JSON, history.db, a Qdrant folder.
    """
    source = Path(file)
    if not file.startswith(foreign.REDIS):
        if not source.exists() or (source.is_dir() and format_ not in _FOLDERS):
            raise typer.BadParameter(f"there is no file {file}", param_hint="FILE")
    elif format_ is not ImportFormat.LANGCHAIN:
        raise typer.BadParameter("only histories of LangChain's are read from Redis: --format langchain")
    if format_ is ImportFormat.EXPORT or (format_ is ImportFormat.JSONL and _is_export(source)):
        _import_export(source, user=user, restore_deleted=restore_deleted, path=path, json_=json_)
        return
    read: Callable[[], Iterator[foreign.Found]]
    if format_.value in foreign.READERS:
        read = partial(foreign.READERS[format_.value], file, user_id=user, prefix=prefix)
    else:
        read = partial(READERS[format_.value], source, user_id=user)
    with shown_progress() as progress:
        checking = progress.add_task("checking", total=None)
        total = sum(isinstance(one, Turn) for one in read())
        progress.update(checking, total=total, completed=total)
        with opened(path, create=True) as memory:
            done = Done()
            before = int(memory.stats()["added"])
            known = 0
            try:
                add_all(memory, (t for t in read() if isinstance(t, Turn)), progress=progress, total=total, done=done)
                if format_ is ImportFormat.MEM0:
                    taken = _remember_all(memory, (k for k in read() if isinstance(k, foreign.Known)))
                    known = taken.entries + taken.present + taken.left_out
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
        typer.echo(
            render.as_json(
                {"messages": total, "added": added, "sessions": sessions}
                | ({"memories": known} if format_ is ImportFormat.MEM0 else {})
            )
        )
    else:
        already = f"; {total + known - added:,} were there already" if added < total + known else ""
        memories = f" and {known:,} memories" if format_ is ImportFormat.MEM0 else ""
        typer.echo(f"Added {added:,} of {total:,} messages{memories} in {sessions:,} conversations{already}.")
    _told(trouble, memory)


_FOLDERS = (ImportFormat.LANGCHAIN, ImportFormat.MEM0)


def _told(trouble: str | None, memory: Memory) -> None:
    if trouble is not None:
        raise IndexingError(
            f"the messages are stored, but indexing stands still ({trouble}); mend the cause, and it goes on when the memory "
            "is next opened",
            path=str(memory.path),
        )


def _is_export(file: Path) -> bool:
    with file.open("rb") as lines:
        return lines.read(64).startswith(b'{"kind":"neuralflow-memory"')


def _import_export(file: Path, *, user: str | None, restore_deleted: bool, path: Path | None, json_: bool) -> None:
    with shown_progress() as progress, opened(path, create=True) as memory:
        reading = progress.add_task("importing", total=None)
        done = memory.import_(
            file,
            user_id=user,
            restore_deleted=restore_deleted,
            progress=lambda read, total: progress.update(reading, completed=read, total=total),
        )
        trouble = wait(memory, progress=progress)
    if json_:
        typer.echo(render.as_json(asdict(done)))
    else:
        typer.echo(
            f"Imported {done.entries:,} entries and {done.values:,} values, {done.sessions:,} conversations new; "
            f"{done.present:,} were there already, {done.left_out:,} left out, as they were deleted here."
        )
    _told(trouble, memory)


def _remember_all(memory: Memory, known: Iterable[foreign.Known]) -> ImportReport:
    """Take knowledge in with its ids and times: as an export, with all that holds for one."""
    now = datetime.now(UTC)
    header = {"id": new_id(), "created_at": now.isoformat(), "counter": "none"}
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.writelines(sealed(header, map(written, foreign.lines_of(known, now=now))))
        file.flush()
        return memory.import_(file.name)


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
