"""Ids of entries: random, and not meant to be hard to guess, since whose an entry is never rests on its id.

So no system call is spent on each, as `uuid4` does: in a virtual machine that may take a millisecond.
"""

from __future__ import annotations

import os
import random

_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)


def new_id() -> str:
    """A new id: 128 random bits in hexadecimal."""
    return f"{_random.getrandbits(128):032x}"


__all__ = ["new_id"]
