"""Search in a scope: a user's own entries among everybody's, and users who have very many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuralflow_memory.config import Ranking

from . import filling
from .chroma import RawChroma
from .measure import WARM_UP, Call, interleaved
from .rows import Goal, Row, compared, faster
from .sizes import Bench
from .texts import Texts
from .vectors import PreparedEmbedder, Vectors, nearest, recall

SECTION = "search"
K = 10
_WORDS = 8
"""Of a question."""
_IN_TURN = 20
"""Users who ask again and again; the others ask once."""
_COMPARED = 100_000
_LIMITS = {5_000: 3.0, 50_000: 10.0, 200_000: 12.0}
"""Milliseconds for a user with so many entries, beside the embedding of the question, which costs nothing here."""
_UNCACHED = {"cache_size": 0}  # each search is one
_FILTERED = "Chroma, filtered by user"
_UNFILTERED = "Chroma, no filter"
_DENSE_ONLY = {field: float(field == "dense") for field in Ranking.model_fields}


def search(bench: Bench) -> Iterator[Row]:
    """A hundred entries among ever more of other users, then one user with ever more."""
    folder = bench.folder / "search"
    folder.mkdir()
    yield from _among_others(bench, folder)
    for entries in bench.sizes.owners:
        yield from _one_owner(bench, folder / f"owner-{entries}", entries)


@dataclass(frozen=True, slots=True)
class _Asking:
    """Questions whose vectors are prepared."""

    embedder: PreparedEmbedder
    questions: Sequence[str]

    def question(self, number: int) -> str:
        return self.questions[number % len(self.questions)]


def _asking(rounds: int) -> _Asking:
    embedder, texts = PreparedEmbedder(), Texts(2)
    questions = [texts.sentence(_WORDS) for _ in range(rounds + WARM_UP)]
    embedder.prepare(questions)
    return _Asking(embedder, questions)


def _among_others(bench: Bench, folder: Path) -> Iterator[Row]:
    from neuralflow_memory import open_memory

    sizes, asking = bench.sizes, _asking(bench.sizes.searches)
    calls: dict[str, Call] = {}
    found: dict[int, float] = {}
    with ExitStack() as stack:
        for total in sizes.totals:
            users = max(1, total // sizes.scope)
            own = folder / f"total-{total}"
            if total <= sizes.chroma:
                raw = stack.enter_context(RawChroma(folder / f"chroma-{total}"))
                _fill(own, raw, users=users, entries=sizes.scope, embedder=asking.embedder)
                calls[f"{_FILTERED} {total}"] = _chroma(raw, asking, users=users)
                calls[f"{_UNFILTERED} {total}"] = _chroma(raw, asking, users=None)
                found[total] = _recall(
                    own, asking, {filling.name(n): filling.texts_of(n, sizes.scope) for n in range(min(users, 10))}
                )
            else:
                filling.fill_ledger(own, users=users, entries=sizes.scope)
            memory = stack.enter_context(open_memory(own, embedder=asking.embedder, context=_UNCACHED))
            memory.ready()
            often = min(users, _IN_TURN)
            for user in range(often):
                memory.session("ask", user_id=filling.name(user)).search(asking.question(user), k=K)
            calls[f"again {total}"] = _ours(memory, asking, lambda number, often=often: number % often)  # type: ignore[misc]
            if users >= often + sizes.searches + WARM_UP:
                calls[f"first {total}"] = _ours(
                    memory,
                    asking,
                    lambda number, often=often: often + WARM_UP + number,  # type: ignore[misc]
                )
        took = interleaved(calls, rounds=sizes.searches, most=30.0)
    yield from _rows(took, sizes.totals, found)


def _rows(took: Mapping[str, list[float]], totals: Sequence[int], found: Mapping[int, float]) -> Iterator[Row]:
    for total in totals:
        ours = took[f"again {total}"]
        here: dict[str, Any] = {"at": total, "size": "entries"}
        if total in found:
            goal = faster(50, applies=total == _COMPARED)
            for name, limit in ((_FILTERED, goal), (_UNFILTERED, None)):
                peer = took[f"{name} {total}"]
                yield compared(SECTION, "hybrid search", ours, against=name, peer=peer, goal=limit, **here)
            yield compared(
                SECTION,
                "meaning alone: recall@10",
                [found[total]],
                unit="share",
                against="numpy",
                peer=[1.0],
                goal=Goal("exact", least=1.0),
                **here,
            )
        if f"first {total}" in took:
            filtered = total in found
            yield compared(
                SECTION,
                "a user's first search",
                took[f"first {total}"],
                against=_FILTERED if filtered else "",
                peer=took[f"{_FILTERED} {total}"] if filtered else (),
                **here,
            )
        if total not in found:
            base = max(t for t in totals if t in found)
            yield compared(
                SECTION,
                "hybrid search, ledger only",
                ours,
                against=f"the same at {base:,}",
                peer=took[f"again {base}"],
                goal=Goal("no slower (10 % for noise)", most=1.1, of="ratio", applies=base == _COMPARED),
                **here,
            )


def _one_owner(bench: Bench, folder: Path, entries: int) -> Iterator[Row]:
    from neuralflow_memory import open_memory

    asking = _asking(bench.sizes.searches)
    with open_memory(folder, embedder=asking.embedder, context=_UNCACHED) as memory:
        said = filling.add_user(memory, 0, entries)
        memory.flush()
    share = _recall(folder, asking, {filling.name(0): said})
    vectors = asking.embedder.embed_documents(said)
    with open_memory(folder, embedder=asking.embedder, context=_UNCACHED) as memory:
        memory.ready()
        took = interleaved(
            {
                "ours": _ours(memory, asking, lambda _: 0),
                "numpy": lambda number: nearest(vectors, asking.embedder.embed_query(asking.question(number)), k=K),
            },
            rounds=bench.sizes.searches,
        )
    limit = _LIMITS.get(entries)
    here: dict[str, Any] = {"at": entries, "size": "entries of one user"}
    yield compared(
        SECTION,
        "hybrid search, one user",
        took["ours"],
        against="numpy: product and top 10",
        peer=took["numpy"],
        goal=None if limit is None else Goal(f"at most {limit:g} ms", most=limit),
        **here,
    )
    yield compared(
        SECTION,
        "one user, meaning alone: recall@10",
        [share],
        unit="share",
        against="numpy",
        peer=[1.0],
        goal=Goal("at least 0.99", least=0.99),
        **here,
    )


def _fill(folder: Path, raw: RawChroma, *, users: int, entries: int, embedder: PreparedEmbedder) -> None:
    """The same entries in a memory and in Chroma."""
    from neuralflow_memory import open_memory

    with open_memory(folder, embedder=embedder) as memory:
        for user in range(users):
            said = filling.add_user(memory, user, entries)
            raw.upsert(said, embedder.embed_documents(said), user=filling.name(user))
        memory.flush()


def _ours(memory: Any, asking: _Asking, user: Callable[[int], int]) -> Call:
    return lambda number: memory.session("ask", user_id=filling.name(user(number))).search(asking.question(number), k=K)


def _chroma(raw: RawChroma, asking: _Asking, *, users: int | None) -> Call:
    """Asks Chroma what we are asked."""

    def ask(number: int) -> object:
        user = None if users is None else filling.name(number % users)
        return raw.query(asking.embedder.embed_query(asking.question(number)), user=user, k=K)

    return ask


def _recall(folder: Path, asking: _Asking, said: Mapping[str, Sequence[str]]) -> float:
    """The share of the nearest ten that search finds, where it ranks by meaning alone, on average."""
    from neuralflow_memory import open_memory

    shares = []
    with open_memory(folder, embedder=asking.embedder, ranking=_DENSE_ONLY) as memory:
        memory.ready()
        for user, texts in said.items():
            vectors: Vectors = asking.embedder.embed_documents(texts)
            for question in asking.questions[:_IN_TURN]:
                hits = memory.session("ask", user_id=user).search(question, k=K)
                found = asking.embedder.embed_documents([hit.entry.content for hit in hits]) if hits else vectors[:0]
                shares.append(recall(found, vectors, asking.embedder.embed_query(question), k=K))
    return float(np.mean(shares))


__all__ = ["search"]
