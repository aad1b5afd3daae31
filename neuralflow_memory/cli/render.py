"""What the commands show: tables, the budget bar, and the same things as JSON values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from neuralflow_memory import _report
from neuralflow_memory.types import Context, Hit, Message, SessionInfo

PARTS: dict[str, str] = {
    "system": "magenta",
    "task": "blue",
    "note": "bright_magenta",
    "summary": "yellow",
    "turn": "green",
    "hit": "cyan",
    "overhead": "bright_black",
    "free": "dim",
}
"""The colour of each share of a context's budget."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def out() -> Console:
    """The console for results. Made for each command, so that it follows a redirected standard output."""
    return Console(highlight=False, soft_wrap=False)


def err() -> Console:
    """The console for errors and progress, so that standard output stays clean for a script."""
    return Console(stderr=True, highlight=False)


def said(text: str, *, limit: int | None = None, style: str = "") -> Text:
    """Stored text, safe to print: no markup, no terminal control characters; one line if cut to *limit* characters."""
    clean = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    if limit is not None:
        clean = " ".join(clean.split())
        clean = clean if len(clean) <= limit else clean[: limit - 1] + "…"
    return Text(clean, style=style)


def when(moment: datetime) -> str:
    """A time as people read it, in UTC."""
    return moment.strftime("%d %b %Y %H:%M")


def signals(values: Mapping[str, float]) -> str:
    """What a hit's score is made of, e.g. `dense 0.31, lexical 0.22`, in search's own order; what adds nothing is left out."""
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items() if abs(value) >= 0.005)


def hit_view(hit: Hit, *, rank: int, evidence: bool = False, reasons: bool = True, limit: int = 200) -> RenderableType:
    """Where a hit stands, what was said, and, with *reasons*, why it was found. *evidence*: it is what was looked for."""
    entry = hit.entry
    place = Text.assemble(
        (f"{rank:>3} ", "dim"),
        ("✓ " if evidence else "  ", "bold green"),
        (f"{hit.score:.2f}", "bold"),
        f"  {entry.created_at:%d %b %Y}  ",
        said(entry.scope.session_id or "knowledge", limit=40, style="cyan"),
    )
    words = Text.assemble((f"{entry.name or entry.role or entry.type}: ", "dim"), said(entry.content, limit=limit))
    why = [Text(signals(hit.signals), style="dim")] if reasons else []
    return Group(place, Padding(Group(words, *why), (0, 0, 0, 6)))


def sparkline(values: Sequence[float], *, top: float) -> str:
    """One character a value, from empty to *top*."""
    return "".join("▁▂▃▄▅▆▇█"[min(int(value / top * 8), 7)] for value in values)


def spent(context: Context) -> dict[str, int]:
    """Tokens of a context's budget by share, what is free included."""
    return {share.part: share.tokens for share in _report.shares(context)}


def budget_bar(context: Context, *, width: int = 48) -> Text:
    """A bar of *width* characters: what fills the budget, in the parts' colours, and what is free."""
    bar, shares = Text(), _report.shares(context)
    for share, cells in zip(shares, _report.cells(shares, width), strict=True):
        bar.append(("░" if share.part == "free" else "█") * cells, style=PARTS[share.part])
    return bar.append(f" {_report.total(context)}")


def legend(context: Context) -> Text:
    """What each colour of the bar stands for, with its tokens."""
    line = Text()
    for share in _report.shares(context):
        if share.tokens and share.part != "free":
            line.append("■ ", style=PARTS[share.part]).append(f"{share.label}   ")
    return line


def context_view(context: Context) -> RenderableType:
    """A context as the model sees it, and the report of why; what was left out for one reason is one row."""
    report = Table(title="what was considered", title_justify="left", box=None, pad_edge=False, header_style="dim")
    rows = _report.rows(context)
    names = [name for name in (rows[0] if rows else ()) if name != "signals"]  # too wide here; `search` shows them
    for name in names:
        justify: JustifyMethod = "right" if name in _report.NUMBERS else "left"
        report.add_column(name, justify=justify, overflow="fold", no_wrap=name != "why")
    for row in rows:
        styles = {"in": "green" if row["in"] == "in" else "red", "part": PARTS[row["part"]]}
        shown = {**row, "id": _report.shortened(row["id"])}
        report.add_row(*(Text(shown[name], style=styles.get(name, "")) for name in names))
    messages = [Text.assemble((f"{m.role}: ", "bold"), said(m.text)) for m in context.messages]
    details = [Text(more, style="dim")] if (more := _report.details(context)) else []
    return Group(*messages, "", report, "", budget_bar(context), legend(context), *details)


def sessions_table(sessions: Sequence[SessionInfo]) -> Table:
    """One row a session."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("session", "user", "messages", "begun", "last active"):
        table.add_column(name, justify="right" if name == "messages" else "left", overflow="fold")
    for s in sessions:
        user = said(s.user_id) if s.user_id is not None else Text("none", style="dim")
        table.add_row(said(s.session_id), user, f"{s.messages:,}", when(s.created_at), when(s.active_at))
    return table


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Names and values, one a row."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), said(_fact(value)))
    return table


def _fact(value: Any) -> str:
    match value:
        case None | []:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list():
            return "\n".join(_fact(v) for v in value)
        case Mapping():
            return ", ".join(f"{name} {_fact(v)}" for name, v in value.items())
    return str(value)


def as_json(value: Any) -> str:
    """Any result as indented JSON; times in ISO 8601."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=2, default=str)


def _plain(value: Any) -> Any:
    match value:
        case Hit():
            return {"score": value.score, "signals": dict(value.signals), **_entry(value.entry)}
        case Context():
            return {
                "messages": [_plain(m) for m in value.messages],
                "tokens": value.tokens,
                "budget": value.budget,
                "estimated": value.estimated,
                "cacheable": value.cacheable,
                "margin": value.margin,
                "report": [{f.name: _plain(getattr(c, f.name)) for f in fields(c)} for c in value.report],
            }
        case Message():
            return {"role": value.role, "content": value.content, "id": value.id, "name": value.name}
        case SessionInfo():
            names = ("session_id", "user_id", "tenant", "messages", "created_at", "active_at")
            return {name: _plain(getattr(value, name)) for name in names}
        case datetime():
            return value.isoformat()
        case list() | tuple():
            return [_plain(v) for v in value]
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
    return value


def _entry(entry: Any) -> dict[str, Any]:
    return {
        "id": entry.id,
        "key": entry.key,
        "type": str(entry.type),
        "role": entry.role,
        "name": entry.name,
        "content": entry.content,
        "session_id": entry.scope.session_id,
        "user_id": entry.scope.user_id,
        "created_at": entry.created_at.isoformat(),
        "metadata": dict(entry.metadata),
    }
