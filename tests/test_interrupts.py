"""Ctrl-C may fall anywhere into a call: what is stored stays whole, and nothing waits for ever afterwards."""

import dis
import random
import sys
import threading

import pytest

from neuralflow_memory import Message


class Interrupted:
    """Runs a block and interrupts it at its place number *at*; with none, counts the places.

    A place is where the interpreter looks for signals: as a function begins, after a call of C code, and in a loop.
    """

    def __init__(self, at=None):
        self.at = at
        self.places = 0
        self.before = None

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind, error, trace):
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename == "<string>":
            return None  # the methods of dataclasses
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        before, self.before = self.before, None
        if event == "opcode" and frame.f_code is not Interrupted.__exit__.__code__:
            looks = dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("CALL", "RESUME", "JUMP_BACKWARD"))
            self.before = frame if looks else None
            if before is frame:
                self.places += 1
                if self.places == self.at:
                    raise KeyboardInterrupt
        return self.trace


def ends(call):
    """Whether a call comes to its end, in a thread of its own."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(30)
    return not thread.is_alive()


# One that falls into a callback of the interpreter's own, such as that of a `WeakSet`, goes no further, and is only reported.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", ["add", "add that fills the window", "update", "delete", "search", "context"])
def test_an_interrupt_anywhere_leaves_a_sound_memory(opened, verb):
    """At any of fifty places: the turn is there or not, RAM and ledger agree, and flush and close come to an end."""
    filling = verb.endswith("window")
    limits = {"max_context_items": 1, "summarization_threshold": 2 if filling else 10_000, "max_context_tokens": 4000}
    memory = opened(pruning=limits)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"{n} beans.", id=f"bed-{n}") for n in range(1 if filling else 120)])
    calls = {
        "add": lambda n: chat.add(f"Turn {n} is about sailing."),
        "update": lambda n: chat.entries.update(f"bed-{n}", content=f"Bed {n} was dug over."),
        "delete": lambda n: chat.entries.delete(f"bed-{n}"),
        "search": lambda n: chat.search(f"beans in bed {n}"),
        "context": lambda n: chat.context(f"beans in bed {n}"),
    }
    call = calls[verb.split()[0]]
    call(0)
    with Interrupted() as usual:
        call(1)
    rng = random.Random(7)
    for n, at in enumerate(sorted(rng.sample(range(1, usual.places), 50)), start=2):
        before = chat.entries.count(within="user")
        with Interrupted(at):
            call(n)
        assert ends(memory.flush), f"flush hangs after an interrupt at {at} of {usual.places}"
        if not filling:
            assert abs(chat.entries.count(within="user") - before) <= 1
        window = [m.content for m in chat.messages(view="window")]
        chat._parts.residents.forget()
        assert window == [m.content for m in chat.messages(view="window")], f"RAM is not the ledger {at}"
    assert ends(memory.close), "close hangs"
