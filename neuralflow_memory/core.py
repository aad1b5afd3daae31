"""`Core`: one open folder at work: worker pools, the indexer's thread, folds in the background, closing."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue

from ._offload import Workers
from .errors import ForkedError, IndexingError
from .pipeline.compact import compact
from .pipeline.index import PARKED, index_batch
from .pipeline.parts import Parts
from .types import Scope

_STORAGE_WORKERS = 4  # places at a time; see _offload
_FOLDERS = 4  # folds at a time: one that waits for a slow model must not hold up the others
_LONGEST_PAUSE = 30.0  # seconds between tries while nothing works
_TRIES_BEFORE_RAISING = 3  # failed passes in a row after which flush() gives up waiting


class _Signal:
    """Wakes a thread that waits.

    Not an `Event`, nor a `Condition`: taking their lock is Python code, and an interrupt (Ctrl-C) that falls into it leaves
    them locked, so that whoever waits, waits for ever.
    """

    def __init__(self) -> None:
        self._given: SimpleQueue[None] = SimpleQueue()

    def give(self) -> None:
        if self._given.empty():
            self._given.put(None)

    def clear(self) -> None:
        with suppress(Empty):
            while True:
                self._given.get_nowait()

    def wait(self, seconds: float) -> None:
        with suppress(Empty):
            self._given.get(timeout=seconds)


class Core:
    """One open folder: its parts and its threads.

    Writers tell it what to do by `_Signal`s and queues, which an interrupt of the writer can't break.
    """

    def __init__(self, parts: Parts, *, release: Callable[[], None]) -> None:
        self.parts = parts
        self.pid = os.getpid()
        self.workers = Workers(_STORAGE_WORKERS, name="storage")
        self.patient_workers = Workers(_FOLDERS, name="patient")
        """For calls that may wait long for a model."""
        self._release = release
        self._wake = _Signal()
        self._hurry = _Signal()
        self._moved = _Signal()
        """Given when a batch was indexed or a fold is done."""
        self._indexing = threading.Lock()
        self._failures = 0
        self._full: SimpleQueue[Scope | None] = SimpleQueue()
        self._folding: dict[Scope, bool] = {}
        """Sessions being folded or waiting for it; True when one filled up again meanwhile."""
        self._guard = threading.Lock()
        self._loading = threading.Lock()
        """Held until the embedding model is loaded."""
        self._reranking = threading.Lock()
        """Held until the reranker is loaded."""
        parts.changed = self._wake.give
        parts.full = self._fold_later
        self._threads = [
            threading.Thread(target=self._fold, name=f"neuralflow-folder-{n}", daemon=True) for n in range(_FOLDERS)
        ]
        if parts.store is not None:
            self._loading.acquire()
            self._threads.append(threading.Thread(target=self._index, name="neuralflow-indexer", daemon=True))
        if hasattr(parts.reranker, "load"):
            self._reranking.acquire()
            self._threads.append(threading.Thread(target=self._load_reranker, name="neuralflow-loader", daemon=True))
        for thread in self._threads:
            thread.start()
        # weakref's own exit hook must be older than ours, or what torch registers while it is imported in close() never runs.
        weakref.finalize(self, int).atexit = False
        atexit.register(self.close)

    # -- indexing

    def _index(self) -> None:
        self._load("embedder")
        self._loading.release()
        while not self.parts.closing:
            self._wake.clear()
            pause = self._pass()  # the first does what a crash or an earlier process left
            if pause:
                # While nothing works, new turns are no reason to try sooner; flush() is.
                self._wake.wait(pause) if self._failures == 0 else self._hurry.wait(pause)
                self._hurry.clear()

    def _load(self, name: str) -> None:
        load = getattr(getattr(self.parts, name), "load", None)
        try:
            if load is not None:
                load()
        except Exception as error:  # told by stats(); each search and each batch will try again
            self._note(name, error)

    def _load_reranker(self) -> None:
        with self._loading:  # first the embedder, which searches need more, and which imports the same library
            pass
        if not self.parts.closing:
            self._load("reranker")
        self._reranking.release()

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
        self._moved.give()
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
        with self._guard:
            if scope in self._folding:
                self._folding[scope] = True
            else:
                self._full.put(scope)  # first: if an interrupt comes between the two, it is folded all the same
                self._folding[scope] = False

    def _fold(self) -> None:
        while (scope := self._full.get()) is not None:
            again = True
            while again:
                with self._guard:
                    self._folding[scope] = False
                try:
                    if not self.parts.closing:
                        compact(self.parts, scope)
                except Exception as error:  # the turns stay in the window; the next add tries again
                    self._note("folding", error)
                with self._guard:
                    again = self._folding.get(scope, False) and not self.parts.closing
                    if not again:
                        self._folding.pop(scope, None)
            self._moved.give()

    # -- waiting and closing

    def flush(self) -> None:
        while self._folding and not self.parts.closing:
            self._moved.wait(0.05)
        if self.parts.store is None:
            return
        self._failures = 0
        while self._due() is not None:
            if self._failures >= _TRIES_BEFORE_RAISING:
                raise IndexingError(
                    f"the vector index can't be brought up to date ({self.parts.trouble}); nothing is lost, the entries wait "
                    "in the ledger: mend the cause and call flush() again",
                    path=str(self.parts.settings.path),
                )
            self._wake.give()
            self._hurry.give()
            self._moved.wait(0.05)

    def ready(self) -> None:
        with self._loading, self._reranking:
            pass

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
        """Finish the batch and the piece of a fold in hand and close; what is left waits in the ledger."""
        if self.parts.closing or os.getpid() != self.pid:
            return
        self.parts.closing = True
        self._wake.give()
        self._hurry.give()
        for _ in range(_FOLDERS):
            self._full.put(None)
        atexit.unregister(self.close)
        for thread in self._threads:
            thread.join()
        self.workers.close()
        self.patient_workers.close()
        if self.parts.store is not None:
            self.parts.store.close()
        self.parts.ledger.close()
        self._release()


__all__ = ["Core"]
