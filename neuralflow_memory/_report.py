"""How a context reads: what fills its budget, and what was considered; as plain text, as HTML, and for the commands."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from .types import Candidate, CompactionReport, Context, Move, ReindexReport, SweepReport

_LOOKS = {
    "system": ("system", "▒", "#b05cc6"),
    "task": ("tasks", "▞", "#4c72d8"),
    "note": ("notes", "▚", "#d9743a"),
    "summary": ("summary", "▓", "#c49a00"),
    "turn": ("turns", "█", "#2f9e44"),
    "hit": ("hits", "░", "#1599ad"),
    "overhead": ("overhead", "▁", "#8a8a8a"),
    "free": ("free", "·", "rgba(128,128,128,.25)"),
}
"""What each share is called, its sign in a bar of text, and its colour, to be seen on white and on black."""

_ID = 11  # columns of an id on screen: ten and "…"
_ALONE = 3  # so many neighbours for one reason are still a row each
_NARROWEST = 60
_GAP = "  "
_NO_BREAK = "\N{NO-BREAK SPACE}"
_WRAPPED = ("part", "id", "why", "signals")
NUMBERS = ("tokens", "score")
"""The columns that are aligned to the right."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one part has of the budget. `portion` is 0..1 of the bar."""

    part: str
    name: str
    sign: str
    colour: str
    tokens: int
    portion: float

    @property
    def label(self) -> str:
        """The legend's words: name, tokens, per cent."""
        return f"{self.name} {self.tokens:,} ({'<1%' if self.portion < 0.01 else f'{self.portion:.0%}'})"


def shares(context: Context) -> list[Share]:
    """Every part's share, in the order of the bar; all but `free` add up to `context.tokens`.

    `overhead` is what no candidate is charged for: headings, and what primes the reply.
    """
    tokens = dict.fromkeys(_LOOKS, 0)
    for c in context.report:
        if c.included:
            tokens[c.part] += c.tokens
    rest = context.tokens - sum(tokens.values())
    # Lines that are counted one by one may come to more than the block that holds them: the hits' share gives way.
    for part in reversed(_LOOKS):
        over = min(tokens[part], max(-rest, 0))
        tokens[part] -= over
        rest += over
    tokens["overhead"] = rest
    tokens["free"] = max(context.budget - context.tokens, 0)
    whole = sum(tokens.values()) or 1
    return [Share(part, *_LOOKS[part], n, n / whole) for part, n in tokens.items()]


def cells(of: Sequence[Share], width: int) -> list[int]:
    """How many of a bar's *width* characters each share has; together all of them."""
    ends = [round(sum(s.portion for s in of[: n + 1]) * width) for n in range(len(of))]
    ends[-1] = width
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def total(context: Context) -> str:
    """`about 3,412 of 8,000 tokens`; "about" when the counter is an approximation."""
    return f"{'about ' if context.estimated else ''}{context.tokens:,} of {context.budget:,} tokens"


def details(context: Context) -> str:
    """`cacheable prefix: 2,900; safety margin 1.04`, or what there is of the two."""
    found = [f"cacheable prefix: {context.cacheable:,}"] if context.cacheable else []
    return "; ".join(found + ([f"safety margin {context.margin:.2f}"] if context.margin != 1.0 else []))


def rows(context: Context) -> list[dict[str, str]]:
    """The report as a table: each row maps column names to printable text. Without scores or signals, without the column.

    Neighbours of one part that share in or out and the reason are one row when they are more than three. A hit that is
    in keeps its own row, since its score is its reason; the others come after, by reason, since search mixes them.
    """
    ordered = sorted(
        context.report, key=lambda c: (c.score is not None, "" if c.included or c.score is None else c.reason)
    )
    found: list[dict[str, str]] = []
    for (_, _, inside, scored), same in groupby(
        ordered, key=lambda c: (c.part, c.reason, c.included, c.score is not None)
    ):
        run = list(same)
        together = len(run) > _ALONE and not (inside and scored)
        found += [_row(run)] if together else [_row([c]) for c in run]
    empty = {name for name in ("score", "signals") if not any(row[name] for row in found)}
    return [{name: cell for name, cell in row.items() if name not in empty} for row in found]


def _row(run: Sequence[Candidate]) -> dict[str, str]:
    first, alone = run[0], len(run) == 1
    best = max((c.score for c in run if c.score is not None), default=None)
    signals = sorted(first.signals.items(), key=lambda s: -s[1]) if alone else ()
    return {
        "in": "in" if first.included else "out",
        "part": first.part,
        "id": _printable(first.id) if alone else f"{len(run)} {_LOOKS[first.part][0]}",
        "tokens": f"{sum(c.tokens for c in run):,}",
        "score": "" if best is None else f"{'' if alone else '≤'}{best:.2f}",
        "why": _printable(first.reason),
        "signals": " ".join(
            f"{_printable(n)}{_NO_BREAK}{f'{v:.2f}'.lstrip('0')}" for n, v in signals if abs(v) >= 0.005
        ),
    }


