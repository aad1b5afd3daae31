"""`FileArchive`: texts of cold entries, in compressed blocks, a file each. Which entry stands in which block, the ledger knows.

A block is written once and never changed: what leaves it is left out of the block that takes its place. Each carries a
checksum, and comes into being whole or not at all.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Literal
from uuid import uuid4

from .._failpoints import failpoint
from ..errors import ArchiveError, MissingDependency, StorageError, StorageFull

_MAGIC = b"NFA1"
_PLAIN, _ZLIB, _ZSTD = 0, 1, 2
_LEVEL = 9  # a block is written once; level 6 takes half the time, and 2 % more room
_ZSTD_LEVEL = 12  # as long as zlib takes, and a tenth less room; read four times as fast
_HEAD = struct.Struct("<4sBI16s")
"""Magic, how it is packed, how many entries, and a hash of what follows and of the numbers before it."""
_RECORD = struct.Struct("<QI")
_SUFFIX, _UNFINISHED = ".block", ".part"
_UNPACKED_BYTES = 8 * 1024 * 1024  # of blocks that were read last


class FileArchive:
    """An `Archive` in a folder, which is made when the first block is written. Thread-safe."""

    def __init__(self, folder: Path, *, compression: Literal["zlib", "zstd"] | None = "zlib") -> None:
        """*compression* is of the blocks that are written; None for none. All are read, whatever they were written with."""
        self._folder = folder
        self._kind = {None: _PLAIN, "zlib": _ZLIB, "zstd": _ZSTD}[compression]
        if self._kind == _ZSTD:
            _zstandard()
        self.damaged: dict[str, str] = {}
        self.opened = 0
        """How many blocks were read from the disk since then."""
        self._unpacked: OrderedDict[str, dict[int, bytes]] = OrderedDict()
        self._bytes = 0
        self._guard = threading.Lock()

    def write(self, records: Mapping[int, bytes]) -> str:
        name = uuid4().hex
        body = b"".join(_RECORD.pack(number, len(text)) + text for number, text in records.items())
        packed = _packed(self._kind, body)
        head = _HEAD.pack(_MAGIC, self._kind, len(records), _digest(self._kind, len(records), packed))
        self._store(name, head + packed)
        if self._read(name) != dict(records):
            raise self._broken(name, "what was read back is not what was written")
        return name

    def put(self, name: str, packed: bytes) -> bool:
        self._records(name, packed)
        if self._path(name).exists():
            try:
                self.check(name)
            except ArchiveError:
                pass
            else:
                return False
        self._store(name, packed)
        self.check(name)
        return True

    def packed(self, name: str) -> bytes:
        content = self._content(name)
        self._records(name, content)
        return content

    def _store(self, name: str, content: bytes) -> None:
        """Write a block's file, whole or not at all, so that it survives a power cut."""
        path, unfinished = self._path(name), self._folder / (name + _UNFINISHED)
        try:
            if not self._folder.exists():
                self._folder.mkdir(exist_ok=True)
                _sync(self._folder.parent)
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            failpoint("archive.written")
            unfinished.replace(path)
            _sync(self._folder)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            if error.errno == 28:
                raise StorageFull(
                    f"no space left for the archive in {self._folder}; nothing was moved: free some space and sweep again",
                    path=str(self._folder),
                ) from error
            raise StorageError(
                f"the archive in {self._folder} can't be written to: {error.strerror}", path=str(self._folder)
            ) from error

    def read(self, name: str) -> Mapping[int, bytes]:
        with self._guard:
            known = self._unpacked.get(name)
            if known is not None:
                self._unpacked.move_to_end(name)
                return known
        records = self._read(name)
        size = sum(map(len, records.values()))
        with self._guard:
            if name not in self._unpacked:
                self._unpacked[name] = records
                self._bytes += size
            while self._bytes > _UNPACKED_BYTES and len(self._unpacked) > 1:
                self._forget(next(iter(self._unpacked)))
        return records

    def check(self, name: str) -> None:
        self._read(name)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self._guard:
                self._forget(name)
            self.damaged.pop(name, None)
            for suffix in (_SUFFIX, _UNFINISHED):
                (self._folder / (name + suffix)).unlink(missing_ok=True)

    def names(self) -> list[str]:
        return sorted({path.stem for path in self._files()})

    def nbytes(self) -> int:
        total = 0
        for path in self._files():
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # it was replaced meanwhile
                continue
        return total

    def _files(self) -> Iterator[Path]:
        for suffix in (_SUFFIX, _UNFINISHED):
            yield from self._folder.glob(f"*{suffix}")

    def _path(self, name: str) -> Path:
        return self._folder / (name + _SUFFIX)

    def _read(self, name: str) -> dict[int, bytes]:
        self.opened += 1
        return self._records(name, self._content(name))

    def _content(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            raise self._broken(name, "its file is missing") from None
        except OSError as error:
            raise self._broken(name, f"it can't be read: {error.strerror}") from error

    def _records(self, name: str, content: bytes) -> dict[int, bytes]:
        if len(content) < _HEAD.size:
            raise self._broken(name, "it is cut short")
        magic, kind, entries, digest = _HEAD.unpack_from(content)
        packed = content[_HEAD.size :]
        if magic != _MAGIC or kind not in (_PLAIN, _ZLIB, _ZSTD):
            raise self._broken(name, "it is no block, or one of a newer version of this package")
        if digest != _digest(kind, entries, packed):
            raise self._broken(name, "its checksum is wrong")
        body = _unpacked(kind, packed)
        records, at = {}, 0
        while at < len(body):
            number, size = _RECORD.unpack_from(body, at)
            at += _RECORD.size
            records[number] = body[at : at + size]
            at += size
        self.damaged.pop(name, None)
        return records

    def _broken(self, name: str, why: str) -> ArchiveError:
        self.damaged[name] = why
        path = self._path(name)
        return ArchiveError(
            f"block {name} of the archive can't be used ({why}): bring {path} back from a backup; entries outside of it are "
            "not touched",
            path=str(path),
            block=name,
        )

    def _forget(self, name: str) -> None:
        records = self._unpacked.pop(name, None)
        if records is not None:
            self._bytes -= sum(map(len, records.values()))


def _packed(kind: int, body: bytes) -> bytes:
    if kind == _ZSTD:
        return bytes(_zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compress(body))
    return zlib.compress(body, _LEVEL) if kind == _ZLIB else body


def _unpacked(kind: int, packed: bytes) -> bytes:
    if kind == _ZSTD:
        return bytes(_zstandard().ZstdDecompressor().decompress(packed))
    return zlib.decompress(packed) if kind == _ZLIB else packed


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError:
        raise MissingDependency("zstandard", "zstd", "An archive that is packed with zstd") from None
    return zstandard


def _digest(kind: int, entries: int, packed: bytes) -> bytes:
    return blake2b(bytes([kind]) + entries.to_bytes(4, "little") + packed, digest_size=16).digest()


def _sync(folder: Path) -> None:
    """Make a new name in *folder* survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["FileArchive"]
