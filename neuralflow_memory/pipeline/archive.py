"""To the archive and back: a block is written and read back before anything leaves the ledger, and is removed after.

Whatever step is cut short, each entry's text is in the ledger or in a block that the ledger knows. A file that it does not
know is left of such a step, and goes with the next sweep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from .._failpoints import failpoint
from ..errors import ArchiveError, InputError, brief
from ..protocols import Block
from ..rules.filters import parse
from ..types import Scope, microseconds
from .analyse import analyse
from .edit import get, select
from .parts import Parts

BLOCK_BYTES = 128 * 1024
"""What a block holds unpacked, about: zlib looks back 32 kB, and each entry read unpacks a whole one."""
BLOCK_ENTRIES = 512
_AT_ONCE = 64  # entries whose texts are read from the ledger at a time
_BACK_AT_ONCE = 200  # entries that come back in one transaction
_LONGEST_LABEL = 200


def archive(
    parts: Parts,
    scope: Scope,
    ids: str | Iterable[str] | None,
    *,
    principal: str | None,
    filter: Mapping[str, Any] | None,
    label: str | None,
    within: Literal["user", "session"],
) -> int:
    """Let entries become cold now, by id or key, or by filter; how many did."""
    parts.authorize(principal, "write", scope)
    if (ids is None) == (filter is None):
        raise InputError("archive takes ids or a filter: pass one of them")
    if ids is not None and not isinstance(ids, Iterable):
        raise InputError(f"archive takes an id or a list of ids, not {brief(ids)}")
    if filter is not None and parse(filter) is None:
        raise InputError("an empty filter would archive everything; say what is meant")
    if label is not None and (not isinstance(label, str) or not 0 < len(label) <= _LONGEST_LABEL):
        raise InputError(f"label is a text of up to {_LONGEST_LABEL} characters or None, not {brief(label)}")
    if ids is None:
        chosen = list(select(parts, scope, principal=principal, within=within, filter=filter))
    else:
        named = [ids] if isinstance(ids, str) else ids
        chosen = [get(parts, scope, i, principal=principal, texts="bare") for i in named]
    return len(freeze(parts, scope, [e.number for e in chosen if e.tier == "warm"], label=label))


def freeze(parts: Parts, scope: Scope, numbers: Sequence[int], *, label: str | None = None) -> list[int]:
    """Move the texts of an owner's entries into the archive; the numbers of those that became cold.

    What is exempt stays, and so does what was changed meanwhile. The owner's last block goes into the first one that is
    written, if it was not full.
    """
    cold: list[int] = []
    queue = deque(dict.fromkeys(numbers))
    if not queue:
        return cold
    owner = queue[0] >> 32
    analyse(parts)
    with parts.exclusive("archive"):
        # What is half full is left, so that an entry is written a few times at most.
        block = parts.ledger.open_block(owner, label=label, size=BLOCK_BYTES // 2, entries=BLOCK_ENTRIES // 2)
        carried = {} if block is None else _live(parts, block)
        while queue and not parts.closing:
            versions: dict[int, int] = {}
            records = dict(carried)
            size = sum(map(len, records.values()))
            while queue and size < BLOCK_BYTES and len(records) < BLOCK_ENTRIES:
                part = [queue.popleft() for _ in range(min(_AT_ONCE, len(queue)))]
                for number, (version, text) in parts.ledger.records(part).items():
                    versions[number], records[number] = version, text
                    size += len(text)
            if versions:
                cold += _packed(
                    parts, scope, records, versions, owner=owner, label=label, moved=block if carried else None
                )
                carried = {}
    return cold


def _live(parts: Parts, block: Block) -> dict[int, bytes]:
    """What still stands in a block; nothing if it can't be read, so that it stays as it is."""
    try:
        found = parts.archive.read(block.name)
    except ArchiveError:
        return {}
    return {n: found[n] for n in block.live if n in found}


def _packed(
    parts: Parts,
    scope: Scope,
    records: Mapping[int, bytes],
    versions: Mapping[int, int],
    *,
    owner: int,
    label: str | None,
    moved: Block | None,
) -> list[int]:
    """Write a block and let it stand in place of texts in the ledger, and of the block *moved*; what became cold."""
    name = parts.archive.write(records)
    resident = parts.resident(scope)
    with resident.lock:
        try:
            cold = parts.ledger.pack(
                name,
                owner=owner,
                label=label,
                size=sum(map(len, records.values())),
                versions=versions,
                moved=moved,
                now=microseconds(parts.clock()),
            )
            if resident.index is not None:
                for number in cold:
                    resident.index.cool(number)
        except BaseException:
            resident.forget()
            raise
    if moved is not None:
        parts.archive.remove([moved.name])
        failpoint("archive.replaced")
    parts.changed()
    return cold


def thaw(parts: Parts, scope: Scope, numbers: Sequence[int]) -> list[int]:
    """Let cold entries of an owner be warm again; the numbers of those whose texts could be read."""
    done: list[int] = []
    resident = parts.resident(scope)
    for start in range(0, len(numbers), _BACK_AT_ONCE):
        if parts.closing:
            break
        with resident.lock:
            try:
                back = parts.ledger.thaw(numbers[start : start + _BACK_AT_ONCE])
                if resident.index is not None:
                    for number in back:
                        resident.index.warm(number)
            except BaseException:
                resident.forget()
                raise
        done += back
        parts.changed()
    return done


def rewrite(parts: Parts, *, discarded_before: int) -> int:
    """Write blocks that something has left anew without it, and remove what nobody knows; how many were written."""
    written = 0
    with parts.exclusive("archive"):
        for owner, worn in groupby(parts.ledger.worn_blocks(), key=lambda block: block.owner):
            scope = parts.ledger.owner_scope(owner << 32)
            for block in worn:
                if parts.closing:
                    return written
                records = _live(parts, block)
                if scope is not None and len(records) == len(block.live):
                    _packed(parts, scope, records, {}, owner=owner, label=block.label, moved=block)
                    written += 1
        parts.ledger.tidy(discarded_before=discarded_before)
        known = set(parts.ledger.block_names())
        parts.archive.remove(name for name in parts.archive.names() if name not in known)
    return written


def damaged(parts: Parts) -> dict[str, str]:
    """Blocks that could not be read, and why. One that was replaced while somebody was about to read it is none."""
    found = dict(parts.archive.damaged)
    known = set(parts.ledger.block_names()) if found else set()
    return {name: why for name, why in found.items() if name in known}


__all__ = ["archive", "damaged", "freeze", "rewrite", "thaw"]
