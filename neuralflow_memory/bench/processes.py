"""Measurements that need a process of their own: what is imported, and how much RAM is taken.

`python -m neuralflow_memory.bench.processes NAME ARGUMENT...` prints one as JSON.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

OF_A_USER = 100
"""Messages of each user of a bulk import."""
_FIRST_USER = 100
_IMPORT = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import {name}
print(json.dumps({{"seconds": time.perf_counter() - start, "modules": sorted(set(sys.modules) - before)}}))
"""


def imported(name: str) -> dict[str, Any]:
    """The modules that `import name` loads in a fresh process, and the seconds that it takes."""
    return _said([sys.executable, "-c", _IMPORT.format(name=name)])


def child(name: str, *arguments: object) -> dict[str, Any]:
    """What the measurement *name*, one of those below, says in a fresh process."""
    return _said(
        [sys.executable, "-W", "ignore", "-m", "neuralflow_memory.bench.processes", name, *map(str, arguments)]
    )


def _said(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own code
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _bulk(folder: str, messages: str) -> dict[str, Any]:
    """The peak of RAM after a quarter of an import, and after all of it."""
    from neuralflow_memory import open_memory

    from . import filling
    from .vectors import PreparedEmbedder

    with open_memory(folder, embedder=PreparedEmbedder()) as memory:
        return _imported(lambda user: filling.add_user(memory, user, OF_A_USER), memory.flush, int(messages))


def _bulk_raw(folder: str, messages: str) -> dict[str, Any]:
    """The same of Chroma alone."""
    from . import filling
    from .chroma import RawChroma
    from .vectors import PreparedEmbedder

    embedder = PreparedEmbedder()
    with RawChroma(Path(folder)) as raw:

        def upsert(user: int) -> None:
            texts = filling.texts_of(user, OF_A_USER)
            raw.upsert(texts, embedder.embed_documents(texts), user=filling.name(user))

        return _imported(upsert, lambda: None, int(messages))


def _imported(write: Callable[[int], object], flush: Callable[[], object], messages: int) -> dict[str, Any]:
    users, found = max(1, messages // OF_A_USER), {}
    for user in range(users):
        write(_FIRST_USER + user)
        if user == users // 4:
            flush()
            found["quarter"] = _peak()
    flush()
    return {**found, "all": _peak()}


def _searching(folder: str, messages: str) -> dict[str, Any]:
    """RAM after a search for each user of a bulk import."""
    from neuralflow_memory import open_memory

    from . import filling
    from .texts import Texts
    from .vectors import PreparedEmbedder

    texts = Texts(5)
    with open_memory(folder, embedder=PreparedEmbedder()) as memory:
        memory.ready()
        for user in range(max(1, int(messages) // OF_A_USER)):
            memory.session("s0", user_id=filling.name(_FIRST_USER + user)).context(texts.sentence(8))
        return {"resident": _resident()}


def _parts_alone(folder: str, messages: str) -> dict[str, Any]:
    """RAM of what that memory is made of: the same collection of Chroma, the same questions, embedder and tokenizer."""
    from .chroma import RawChroma
    from .peers import encoder
    from .texts import Texts
    from .vectors import PreparedEmbedder

    texts, embedder, encode = Texts(5), PreparedEmbedder(), encoder()
    with RawChroma(Path(folder) / "chroma", collection="entries") as chroma:
        for _ in range(min(50, max(1, int(messages) // OF_A_USER))):
            question = texts.sentence(8)
            encode(question)
            chroma.query(embedder.embed_query(question))
        return {"resident": _resident()}


def _idle(folder: str, sessions: str) -> dict[str, Any]:
    """RAM that sessions take: as objects only; in use, each opened for a turn; and idle, beside as many others in use."""
    from neuralflow_memory import open_memory

    from .texts import Texts

    texts, later = Texts(6), timedelta()
    with open_memory(
        folder, embedder="none", summarizer="extractive", tokenizer="approx", clock=lambda: datetime.now(UTC) + later
    ) as memory:
        said = [texts.sentence(85) for _ in range(int(sessions))]
        warm = memory.session("warm", user_id="warm")
        for text in said:  # what is kept of words is kept once, and is nobody's
            warm.remember(text)
        steps = [_resident()]
        kept = [memory.session(f"s{number}", user_id=f"user-{number}") for number in range(int(sessions))]
        steps.append(_resident())
        for prefix in ("user", "other"):
            for number, text in enumerate(said):
                memory.session(f"s{number}", user_id=f"{prefix}-{number}").add(text)
            memory.flush()
            steps.append(_resident())
            later += timedelta(hours=1)
        before, objects, used, both = steps
        if before is None or objects is None or used is None or both is None:
            return {"objects": None, "used": None, "idle": None}
        del kept
        return {"objects": objects - before, "used": used - objects, "idle": both - used}


def _resident() -> int | None:
    """Bytes of RAM that this process holds now; None where the system doesn't say."""
    gc.collect()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def _peak() -> int:
    """Bytes of RAM that this process held at most."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux it would begin with the parent's
    return most if sys.platform == "darwin" else most * 1024


_MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "bulk": _bulk,
    "bulk-raw": _bulk_raw,
    "searching": _searching,
    "parts-alone": _parts_alone,
    "idle": _idle,
}


if __name__ == "__main__":
    print(json.dumps(_MEASUREMENTS[sys.argv[1]](*sys.argv[2:])))  # noqa: T201 - it is what the parent reads


__all__ = ["OF_A_USER", "child", "imported"]
