"""The async twin of a synchronous method: the same call on a worker thread, admitted a few at a time.

Letting every waiting call into a thread pool at once makes the event loop compete with all of them for the interpreter
(200 calls of 0.8 ms stalled a loop for 87-153 ms, four at a time for 5 ms). So calls wait on the loop's side, for a
place among as many as there are workers, and whichever loop they wait on may come and go.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from .errors import ClosedError

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """Worker threads with as many places; those who wait for one hold no thread."""

    def __init__(self, size: int, *, name: str) -> None:
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=f"neuralflow-{name}")
        self._free = size
        self._lock = threading.Lock()
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    async def run(self, call: Callable[[], T]) -> T:
        """Wait for a place, run *call* on a thread, and return what it returns.

        Cancelling stops the waiting, not the work: the place is given on when the work is done.
        """
        await self._admitted()
        try:
            work = self._threads.submit(copy_context().run, call)
        except RuntimeError as error:
            self._leave()
            raise ClosedError("the memory was closed; open it again with open_memory(...)") from error
        work.add_done_callback(lambda _: self._leave())
        return await asyncio.wrap_future(work)

    async def _admitted(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            loop = asyncio.get_running_loop()
            place = loop.create_future()
            self._waiting.append((loop, place))
        try:
            await place
        except BaseException:  # cancelled, or thrown away with its loop
            with self._lock:
                waiting = (loop, place) in self._waiting
                if waiting:
                    self._waiting.remove((loop, place))
            if not waiting:
                self._leave()  # the place had been given already, or was on its way
            raise

    def _leave(self) -> None:
        with self._lock:
            while self._waiting:
                loop, place = self._waiting.popleft()
                try:
                    loop.call_soon_threadsafe(self._give, place)
                except RuntimeError:
                    continue  # that loop was closed while it waited
                return
            self._free += 1

    @staticmethod
    def _give(place: asyncio.Future[None]) -> None:
        if not place.done():  # else its waiter was cancelled, and has passed the place on
            place.set_result(None)

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        self._threads.shutdown(wait=True)


class _Owner(Protocol):
    @property
    def _workers(self) -> Workers: ...


S = TypeVar("S", bound=_Owner)


def offload(
    method: Callable[Concatenate[S, P], T], *, workers: str = "_workers"
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Return the async twin of *method*: the same call, run on the *workers* of its owner."""

    @functools.wraps(method)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        chosen: Workers = getattr(self, workers)
        return await chosen.run(functools.partial(method, self, *args, **kwargs))

    twin.__name__ = f"a{method.__name__}"
    twin.__qualname__ = f"{method.__qualname__.rpartition('.')[0]}.{twin.__name__}"
    twin.__doc__ = f"Async twin of `{method.__name__}`."
    return twin


__all__ = ["Workers", "offload"]
