"""The command `demo`: a half-year chat through LangChain, then LlamaIndex, on one memory; offline, in about a minute."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from neuralflow_memory.errors import ConfigError, NeuralFlowError

from . import render
from .demo_chat import Chat, DemoSession, bundled_chat
from .demo_questions import Answer, ask, lost, show
from .demo_stage import Stage
from .options import opened, settings

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory

_SMALL: dict[str, Any] = {
    "budget": {"total": 2000, "conversation": 1000, "summary": 500},
    "pruning": {
        "max_context_items": 4,
        "summarization_threshold": 7,
        "max_context_tokens": 700,
        "summary_max_tokens": 300,
    },
}
"""A budget so small that twenty turns overflow it: folds are to be seen, not only to be believed."""

_SWITCH = 3  # the session begun in LangChain and finished in LlamaIndex

_INTRO = """A chat of {turns} turns in {sessions} sessions, from {begun} to {ended}, is played into one memory: the first sessions by
LangChain's ConversationChain, the later ones by LlamaIndex's SimpleChatEngine, and one is begun in the first and
finished in the second. A script stands in for the model that chats; memory, budget and search are real. {summaries}"""

_OFFLINE = "Nothing leaves this machine."
_ONLINE = "Gemini writes the summaries, since it is configured; it is sent the turns that are folded."

_ASKED = """Asked in a new conversation; the answers lie weeks and months back. ✓ the turn that holds the answer; the script
knows which that is, and quotes it from where the memory found it."""

_GEMINI = """To let Gemini write the summaries, install neuralflow-memory[gemini], set NEURALFLOW_GEMINI__API_KEY, and run
this again."""


class DemoClock:
    """Shows the time of the turn that is being played, so that every turn gets the chat's own date."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def demo(
    *,
    path: Annotated[
        Path | None, typer.Option("--path", help="Keep the memory in this new folder.", show_default=False)
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="No animation.")] = False,
) -> None:
    """Play a half-year chat through LangChain and LlamaIndex on one small budget, then ask about it. Offline.

    The exit code is 0 only if every question's evidence is among its hits, before and after the memory is reopened.
    """
    chat, console = bundled_chat(), render.out()
    if path is not None and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(_refusal(path, chat=chat))
    gemini = settings(path).gemini
    online = gemini.project is not None or gemini.api_key is not None
    console.print(_intro(chat, online=online))
    with console.status("loading LangChain and LlamaIndex"):
        for host in ("demo_langchain", "demo_llama_index"):
            import_module(f"{__package__}.{host}")  # a missing one is told now, not in the middle of the show
    with _folder(path) as where:
        clock = DemoClock(chat.sessions[0].turns[0].at)
        before = _first_life(chat, where=where, clock=clock, console=console, animate=not fast and console.is_terminal)
        after, whole = _second_life(chat, where=where, clock=clock, console=console)
    if path is not None:
        console.print(
            Text(f"The memory stays: neuralflow-memory search 'whose sofa' --user {chat.user_id} --path {path}\n")
        )
    good = _verdict(before, after, whole=whole, console=console)
    if not online:
        console.print(Text(_GEMINI.replace("\n", " "), style="dim"))
    if not good:
        raise typer.Exit(1)


def _refusal(path: Path, *, chat: Chat) -> str:
    """Why the demo is not played into *path*, which is not empty: what it holds, as far as that can be told."""
    played: dict[str, int] | None = None
    # Opened only if it is a memory: opening makes one of a folder that holds none.
    if (path / "ledger.sqlite3").is_file():
        with suppress(NeuralFlowError), opened(path, words_only=True) as memory:
            found = {session.session_id: session.messages for session in memory.sessions(user_id=chat.user_id)}
            played = found if memory.stats()["sessions"] == len(found) else None
    whole = {session.id: len(session.turns) for session in chat.sessions}
    if played is None or not played.keys() <= whole.keys():
        return f"{path} is not empty; give the demo a new folder"
    if played == whole:
        return f"{path} is not empty: it holds a demo that was played to its end; give the demo a new folder"
    return (
        f"{path} is not empty: it holds a demo that was broken off after {sum(played.values())} of {sum(whole.values())} "
        "turns; delete that folder and run the demo again, or give it a new one"
    )


