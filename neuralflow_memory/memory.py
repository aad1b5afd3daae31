"""`Memory`: the front door. A handle on an open folder, whose work `Core` does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from ._offload import Workers, offload
from .config import Settings
from .core import Core
from .errors import ArchiveError, ClosedError, QueryError, StorageError, brief
from .pipeline import archive, cached, sweep
from .pipeline.backup import backup
from .pipeline.export import Progress, export
from .pipeline.import_ import import_
from .pipeline.index import PARKED
from .pipeline.ingest import Messages, listed
from .pipeline.parts import Parts
from .pipeline.reindex import Sample
from .protocols import Embedder, EntryStore
from .rules.budget import prompt_tokens
from .rules.states import StateRules, as_rules
from .session import Session
from .types import (
    BackupReport,
    ExportReport,
    ImportReport,
    ReindexReport,
    RestoreReport,
    Scope,
    SessionInfo,
    SweepReport,
)
from .values import Values


class Memory:
    """An open memory. Made by `open_memory`; closed by `close()` or by leaving its `with` block.

    Every operation has an async twin: `flush` / `aflush`, and so on. Safe to use from any thread and any event loop.
    """

    def __init__(self, core: Core, *, on_close: Callable[[Core], None]) -> None:
        self._core = core
        self._on_close = on_close
        self._closed = False

    @property
    def path(self) -> Path:
        """The folder."""
        return self._core.parts.settings.path

    @property
    def settings(self) -> Settings:
        return self._core.parts.settings

    @property
    def _workers(self) -> Workers:
        self._ready_parts()
        return self._core.workers

    @property
    def _patient_workers(self) -> Workers:
        self._ready_parts()
        return self._core.patient_workers

    def _ready_parts(self) -> Parts:
        self._core.check()
        if self._closed:
            raise ClosedError("this memory was closed; open it again with open_memory(...)")
        return self._core.parts

    def session(
        self,
        session_id: str | None = None,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        tenant: str | None = None,
        principal: str | None = None,
        state_rules: StateRules | Any = None,
    ) -> Session:
        """A conversation. Cheap, no I/O; a new one comes into being with its first turn.

        Args:
            session_id: Its id, unique for its user; None makes a new one.
            user_id: Whose it is; None means the memory's default user, or nobody: a chat of its own.
            agent_id: Which agent writes, for `within="agent"`.
            tenant: Keeps the users of one organisation from those of another.
            principal: On whose behalf it is used, for the access policy; None is the application itself.
            state_rules: What its state may be: `StateRules`, a pydantic model or a JSON schema. None means the memory's.
        """
        settings = self._ready_parts().settings
        rules = None if state_rules is None else as_rules(state_rules)
        scope = Scope(
            "default" if tenant is None else tenant,
            settings.user_id if user_id is None else user_id,
            uuid4().hex if session_id is None else session_id,
            agent_id,
        )
        return Session(self, scope, principal=principal, state_rules=rules)

    def values(self, *, user_id: str | None = None, tenant: str | None = None, principal: str | None = None) -> Values:
        """JSON values under namespaces and keys, of a user or of a tenant. Cheap, no I/O.

        Args:
            user_id: Whose they are: what they are found by is then knowledge of that user, which the user's sessions find,
                too. None means the memory's default user, or nobody: values of the tenant, which no session sees.
            tenant: Keeps the values of one organisation from those of another.
            principal: On whose behalf they are used, for the access policy; None is the application itself.
        """
        settings = self._ready_parts().settings
        scope = Scope("default" if tenant is None else tenant, settings.user_id if user_id is None else user_id)
        return Values(self, scope, principal=principal)

    def sessions(self, *, user_id: str | None = None, tenant: str | None = None) -> list[SessionInfo]:
        """A user's sessions, latest first; without a user, the sessions that have none."""
        parts = self._ready_parts()
        return parts.ledger.sessions(
            tenant="default" if tenant is None else tenant,
            user_id=parts.settings.user_id if user_id is None else user_id,
        )

    def count_tokens(self, messages: Messages) -> int:
        """What *messages* would cost as a prompt, by the counter that `context` uses."""
        return prompt_tokens(listed(messages, injected=True), self._ready_parts().counter.count)

    def stats(self, *, verify: bool = False) -> dict[str, Any]:
        """Counts and states, for people and for monitoring.

        *verify* also reads every block of the archive, waits until the vector index was asked whether it answers, and reads all of the ledger's file:
        "integrity" says whether it is sound, and "twins" lists session ids that exist with and without a user, which are
        different conversations. "cache" is what the caches hold, and how often they had what was asked for. "indexer" is the
        process that indexes for all who have the folder open, perhaps this one.
        """
        parts = self._ready_parts()
        if verify:
            self._core.checked()
        found = {"path": str(self.path), **parts.ledger.totals(parked_at=PARKED)}
        found |= _index_state(parts.store)
        found["indexer"] = self._core.indexer
        found["embedder"] = parts.model_id
        found["tokenizer"] = parts.counter.name
        found["exact_tokens"] = parts.counter.exact
        found["summarizer"] = parts.summarizer.name
        found["extractor"] = None if parts.extractor is None else parts.extractor.name
        for name in (
            "added",
            "failed_writes",
            "embedded",
            "folds",
            "summarizer_calls",
            "summarizer_fallbacks",
            "extractor_calls",
            "extractor_failures",
            "extracted",
            "superseded",
            "search_without_vectors",
            "search_without_reranker",
            "facts_kept",
            "facts_pinned",
            "facts_reachable",
            "facts_lost",
        ):
            found[name] = parts.tally[name]
        found["archive_bytes"] = parts.archive.nbytes()
        found["archive_damaged"] = archive.damaged(parts)
        found["last_sweep"] = sweep.last_sweep(parts)
        found["spent"] = parts.ledger.spent()
        parts.residents.look()
        tenants = {tenant for tenant, *_ in parts.ledger.calibration()}
        found["margins"] = {tenant: dict(parts.margins(tenant)) for tenant in sorted(tenants)}
        found["cache"] = cached.stats(parts)
        found["last_error"] = parts.trouble
        if verify:
            found["integrity"] = parts.ledger.verify()
            for name in parts.ledger.block_names():
                with suppress(ArchiveError):  # the archive notes it
                    parts.archive.check(name)
            found["archive_damaged"] = archive.damaged(parts)
            found["twins"] = parts.ledger.twins()
        return found

    def flush(self) -> None:
        """Wait until everything added is indexed and every fold under way is done.

        Raises:
            IndexingError: The vector index can't be brought up to date; nothing is lost.
        """
        self._ready_parts()
        self._core.flush()

    def ready(self) -> None:
        """Wait until the models of search are loaded, so that the first search does not pay for it."""
        self._ready_parts()
        self._core.ready()

    def reindex(
        self,
        embedder: str | Embedder | None = None,
        *,
        progress: Progress | None = None,
        samples: int | Sequence[str | tuple[Session, str]] = 50,
        switch: bool = True,
    ) -> ReindexReport:
        """Build the vector index anew: from the vectors there are, or with another embedding model.

        Without *embedder* nothing is embedded again, and parked entries get a new chance. With it, its vectors are made beside
        those in use, while everybody goes on searching and writing with these; then both are asked sample questions, and the
        new one is taken up in one transaction. Cut short anywhere, another call goes on where it stopped.

        Other processes that have the folder open search by words from then on, with a warning, until they open it again with
        the new model or call this with it.

        Args:
            embedder: A model's name, or an `Embedder` whose `model_id` is not the one in use.
            progress: Called now and then with how many entries the new model has embedded, and of how many; then, from the start
                again, with how many the index has.
            samples: Questions to compare by, each asked in the scope of a session, or in that of whoever has the most entries;
                or how many to take from the chats of the largest users.
            switch: False to build and to compare only; another call then has nothing to embed but what is new.

        Raises:
            ConfigError: This memory is open without an embedding model; open it with the new one.
            ModelMismatch: Another process has taken up a third model meanwhile; open it again.
            EmbeddingError: The new model failed; the old one is still in use. What else it raises is raised as it is.
            IndexingError: The vector index can't be brought up to date; nothing is lost.
        """
        self._ready_parts()
        if embedder is None:
            return self._core.reindex(progress=progress)
        given = samples if isinstance(samples, int) else [_sample(s) for s in samples]
        return self._core.take_up(embedder, progress=progress, samples=given, switch=switch)

    def export(
        self,
        file: str | os.PathLike[str],
        *,
        user_id: str | None = None,
        tenant: str | None = None,
        vectors: bool = False,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write all that is stored, as of this moment, to a file of JSON lines; others may write meanwhile.

        docs/backup.md describes the file. It is there whole or, if this raises, as it was before.

        Args:
            file: Where to; a file that is there is replaced.
            user_id: Only what is of this user; None: of all users, and what has none.
            tenant: Only of this tenant; None: of all, or of the default one if a user is named.
            vectors: With the vectors, so that nothing has to be embedded again where they go; three times the size.
            progress: Called now and then with how many entries are written, and how many there are.

        Raises:
            StorageError: The file can't be written.
        """
        parts = self._ready_parts()
        return export(parts, file, user_id=user_id, tenant=tenant, vectors=vectors, progress=progress)

    def import_(
        self,
        file: str | os.PathLike[str],
        *,
        user_id: str | None = None,
        tenant: str | None = None,
        restore_deleted: bool = False,
        progress: Progress | None = None,
    ) -> ImportReport:
        """Take in what `export` wrote, here or elsewhere. What is here already stays as it is; so again adds nothing.

        A session that is new here becomes what it was, with order, window and summary. In one that is here already, the
        turns that are missing come after those that are here. The whole file is read before anything is written. Then it
        is written in batches: if that is cut short, a second call goes on.

        Args:
            file: What `export` wrote.
            user_id: Whose it becomes; the file then holds what is of one user, or of none.
            tenant: In which tenant; likewise.
            restore_deleted: Take in also what was deleted here.
            progress: Called now and then with how much is done, and of how much.

        Raises:
            FormatError: The file is cut, damaged, of a newer version or no export; nothing was written.
        """
        return import_(
            self._ready_parts(),
            file,
            user_id=user_id,
            tenant=tenant,
            restore_deleted=restore_deleted,
            progress=progress,
        )

    def backup(self, path: str | os.PathLike[str], *, progress: Progress | None = None) -> BackupReport:
        """Copy all that is stored, as of one moment, into a new folder; others may write meanwhile.

        The copy is checked, and is there whole or not at all. The vector index is not in it: it is filled from the ledger.
        Sweeps wait until it is made. A block of the archive that can't be read is left out, and the report names it.

        Args:
            path: The folder to make.
            progress: Called now and then with how much is copied, and of how much.

        Raises:
            InputError: There is something at *path*.
            StorageError: It can't be written.
        """
        return backup(self._ready_parts(), path, progress=progress)

    def restore(
        self, path: str | os.PathLike[str], *, restore_deleted: bool = False, progress: Progress | None = None
    ) -> RestoreReport:
        """Go back to a backup of this memory; or make a new, empty memory what another was. All or nothing.

        What was added since is gone then; what was deleted since stays deleted. Handles and sessions stay usable. Nothing is
        embedded: the index is filled from the ledger in the background, and `flush` waits for it.

        Args:
            path: What `backup` made.
            restore_deleted: Bring back also what was deleted since.
            progress: Called now and then with how much is read, and of how much.

        Raises:
            BackupError: It is no backup, damaged, of a newer version, or of another memory.
            FolderInUse: Another process has the folder open.
            ModelMismatch: It was indexed with another embedding model.
        """
        self._ready_parts()
        return self._core.restore(path, restore_deleted=restore_deleted, progress=progress)

    def sweep(self, *, dry_run: bool = False) -> SweepReport:
        """Move entries to where they belong: to the archive what nobody uses, back what is used again, by `tiers` and `archive`.

        What has expired or is selected by `retention` is archived as well, or deleted, if `retention.delete` asks for it.
        Knowledge that says the same is merged, as `entries.consolidate` does. Keyed values that have expired are deleted.

        Args:
            dry_run: Only say what would be done, and why.

        Returns:
            Every move with its reason; print it.
        """
        return sweep.sweep(self._ready_parts(), dry_run=dry_run)

    def undo(self, run: str) -> int:
        """Bring back what retention deleted in a sweep, for `retention.undo_days`; how many entries.

        What somebody deleted himself never comes back. Raises `NotFound` if there is nothing to bring back.

        Args:
            run: The sweep's `run`, as its report and `stats()` name it.
        """
        return sweep.undo(self._ready_parts(), run)

    def vacuum(self) -> None:
        """Give the room of what was archived or deleted back to the disk. Nobody can write for that long; it may take minutes."""
        self._ready_parts()
        self._core.vacuum()

    def close(self) -> None:
        """Close this handle; the last one on a folder closes it. Indexing that is left goes on when it is next opened."""
        if not self._closed:
            self._closed = True
            self._on_close(self._core)

    asessions = offload(sessions)
    acount_tokens = offload(count_tokens)
    astats = offload(stats)
    # They may last, and must not hold a storage worker.
    areindex = offload(reindex, workers="_patient_workers")
    aexport = offload(export, workers="_patient_workers")
    aimport_ = offload(import_, workers="_patient_workers")
    abackup = offload(backup, workers="_patient_workers")
    arestore = offload(restore, workers="_patient_workers")

    async def asweep(self, *, dry_run: bool = False) -> SweepReport:
        """Async twin of `sweep`."""
        # It may take long, and must not hold a storage worker; so below.
        return await self._patient_workers.run(lambda: self.sweep(dry_run=dry_run))

    async def aundo(self, run: str) -> int:
        """Async twin of `undo`."""
        return await self._patient_workers.run(lambda: self.undo(run))

    async def avacuum(self) -> None:
        """Async twin of `vacuum`."""
        await self._patient_workers.run(self.vacuum)

    async def aflush(self) -> None:
        """Async twin of `flush`."""
        await asyncio.to_thread(self.flush)  # it may wait long, and must not hold a storage worker

    async def aready(self) -> None:
        """Async twin of `ready`."""
        await asyncio.to_thread(self.ready)

    async def aclose(self) -> None:
        """Async twin of `close`."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Memory({str(self.path)!r})"


def _sample(given: str | tuple[Session, str]) -> Sample:
    """A question to compare by, with the scope that it is asked in."""
    scope, question = (None, given) if isinstance(given, str) else (given[0].scope, given[1])
    if not isinstance(question, str) or not question.strip():
        raise QueryError(f"a sample is a question, or a session and a question, not {brief(given)}")
    return scope, question


def _index_state(store: EntryStore | None) -> dict[str, Any]:
    """Where the vector index is, how many entries it holds, and why it does not say."""
    found: dict[str, Any] = {"chroma": None, "store": None, "store_error": None}
    if store is not None:
        found["store"] = store.url or "embedded"
        try:
            found["chroma"] = store.count()
        except StorageError as error:
            found["store_error"] = str(error)
    return found


__all__ = ["Memory"]
