"""The command `eval`: how much of the evidence of labelled questions search finds, on the user's own chats."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from neuralflow_memory.config import Ranking
from neuralflow_memory.errors import InputError
from neuralflow_memory.rules.measures import DEPTHS, averaged, measures
from neuralflow_memory.types import Message

from . import render
from .formats import QUESTIONS, READERS, Asked
from .importing import FileFormat, add_all, shown_progress, wait
from .options import JsonOption, settings

if TYPE_CHECKING:
    from neuralflow_memory.config import Settings
    from neuralflow_memory.memory import Memory

_DEEPEST = 60  # hits of a question
_SHOWN = 5  # questions that gained or lost most
_OWN, _DENSE, _BM25, _WEIGHTED = "this memory", "plain dense", "plain BM25", "dense and BM25, weighted"
_PLAIN = {_DENSE: ("dense",), _BM25: ("lexical",), _WEIGHTED: ("dense", "lexical")}
_FUSED = "dense and BM25 by reciprocal rank"
_FUSION = 60  # as in Cormack, Clarke and Büttcher, SIGIR 2009
_CURVE = (1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 60)


@dataclass(frozen=True, slots=True)
class Policy:
    """A ranking under test."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """What one policy found for one question.

    `hits`: ids, best first, and the tokens of each. `ranks`: the place of each piece of evidence, from 1; 0 for none.
    """

    asked: Asked
    hits: Mapping[str, int]
    milliseconds: float
    found: Mapping[str, float] = field(init=False)
    ranks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        ranked, evidence = list(self.hits), self.asked.evidence
        found = measures(ranked, evidence, tokens=list(self.hits.values()))
        object.__setattr__(self, "found", found)
        object.__setattr__(self, "ranks", tuple(ranked.index(own) + 1 if own in ranked else 0 for own in evidence))


def eval_(
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, readable=True, help="Chats and questions.", show_default=False),
    ],
    *,
    format_: Annotated[FileFormat, typer.Option("--format", help="How the file is written.")] = FileFormat.JSONL,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Try another policy, too, e.g. ranking.speaker=2.0; may be repeated.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A .toml or .yaml file of options.", show_default=False)
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure search on labelled chats: the share of each question's evidence that is found, against plain dense and BM25.

    JSONL: messages as for `import`, each with an id, and questions, {"question", "evidence": [ids]} and, if you have them,
    user_id, session_id and category. The chats are read into a memory that goes away at the end.
    """
    base = settings(config)
    policies = [Policy(_OWN, {}), *_plain()]
    if set_:
        policies.append(Policy(", ".join(set_), _overrides(set_)))
    questions = list(QUESTIONS[format_](file))
    if not questions:
        raise InputError(f"{file.name}: there are no questions with evidence in it")
    with tempfile.TemporaryDirectory() as folder, shown_progress() as progress:
        answers = _measured(
            base, policies, questions, file=file, format_=format_, folder=Path(folder), progress=progress
        )
    if json_:
        typer.echo(render.as_json({name: _as_json(found) for name, found in answers.items()}))
        return
    console = render.out()
    console.print(f"{len(questions):,} questions", _table(answers), sep="\n")
    console.print(f"\nevidence among the first {', '.join(map(str, _CURVE))} hits", _curves(answers), sep="\n")
    if set_:
        changes, table = _compared(answers[_OWN], answers[policies[-1].name])
        console.print(f"\n{changes}", table, sep="\n")


def _plain() -> Iterator[Policy]:
    weights = Ranking()
    for name, signals in _PLAIN.items():
        own = {s: getattr(weights, s) if s in signals else 0.0 for s in Ranking.model_fields}
        yield Policy(name, {"ranking": own})


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    """`ranking.speaker=2.0` as options."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        section, dot, field = name.strip().partition(".")
        if not equals or not section:
            raise typer.BadParameter(f"write OPTION=VALUE, not {text!r}", param_hint="--set")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        if dot:
            options.setdefault(section, {})[field] = parsed
        else:
            options[section] = parsed
    return options


@contextmanager
def filled(
    base: Settings, *, file: Path, format_: FileFormat, folder: Path, progress: Progress, ranking: Ranking | None = None
) -> Iterator[Memory]:
    """A memory in *folder* that holds the file's chats, embedded."""
    from neuralflow_memory import open_memory
    from neuralflow_memory.sources import read_settings

    options = {} if ranking is None else {"ranking": ranking}
    total = sum(1 for _ in READERS[format_](file))
    with open_memory(read_settings(base, path=folder / "memory", **options)) as memory:
        add_all(memory, READERS[format_](file), progress=progress, total=total)
        trouble = wait(memory, progress=progress)
        if trouble is not None:
            raise InputError(f"the chats can't be embedded: {trouble}")
        yield memory


