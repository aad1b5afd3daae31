"""The command `fit`: weights for search from labelled chats, and what they are worth on chats that they were not fitted on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from neuralflow_memory.config import Ranking
from neuralflow_memory.errors import InputError, MissingDependency

from . import render
from .evaluating import filled
from .formats import QUESTIONS, Asked
from .importing import FileFormat, shown_progress
from .options import JsonOption, settings

if TYPE_CHECKING:
    from neuralflow_memory.memory import Memory
    from neuralflow_memory.rules.fitting import Sample, Weights

_SOFTNESS = (1.0, 0.5)  # wide first, so that what is far off moves, too
_EVERYTHING = 1_000_000


def fit(
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, readable=True, help="Chats and questions.", show_default=False),
    ],
    *,
    format_: Annotated[FileFormat, typer.Option("--format", help="How the file is written.")] = FileFormat.JSONL,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="A signal whose weight stays; may be repeated.", show_default=False),
    ] = None,
    pull: Annotated[
        float, typer.Option("--pull", min=0, help="How strongly the weights are held to those there are.")
    ] = 0.001,
    config: Annotated[
        Path | None, typer.Option("--config", help="A .toml or .yaml file of options.", show_default=False)
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Fit the weights of search to labelled chats, in the formats of `eval`, and say what they are worth.

    The share of the evidence among the first ten hits is given for the weights there are, for the fitted ones on what they were
    fitted on, and on each user's chats for weights fitted on the others'. Nothing is changed: set what you want as `ranking`.
    """
    names = list(Ranking.model_fields)
    unknown = [name for name in keep or () if name not in names]
    if unknown:
        raise typer.BadParameter(f"signals are {', '.join(names)}", param_hint="--keep")
    base = settings(config)
    questions = list(QUESTIONS[format_](file))
    if not questions:
        raise InputError(f"{file.name}: there are no questions with evidence in it")
    with tempfile.TemporaryDirectory() as folder, shown_progress() as progress:
        even = Ranking(**dict.fromkeys(names, 1.0))
        with filled(base, file=file, format_=format_, folder=Path(folder), progress=progress, ranking=even) as memory:
            asking = progress.add_task("asking", total=len(questions))
            groups: dict[str, list[Sample]] = {}
            for asked in questions:
                sample = _sample(memory, asked, names)
                if sample is not None:
                    groups.setdefault(asked.user_id or asked.session_id or "", []).append(sample)
                progress.advance(asking)
        found = _fitted(groups, names, now=base.ranking, keep=keep or (), pull=pull)
    if json_:
        typer.echo(render.as_json(found))
    else:
        render.out().print(_table(found), _shares(found), sep="\n")


def _sample(memory: Memory, asked: Asked, names: Sequence[str]) -> Sample | None:
    import numpy as np

    from neuralflow_memory.rules.fitting import Sample

    hits = memory.session(asked.session_id, user_id=asked.user_id).search(asked.question, k=_EVERYTHING)
    rows = [[hit.signals.get(name, 0.0) * len(hit.signals) for name in names] for hit in hits]  # all weights are 1
    evidence = [row for row, hit in enumerate(hits) if hit.entry.id in asked.evidence]
    return Sample(np.array(rows), np.array(evidence, np.int64)) if evidence else None


def _fitted(
    groups: Mapping[str, Sequence[Sample]], names: Sequence[str], *, now: Ranking, keep: Sequence[str], pull: float
) -> dict[str, Any]:
    import numpy as np

    from neuralflow_memory.rules.fitting import recall

    before = np.array([getattr(now, name) for name in names])
    everything = [s for group in groups.values() for s in group]
    weights = _best(everything, before, free=[name not in keep for name in names], pull=pull)
    apart, counts = [], []
    for left_out, group in groups.items():
        rest = [s for name, samples in groups.items() if name != left_out for s in samples]
        if rest:
            own = _best(rest, before, free=[name not in keep for name in names], pull=pull)
            apart.append(recall(group, own, depth=10))
            counts.append(len(group))
    return {
        "questions": len(everything),
        "users": len(groups),
        "weights": {name: round(float(w), 2) for name, w in zip(names, weights, strict=True)},
        "before": {name: float(w) for name, w in zip(names, before, strict=True)},
        "R@10 before": recall(everything, before, depth=10),
        "R@10 fitted": recall(everything, weights, depth=10),
        "R@10 on others": float(np.average(apart, weights=counts)) if apart else None,
    }


def _best(samples: Sequence[Sample], start: Weights, *, free: Sequence[bool], pull: float) -> Weights:
    import numpy as np

    from neuralflow_memory.rules.fitting import loss, pruned

    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingDependency("scipy", "local", "fit") from error
    few = [pruned(s, start) for s in samples]
    bounds = [(0.0, None) if moves else (value, value) for moves, value in zip(free, start, strict=True)]
    best = start
    for softness in _SOFTNESS:
        done = minimize(
            lambda w, softness=softness: loss(w, few, start=start, softness=softness, pull=pull),
            best,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 60},
        )
        best = np.asarray(done.x, np.float64)
    return best


def _table(found: Mapping[str, Any]) -> Table:
    table = Table("signal", box=None)
    for name in ("before", "fitted"):
        table.add_column(name, justify="right")
    for name, weight in found["weights"].items():
        table.add_row(name, f"{found['before'][name]:.2f}", f"{weight:.2f}")
    return table


def _shares(found: Mapping[str, Any]) -> str:
    lines = [f"\n{found['questions']:,} questions of {found['users']:,} users; evidence among the first ten hits:"]
    for title, name in (("before", "R@10 before"), ("fitted", "R@10 fitted"), ("fitted on others", "R@10 on others")):
        if found[name] is not None:
            lines.append(f"  {title}: {100 * found[name]:.1f} %")
    return "\n".join(lines)
