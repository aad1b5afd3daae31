"""`backup` and `restore`: a folder that holds a copy of the ledger and the archive's blocks, and says what must be in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .._failpoints import failpoint
from ..errors import ArchiveError, BackupError, FolderInUse, InputError, ModelMismatch, StorageError, StorageFull
from ..rules.analysis import recorded
from ..types import BackupReport, RestoreReport, Scope, microseconds
from .export import Progress, sync
from .parts import Parts

FORMAT = 2
_MANIFEST = "manifest.json"
_LEDGER = "ledger.sqlite3"
_ARCHIVE, _SUFFIX = "archive", ".block"
_BLOCK = re.compile(rf"{_ARCHIVE}/([\w-]{{1,100}}){re.escape(_SUFFIX)}")
"""The file of a block, by the block's name."""
SCRATCH = "restoring"
"""Where, in the memory's folder, a backup is made ready to be restored."""
_CHUNK = 1 << 20  # bytes


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    bytes: int
    blake2b: str


class _Manifest(BaseModel):
    """What a backup holds; docs/backup.md describes it. `FORMAT` grows with what an older version would not know."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Literal["neuralflow-memory backup"]
    format: int
    created_at: datetime
    package: str
    lineage: str
    files: list[_File]
    rows: dict[str, int]


def backup(parts: Parts, path: str | os.PathLike[str], *, progress: Progress | None = None) -> BackupReport:
    """Copy the memory into a new folder; see `Memory.backup`."""
    target = Path(path).expanduser().absolute()
    if target.exists():
        raise InputError(f"{target} is there already; name a new folder for each backup")
    parts.authorize(None, "read", Scope())
    partial = target.with_name(f".{target.name}.partial")
    # The blocks that the copy reads stay where they are until they are copied, too.
    with parts.exclusive("backup"), parts.exclusive("archive"), _translated(target):
        shutil.rmtree(partial, ignore_errors=True)  # of one that was cut short
        try:
            partial.mkdir(parents=True)
            now = parts.clock()
            rows, names = parts.ledger.copy(partial / _LEDGER, progress=progress)
            blocks, damaged = _blocks_copied(parts, names, partial, progress=progress)
            failpoint("backup.copied")
            files = [_described(partial, name) for name in (_LEDGER, *blocks)]
            manifest = _Manifest(
                kind="neuralflow-memory backup",
                format=FORMAT,
                created_at=now,
                package=version("neuralflow-memory"),
                lineage=parts.ledger.lineage,
                files=files,
                rows=rows,
            )
            (partial / _MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
            _synced(partial / _MANIFEST)
            sync(partial)
            failpoint("backup.written")
            partial.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return BackupReport(target, now, rows["sessions"], rows["entries"], sum(file.bytes for file in files), damaged)


def _blocks_copied(
    parts: Parts, names: Sequence[str], folder: Path, *, progress: Progress | None
) -> tuple[list[str], dict[str, str]]:
    """Copy blocks of the archive; their files, and which can't be read."""
    files, damaged = [], {}
    for done, name in enumerate(names, 1):
        try:
            packed = parts.archive.packed(name)
        except ArchiveError as error:
            damaged[name] = str(error)
            continue
        files.append(f"{_ARCHIVE}/{name}{_SUFFIX}")
        (folder / _ARCHIVE).mkdir(exist_ok=True)
        (folder / files[-1]).write_bytes(packed)
        if progress is not None:
            progress(done, len(names))
    if files:
        sync(folder / _ARCHIVE)
    return files, damaged


def _described(folder: Path, name: str) -> _File:
    size, digest = _synced(folder / name)
    return _File(name=name, bytes=size, blake2b=digest)


@contextmanager
def ready(
    parts: Parts, path: str | os.PathLike[str], *, progress: Progress | None = None
) -> Iterator[Callable[[bool], RestoreReport]]:
    """A verified copy of a backup in the memory's folder, and the call that puts it in place; it may then begin at once."""
    source = Path(path).expanduser().absolute()
    parts.authorize(None, "delete", Scope())
    scratch = parts.settings.path / SCRATCH
    stored: list[str] = []
    with parts.exclusive("backup"), parts.exclusive("archive"):
        try:
            with _translated(source):
                manifest = _read(source)
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                for file in manifest.files:
                    _copied(source, scratch / Path(file.name).name, file, progress=progress)
                # Blocks never change, and nobody reads those that the ledger doesn't know: so they go first.
                for name in _blocks(manifest):
                    if parts.archive.put(name, (scratch / f"{name}{_SUFFIX}").read_bytes()):
                        stored.append(name)  # noqa: PERF401 - also if the next one fails
            failpoint("restore.copied")
            parts.ledger.prepare(scratch / _LEDGER, lineage=manifest.lineage, terms=recorded)

            def put_in_place(restore_deleted: bool) -> RestoreReport:
                return _put(parts, scratch, manifest, restore_deleted=restore_deleted)

            yield put_in_place
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if stored:
                known = set(parts.ledger.block_names())
                parts.archive.remove(name for name in stored if name not in known)


