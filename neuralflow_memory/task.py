"""`Task`: the working memory of one task of a session. Each method is a line or two onto `pipeline/tasks.py`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast
from weakref import WeakSet

from ._offload import Workers, offload
from .errors import TaskError
from .pipeline import tasks
from .pipeline.parts import Parts
from .pipeline.tasks import Ref

if TYPE_CHECKING:
    from .session import Session

Status = Literal["new", "open", "completed", "failed", "gone"]
T = TypeVar("T")

_around: ContextVar[tuple[str, ...]] = ContextVar("neuralflow_tasks", default=())
"""Keys of the tasks whose blocks are around this code, the innermost last. A key is bound to its session."""
_inside: WeakSet[Task] = WeakSet()
"""The tasks whose blocks are running now, in any thread; weak, since a block that is thrown away may never be left."""
_lock = threading.Lock()


class Task:
    """A task's values, notes and progress, kept in working memory until it ends. Made by `Session.task`.

    ```python
    with session.task("book flight") as task:
        task.set("destination", "Lisbon")
        task.note("prefers an aisle seat")
        task.progress(0.4, "comparing fares")
        task.complete("booked TP 123")
    ```

    Leaving the block completes a task that has not ended, and fails it when an exception leaves the block, which goes on.
    Without a block, call `start` and then `complete` or `fail`. A task that is not ended, because its process was killed, is
    resumed by the next `session.task` of the same name, and found by `session.tasks`. One to which, and to whose parts, nothing
    was written for `tasks.open_max_age` seconds has failed, and can't be resumed.

    A task begun in another's block, in the same session, is a part of that one and ends with it at the latest. It needs a name
    of its own: starting the task again whose block is around this code raises `TaskError`, also where code calls itself, since
    the inner one would end the outer. A task begun or resumed elsewhere is a switch of context: the other open tasks of the
    session lose their temporary notes, except those that it is a part of, and those whose blocks are running at this moment in
    another thread or asyncio task of this process.

    Ending clears values and notes, and leaves an episode that search finds: how the task ended, the 10 values that were set
    last and the 10 newest lasting notes, each cut to 500 characters. The task stays for `tasks.completed_max_age` seconds, and
    in the prompt as a line, if it is one of the five that ended last.

    Every method has an async twin: `set` / `aset`, `complete` / `acomplete`, and so on. A task that was not started yet, or
    is over, raises `TaskError`.
    """

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = tasks.checked_name(name)
        self._begun: Ref | None = None
        self._seen: Status = "new"
        """The status as last known; an end is final."""

    @classmethod
    def _listed(cls, session: Session, status: str | None) -> list[Self]:
        """The tasks of `Session.tasks`."""
        found = []
        for ref, stands in tasks.listed(session._parts, session.scope, principal=session.principal, status=status):
            task = cls(session, ref.name)
            task._begun, task._seen = ref, stands
            found.append(task)
        return found

    @property
    def name(self) -> str:
        return self._name

    @property
    def id(self) -> str | None:
        """The id of its entry, None before it is started."""
        return None if self._begun is None else self._begun.id

    @property
    def status(self) -> Status:
        """How the task stands: "new" before it is started, "open", "completed", "failed"; "gone" once its session was cleared.

        It is read anew while the task is open, since others may end it, too.
        """
        if self._seen == "open":
            self._seen = cast("Status", tasks.status(self._parts, self._ref) or "gone")
        return self._seen

    async def astatus(self) -> Status:
        """Async twin of `status`."""
        return await self._workers.run(lambda: self.status)

    @property
    def _workers(self) -> Workers:
        return self._session._workers

    @property
    def _parts(self) -> Parts:
        return self._session._parts

    @property
    def _ref(self) -> Ref:
        if self._begun is None:
            raise TaskError(
                f"task {self.name!r} was not started: enter it with `with`, or call start() first", name=self.name
            )
        return self._begun

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {self._seen})"

    def start(self) -> None:
        """Begin the task, or resume the open one of this name in the session, unless its block is around this code."""
        if self._begun is not None:
            raise TaskError(
                f"task {self.name!r} was started already; make another with session.task({self.name!r})", name=self.name
            )
        s = self._session
        self._begun = tasks.begin(
            self._parts, s.scope, self.name, principal=s.principal, around=_around.get(), inside=_keys_inside
        )
        self._seen = "open"

    def set(self, name: str, value: Any) -> None:
        """Keep a JSON value under *name*: at most 200 values, each of at most 20,000 characters as JSON."""
        tasks.set_value(self._parts, self._ref, name, value)

    def get(self, name: str, default: Any = None) -> Any:
        """The value under *name*, or *default*."""
        return self.values().get(tasks.checked_value_name(name), default)

    def values(self) -> dict[str, Any]:
        """All values, those set last at the end."""
        return cast("dict[str, Any]", tasks.read(self._parts, self._ref)["values"])

    def note(self, text: str, *, temporary: bool = False, lifetime: float | None = None) -> None:
        """Write down a note. A task keeps its newest 200 lasting notes and its newest 200 temporary ones; older ones go.

        Args:
            text: What to note, up to 2,000 characters; a prompt shows the first 500.
            temporary: The note has a budget of its own in the prompt and goes after *lifetime*, on a switch of context, and
                with the task; it is not told in the outcome.
            lifetime: Seconds for which a temporary note lives; None means `context.expiry_time`.
        """
        tasks.note(self._parts, self._ref, text, temporary=temporary, lifetime=lifetime)

    def notes(self) -> list[str]:
        """The notes, temporary ones too, oldest first."""
        return [n["text"] for n in tasks.read(self._parts, self._ref)["notes"]]

    def progress(self, fraction: float, step: str | None = None) -> None:
        """Say how much is done, 0..1, and what is being done now."""
        tasks.progress(self._parts, self._ref, fraction, step)

    def complete(self, result: str | None = None) -> None:
        """End the task, and first the open tasks that are parts of it. *result*: what it came to."""
        tasks.end(self._parts, self._ref, "completed", result)
        self._seen = "completed"

    def fail(self, error: BaseException | str) -> None:
        """End the task as one that failed, and first the open tasks that are parts of it."""
        tasks.end(self._parts, self._ref, "failed", error)
        self._seen = "failed"

    astart = offload(start)
    aset = offload(set)
    aget = offload(get)
    avalues = offload(values)
    anote = offload(note)
    anotes = offload(notes)
    aprogress = offload(progress)
    acomplete = offload(complete)
    afail = offload(fail)

    def __enter__(self) -> Self:
        self.start()
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._leaving(error):
            self.complete() if error is None else self.fail(error)

    async def __aenter__(self) -> Self:
        try:
            await _whole(self.astart())
        except asyncio.CancelledError as error:
            if self._begun is not None:  # there is no block to end it
                await self.__aexit__(type(error), error, None)
            raise
        self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._leaving(error):
            await _whole(self.acomplete() if error is None else self.afail(error))

    def _enter(self) -> None:
        _around.set((*_around.get(), self._ref.key))
        with _lock:
            _inside.add(self)

    @contextmanager
    def _leaving(self, error: BaseException | None) -> Iterator[None]:
        """Around the ending that a block brings: the block's own error goes on, whatever comes of it."""
        try:
            yield
        except TaskError:
            pass  # it has ended in the block, or elsewhere
        except Exception as trouble:
            if error is None:
                raise
            error.add_note(f"Task {self.name!r} could not be marked as failed: {type(trouble).__name__}: {trouble}")
        finally:
            key = self._begun and self._begun.key
            _around.set(tuple(k for k in _around.get() if k != key))
            with _lock:
                _inside.discard(self)


def _keys_inside() -> set[str]:
    with _lock:
        return {task._ref.key for task in _inside}


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Await *work* to its end, also when cancelled meanwhile: then the cancellation goes on afterwards."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen
        raise


__all__ = ["Status", "Task"]