def shortened(text: str, columns: int = _ID) -> str:
    """*text* in at most *columns* of the screen, cut at the end."""
    if _width(text) <= columns:
        return text
    head = ""
    for c in text:
        if _width(head + c) >= columns:
            break
        head += c
    return head + "…"


def compaction(report: CompactionReport) -> str:
    """What a fold did, in two lines at most."""
    if not report.needed:
        return f"nothing was folded: the window's {report.before:,} tokens are within its limits"
    by = f" (by {report.by})" if report.by else ""
    fates = ", ".join(f"{getattr(report, name):,} {name}" for name in ("kept", "pinned", "reachable", "lost"))
    return (
        f"{len(report.folded):,} turns folded, {report.before:,} → {report.after:,} tokens; "
        f"the summary covers {report.covered:,} turns{by}\nfacts: {fates}"
    )


_MOVED = {
    "merge": ("merged", "to merge"),
    "archive": ("archived", "to archive"),
    "warm": ("warmed up", "to warm up"),
    "delete": ("deleted", "to delete"),
}
_SHOWN_MOVES = 1000


def swept(report: SweepReport) -> list[str]:
    """What a sweep did, or would do, in a line or a few."""
    words = {what: said[report.dry_run] for what, said in _MOVED.items()}
    if report.refused is not None:
        words["delete"] = "not deleted"
    counts = [f"{report.count(what):,} {said}" for what, said in words.items()]
    lines = [f"{report.run}: {', '.join(counts)}{'' if report.dry_run else f'; {report.done:,} moved'}"]
    if report.expired:
        lines.append(
            f"{report.expired:,} keyed values {'have expired' if report.dry_run else 'had expired, and are deleted'}"
        )
    if report.refused is not None:
        lines.append(f"refused: {report.refused}")
    if not report.complete:
        lines.append("cut short, since the memory was closed; the next sweep goes on")
    return lines + [f"block {name} of the archive can't be read: {why}" for name, why in report.damaged.items()]


def move_rows(report: SweepReport) -> list[dict[str, str]]:
    """Each move as a row of a table, the first thousand of them."""
    return [_move_row(move) for move in report.moves[:_SHOWN_MOVES]]


def _move_row(move: Move) -> dict[str, str]:
    return {
        "do": move.what,
        "id": _printable(move.id),
        "part": str(move.type),
        "of": _printable(" / ".join(filter(None, (move.user_id, move.session_id)))),
        "why": _printable(f"{move.reason} ({move.rule})"),
    }


def sweep_text(report: SweepReport, *, width: int = 100) -> str:
    """What a sweep did, and every move with its reason, in lines of at most *width* columns."""
    lines = [line for text in swept(report) for line in _filled(text.split(" "), width)]
    table = [{**row, "id": shortened(row["id"]), "of": shortened(row["of"], 24)} for row in move_rows(report)]
    if table:
        table.insert(0, {name: name for name in table[0]})
        lines += ["", *_table(table, width)]
    if len(report.moves) > _SHOWN_MOVES:
        lines.append(f"and {len(report.moves) - _SHOWN_MOVES:,} more: report.moves")
    return "\n".join(lines)