def _put(parts: Parts, scratch: Path, manifest: _Manifest, *, restore_deleted: bool) -> RestoreReport:
    models = parts.ledger.models_in(scratch / _LEDGER)
    foreign = parts.model_id is not None and bool(models) and parts.model_id not in models
    if foreign and parts.settings.embedder.on_change != "reindex":
        raise ModelMismatch(
            f"the backup was indexed with {models[0]!r} and this memory is open with {parts.model_id!r}; open it with the same "
            "model, or with embedder={'on_change': 'reindex', ...} to embed everything again with the new one",
            stored=models[0],
            given=parts.model_id,
        )
    with parts.sole() as alone:
        if not alone:
            raise FolderInUse(
                f"{parts.settings.path} is open in another process, under whose feet everything would change; close it there "
                "first",
                path=str(parts.settings.path),
                pid=None,
            )
        done = parts.ledger.become(
            scratch / _LEDGER,
            restore_deleted=restore_deleted,
            forget_vectors=foreign,
            now=microseconds(parts.clock()),
        )
    damaged = {}
    for name in set(parts.ledger.block_names()) - set(_blocks(manifest)):
        try:
            parts.archive.check(name)
        except ArchiveError as error:
            damaged[name] = str(error)
    return RestoreReport(manifest.created_at, done.sessions, done.entries, done.left_out, damaged)


def _blocks(manifest: _Manifest) -> list[str]:
    """The names of the archive's blocks in a backup."""
    return [found[1] for file in manifest.files if (found := _BLOCK.fullmatch(file.name))]


def _read(source: Path) -> _Manifest:
    path = str(source)
    try:
        text = (source / _MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BackupError(f"{source} is no backup; give the folder that backup() has made", path=path) from None
    except UnicodeDecodeError:
        text = ""
    try:
        known = json.loads(text)
        if isinstance(known, dict) and isinstance(known.get("format"), int) and known["format"] > FORMAT:
            raise BackupError(
                f"{source} was made by a newer version of neuralflow-memory; upgrade the package to restore it",
                path=path,
            )
        manifest = _Manifest.model_validate_json(text)
    except (ValidationError, ValueError, RecursionError):
        raise BackupError(
            f"{source} is damaged: its {_MANIFEST} can't be read; take another backup", path=path
        ) from None
    names = [file.name for file in manifest.files]
    if names.count(_LEDGER) != 1 or not all(_BLOCK.fullmatch(name) for name in names if name != _LEDGER):
        raise BackupError(f"{source} is damaged: its {_MANIFEST} names no ledger; take another backup", path=path)
    return manifest


def _copied(source: Path, target: Path, file: _File, *, progress: Progress | None) -> None:
    """Copy a file of a backup, and see that it is what was written then."""
    digest, done = hashlib.blake2b(digest_size=32), 0
    try:
        with (source / file.name).open("rb") as given, target.open("wb") as out:
            while chunk := given.read(_CHUNK):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(min(done, file.bytes), file.bytes)
    except FileNotFoundError:
        done = -1
    if done != file.bytes or digest.hexdigest() != file.blake2b:
        raise BackupError(
            f"{source} is damaged: {file.name} is not as it was written; take another backup, nothing was restored",
            path=str(source),
        )


def _synced(file: Path) -> tuple[int, str]:
    """Make *file* survive a power cut; its size, and the hash of what stands in it."""
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb+") as lines:
        while chunk := lines.read(_CHUNK):
            digest.update(chunk)
        os.fsync(lines.fileno())
        return lines.tell(), digest.hexdigest()


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        kind = StorageFull if error.errno == 28 else StorageError
        raise kind(f"{path}: {error.strerror}; nothing was changed", path=str(path)) from error


__all__ = ["SCRATCH", "backup", "ready"]
