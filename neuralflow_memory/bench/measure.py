"""Timing: calls taken in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

Call = Callable[[int], object]
"""Is given the number of the round; those of the warm-up are negative."""
WARM_UP = 2
"""Rounds that don't count."""


def interleaved(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    warm_up: int = WARM_UP,
    most: float = 20.0,
    between: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds that each call took in each round, without those of the *warm_up*.

    Each round begins with another one. *between* runs before each call, and is not measured. A call that has taken *most*
    seconds in all is left out of the rounds that follow, so that a slow peer doesn't hold up the rest.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    spent = dict.fromkeys(names, 0.0)
    for number in range(-warm_up, rounds):
        start = number % len(names) if names else 0
        for name in names[start:] + names[:start]:
            if spent[name] > most:
                continue
            between()
            seconds = timed(lambda call=calls[name], number=number: call(number))  # type: ignore[misc]
            spent[name] += seconds
            if number >= 0:
                found[name].append(seconds)
            elif spent[name] > most:
                found[name].append(seconds)  # it is all there will be
    return found


def timed(call: Callable[[], object]) -> float:
    """Seconds that *call* takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def cpu() -> Iterator[Callable[[], float]]:
    """Yields a function that says how many seconds of CPU, of all threads, were used since the block was entered."""
    start = time.process_time()
    yield lambda: time.process_time() - start


def rotating(items: Sequence[str]) -> Callable[[int], str]:
    """The item of a round: another one each round, from the start again when all had their turn."""
    return lambda number: items[number % len(items)]


__all__ = ["WARM_UP", "Call", "cpu", "interleaved", "rotating", "timed"]