def sweep_html(report: SweepReport) -> str:
    """The same as an HTML fragment for notebooks."""
    rows = move_rows(report)
    head = "".join(f'<th style="{_align(name)}">{name}</th>' for name in (rows[0] if rows else ()))
    body = "".join(
        "<tr>" + "".join(f'<td style="{_align(name)}"{_shown(name, cell)}</td>' for name, cell in row.items()) + "</tr>"
        for row in rows
    )
    said = "".join(f"<div>{escape(line)}</div>" for line in swept(report))
    return (
        f'<div style="color:inherit;font-family:sans-serif">{said}'
        f'<table style="border-collapse:collapse;font-size:.9em"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def as_text(context: Context, *, width: int = 100) -> str:
    """The budget bar, its legend and the report, in lines of at most *width* columns (60 at least)."""
    width = max(width, _NARROWEST)
    of, more = shares(context), details(context)
    legend = [f"{s.sign} {s.label}" for s in of if s.tokens]
    lines = ["".join(s.sign * n for s, n in zip(of, cells(of, width), strict=True))]
    lines += _filled(f"{total(context)}{f' ({more})' if more else ''}".split(" "), width)
    lines += _filled(legend, width, gap=_GAP)
    table = [{**row, "id": shortened(row["id"])} for row in rows(context)]
    if table:
        table.insert(0, {name: name for name in table[0]})
        lines += ["", *_table(table, width)]
    return "\n".join(lines).replace(_NO_BREAK, " ")


def _table(table: Sequence[dict[str, str]], width: int) -> list[str]:
    """Lines of *table*. The widest columns of words are narrowed until it fits; their cells go on in the next line."""
    widths = {name: min(max(_width(row[name]) for row in table), width) for name in table[0]}
    while sum(widths.values()) + len(_GAP) * (len(widths) - 1) > width:
        widths[max((name for name in widths if name in _WRAPPED), key=lambda name: widths[name])] -= 1
    lines = []
    for row in table:
        wrapped = {name: _filled(cell.split(" "), widths[name]) for name, cell in row.items()}
        if len(wrapped.get("signals", ())) > 1:  # one line of them: the largest, which come first, say most
            wrapped["signals"] = [_filled(row["signals"].split(" "), widths["signals"] - 2)[0] + " …"]
        for n in range(max(map(len, wrapped.values()))):
            line = []
            for name, pieces in wrapped.items():
                piece = pieces[n] if n < len(pieces) else ""
                pad = " " * (widths[name] - _width(piece))
                line.append(pad + piece if name in NUMBERS else piece + pad)
            lines.append(_GAP.join(line).rstrip())
    return lines


def _filled(pieces: Iterable[str], columns: int, *, gap: str = " ") -> list[str]:
    """*pieces* side by side, in lines of at most *columns*; one that is longer than a line is broken."""
    lines = [""]
    for piece in pieces:
        joined = f"{lines[-1]}{gap}{piece}" if lines[-1] else piece
        if _width(joined) <= columns:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for c in piece:
            if _width(lines[-1] + c) > columns:
                lines.append("")
            lines[-1] += c
    return lines


def _width(text: str) -> int:
    """Columns of the screen: two for a wide character, none for a mark on the one before."""
    if text.isascii():
        return len(text)
    seen = [c for c in text if unicodedata.category(c) not in ("Mn", "Me")]
    return len(seen) + sum(unicodedata.east_asian_width(c) in "WF" for c in seen)


def _printable(text: str) -> str:
    """*text* with line breaks, controls and invisible characters escaped as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reindexing(report: ReindexReport) -> str:
    """What `str()` of a reindex report shows."""
    if report.previous is None:
        return f"{report.model}: {report.entries:,} entries"
    lines = [
        f"{report.previous} -> {report.model}: {report.entries:,} entries, {report.embedded:,} texts embedded now"
        + (f", {report.failed:,} could not be" if report.failed else "")
    ]
    if report.overlap is not None:
        lines.append(
            f"of the first ten hits for {len(report.samples):,} samples, {report.overlap:.0%} are the same with both models"
        )
    if report.answered_before is not None and report.answered_after is not None:
        lines.append(
            f"the next turn of a sample is among its hits for {report.answered_before:.0%} before, "
            f"{report.answered_after:.0%} after"
        )
    lines += [f"  {share:4.0%}  {_printable(text)[:80]}" for text, share in sorted(report.samples, key=_least)[:3]]
    lines.append("switched" if report.switched else "not switched: the model before is in use")
    return "\n".join(lines)


def _least(sample: tuple[str, float]) -> float:
    return sample[1]


def as_html(context: Context) -> str:
    """The same as an HTML fragment for notebooks: no ids, no scripts, inline styles, for light and dark pages."""
    filled, more, found = [s for s in shares(context) if s.tokens], details(context), rows(context)
    bar = "".join(
        f'<div style="width:{s.portion:.3%};background:{s.colour}" title="{escape(s.label)}"></div>' for s in filled
    )
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="display:inline-block;width:.8em;height:.8em;'
        f'background:{s.colour}"></span> {escape(s.label)}</span>'
        for s in filled
    )
    table = ""
    if found:
        head = "".join(f'<th style="{_align(name)}">{name}</th>' for name in found[0])
        body = "".join(
            f'<tr style="opacity:{1 if row["in"] == "in" else 0.6}">'
            + "".join(f'<td style="{_align(name)}"{_shown(name, cell)}</td>' for name, cell in row.items())
            + "</tr>"
            for row in found
        )
        table = (
            '<table style="border-collapse:collapse;margin:.6em 0 0;font-size:.9em">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    return (
        '<div style="color:inherit;font-family:sans-serif">'
        f'<div style="display:flex;height:1em;max-width:60em;overflow:hidden;border-radius:.2em">{bar}</div>'
        f"<div><b>{total(context)}</b>{f' ({more})' if more else ''}</div><div>{legend}</div>{table}</div>"
    )


def _align(name: str) -> str:
    return f"text-align:{'right' if name in NUMBERS else 'left'};padding:.1em .8em .1em 0;vertical-align:top"


def _shown(name: str, cell: str) -> str:
    return f' title="{escape(cell)}">{escape(shortened(cell))}' if name == "id" else f">{escape(cell)}"


__all__ = [
    "NUMBERS",
    "Share",
    "as_html",
    "as_text",
    "cells",
    "compaction",
    "details",
    "move_rows",
    "reindexing",
    "rows",
    "shares",
    "shortened",
    "sweep_html",
    "sweep_text",
    "swept",
    "total",
]
