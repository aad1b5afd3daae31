"""`export`: a memory as a file of records, as of one moment, whoever writes meanwhile."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from .._ids import new_id
from ..errors import InputError, StorageError, StorageFull
from ..protocols import Moved, MovedEntry, MovedSession, MovedValue
from ..types import ExportReport, Scope
from .parts import Parts
from .records import line_of, sealed

Progress = Callable[[int, int], None]
"""Called now and then with how much is done, and of how much."""
_EVERY = 500  # records between two calls of it


def export(
    parts: Parts,
    file: str | os.PathLike[str],
    *,
    user_id: str | None = None,
    tenant: str | None = None,
    vectors: bool = False,
    principal: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write all that is stored, or what is of a user or a tenant, to *file*, which is there whole or not at all."""
    target = Path(file).expanduser()
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file to export to")
    owner = Scope("default" if tenant is None else tenant, user_id)
    parts.authorize(principal, "read", owner)
    chosen = {"tenant": tenant, "user_id": user_id} if user_id is None else {"tenant": owner.tenant, "user_id": user_id}
    known = None
    if vectors and parts.model_id is not None:
        known = parts.ledger.known_model(parts.model_id)
    total = (
        parts.ledger.totals(parked_at=0)["entries"]
        if user_id is None
        else parts.ledger.count(owner, session_only=False)
    )
    counts: Counter[type] = Counter()

    def lines(records: Iterable[Moved]) -> Iterator[bytes]:
        for number, moved in enumerate(records, 1):
            yield line_of(moved, counter=parts.counter.name)
            counts[type(moved)] += not (isinstance(moved, MovedSession) and moved.knowledge)
            if progress is not None and number % _EVERY == 0:
                progress(min(counts[MovedEntry], total), total)

    model = None if known is None else {"name": parts.model_id, "dimensions": known[1]}
    header = {"id": new_id(), "created_at": parts.clock().isoformat(), "counter": parts.counter.name, "model": model}
    partial = target.with_name(f".{target.name}.{new_id()[:8]}.partial")
    unread: list[int] = []
    try:
        # The blocks that are read stay where they are as long as it lasts.
        with parts.exclusive("archive"), partial.open("wb") as out:
            dumped = parts.ledger.dump(**chosen, model=known and known[0], unread=unread)
            with closing(dumped) as records:
                out.writelines(sealed(header, lines(records)))
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        partial.replace(target)
        sync(target.parent)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        kind = StorageFull if error.errno == 28 else StorageError
        raise kind(f"{target} can't be written: {error.strerror}", path=str(target)) from error
    finally:
        partial.unlink(missing_ok=True)
    if progress is not None:
        progress(total, total)
    return ExportReport(counts[MovedSession], counts[MovedEntry], counts[MovedValue], size, len(unread))


def sync(folder: Path) -> None:
    """Make what was renamed into *folder* survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["Progress", "export", "sync"]
