"""A turn: what the user said and the assistant answered is added, and the next prompt is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from neuralflow_memory.types import Message

from . import peers
from .measure import WARM_UP, Call, interleaved, timed
from .rows import Goal, Row, at_most, compared
from .sizes import Bench
from .texts import Texts

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory
    from neuralflow_memory.session import Session

SECTION = "turn"
WORDS = 85
WINDOW = 4_000
"""Tokens that a prompt may have."""
_TOO_SLOW = 0.25
"""Seconds of a turn after which a peer is measured at no larger size."""
_BULK = 500
_FLAT = (100, 10_000)


def turn(bench: Bench) -> Iterator[Row]:
    """Ours against a bare transaction, at every size in the same rounds; then the hosts' own memories."""
    from neuralflow_memory import open_memory

    folder, texts = bench.folder / "turn", Texts(1)
    folder.mkdir()
    encode = peers.encoder()
    with ExitStack() as stack:
        memory = stack.enter_context(open_memory(folder / "memory", embedder="none", summarizer="extractive"))
        bare = stack.enter_context(peers.BareSqlite(folder / "bare.sqlite3", encode=encode))
        kinds, missing = _kinds()
        rounds = bench.sizes.turn_rounds
        calls = {bare.name: _turns(bare.turn, texts, rounds=rounds)}
        for size in bench.sizes.turns:
            session = _filled(memory, texts, turns=size)
            for kind, make in kinds.items():
                calls[f"{kind} {size}"] = _turns(make(session), texts, rounds=rounds)
        took = interleaved(calls, rounds=rounds, between=memory.flush)
        whole = _with_folds(memory, texts, turns=rounds)
        yield from _rows(took, bench=bench, kinds=kinds)
        for kind, why in missing.items():
            yield Row(SECTION, kind, note=why)
        yield Row(
            SECTION,
            "core, the folds in the background included",
            at=bench.sizes.turns[0],
            size="turns",
            ours=1000 * whole,
            note="mean of turns without a pause between them",
        )
    core = {size: took[f"core {size}"] for size in bench.sizes.turns}
    yield from _peers(bench, texts, encode=encode, ours=core)


def _rows(took: Mapping[str, list[float]], *, bench: Bench, kinds: Mapping[str, Any]) -> Iterator[Row]:
    goals = {"core": at_most(3), "core with search by words": None}
    for size in bench.sizes.turns:
        for kind in kinds:
            yield compared(
                SECTION,
                kind,
                took[f"{kind} {size}"],
                against=peers.BareSqlite.name,
                peer=took[peers.BareSqlite.name],
                at=size,
                size="turns",
                goal=goals.get(kind, at_most(6)),
            )
    first, last = bench.sizes.turns[0], bench.sizes.turns[-1]
    if last > first:
        yield compared(
            SECTION,
            "core, flat",
            took[f"core {last}"],
            against=f"the same at {first:,} turns",
            peer=took[f"core {first}"],
            at=last,
            size="turns",
            goal=Goal(
                f"at most 1.2 x, from {_FLAT[0]} to {_FLAT[1]:,} turns",
                most=1.2,
                of="ratio",
                applies=(first, last) == _FLAT,
            ),
        )


def _kinds() -> tuple[dict[str, Callable[[Session], Callable[[peers.Turn], object]]], dict[str, str]]:
    """The ways to our memory that a turn may take: each makes, of a session, what takes a turn; and which are missing."""
    kinds: dict[str, Callable[[Session], Callable[[peers.Turn], object]]] = {
        "core": lambda session: partial(_core, session, search=False),
        "core with search by words": lambda session: partial(_core, session, search=True),
    }
    missing = {}
    for name, make in (("LangChain history", _langchain), ("LlamaIndex memory", _llama_index)):
        found, why = peers.installed(make)
        if found is None:
            missing[name] = why
        else:
            kinds[name] = found
    return kinds, missing


def _core(session: Session, said: peers.Turn, *, search: bool) -> object:
    session.add([Message("user", said[0]), Message("assistant", said[1])])
    return session.context(max_tokens=WINDOW, search=search)


def _langchain() -> Callable[[Session], Callable[[peers.Turn], object]]:
    from langchain_core.messages import AIMessage, HumanMessage

    from neuralflow_memory.langchain import NeuralFlowChatMessageHistory

    def take(history: NeuralFlowChatMessageHistory, said: peers.Turn) -> object:
        history.add_messages([HumanMessage(said[0]), AIMessage(said[1])])
        return history.messages

    return lambda session: partial(take, NeuralFlowChatMessageHistory(session, max_tokens=WINDOW))


def _llama_index() -> Callable[[Session], Callable[[peers.Turn], object]]:
    from llama_index.core.base.llms.types import ChatMessage

    from neuralflow_memory.llama_index import NeuralFlowMemory

    def take(memory: NeuralFlowMemory, said: peers.Turn) -> object:
        memory.put_messages([ChatMessage(role="user", content=said[0]), ChatMessage(role="assistant", content=said[1])])
        return memory.get()

    return lambda session: partial(take, NeuralFlowMemory(session, token_limit=WINDOW, search=False))


def _turns(take: Callable[[peers.Turn], object], texts: Texts, *, rounds: int) -> Call:
    """Takes another turn each time; what is said was made before the clock runs."""
    said = iter([_said(texts) for _ in range(rounds + WARM_UP)])
    return lambda _: take(next(said))


def _said(texts: Texts) -> peers.Turn:
    return texts.sentence(WORDS), texts.sentence(WORDS)


def _filled(memory: Memory, texts: Texts, *, turns: int) -> Session:
    """A conversation of so many turns."""
    session = memory.session(f"chat-{turns}", user_id=f"user-{turns}")
    for start in range(0, turns, _BULK):
        pairs = [_said(texts) for _ in range(min(_BULK, turns - start))]
        session.add([m for user, answer in pairs for m in (Message("user", user), Message("assistant", answer))])
        memory.flush()
    return session


def _with_folds(memory: Memory, texts: Texts, *, turns: int) -> float:
    """Seconds of a turn where they follow each other without a pause, with all the work that they leave behind."""
    session = memory.session("busy", user_id="busy")
    said = [_said(texts) for _ in range(turns)]

    def chat() -> None:
        for one in said:
            _core(session, one, search=False)
        memory.flush()

    return timed(chat) / turns


def _peers(bench: Bench, texts: Texts, *, encode: peers.Encode, ours: Mapping[int, list[float]]) -> Iterator[Row]:
    slow: dict[str, str] = {}
    for size in bench.sizes.turns:
        before = [_said(texts) for _ in range(size)]
        for name, make in peers.conversations(before, folder=bench.folder / "turn", encode=encode, max_tokens=WINDOW):
            if name in slow:
                yield Row(SECTION, "core", at=size, size="turns", against=name, note=slow[name])
                continue
            peer, missing = peers.installed(make)
            if peer is None:
                yield Row(SECTION, "core", at=size, size="turns", against=name, note=missing)
                continue
            with peer:
                call = _turns(peer.turn, texts, rounds=bench.sizes.turn_rounds)
                took = interleaved({name: call}, rounds=bench.sizes.turn_rounds, most=2.0)[name]
            row = compared(SECTION, "core", ours[size], against=name, peer=took, at=size, size="turns")
            yield row
            if row.peer is not None and row.peer > 1000 * _TOO_SLOW:
                slow[name] = f"stopped: {row.peer:,.0f} ms at {size:,} turns"


__all__ = ["turn"]
