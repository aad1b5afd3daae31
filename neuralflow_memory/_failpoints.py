"""Named places where a crash is worth testing. They cost one comparison and do nothing unless a test arms them."""

from __future__ import annotations

from collections.abc import Callable

FAILPOINTS = (
    "open.migrated",
    "append.begun",
    "append.applied",
    "append.committed",
    "index.claimed",
    "index.embedded",
    "index.saved",
    "index.upserted",
    "index.cleared",
    "fold.summarized",
    "fold.applied",
    "fold.committed",
    "change.applied",
    "change.committed",
    "archive.written",
    "archive.applied",
    "archive.committed",
    "archive.replaced",
)

MOVING = (
    "load.applied",
    "load.committed",
    "backup.copied",
    "backup.written",
    "restore.copied",
    "restore.applied",
    "restore.committed",
)
"""Those of import, backup and restore, which have tests of their own."""

REINDEXING = (
    "reindex.embedded",
    "reindex.saved",
    "reindex.built",
    "reindex.compared",
    "reindex.applied",
    "reindex.committed",
    "reindex.cleared",
)
"""Those of taking up another embedding model, likewise."""

hook: Callable[[str], None] | None = None
"""Set by tests; called with the name of each failpoint that is passed."""


def failpoint(name: str) -> None:
    """Mark a place where a test may kill the process."""
    if hook is not None:
        hook(name)
