"""The demo's questions: asked of the memory, checked against the turns that hold the answer, and shown with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from neuralflow_memory.types import Context, Hit, MemoryType

from . import render
from .demo_chat import Question

if TYPE_CHECKING:
    from neuralflow_memory.session import Session

_SHOWN = 3  # hits of a question on screen, beside its evidence

_SIGNALS = (
    "dense = meaning, near = meaning with the turns around it, lexical = words, around = words with those around it, "
    "speaker = who said it, date = when, length = not too short, statement = no question"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the memory found for a question. `found` are the chat's own ids of the hits, best first; "" for others."""

    question: Question
    hits: tuple[Hit, ...]
    found: tuple[str, ...]
    context: Context

    @property
    def complete(self) -> bool:
        """Whether all of the evidence is among the hits."""
        return set(self.question.evidence) <= set(self.found)


def ask(question: Question, *, session: Session, known: Mapping[tuple[str, str], str]) -> Answer:
    """Search the user's whole memory, and put together the prompt that a model would get; nothing is written.

    *known* maps (session id, message id) to the chat's own turn ids.
    """
    hits = tuple(session.search(question.text, types=[MemoryType.SHORT_TERM]))
    found = tuple(known.get((hit.entry.scope.session_id or "", hit.entry.id), "") for hit in hits)
    return Answer(question, hits, found, session.context(question.text))


def scripted_answer(answer: Answer) -> str:
    """What the script says: the hits that hold the answer, quoted with their rank; without them it admits it.

    The script knows which turns those are. That the memory found them, and at which rank, is what is to be seen.
    """
    hits = list(enumerate(zip(answer.hits, answer.found, strict=True), 1))
    quoted = [f"hit {rank}, {_quote(hit)}" for rank, (hit, turn) in hits if turn in answer.question.evidence]
    if not hits:
        return "Nothing in the memory speaks of that."
    return "; ".join(quoted) or f"No hit holds the answer; the best is hit 1, {_quote(answer.hits[0])}"


def _quote(hit: Hit) -> str:
    said = hit.entry
    who = "you said" if said.role == "user" else "I said"
    return f"{who} on {said.created_at.day} {said.created_at:%B}: “{said.content}”"


def lost(before: Sequence[Answer], after: Sequence[Answer]) -> list[str]:
    """The questions that do not find the same turns any more."""
    pairs = zip(before, after, strict=True)
    return [old.question.text for old, new in pairs if set(old.found) != set(new.found)]


def show(answer: Answer, *, console: Console, reasons: bool) -> None:
    """Print a question, its answer, the turns found (with *reasons* also why), and the size of the prompt."""
    console.print(Text(answer.question.text, style="bold"))
    console.print(Text.assemble(("scripted model: ", "dim"), render.said(scripted_answer(answer))))
    shown = 0
    for rank, (hit, turn) in enumerate(zip(answer.hits, answer.found, strict=True), 1):
        evidence = turn in answer.question.evidence
        if evidence or rank <= _SHOWN:
            console.print(render.hit_view(hit, rank=rank, evidence=evidence, reasons=reasons, limit=100))
            shown += 1
    inside = sum(1 for c in answer.context.report if c.part == "hit" and c.included)
    size = f"{inside} turns found, {shown} shown; prompt: {answer.context.tokens:,} of {answer.context.budget:,} tokens"
    console.print(Text(size, style="dim"))
    if reasons:
        console.print(Text(_SIGNALS, style="dim"))
    if not answer.complete:
        console.print(Text("not all of the evidence is among the hits", style="bold red"))
    console.print()
