"""What an entry was before it was changed: read it, write it again."""

from __future__ import annotations

from dataclasses import replace

from ..errors import InputError, NotFound, brief
from ..protocols import Record
from ..rules.analysis import recorded
from ..types import Entry, Scope
from .edit import get, rewrite
from .parts import Parts

_RESTORED = """role name content blocks tool_calls tool_call_id payload metadata tags category source importance provenance trust
    sources created_at expires_at valid_from"""


def history(parts: Parts, scope: Scope, id: str, *, principal: str | None) -> list[Entry]:
    """Every version of an entry that is kept, oldest first, the last as it is now."""
    return parts.ledger.history(scope, get(parts, scope, id, principal=principal).number)


def restore(parts: Parts, scope: Scope, id: str, version: int, *, principal: str | None) -> Entry:
    """Write an earlier version of an entry anew; if nothing stood for it then, it holds again.

    What the entry itself stands for stays as it is, and so does that another stands for it, if one did then.
    """
    parts.authorize(principal, "write", scope)
    if not isinstance(version, int) or isinstance(version, bool):
        raise InputError(f"version is the number of a version, not {brief(version)}")

    def restored(before: Entry) -> Record:
        found = {e.version: e for e in parts.ledger.history(scope, before.number)}
        if version not in found:
            raise NotFound(f"{brief(id)} has no version {version}; history() lists those that are kept", id=id)
        old = found[version]
        if version == before.version:
            return recorded(before)
        new = {name: getattr(old, name) for name in _RESTORED.split()}
        if old.superseded_by is None:
            new |= {"valid_to": old.valid_to, "superseded_by": None}
        entry = replace(before, **new, updated_at=parts.clock())
        return recorded(
            replace(entry, tokens=parts.count(entry.message) if entry.role else parts.counter.count(entry.content))
        )

    return rewrite(parts, scope, id, restored, principal=principal)


__all__ = ["history", "restore"]