def _measured(
    base: Settings,
    policies: Sequence[Policy],
    questions: Sequence[Asked],
    *,
    file: Path,
    format_: FileFormat,
    folder: Path,
    progress: Progress,
) -> dict[str, list[Answered]]:
    from neuralflow_memory import open_memory
    from neuralflow_memory.sources import read_settings

    with filled(base, file=file, format_=format_, folder=folder, progress=progress) as memory:
        inside = memory.settings
    answers = {}
    for policy in policies:
        asking = progress.add_task("asking", total=len(questions))
        with open_memory(read_settings(inside, **policy.options)) as memory:
            memory.ready()
            found = []
            for asked in questions:
                found.append(_answered(memory, asked))
                progress.advance(asking)
            answers[policy.name] = found
        if policy.name == _BM25:
            answers[_FUSED] = [_fused(*both) for both in zip(answers[_DENSE], found, strict=True)]
    return answers


def _answered(memory: Memory, asked: Asked) -> Answered:
    session = memory.session(asked.session_id, user_id=asked.user_id)
    start = time.perf_counter()
    hits = session.search(asked.question, k=_DEEPEST)
    elapsed = 1000 * (time.perf_counter() - start)
    costs = [memory.count_tokens([Message(h.entry.role or "user", h.entry.content, name=h.entry.name)]) for h in hits]
    return Answered(asked, dict(zip((hit.entry.id for hit in hits), costs, strict=True)), elapsed)


def _fused(one: Answered, other: Answered) -> Answered:
    """Two rankings as one: each hit scores the sum of 1 / (60 + its rank)."""
    scores: dict[str, float] = defaultdict(float)
    for answered in (one, other):
        for rank, own_id in enumerate(answered.hits, 1):
            scores[own_id] += 1 / (_FUSION + rank)
    costs = {**one.hits, **other.hits}
    best = sorted(scores, key=lambda own_id: -scores[own_id])[:_DEEPEST]
    return Answered(one.asked, {own_id: costs[own_id] for own_id in best}, one.milliseconds + other.milliseconds)


def _times(found: Sequence[Answered]) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds of a search."""
    ordered = sorted(a.milliseconds for a in found)
    return median(ordered), ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]


def _table(answers: Mapping[str, Sequence[Answered]]) -> Table:
    names = list(averaged([a.found for a in next(iter(answers.values()))]))
    table = Table("ranking", box=None)
    for name in (*names, "ms", "p95"):
        table.add_column(name, justify="right")
    for policy, found in answers.items():
        shares = averaged([a.found for a in found])
        table.add_row(policy, *(f"{100 * shares[n]:.1f}" for n in names), *(f"{ms:.1f}" for ms in _times(found)))
    return table


def _curves(answers: Mapping[str, Sequence[Answered]]) -> Table:
    """The share of the evidence among the first k hits, for growing k."""
    table = Table(box=None, show_header=False)
    for policy, found in answers.items():
        shares = [sum(sum(0 < r <= k for r in a.ranks) / len(a.ranks) for a in found) / len(found) for k in _CURVE]
        table.add_row(policy, render.sparkline(shares, top=1.0), f"{100 * shares[-1]:.1f}")
    return table


def _compared(before: Sequence[Answered], after: Sequence[Answered]) -> tuple[str, Table]:
    """Which questions another policy would answer better, and which worse."""
    depth = f"R@{DEPTHS[2]}"
    changes = [(b.found[depth] - a.found[depth], a, b) for a, b in zip(before, after, strict=True)]
    gained, lost = sum(c > 0 for c, *_ in changes), sum(c < 0 for c, *_ in changes)
    table = Table(box=None)
    for name in ("change", "ranks before", "after"):
        table.add_column(name, justify="right")
    table.add_column("question")
    ordered = sorted(changes, key=lambda c: c[0])
    for change, a, b in [*reversed(ordered[-_SHOWN:]), *ordered[:_SHOWN]]:
        if change:
            ranks = [", ".join(str(r or "-") for r in x.ranks) for x in (a, b)]
            table.add_row(f"{100 * change:+.0f}", *ranks, render.said(a.asked.question, limit=80))
    return f"{depth}: {gained} questions gain, {lost} lose", table


def _as_json(found: Sequence[Answered]) -> dict[str, Any]:
    middle, slow = _times(found)
    rows = [
        {"question": a.asked.question, "category": a.asked.category, "ranks": a.ranks, **a.found, "ms": a.milliseconds}
        for a in found
    ]
    return {**averaged([a.found for a in found]), "ms": middle, "ms_p95": slow, "questions": rows}