def _intro(chat: Chat, *, online: bool) -> str:
    turns = [turn for session in chat.sessions for turn in session.turns]
    facts = {"begun": f"{turns[0].at:%B}", "ended": f"{turns[-1].at:%B %Y}", "sessions": len(chat.sessions)}
    facts["summaries"] = _ONLINE if online else _OFFLINE
    return _INTRO.format(turns=len(turns), **facts).replace("\n", " ") + "\n"


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="neuralflow-demo-") as temporary:
        yield Path(temporary) / "memory"


def _first_life(chat: Chat, *, where: Path, clock: DemoClock, console: Console, animate: bool) -> list[Answer]:
    """Play the chat, then ask the questions."""
    from neuralflow_memory import open_memory

    with open_memory(where, clock=clock, **_SMALL) as memory:
        stage = Stage(memory, console=console, animate=animate)
        for number, session in enumerate(chat.sessions):
            with stage.session(session, number=number, of=len(chat.sessions)):
                _play(memory, session, number=number, user_id=chat.user_id, clock=clock, stage=stage)
        memory.flush()
        clock.now = chat.asked
        console.rule("questions")
        console.print(_ASKED.replace("\n", " ") + "\n")
        answers = _ask_all(memory, chat)
        for number, answer in enumerate(answers):
            show(answer, console=console, reasons=number == 0)
        return answers


def _play(memory: Memory, session: DemoSession, *, number: int, user_id: str, clock: DemoClock, stage: Stage) -> None:
    """Play one session through the host whose turn it is; the one at the switch through both."""
    from .demo_langchain import langchain_talk
    from .demo_llama_index import llama_index_talk

    ours = memory.session(session.id, user_id=user_id)
    script = iter(turn.text for turn in session.turns if turn.role == "assistant")

    def reply(prompt: str) -> str:
        stage.prompt(prompt)
        return next(script)

    exchanges = session.exchanges
    switch = len(exchanges) // 2 if number == _SWITCH else len(exchanges) if number < _SWITCH else 0
    halves = (("LangChain", langchain_talk, exchanges[:switch]), ("LlamaIndex", llama_index_talk, exchanges[switch:]))
    for host, talk, part in halves:
        say = talk(ours, reply=reply)
        for asked, answered in part:
            clock.now = asked.at
            say(asked.text)
            stage.exchange(ours, host=host, asked=asked, answered=answered)


def _second_life(chat: Chat, *, where: Path, clock: DemoClock, console: Console) -> tuple[list[Answer], bool]:
    """Open the same folder again, and ask the same questions; also, whether every turn is there."""
    from neuralflow_memory import open_memory

    console.rule("closed, and opened again")
    with open_memory(where, clock=clock, **_SMALL) as memory:
        known = _turn_ids(memory, chat)
        said = sum(len(session.turns) for session in chat.sessions)
        console.print(f"{len(known)} of {said} turns stand in the transcript, word for word.")
        return _ask_all(memory, chat), len(known) == said


def _ask_all(memory: Memory, chat: Chat) -> list[Answer]:
    known = _turn_ids(memory, chat)
    session = memory.session("questions", user_id=chat.user_id)
    return [ask(question, session=session, known=known) for question in chat.questions]


def _turn_ids(memory: Memory, chat: Chat) -> dict[tuple[str, str], str]:
    """The chat's own turn ids by (session, message id): the hosts give messages ids of their own."""
    known = {}
    for session in chat.sessions:
        messages = memory.session(session.id, user_id=chat.user_id).messages()
        for message, turn in zip(messages, session.turns, strict=False):
            if message.id is not None and (message.role, message.text) == (turn.role, turn.text):
                known[session.id, message.id] = turn.id
    return known


def _verdict(before: list[Answer], after: list[Answer], *, whole: bool, console: Console) -> bool:
    """Print how it went; whether all evidence was found, found again, and nothing is lost."""
    changed = lost(before, after)
    again = "every question finds the same turns." if not changed else f"found differently: {'; '.join(changed)}"
    console.print(f"Asked again: {again}\n")
    complete = min(sum(answer.complete for answer in answers) for answers in (before, after))
    good = complete == len(before) and whole and not changed
    verdict = f"For {complete} of {len(before)} questions, every turn that holds the answer was found."
    console.print(Text(verdict, style="bold green" if good else "bold red"))
    return good
