"""What the demo shows while the chat is played: who says what through which host, and how full the budget is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from neuralflow_memory.types import Context, Message

from . import render
from .demo_chat import DemoSession, DemoTurn

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory
    from neuralflow_memory.session import Session

_BEAT = 0.15  # seconds between two exchanges, so that an eye can follow


class Stage:
    """Follows the play and draws it: live on a terminal, else a few lines a session."""

    def __init__(self, memory: Memory, *, console: Console, animate: bool) -> None:
        self._memory = memory
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if animate else None
        self._title = ""
        self._turns = 0
        self._folds_before = 0
        self._prompts: list[int] = []
        self._verbatim: list[int] = []
        self._hosts: dict[str, None] = {}
        self._fullest: Context | None = None

    @contextmanager
    def session(self, session: DemoSession, *, number: int, of: int) -> Iterator[None]:
        """Announce a session, follow it, and sum it up."""
        self._prompts, self._verbatim, self._hosts, self._fullest = [], [], {}, None
        self._folds_before = self._folds()
        self._title = f"{number + 1} of {of}: {session.title}, {session.turns[0].at:%d %B %Y}"
        if self._live is None:
            yield
        else:
            with self._live:
                yield
        self._sum_up(len(session.turns))

    def prompt(self, text: str) -> None:
        """Note the size of the prompt that a host has just sent to its model."""
        self._prompts.append(self._memory.count_tokens([Message("user", text)]))

    def exchange(self, session: Session, *, host: str, asked: DemoTurn, answered: DemoTurn) -> None:
        """Show what was said, and what the next prompt would hold."""
        self._hosts[host] = None
        self._turns += 2
        context = session.context()
        self._verbatim.append(render.spent(context)["turn"])
        if self._fullest is None or context.tokens >= self._fullest.tokens:
            self._fullest = context
        if self._live is not None:
            self._live.update(self._scene(context, host=host, asked=asked, answered=answered), refresh=True)
            time.sleep(_BEAT)

    def _scene(self, context: Context, *, host: str, asked: DemoTurn, answered: DemoTurn) -> Panel:
        width = max(min(self._console.width - 36, 64), 20)
        counts = f"through {host} · {self._turns} turns stored · {self._folds()} folds · last prompt {self._prompts[-1]:,} tokens"
        lines = Group(
            Text.assemble(("Nadia  ", "bold"), render.said(asked.text)),
            Text.assemble(("model  ", "bold"), render.said(answered.text)),
            "",
            render.budget_bar(context, width=width),
            render.legend(context),
            Text(counts, style="dim"),
        )
        return Panel(lines, title=self._title, title_align="left")

    def _sum_up(self, turns: int) -> None:
        self._memory.flush()  # folds run in the background
        folds = self._folds() - self._folds_before
        self._console.print(Text(self._title, style="bold"))
        self._console.print(f"  {turns} turns through {' then '.join(self._hosts)}, {folds} folds")
        self._console.print(f"  prompts of {min(self._prompts):,} to {max(self._prompts):,} tokens")
        top = self._memory.settings.pruning.max_context_tokens
        filling = render.sparkline(self._verbatim, top=top)
        self._console.print(
            Text.assemble("  verbatim turns: ", (filling, "green"), f" of {top:,} tokens, a drop is a fold")
        )
        if self._fullest is not None:
            self._console.print(Text.assemble("  ", render.budget_bar(self._fullest, width=32), " at its fullest"))
            self._console.print(Text.assemble("  ", render.legend(self._fullest)))

    def _folds(self) -> int:
        return int(self._memory.stats()["folds"])
