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


def scripted_answer(hits: Sequence[Hit]) -> str:
    """What a model without a mind of its own says: the best hit, quoted."""
    if not hits:
        return "Nothing in the memory speaks of that."
    best = hits[0].entry
    who = "You said" if best.role == "user" else "I said"
    return f"{who} on {best.created_at.day} {best.created_at:%B}: “{best.content}”"


def lost(before: Sequence[Answer], after: Sequence[Answer]) -> list[str]:
    """The questions that do not find the same turns any more."""
    pairs = zip(before, after, strict=True)
    return [old.question.text for old, new in pairs if set(old.found) != set(new.found)]


def show(answer: Answer, *, console: Console) -> None:
    """Print a question, its answer, the turns found, and the size of the prompt."""
    console.print(Text(answer.question.text, style="bold"))
    console.print(Text.assemble(("scripted model: ", "dim"), render.said(scripted_answer(answer.hits))))
    for rank, (hit, turn) in enumerate(zip(answer.hits, answer.found, strict=True), 1):
        evidence = turn in answer.question.evidence
        if evidence or rank <= _SHOWN:
            console.print(render.hit_view(hit, rank=rank, evidence=evidence, limit=100))
    inside = sum(1 for c in answer.context.report if c.part == "hit" and c.included)
    size = f"prompt: {answer.context.tokens:,} of {answer.context.budget:,} tokens, {inside} found turns in it"
    console.print(Text(size, style="dim"))
    if not answer.complete:
        console.print(Text("not all of the evidence is among the hits", style="bold red"))
    console.print()
