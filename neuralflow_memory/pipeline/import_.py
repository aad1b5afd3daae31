"""`import_`: what `export` wrote, into this memory. The whole file is checked before the first record is written; then
batches of one owner each are written, each in one transaction, and a run that was cut short is finished by the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ..errors import FormatError, InputError
from ..protocols import Loaded, Moved, MovedDerivation, MovedEntry, MovedMargin, MovedState, MovedVersion
from ..rules.analysis import recorded, worth
from ..types import Entry, ImportReport, Scope, microseconds
from .export import Progress
from .parts import Parts
from .records import (
    FORMAT,
    MAGIC,
    Body,
    DerivationLine,
    End,
    EntryLine,
    Header,
    MarginLine,
    SessionLine,
    StateLine,
    ValueLine,
    VersionLine,
    entry_of,
    parsed,
    session_of,
    state_of,
    value_of,
    version_of,
)

_BATCH = 500  # records a transaction
_EVERY = 500  # records between two reports of progress
_LONGEST_LINE = 1 << 28  # bytes; a longer one is no record


@dataclass(slots=True)
class _Run:
    """One import: where records go, and what became of them."""

    name: str
    user_id: str | None
    tenant: str | None
    restore_deleted: bool
    done: Loaded = field(default_factory=Loaded)
    owners: set[Scope] = field(default_factory=set)
    """Those of whom turns go back into the window."""

    def add(self, owner: Scope, one: Loaded) -> None:
        for name in _COUNTS:
            setattr(self.done, name, getattr(self.done, name) + getattr(one, name))
        self.done.tainted |= one.tainted
        for session, numbers in one.uncovered.items():
            self.owners.add(owner)
            self.done.uncovered.setdefault(session, []).extend(numbers)

    def moved_to(self, scope: Scope, *, knowledge: bool = False) -> Scope:
        """*scope*, or what is asked for in its place."""
        tenant = scope.tenant if self.tenant is None else self.tenant
        if self.user_id is None:
            return scope if tenant == scope.tenant else replace(scope, tenant=tenant)
        return Scope(tenant, self.user_id, None if knowledge else scope.session_id, scope.agent_id)


_COUNTS = ("sessions", "entries", "values", "vectors", "present", "left_out")


def import_(
    parts: Parts,
    file: str | os.PathLike[str],
    *,
    user_id: str | None = None,
    tenant: str | None = None,
    restore_deleted: bool = False,
    principal: str | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Take in what `export` wrote; see `Memory.import_`."""
    path = Path(file).expanduser()
    Scope("default" if tenant is None else tenant, user_id)
    run = _Run(path.name, user_id, tenant, restore_deleted)
    try:
        source = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    with source:
        size = os.fstat(source.fileno()).st_size

        def told(read: int, *, before: int) -> None:
            if progress is not None:
                progress(before + read, 2 * size)

        header = _checked(parts, run, source, principal=principal, told=partial(told, before=0))
        source.seek(0)
        lines = _lines(source, run.name, told=partial(told, before=size))
        for owner, batch in _batches(run, lines, header):
            _load(parts, run, owner, batch, header)
    parts.ledger.loaded(header.id, uncovered=run.done.uncovered)
    for owner in run.owners:
        resident = parts.resident(owner)
        with resident.lock:
            resident.forget()
    return ImportReport(*(getattr(run.done, name) for name in _COUNTS))


# -- reading


def _lines(source: BinaryIO, name: str, *, told: Callable[[int], None]) -> Iterator[tuple[int, Header | Body]]:
    """The records between the first line and the last, with their line numbers; the first line comes with number 1.

    Raises `FormatError`, naming the line, as soon as one is not what `export` writes, and where the file is cut or changed.
    """
    digest, number, read = hashlib.blake2b(digest_size=32), 0, 0

    def wrong(what: str) -> FormatError:
        return FormatError(f"{name}, line {number}: {what}", path=name, line=number)

    while text := source.readline(_LONGEST_LINE):
        number, read = number + 1, read + len(text)
        if number == 1:
            _check_format(text, wrong)
        if not text.endswith(b"\n"):
            raise wrong("the file ends within this line; it is cut: take another copy, or export it again")
        line = parsed(text, file=name, number=number)
        if isinstance(line, End):
            if line.lines != number - 1 or line.blake2b != digest.hexdigest():
                raise wrong("the file is not as it was written: take another copy, or export it again")
            if source.read(1):
                raise wrong("records follow after the last line; the file is not as it was written")
            told(read)
            return
        if isinstance(line, Header) != (number == 1):
            raise wrong("this kind of record stands in the first line, and only there")
        digest.update(text)
        yield number, line
        if number % _EVERY == 0:
            told(read)
    number += 1
    raise wrong("the file ends here, without its last line; it is cut: take another copy, or export it again")


def _check_format(text: bytes, wrong: Callable[[str], FormatError]) -> None:
    """Say what kind of file it is where it is another one, or of a newer version."""
    try:
        first = json.loads(text)
    except (ValueError, RecursionError):
        first = None
    if not isinstance(first, dict) or first.get("kind") != MAGIC:
        raise wrong("this is no export of a memory; for other files there is `neuralflow-memory import --format`")
    version = first.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise wrong(
            f"a newer version of neuralflow-memory wrote this file (format {version!r:.20}); upgrade to import it"
        )


