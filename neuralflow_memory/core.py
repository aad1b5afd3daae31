"""`Core`: one open folder at work: worker pools, the indexer's thread, folds in the background, closing."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import Any

from ._offload import Workers
from .errors import ForkedError, IndexingError, ModelMismatch, StorageError
from .pipeline.analyse import analyse
from .pipeline.backup import ready
from .pipeline.compact import compact
from .pipeline.export import Progress
from .pipeline.extract import MOST_ATTEMPTS, extract
from .pipeline.index import BATCH, PARKED, index_batch
from .pipeline.parts import Parts
from .pipeline.reindex import Sample, adopted, built, cleared, counted, switched
from .pipeline.states import cleanup
from .pipeline.sweep import last_sweep, sweep
from .protocols import EntryStore, Lock
from .types import ReindexReport, RestoreReport, Scope, SweepReport

_STORAGE_WORKERS = 4  # places at a time; see _offload
_FOLDERS = 4  # folds at a time: one that waits for a slow model must not hold up the others
_LONGEST_PAUSE = 30.0  # seconds between tries while nothing works
_CHECK_PAUSE = 5.0  # the same, of asking a server that is down whether it is back
_TRIES_BEFORE_RAISING = 3  # failed passes in a row after which flush() gives up waiting
_LOOK_PAUSE = 0.25  # seconds between two looks at what other processes do
_REOPENING_PAUSE = 5.0  # the same, of trying to open an index that could not be opened, or of asking a server how it is
_AFTER_A_TURN = 0.05  # seconds for whoever wrote it to build the next prompt, before it is embedded
_KEEPING_PAUSE = 0.25  # seconds between two looks at what is to be made up for after writes and searches
_STALLED = 30.0  # seconds without progress of another process after which flush() gives up waiting
_TO_BE_MADE_ANEW = (
    "to be made anew"  # the collection that the marks are about, when another process is to start a new one
)


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

    def wait(self, seconds: float) -> bool:
        """Whether it was given within so many seconds."""
        with suppress(Empty):
            self._given.get(timeout=seconds)
            return True
        return False


class Core:
    """One open folder: its parts and its threads.

    Writers tell it what to do by `_Signal`s and queues, which an interrupt of the writer can't break.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        index_lock: Lock,
        wanted: Lock,
        open_store: Callable[[], EntryStore] | None,
        release: Callable[[], None],
    ) -> None:
        """Start work.

        *index_lock* is of the process that indexes for all who have the folder open, *wanted* is shared by those who would, and
        have an embedder. *open_store* opens the vector index, None if this process has nothing to do with it.
        """
        self.parts = parts
        self.pid = os.getpid()
        self.workers = Workers(_STORAGE_WORKERS, name="storage")
        self.patient_workers = Workers(_FOLDERS, name="patient")
        """For calls that may wait long for a model."""
        self._lock = index_lock
        self._wanted = wanted
        self._open_store = open_store
        self._release = release
        self._wake = _Signal()
        self._hurry = _Signal()
        self._moved = _Signal()
        """Given when a batch was indexed or a fold is done."""
        self._indexing = threading.Lock()
        self._analysing = threading.Lock()
        self._unanalysed = False
        """Whether texts were written that no thread has taken up yet."""
        self._closing = _Signal()
        self._failures = 0
        self._failure: Exception | None = None
        """The last one of indexing."""
        self._astray = True
        """Whether the vector index may be another than the marks are about, or marks are on hold though it answers."""
        self._checked = open_store is None
        """Whether the vector index was looked at: until then, what it lost is not marked."""
        self._full: SimpleQueue[Scope | Callable[[], None] | None] = SimpleQueue()
        """Sessions to be folded, other things to be done in the background; None ends a thread."""
        self._folding: dict[Scope, bool] = {}
        """Sessions being folded or waiting for it; True when one filled up again meanwhile."""
        self._cleaned = time.monotonic()
        """When states were seen to."""
        self._guard = threading.Lock()
        self._loading = threading.Lock()
        """Held until the embedding model is loaded."""
        self._reranking = threading.Lock()
        """Held until the reranker is loaded."""
        self._seen = -1
        """The ledger's `data_version` when marks were looked for."""
        self._asked = -_REOPENING_PAUSE
        """When a server that others fill was asked how it is, or an index could not be opened."""
        parts.residents.whole = parts.store is None
        parts.changed = self._changed
        parts.full = self._fold_later
        parts.later = self._full.put
        self._sweep_at = self._first_sweep() if parts.settings.tiers.background else None
        """By the monotonic clock; None: not in the background."""
        self._threads = [
            threading.Thread(target=self._fold, args=(n == 0,), name=f"neuralflow-folder-{n}", daemon=True)
            for n in range(_FOLDERS)
        ]
        self._threads.append(threading.Thread(target=self._keep, name="neuralflow-keeper", daemon=True))
        if open_store is not None:
            self._loading.acquire()
            self._threads.append(threading.Thread(target=self._index, name="neuralflow-indexer", daemon=True))
        if hasattr(parts.reranker, "load"):
            self._reranking.acquire()
            self._threads.append(threading.Thread(target=self._load_reranker, name="neuralflow-loader", daemon=True))
        for thread in self._threads:
            thread.start()
        if parts.extractor is not None:
            for scope in parts.ledger.to_extract(attempts=MOST_ATTEMPTS):
                self._fold_later(scope)
        # weakref's own exit hook must be older than ours, or what torch registers while it is imported in close() never runs.
        weakref.finalize(self, int).atexit = False
        atexit.register(self.close)

    def _changed(self) -> None:
        self._wake.give()
        self._unanalysed = True

    # -- keeping up

    def _keep(self) -> None:
        """Do what neither turns nor searches wait for, a moment after them; a thread's work.

        Texts are analysed, also what a crash or an earlier process left; questions are written down; and what others have deleted
        does not stay in RAM. Nobody wakes it: that would cost a turn more than it costs to look, four times a second.
        """
        due = 0.0
        while not self.parts.closing:
            self._closing.wait(_KEEPING_PAUSE)
            self._do(self.parts.write_questions)
            with suppress(StorageError):
                self.parts.residents.look()
            if not self._unanalysed and time.monotonic() < due:
                continue
            with self._analysing:
                self._unanalysed = False  # first: what is written from now on may be too late for this time
                try:
                    analyse(self.parts)
                    due = time.monotonic() + _LONGEST_PAUSE
                except Exception as error:  # they stay as they are, and are tried again
                    self._note("analysing", error)
                    due = time.monotonic() + 1.0

    # -- indexing

    def _index(self) -> None:
        if self.parts.settings.embedder.preload:
            self._load("embedder")
        self._loading.release()
        leads = False
        while not self.parts.closing:
            led, leads = leads, self._lead()
            if not leads:
                self._follow()
                self._hurry.wait(_LOOK_PAUSE)
            elif not led:
                self._begin()
            else:
                self._wake.clear()
                pause = self._pass()  # the first does what a crash or an earlier process left
                if pause:
                    # While nothing works, new turns are no reason to try sooner; flush() is.
                    self._rest(pause) if self._failures == 0 else self._hurry.wait(pause)
            self._hurry.clear()

    @property
    def indexer(self) -> int | None:
        """The process that indexes for all who have the folder open."""
        return self.pid if self._lock.held else self._lock.pid

    def _lead(self) -> bool:
        """Whether this process indexes for all; it does as soon as nobody else does, and as long as it is open.

        Without an embedder it only deletes, so it lets go as soon as somebody wants to who has one.
        """
        assert self._open_store is not None
        parts = self.parts
        if not self._lock.held and time.monotonic() < self._asked + _REOPENING_PAUSE and parts.store is None:
            return False
        if not self._lock.take():
            if parts.model_id is not None:
                self._wanted.take(shared=True)
            return False
        if self._to_let_go():
            self._let_go()
            return False
        self._wanted.release()
        if parts.store is None:
            try:
                parts.store = self._open_store()
            except Exception as error:  # perhaps another process can
                self._note("indexing", error)
                self._asked = time.monotonic()
                self._lock.release()
                return False
        return True

    def _to_let_go(self) -> bool:
        """Whether somebody who has an embedder wants to index. Asked by who indexes only: whoever asks looks, to others who
        ask, as if that were so.
        """
        if self.parts.model is not None:
            return False
        nobody = self._wanted.take()
        self._wanted.release()
        return not nobody

    def _let_go(self) -> None:
        if self._lock.held:
            store = self.parts.store
            if store is not None and store.url is None:
                self.parts.store = None
                store.close()
            self._lock.release()

    def _begin(self) -> None:
        """See what the vector index is about; the first time that this process indexes, and after another has."""
        self._astray = True
        try:
            with self._indexing:
                self._check()
        except Exception as error:  # each batch will look again
            self._note("indexing", error)
        self._checked = True

    def _follow(self) -> None:
        """What is to be done while another process indexes: see that a server can be asked."""
        store = self.parts.store
        if store is not None and time.monotonic() > self._asked + _REOPENING_PAUSE:
            self._asked = time.monotonic()
            try:
                store.check(create=False)  # one that is made meanwhile would be made twice
            except Exception as error:
                self._note("search", error)
        self._checked = True
        self._moved.give()

    def _rest(self, pause: float) -> None:
        """Wait for what this process, or another one, writes; not longer than *pause* (seconds)."""
        end = time.monotonic() + pause
        while (left := end - time.monotonic()) > 0:
            if self._wake.wait(min(left, _LOOK_PAUSE)):
                self._hurry.wait(_AFTER_A_TURN)  # more may come, to be embedded together
                return
            version = self.parts.ledger.data_version()
            if version != self._seen:
                self._seen = version
                due = self._due()
                if due is not None and due <= time.time():
                    return
            if self._to_let_go():
                return

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
        parts, store = self.parts, self.parts.store
        assert store is not None
        done = 0
        try:
            with self._indexing:
                done = self._batch()
            if store.down is None:
                self._failures = 0
        except Exception as error:  # nothing is lost: the marks stay, and are tried again
            if isinstance(error, ModelMismatch):
                with parts.embedding:
                    if parts.model_id == error.given:
                        parts.model, parts.outdated = None, True  # it is for others to embed
            self._failures += 1
            self._failure = error
            self._note("indexing", error)
        self._moved.give()
        if done:
            return 0.0
        if self._failures:
            return float(min(_LONGEST_PAUSE if store.down is None else _CHECK_PAUSE, 0.05 * 4**self._failures))
        due = self._due()
        return _LONGEST_PAUSE if due is None else max(0.01, due - time.time())

    def _batch(self) -> int:
        """Index one batch. While the vector index is down, it is only embedded, for search, and goes on hold."""
        parts, store = self.parts, self.parts.store
        assert store is not None
        try:
            self._check()
        except StorageError:
            if store.down is None:
                raise
            marks = parts.ledger.claim(now=time.time_ns() // 1000, limit=BATCH, gone=parts.embedder is None)
            if not marks:
                raise
            with suppress(StorageError):  # once its vectors are kept
                index_batch(parts)
            if not parts.closing:  # which leaves some without
                parts.ledger.hold(marks)
            return len(marks)
        return index_batch(parts)

    def _check(self) -> None:
        """See that the vector index answers, and is the one that the marks are about."""
        parts = self.parts
        assert parts.store is not None
        self._astray |= parts.store.check()
        if self._astray:
            if parts.model_id is not None and parts.store.model_id != parts.model_id and parts.ledger.models():
                parts.ledger.mark_all()  # it was lost, or is another one: it is filled from the ledger
            parts.ledger.release()
            self._astray = False

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

    def _next(self, *, sweeps: bool) -> Scope | Callable[[], None] | None:
        """The next session to be folded, or other thing to be done; whoever waits for one sees to the states of sessions in
        between, and one of them sweeps.
        """
        pause = min(self.parts.settings.state.cleanup_interval, threading.TIMEOUT_MAX)
        while True:
            self._clean_up(pause)
            due = self._sweep_at if sweeps else None
            try:
                return self._full.get(timeout=pause if due is None else min(pause, max(0.0, due - time.monotonic())))
            except Empty:
                if due is not None and time.monotonic() >= due:
                    self._sweep()

    def _clean_up(self, pause: float) -> None:
        with self._guard:
            if self.parts.closing or time.monotonic() < self._cleaned + pause:
                return
            self._cleaned = time.monotonic()
        try:
            cleanup(self.parts)
        except Exception as error:  # the next one tries again
            self._note("cleanup of states", error)

    def _fold(self, sweeps: bool) -> None:
        """Fold what is to be folded; one of the threads also sweeps."""
        while (scope := self._next(sweeps=sweeps)) is not None:
            if callable(scope):
                self._do(scope)
                continue
            again = True
            while again:
                with self._guard:
                    self._folding[scope] = False
                try:
                    if not self.parts.closing:
                        compact(self.parts, scope)
                    if not self.parts.closing and self.parts.extractor is not None:
                        extract(self.parts, scope)
                except Exception as error:  # the turns stay in the window; the next add tries again
                    self._note("folding", error)
                with self._guard:
                    again = self._folding.get(scope, False) and not self.parts.closing
                    if not again:
                        self._folding.pop(scope, None)
            self._moved.give()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._note("background", error)

    # -- sweeping

    def _first_sweep(self) -> float:
        """When an interval has gone by since anybody swept the folder."""
        parts = self.parts
        swept = last_sweep(parts)
        since = 0.0 if swept is None else (parts.clock() - datetime.fromisoformat(swept["at"])).total_seconds()
        left = 0.0 if swept is None else parts.settings.tiers.tier_migration_interval - since
        return time.monotonic() + min(max(left, 0.0), parts.settings.tiers.tier_migration_interval)

    def _sweep(self) -> None:
        """Sweep, if this is the process that indexes for all; without an index, if nobody else has that lock."""
        self._sweep_at = time.monotonic() + self.parts.settings.tiers.tier_migration_interval
        borrowed = self._open_store is None and not self._lock.held and self._lock.take()
        if self._lock.held:
            self._do(lambda: self._told(sweep(self.parts, dry_run=False)))
        if borrowed:
            self._lock.release()

    def _told(self, report: SweepReport) -> None:
        if report.refused is not None:
            self.parts.trouble = f"sweeping: {report.refused}"

    def vacuum(self) -> None:
        """Give the room that was freed back to the disk: the ledger's, and that of an index of our own."""
        parts = self.parts
        parts.write_uses()
        parts.ledger.vacuum()
        if not self._lock.held or parts.store is None or parts.store.url is not None or self._open_store is None:
            return
        with self._indexing:
            # Chroma keeps the rows of vectors that were deleted: it is made anew, from the vectors in the ledger.
            if not parts.store.clear():
                return
            parts.store = self._open_store()
            self._check()
        self.flush()

    # -- waiting and closing

    def flush(self, *, progress: Progress | None = None, written_by: float | None = None) -> None:
        """Wait until all is indexed and folded, or only until that is indexed which was there at a time.

        *progress* is told how many of all entries are indexed.
        """
        ledger = self.parts.ledger
        while self._folding and not self.parts.closing and written_by is None:
            self._moved.wait(0.05)
        with self._analysing:
            analyse(self.parts)  # raises what keeps the thread from doing it
        self.parts.write_questions()
        if self._open_store is None:
            return
        self._failures = 0
        left, since = -1, time.monotonic()
        total = 0 if progress is None else ledger.totals(parked_at=PARKED)["entries"]

        def left_to_do() -> bool:
            due = self._due() is not None
            return due and (written_by is None or ledger.waiting(parked_at=PARKED, marked_by=written_by) > 0)

        while left_to_do() or not self._checked:
            if not self._lock.held:
                before, left = left, ledger.waiting(parked_at=PARKED)
                since = since if left == before else time.monotonic()
                if time.monotonic() > since + _STALLED:
                    raise IndexingError(
                        f"process {self.indexer or 'unknown'} indexes for all who have this folder open, and makes no progress; "
                        "nothing is lost, the entries wait in the ledger: see its stats() or end it, and call flush() again",
                        path=str(self.parts.settings.path),
                    )
            elif self._failures >= _TRIES_BEFORE_RAISING:
                raise IndexingError(
                    f"the vector index can't be brought up to date ({self.parts.trouble}); nothing is lost, the entries wait "
                    "in the ledger: mend the cause and call flush() again",
                    path=str(self.parts.settings.path),
                ) from self._failure
            if progress is not None:
                progress(max(total - ledger.waiting(parked_at=PARKED), 0), total)
            self._wake.give()
            self._hurry.give()
            self._moved.wait(0.05)
        if progress is not None:
            progress(total, total)

    def ready(self) -> None:
        with self._loading, self._reranking:
            pass

    def checked(self) -> None:
        """Wait until the vector index was looked at for the first time."""
        while not self._checked and not self.parts.closing:
            time.sleep(0.01)

    def reindex(self, *, progress: Progress | None = None) -> ReindexReport:
        parts = self.parts
        parts.ledger.retry_parked()
        if self._open_store is not None and parts.model_id is not None:
            known = parts.ledger.known_model(parts.model_id)
            with self._indexing:  # a batch under way would clear marks for what it wrote before the reset
                if self._lock.held and parts.store is not None:
                    self._check()
                    parts.ledger.mark_all()
                    if known is not None:
                        parts.store.reset(model_id=parts.model_id, dimensions=known[1])
                else:
                    parts.ledger.collection = _TO_BE_MADE_ANEW
        for _ in range(_TRIES_BEFORE_RAISING):
            if parts.ledger.collection == _TO_BE_MADE_ANEW:
                parts.ledger.mark_all()  # anew, if a batch was under way that has not seen it
            self.flush(progress=progress)
            if parts.ledger.collection != _TO_BE_MADE_ANEW:
                break
        return counted(parts, parts.model)

    def take_up(
        self, given: Any, *, progress: Progress | None, samples: int | Sequence[Sample], switch: bool
    ) -> ReindexReport:
        """Reindex with another embedding model, see `Memory.reindex`."""
        parts = self.parts
        with parts.exclusive("reindex"):
            using = parts.choose(given)
            if not adopted(parts, using):
                report = built(parts, using, progress=progress, samples=samples)
                if not switch:
                    return report
                # Nobody here embeds or indexes with the old one meanwhile.
                with self._indexing, parts.embedding:
                    switched(parts, using)
            else:
                report = counted(parts, using)
            parts.chosen(given)
            self._astray = True
            cleared(parts)
        self.flush(progress=progress, written_by=time.time())  # others may never stop writing
        return replace(report, switched=True)

    def restore(
        self, path: str | os.PathLike[str], *, restore_deleted: bool, progress: Progress | None
    ) -> RestoreReport:
        parts = self.parts
        # Neither marks nor vectors of before may be written after it.
        with ready(parts, path, progress=progress) as put_in_place, self._indexing, parts.embedding, self._analysing:
            known = None if parts.model_id is None else parts.ledger.known_model(parts.model_id)
            done = put_in_place(restore_deleted)
            if known is not None and parts.model_id is not None and parts.store is not None and self._lock.held:
                # Where nothing is left to be indexed, nobody else would.
                with suppress(StorageError):
                    parts.store.reset(model_id=parts.model_id, dimensions=known[1])
        self.parts.residents.look()  # so that RAM holds nothing of before
        self._unanalysed = True
        self._wake.give()
        self._hurry.give()
        return done

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
        self._closing.give()
        self._wake.give()
        self._hurry.give()
        for _ in range(_FOLDERS):
            self._full.put(None)
        atexit.unregister(self.close)
        for thread in self._threads:
            thread.join()
        self.workers.close()
        self.patient_workers.close()
        with suppress(Exception):  # what is not written down is not counted
            self.parts.write_uses()
        with suppress(Exception):
            self.parts.write_questions()
        if self.parts.store is not None:
            self.parts.store.close()
        self._lock.release()  # another may go on at once
        self.parts.ledger.close()
        self._release()


__all__ = ["Core"]
