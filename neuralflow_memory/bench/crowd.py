"""Many processes: what a turn costs while others write to the same folder, and what it saves to write many at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from neuralflow_memory.types import Message

from .measure import WARM_UP, interleaved, timed
from .rows import Goal, Row, compared
from .sizes import Bench
from .texts import Texts

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory
    from neuralflow_memory.session import Session

SECTION = "processes"
_OTHERS = 7
_PACES = ((20, "others write 20 turns a second each"), (0, "others write as fast as they can"))
"""Turns a second of each of the others; 0 stands for all that it can."""
_WORDS = 85
_BATCH = 50
"""Turns that are written at once."""


def processes(bench: Bench) -> Iterator[Row]:
    """A turn of ours beside others in the same folder, against the same beside as many in a folder of their own."""
    from neuralflow_memory import open_memory

    shared, apart = bench.folder / "shared", bench.folder / "apart"
    with ExitStack() as stack:
        memory = stack.enter_context(open_memory(shared, embedder="none", summarizer="extractive"))
        open_memory(apart, embedder="none", summarizer="extractive").close()
        here, there = (stack.enter_context(_writers(folder)) for folder in (shared, apart))
        session, texts = memory.session("ours", user_id="ours"), Texts(11)
        for pace, how in _PACES:
            took: dict[str, list[float]] = {"shared": [], "apart": []}
            # Each kind of company in turns, so that what else the machine does falls on both alike.
            for _ in range(bench.sizes.crowd_rounds):
                for name, crowd in (("shared", here), ("apart", there)):
                    own = _turns(session, texts, beside=crowd, pace=pace, turns=bench.sizes.crowd_turns)
                    took[name].append(median(own))
            yield compared(
                SECTION,
                f"a turn, while {_OTHERS} {how}",
                took["shared"],
                against=f"the same while {_OTHERS} do so in another folder",
                peer=took["apart"],
                goal=Goal("at most 1.3 x", most=1.3, of="ratio"),
                note="medians of rounds" if pace else "one writes at a time: the limit is SQLite's",
            )
        yield _at_once(memory, texts, rounds=bench.sizes.crowd_turns)


def _turns(session: Session, texts: Texts, *, beside: Sequence[_Writer], pace: int, turns: int) -> list[float]:
    """Seconds of each of so many turns, beside writers that don't stop before."""
    for writer in beside:
        writer.begin(pace)
    said = [_said(texts) for _ in range(turns + WARM_UP)]
    took = [timed(lambda turn=turn: _turn(session, turn)) for turn in said]  # type: ignore[misc]
    for writer in beside:
        writer.end()
    return took[WARM_UP:]


def _at_once(memory: Memory, texts: Texts, *, rounds: int) -> Row:
    """Turns written in one call against turns written one by one."""
    session = memory.session("at once", user_id="ours")

    def one_by_one(_: int) -> None:
        for turn in [_said(texts) for _ in range(_BATCH)]:
            session.add(turn)

    took = interleaved(
        {
            "at once": lambda _: session.add([m for _ in range(_BATCH) for m in _said(texts)]),
            "one by one": one_by_one,
        },
        rounds=max(3, rounds // _BATCH),
        between=memory.flush,
    )
    return compared(
        SECTION, f"{_BATCH} turns in one call", took["at once"], against="one by one", peer=took["one by one"]
    )


def _said(texts: Texts) -> list[Message]:
    return [Message("user", texts.sentence(_WORDS)), Message("assistant", texts.sentence(_WORDS))]


def _turn(session: Session, said: Sequence[Message]) -> None:
    session.add(said)
    session.context(search=False)


@contextmanager
def _writers(folder: Path) -> Iterator[list[_Writer]]:
    writers = [_Writer(folder, number) for number in range(_OTHERS)]
    try:
        for writer in writers:
            writer.answer()
        yield writers
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.communicate()


class _Writer:
    """A process that takes turns in a session of its own, when it is told to."""

    def __init__(self, folder: Path, number: int) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "neuralflow_memory.bench.crowd", str(folder), str(number)]
        self.process = subprocess.Popen(  # noqa: S603 - our own code
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def begin(self, pace: int) -> None:
        self._say(str(pace))
        self.answer()

    def end(self) -> None:
        self._say("end")
        self.answer()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def answer(self) -> None:
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError("a process that was to write beside ours has ended; its error is above")


def _write(folder: str, number: str) -> None:
    """What such a process does: a line is a pace to write at until the next line comes."""
    import queue
    import threading
    import time

    from neuralflow_memory import open_memory

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    texts = Texts(100 + int(number))
    with open_memory(folder, embedder="none", summarizer="extractive") as memory:
        session = memory.session(f"other-{number}", user_id=f"other-{number}")
        print("open", flush=True)  # noqa: T201 - it is what the parent reads
        while (line := lines.get()) != "":
            pace, due = int(line), time.perf_counter()
            print("begun", flush=True)  # noqa: T201
            while lines.empty():
                _turn(session, _said(texts))
                due = max(due + 1 / pace, time.perf_counter()) if pace else 0.0
                time.sleep(max(0.0, due - time.perf_counter()))
            lines.get()
            print("ended", flush=True)  # noqa: T201


if __name__ == "__main__":
    _write(*sys.argv[1:])


__all__ = ["processes"]
