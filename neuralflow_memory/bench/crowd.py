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
from .rows import Row, at_most, compared
from .sizes import Bench
from .texts import Texts

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory
    from neuralflow_memory.session import Session

SECTION = "processes"
_OTHERS = 7
_PACES = {20: "20 turns a second each", 0: "as fast as they can"}
"""How others write, by turns a second of each."""
_WORDS = 85
_BATCH = 50
"""Turns that are written at once."""


def processes(bench: Bench) -> Iterator[Row]:
    """A turn of ours beside others in the same folder, against the same beside as many in a folder of their own."""
    from neuralflow_memory import open_memory

    shared, apart = bench.folder / "shared", bench.folder / "apart"
    with ExitStack() as stack:
        memory = stack.enter_context(open_memory(shared, embedder="none", summarizer="extractive"))
        others = stack.enter_context(_writers([shared, apart]))
        session, texts = memory.session("ours", user_id="ours"), Texts(11)
        for pace, how in _PACES.items():
            took: dict[str, list[float]] = {"shared": [], "apart": []}
            # Each kind of company in turns, so that what else the machine does falls on both alike.
            for _ in range(bench.sizes.crowd_rounds):
                for place, name in enumerate(took):
                    for writer in others:
                        writer.tell(f"{place} {pace}")
                    took[name].append(_turn_of(session, texts, turns=bench.sizes.crowd_turns))
                    for writer in others:
                        writer.tell("end")
            yield compared(
                SECTION,
                f"a turn, while {_OTHERS} others write {how}",
                took["shared"],
                against=f"the same while {_OTHERS} do so in another folder",
                peer=took["apart"],
                goal=at_most(1.3) if pace else None,
                note="medians of rounds" if pace else "one writes at a time: the limit is SQLite's",
            )
        yield _at_once(memory, texts, rounds=bench.sizes.crowd_turns)


def _turn_of(session: Session, texts: Texts, *, turns: int) -> float:
    """Seconds of a turn: the median of so many."""
    said = [_said(texts) for _ in range(turns + WARM_UP)]
    return median([timed(lambda turn=turn: _turn(session, turn)) for turn in said][WARM_UP:])  # type: ignore[misc]


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
def _writers(folders: Sequence[Path]) -> Iterator[list[_Writer]]:
    writers = [_Writer(folders, number) for number in range(_OTHERS)]
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

    def __init__(self, folders: Sequence[Path], number: int) -> None:
        module = "neuralflow_memory.bench.crowd"
        command = [sys.executable, "-W", "ignore", "-m", module, str(number), *map(str, folders)]
        self.process = subprocess.Popen(  # noqa: S603 - our own code
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def tell(self, line: str) -> None:
        """Say which folder to write to, by its place, and how fast; or "end"."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.answer()

    def answer(self) -> None:
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError("a process that was to write beside ours has ended; its error is above")


def _write(number: str, *folders: str) -> None:
    """What such a process does: a line names a folder and a pace to write at until the next line comes."""
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
    with ExitStack() as stack:
        memories = [stack.enter_context(open_memory(f, embedder="none", summarizer="extractive")) for f in folders]
        sessions = [m.session(f"other-{number}", user_id=f"other-{number}") for m in memories]
        print("open", flush=True)  # noqa: T201 - it is what the parent reads
        while (line := lines.get()) != "":
            (place, pace), due = map(int, line.split()), time.perf_counter()
            print("begun", flush=True)  # noqa: T201
            while lines.empty():
                _turn(sessions[place], _said(texts))
                due = max(due + 1 / pace, time.perf_counter()) if pace else 0.0
                time.sleep(max(0.0, due - time.perf_counter()))
            lines.get()
            print("ended", flush=True)  # noqa: T201


if __name__ == "__main__":
    _write(*sys.argv[1:])


__all__ = ["processes"]
