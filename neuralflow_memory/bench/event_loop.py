"""The event loop: how long it stands still while 200 contexts are built, against the same load that is not ours."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from . import filling
from .embedding import default_embedder
from .measure import cpu
from .rows import Goal, Row, compared
from .sizes import Bench
from .texts import Texts

if TYPE_CHECKING:
    from neuralflow_memory.session import Session

SECTION = "event loop"
_TICK = 0.001
"""Seconds that the loop's own task sleeps; what it oversleeps is a stall."""
_THREADS = 4
_THREADED = f"the same CPU time in {_THREADS} threads of plain Python"
_ELSEWHERE = "the same CPU load in other processes"
_BUSY = """
import time
end = time.perf_counter() + {seconds}
while time.perf_counter() < end:
    pass
"""


def event_loop(bench: Bench) -> Iterator[Row]:
    """Runs of each in turns; the median of the longest stall of each run."""
    yield from asyncio.run(_measured(bench))


async def _measured(bench: Bench) -> list[Row]:
    from neuralflow_memory import open_memory

    sizes, texts = bench.sizes, Texts(8)
    ours: list[float] = []
    loads: dict[str, list[float]] = {_THREADED: [], _ELSEWHERE: []}
    model = replace(bench, sizes=replace(sizes, real_model=sizes.real_model and sizes.loop_model))
    with default_embedder(model) as (embedder, note):
        async with await asyncio.to_thread(open_memory, bench.folder / "loop", embedder=embedder) as memory:
            await memory.aready()
            await asyncio.to_thread(filling.add_user, memory, 0, sizes.loop_entries)
            await memory.aflush()
            session = memory.session("ask", user_id=filling.name(0))
            await session.acontext(texts.sentence(8))
            for _ in range(sizes.loop_runs):
                questions = [texts.sentence(8) for _ in range(sizes.loop_calls)]
                start = time.perf_counter()
                with cpu() as used:
                    ours.append(await _longest_stall(partial(_contexts, session, questions)))
                    busy = used()
                seconds = time.perf_counter() - start
                threads = partial(_threads, sizes.loop_calls, busy / sizes.loop_calls)
                processes = partial(_processes, max(1, round(busy / seconds)), seconds)
                loads[_THREADED].append(await _longest_stall(threads))
                loads[_ELSEWHERE].append(await _longest_stall(processes))
    return [
        compared(
            SECTION,
            f"longest stall while {sizes.loop_calls} contexts with search are built",
            ours,
            against=name,
            peer=load,
            at=sizes.loop_entries,
            size="entries of one user",
            goal=Goal("at most 10 ms more", most=10.0, of="beyond"),
            note=note or f"medians of {sizes.loop_runs} runs",
        )
        for name, load in loads.items()
    ]


async def _contexts(session: Session, questions: Sequence[str]) -> None:
    await asyncio.gather(*(session.acontext(question) for question in questions))


async def _threads(calls: int, seconds: float) -> None:
    """So many calls of so much CPU time, on threads."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(_THREADS) as pool:
        await asyncio.gather(*(loop.run_in_executor(pool, _spin, seconds) for _ in range(calls)))


async def _processes(count: int, seconds: float) -> None:
    """So many processes that are busy for so long."""
    command = [sys.executable, "-c", _BUSY.format(seconds=seconds)]
    busy = [await asyncio.create_subprocess_exec(*command) for _ in range(count)]
    for process in busy:
        await process.wait()


def _spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(100))


async def _longest_stall(work: Callable[[], Awaitable[None]]) -> float:
    """Seconds by which a task that only sleeps woke up late, at most, while *work* was done."""
    longest, running = 0.0, True

    async def tick() -> None:
        nonlocal longest
        while running:
            start = time.perf_counter()
            await asyncio.sleep(_TICK)
            longest = max(longest, time.perf_counter() - start - _TICK)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(10 * _TICK)
    longest = 0.0
    await work()
    running = False
    await ticking
    return longest


__all__ = ["event_loop"]