def _checked(
    parts: Parts, run: _Run, source: BinaryIO, *, principal: str | None, told: Callable[[int], None]
) -> Header:
    """Read the whole file, so that nothing is written of one that is wrong; its first line."""
    header: Header | None = None
    allowed: Scope | None = None
    whose: tuple[str | None, str | None] | None = None
    for number, line in _lines(source, run.name, told=told):
        try:
            if isinstance(line, Header):
                header = line
                continue
            assert header is not None
            moved = _moved(line, run, header)
            if isinstance(moved, MovedMargin) or isinstance(line, MarginLine):
                continue
            named = (line.tenant if run.tenant else None, line.user_id if run.user_id else None)
            if whose not in (None, named):
                raise InputError(
                    f"the file holds what is of {_named(whose)} and of {_named(named)}, which can't all become one; export "
                    "one of them with user_id= or tenant=, or import without these"
                )
            whose = named
        except InputError as error:
            raise FormatError(f"{run.name}, line {number}: {error}", path=run.name, line=number) from None
        owner = _owner(moved)
        if owner != allowed:
            parts.authorize(principal, "write", owner)
            allowed = owner
    assert header is not None
    return header


def _named(whose: tuple[str | None, str | None] | None) -> str:
    tenant, user = whose or (None, None)
    return " in ".join(
        ([repr(user) if user is not None else "nobody"] if tenant is None or user else [])
        + ([repr(tenant)] if tenant else [])
    )


def _moved(line: Body, run: _Run, header: Header) -> Moved:
    """The record of a line, where it is to go."""
    match line:
        case SessionLine():
            session = session_of(line)
            return replace(session, scope=run.moved_to(session.scope, knowledge=line.knowledge))
        case StateLine():
            state = state_of(line)
            return replace(state, scope=run.moved_to(state.scope))
        case VersionLine():
            return version_of(line, scope=run.moved_to(line.scope(line.session_id), knowledge=line.knowledge))
        case DerivationLine():
            return MovedDerivation(run.moved_to(line.scope(line.session_id)), line.turn, line.known)
        case EntryLine():
            scope = run.moved_to(line.scope(line.session_id, line.agent_id), knowledge=line.knowledge)
            return entry_of(line, scope=scope, dimensions=None if header.model is None else header.model.dimensions)
        case ValueLine():
            value = value_of(line)
            return replace(value, scope=run.moved_to(value.scope, knowledge=True))
        case MarginLine():
            tenant = line.tenant if run.tenant is None else run.tenant
            return MovedMargin(tenant, line.model, line.n, line.mean, line.m2)


def _owner(moved: Moved) -> Scope:
    assert not isinstance(moved, MovedMargin)  # it is of a tenant
    match moved:
        case MovedEntry():
            scope = moved.record.entry.scope
        case MovedVersion():
            scope = moved.entry.scope
        case _:
            scope = moved.scope
    return Scope(*scope.owner)


def _batches(
    run: _Run, lines: Iterable[tuple[int, Header | Body]], header: Header
) -> Iterator[tuple[Scope, list[Moved]]]:
    """Records of one owner each, not too many at a time; versions come with what they are of."""
    owner: Scope | None = None
    batch: list[Moved] = []
    for _, line in lines:
        if isinstance(line, Header):
            continue
        moved = _moved(line, run, header)
        whose = owner if isinstance(moved, MovedMargin) else _owner(moved)
        full = len(batch) >= _BATCH and not isinstance(moved, MovedState | MovedVersion)
        if batch and (whose != owner or full):
            assert owner is not None
            yield owner, batch
            batch = []
        owner = whose or Scope()
        batch.append(moved)
    if batch:
        assert owner is not None
        yield owner, batch


# -- writing


def _load(parts: Parts, run: _Run, owner: Scope, batch: Sequence[Moved], header: Header) -> None:
    model = None
    if header.model is not None and header.model.name == parts.model_id:
        model = parts.ledger.model(header.model.name, dimensions=header.model.dimensions)
    moved = [_ready(parts, m, counter=header.counter, hashed=model is not None) for m in batch]
    resident = parts.resident(owner)
    with resident.lock:
        try:
            done = parts.ledger.load(
                owner,
                moved,
                source=header.id,
                tainted=run.done.tainted,
                model=model,
                restore_deleted=run.restore_deleted,
                now=microseconds(parts.clock()),
            )
        finally:
            resident.forget()
    run.add(owner, done)
    parts.tally["added"] += done.entries
    parts.changed()


def _ready(parts: Parts, moved: Moved, *, counter: str, hashed: bool) -> Moved:
    """A record of the file with what this ledger needs of it: key, tokens, terms, the hash of its vector."""
    if isinstance(moved, MovedVersion):
        return replace(moved, entry=_complete(parts, moved.entry, knowledge=moved.knowledge, counter=counter))
    if not isinstance(moved, MovedEntry):
        return moved
    entry = _complete(parts, moved.record.entry, knowledge=moved.knowledge, counter=counter)
    digest = b""
    if hashed and moved.vector is not None and parts.model_id is not None:
        digest = parts.ledger.content_hash(entry.scope, text=entry.content, model_id=parts.model_id)
    return replace(moved, record=recorded(entry), hash=digest)


def _complete(parts: Parts, entry: Entry, *, knowledge: bool, counter: str) -> Entry:
    tokens, importance = entry.tokens, entry.importance
    if tokens < 0 or counter != parts.counter.name:
        tokens = parts.counter.count(entry.content) if entry.role is None else parts.count(entry.message)
    if importance < 0:
        importance = worth(entry.content, role=entry.role, name=entry.name)
    key = parts.ledger.key(entry.scope, id=entry.id, knowledge=knowledge)
    return replace(entry, key=key, tokens=tokens, importance=importance)


__all__ = ["import_"]
