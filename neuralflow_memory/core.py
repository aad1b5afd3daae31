"""`Core`: one open folder at work: worker pools, the indexer's thread, folds in the background, closing."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

from ._offload import Workers
from .errors import ForkedError, IndexingError
from .pipeline.compact import compact
from .pipeline.index import PARKED, index_batch
from .pipeline.parts import Parts
from .types import Scope

_STORAGE_WORKERS = 4  # places at a time; see _offload
_SUMMARY_WORKERS = 2
_LONGEST_PAUSE = 30.0  # seconds between tries while nothing works
_TRIES_BEFORE_RAISING = 3  # failed passes in a row after which flush() gives up waiting


class Core:
    """One open folder: its parts, its threads, and how many handles are on it."""

    def __init__(self, parts: Parts, *, release: Callable[[], None]) -> None:
        self.parts = parts
        self.pid = os.getpid()
        self.workers = Workers(_STORAGE_WORKERS, name="storage")
        self._summaries = Workers(_SUMMARY_WORKERS, name="summaries")
        self._release = release
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._indexing = threading.Lock()
        self._moved = threading.Condition()
        self._failures = 0
        self._folding: dict[Scope, bool] = {}
        """Sessions being folded; True when one filled up again meanwhile."""
        self._loaded = threading.Event()
        parts.changed = self._wake.set
        parts.full = self._fold_later
        self._indexer: threading.Thread | None = None
        if parts.store is not None:
            self._wake.set()  # what a crash or an earlier process left
            self._indexer = threading.Thread(target=self._index, name="neuralflow-indexer", daemon=True)
            self._indexer.start()
        else:
            self._loaded.set()
        # weakref's own exit hook must be older than ours, or what torch registers while it is imported in close() never runs.
        weakref.finalize(self, int).atexit = False
        atexit.register(self.close)

    # -- indexing

    def _index(self) -> None:
        load = getattr(self.parts.embedder, "load", None)
        try:
            if load is not None:
                load()
        except Exception as error:  # told by stats(); each search and each batch will try again
            self._note("embedder", error)
        self._loaded.set()
        while not self._closing.is_set():
            self._wake.clear()
            pause = self._pass()
            if pause:
                # While nothing works, new turns are no reason to try sooner; flush() is.
                self._wake.wait(pause) if self._failures == 0 else self._hurry.wait(pause)
                self._hurry.clear()

    def _pass(self) -> float:
        """One batch; how long to wait before the next, in seconds."""
        try:
            with self._indexing:
                done = index_batch(self.parts)
            self._failures = 0
        except Exception as error:  # nothing is lost: the marks stay, and are tried again
            self._failures += 1
            self._note("indexing", error)
            done = 0
        with self._moved:
            self._moved.notify_all()
        if self._failures:
            return float(min(_LONGEST_PAUSE, 0.05 * 4**self._failures))
        if done:
            return 0.0
        due = self._due()
        return _LONGEST_PAUSE if due is None else max(0.01, due - time.time())

    def _due(self) -> float | None:
        """When the next mark that is not parked is due, in seconds since 1970; None when none waits."""
        found = self.parts.ledger.next_retry(gone=self.parts.embedder is None)
        return None if found is None or found >= PARKED else found / 1_000_000

    def _note(self, what: str, error: BaseException) -> None:
        self.parts.trouble = f"{what}: {type(error).__name__}: {error}"

    # -- folding

    def _fold_later(self, scope: Scope) -> None:
        scope = replace(scope, agent_id=None)  # one fold a session, whoever writes
        with self._moved:
            if scope in self._folding:
                self._folding[scope] = True
                return
            self._folding[scope] = False
        try:
            self._summaries.submit(lambda: self._fold(scope))
        except RuntimeError:  # closing; the next add after reopening starts it
            with self._moved:
                self._folding.pop(scope, None)

    def _fold(self, scope: Scope) -> None:
        again = True
        while again:
            try:
                if not self._closing.is_set():
                    compact(self.parts, scope)
            except Exception as error:  # the turns stay in the window; the next add tries again
                self._note("folding", error)
            with self._moved:
                again = self._folding[scope] and not self._closing.is_set()
                self._folding[scope] = False
                if not again:
                    del self._folding[scope]
                    self._moved.notify_all()

    # -- waiting and closing

    def flush(self) -> None:
        with self._moved:
            self._moved.wait_for(lambda: not self._folding)
        if self._indexer is None:
            return
        self._failures = 0
        while self._due() is not None:
            if self._failures >= _TRIES_BEFORE_RAISING:
                raise IndexingError(
                    f"the vector index can't be brought up to date ({self.parts.trouble}); nothing is lost, the entries wait "
                    "in the ledger: mend the cause and call flush() again",
                    path=str(self.parts.settings.path),
                )
            self._wake.set()
            self._hurry.set()
            with self._moved:
                self._moved.wait(0.05)

    def ready(self) -> None:
        self._loaded.wait()

    def reindex(self) -> None:
        parts = self.parts
        parts.ledger.retry_parked()
        if parts.store is not None and parts.model_id is not None:
            known = parts.ledger.known_model(parts.model_id)
            with self._indexing:  # a batch under way would clear marks for what it wrote before the reset
                parts.ledger.mark_all()
                if known is not None:
                    parts.store.reset(model_id=parts.model_id, dimensions=known[1])
        self.flush()

    def check(self) -> None:
        """Raise unless this core can be used from here."""
        if os.getpid() != self.pid:
            raise ForkedError(
                "this memory was opened before a fork; a child process must open its own with open_memory(...), "
                "or be started with 'spawn'"
            )

    def close(self) -> None:
        """Finish the batch in hand and close; what is left waits in the dirty set."""
        if self._closing.is_set() or os.getpid() != self.pid:
            return
        self._closing.set()
        self._wake.set()
        self._hurry.set()
        atexit.unregister(self.close)
        if self._indexer is not None:
            self._indexer.join()
        self._summaries.close()
        self.workers.close()
        if self.parts.store is not None:
            self.parts.store.close()
        self.parts.ledger.close()
        self._release()


__all__ = ["Core"]
