"""How a context reads: the bar adds up, columns line up, nothing stored breaks the page."""

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from neuralflow_memory import Message
from neuralflow_memory._report import as_html, as_text, cells, details, rows, shares, shortened, total
from neuralflow_memory.models.tokens import ApproximateCounter
from neuralflow_memory.types import Candidate, Context

PARTS = get_args(get_type_hints(Candidate)["part"])
HOSTILE = st.one_of(
    st.sampled_from(
        ["<script>alert(1)</script>", '"><img src=x onerror=x>', "a\nb\tc\x1b[2J\x9b\u202e\u200b", "記憶" * 40]
    ),
    st.text(st.characters(max_codepoint=0x2FF), max_size=80),
    st.text("ab 東京e\u0301ü한글", max_size=120),
)
CANDIDATES = st.builds(
    Candidate,
    st.sampled_from(PARTS),
    HOSTILE,
    st.integers(0, 10**6),
    st.booleans(),
    HOSTILE | st.just("recent"),
    st.none() | st.floats(0, 1),
    st.dictionaries(
        st.sampled_from(["dense", "lexical", "session", "statement"]) | HOSTILE, st.floats(-1, 1), max_size=5
    ),
)
CONTEXTS = st.builds(
    Context,
    st.just(()),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.lists(CANDIDATES, max_size=12).map(tuple),
    st.booleans(),
    st.sampled_from([1.0, 1.04, 2.5]),
    st.sampled_from([0, 0, 2900]),
)


class Page(HTMLParser):
    """What a browser makes of a fragment; fails where a tag is not closed in its place."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], set(), [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def turn(n, *, included=True, reason="recent", id="turn"):
    return Candidate("turn", f"{id}-{n}", 70, included, reason)


def hit(n, *, included=True, reason="found by search", score=0.5):
    return Candidate("hit", f"hit-{n}", 40, included, reason, score, {"session": 0.1, "dense": score - 0.1})


def of(*report, budget=8000, **more):
    """A context with that report; it costs what is in, and three tokens of overhead."""
    return Context((), 3 + sum(c.tokens for c in report if c.included), budget, report, **more)


def table(text):
    """The lines of the report's table, its header first."""
    return text.split("\n\n")[1].splitlines()


@pytest.fixture
def real(chat):
    """A context of a chat that was folded, has too many turns for its budget, and hits."""
    chat.add([Message("system", "You are a patient gardener.")])
    for n in range(40):
        chat.add([Message("user", f"Bed {n}: shall the beans go by the wall?"), Message("assistant", f"Bed {n}: yes.")])
    chat.compact(max_tokens=600)
    return chat.context("beans by the wall", max_tokens=800)


def test_a_real_context_reads_whole(real):
    """Tokens as stated; every hit that is in with its score and signals; every candidate counted in some row."""
    text = str(real)
    assert text == as_text(real)
    assert total(real) in text
    assert f"{real.tokens:,} of 800 tokens" in text
    quoted = [c for c in real.report if c.part == "hit" and c.included]
    assert quoted
    for c in quoted:
        (line,) = [line for line in table(text) if line.startswith("in") and shortened(c.id) in line and "hit" in line]
        assert f"{c.score:.2f}" in line
        assert re.search(r"(dense|near|lexical|around) \.\d\d", line)
    counted = 0
    for row in rows(real):
        group = re.fullmatch(r"(\d+) [a-z]+", row["id"])
        counted += int(group[1]) if group else 1
    assert counted == len(real.report) > len(rows(real))
    spent = {s.part: s.tokens for s in shares(real)}
    assert min(spent["system"], spent["summary"], spent["turn"], spent["hit"], spent["overhead"]) > 0
    assert "\N{NO-BREAK SPACE}" not in text


def test_a_real_context_reads_whole_in_a_notebook(real):
    """The same rows, and the whole of each id when one points at it."""
    html = real._repr_html_()
    assert html == as_html(real)
    page = Page(html)
    assert total(real) in page.text
    titles = {value for name, value in page.attributes if name == "title"}
    for row in rows(real):
        assert row["id"] in titles
        assert row["why"] in page.words
    for c in real.report:
        if c.part == "hit" and c.included:
            assert f"{c.score:.2f}" in page.words


def test_every_part_has_a_look():
    """What a report may name can be shown: each part with a name, a sign and a colour of its own."""
    found = shares(of(*(Candidate(part, "x", 10, included=True, reason="x") for part in PARTS)))
    assert [s.part for s in found if s.tokens == 10] == list(PARTS)
    for distinct in ("name", "sign", "colour"):
        assert len({getattr(s, distinct) for s in found}) == len(found)


@settings(deadline=None)
@given(CONTEXTS, st.integers(60, 180))
def test_any_context_fits_the_width(context, width):
    """No line is wider than asked, as an independent table of character widths sees it; nothing can drive the terminal."""
    lines = as_text(context, width=width).split("\n")
    assert max(map(cell_len, lines)) <= width
    assert len(lines[0]) == width
    assert all(c.isprintable() for line in lines for c in line)


@settings(deadline=None)
@given(CONTEXTS, st.integers(1, 200))
def test_the_bar_adds_up(context, width):
    """All shares but what is free are the context's tokens; a bar's characters are its width."""
    found = shares(context)
    assert all(s.tokens >= 0 for s in found)
    assert sum(s.tokens for s in found if s.part != "free") == context.tokens
    assert sum(s.tokens for s in found) == max(context.budget, context.tokens)
    assert sum(cells(found, width)) == width
    assert min(cells(found, width)) >= 0


@settings(deadline=None)
@given(CONTEXTS)
def test_any_context_is_a_balanced_page(context):
    """Whatever ids and reasons hold, the fragment has our tags only, inline styles, no ids, and a bar of 100 per cent."""
    html = as_html(context)
    page = Page(html)
    assert page.tags <= {"div", "span", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert {name for name, _ in page.attributes} <= {"style", "title"}
    widths = [float(w) for w in re.findall(r'<div style="width:([\d.]+)%', html)]
    assert not widths or sum(widths) == pytest.approx(100, abs=0.01)


def test_a_stored_script_is_text():
    """An id or a reason that is markup is shown as it is written, in the cell and in its title."""
    context = of(
        Candidate("hit", "<script>alert(1)</script>", 5, included=True, reason='"><b onclick=x>&amp;', score=1.0)
    )
    html = as_html(context)
    assert "<script" not in html
    page = Page(html)
    assert ("title", "<script>alert(1)</script>") in page.attributes
    assert "<script>al…" in page.words
    assert '"><b onclick=x>&amp;' in page.words


def test_columns_line_up_under_wide_characters():
    """Chinese, combining marks and emoji in ids and reasons move no column."""
    ids = ["plain", "記憶記憶記憶記憶", "ne\u0301e", "한글", "🙂🙂", "ｗｉｄｅ"]
    report = [Candidate("hit", i, 5, included=True, reason=f"{i}!", score=0.5, signals={"dense": 0.5}) for i in ids]
    lines = table(as_text(of(*report)))
    head = lines[0]
    assert head.split() == ["in", "part", "id", "tokens", "score", "why", "signals"]
    assert len(lines) == 1 + len(ids)
    for line, own_id in zip(lines[1:], ids, strict=True):
        before, _, after = line.rpartition(f"{own_id}!")
        assert cell_len(before) == head.index("why")
        assert cell_len(before) + cell_len(f"{own_id}!{after}") == head.index("signals") + len("dense .50")
        assert cell_len(line[: line.index("0.50")].rstrip()) == head.index("tokens") + len("tokens")
    assert "記憶記憶記…" in lines[2]


def test_line_breaks_and_controls_are_shown_escaped():
    """One candidate stays one row, and what hides or moves the cursor is to be seen."""
    text = as_text(of(Candidate("turn", "a\nb\x1b", 5, included=True, reason="one\r\ntwo\u202e")))
    assert len(table(text)) == 2
    assert r"a\nb\x1b" in text
    assert r"one\r\ntwo\u202e" in text


def test_a_long_reason_goes_on_in_the_next_line():
    """Nothing of a reason is lost in a narrow table, and only words are broken that do not fit."""
    reason = "a tool result whose call is not in the window, or has a result already " + "x" * 90
    text = as_text(of(turn(1, included=False, reason=reason)), width=60)
    column = table(text)[0].index("why")
    said = [line[column:].strip() for line in table(text)[1:]]
    assert "".join(said).replace(" ", "") == reason.replace(" ", "")
    assert "or has a result already" in " ".join(said)


def test_neighbours_for_one_reason_are_one_row():
    """From four on; another reason, another part or the other side begins a row."""
    old = [turn(n, included=False, reason="older than what fits") for n in range(12)]
    late = [turn(n, id="late") for n in range(3)]
    text = as_text(of(*old, *late, turn(9, reason="the newest user turn")))
    assert re.search(r"out +turn +12 turns +840 +older than what fits", text)
    assert len(table(text)) == 1 + 1 + 3 + 1
    again = rows(of(*(turn(n) for n in range(4)), turn(9, included=False, reason="cut"), *(turn(n) for n in range(4))))
    assert [row["id"] for row in again] == ["4 turns", "turn-9", "4 turns"]


def test_hits_keep_their_scores():
    """Each hit that is in is a row; those left out are told by reason, with the best score that was not enough."""
    mixed = [
        hit(n, included=False, reason=("no room left", "sent as a turn")[n % 2], score=0.8 - n / 100) for n in range(10)
    ]
    found = rows(of(*itertools.chain(*zip((hit(n, score=0.9) for n in range(10)), mixed, strict=True))))
    assert [row["id"] for row in found] == [f"hit-{n}" for n in range(10)] + ["5 hits", "5 hits"]
    assert {row["score"] for row in found[:10]} == {"0.90"}
    assert [(row["why"], row["score"], row["tokens"]) for row in found[10:]] == [
        ("no room left", "≤0.80", "200"),
        ("sent as a turn", "≤0.79", "200"),
    ]


def test_signals_are_compact_and_the_largest_first():
    """`dense .61 lexical .20`: what adds nothing is left out; where all do not fit, the largest stay, in one line."""
    signals = {"lexical": 0.2, "session": 0.001, "dense": 0.61, "length": 0.05, "statement": 0.04, "speaker": 0.03}
    context = of(replace(hit(1), signals=signals))
    assert table(as_text(context, width=140))[1].endswith("dense .61 lexical .20 length .05 statement .04 speaker .03")
    (_, narrow) = table(as_text(context, width=80))
    assert narrow.endswith("dense .61 lexical .20 …")
    (row,) = rows(context)
    assert "session" not in row["signals"]


def test_columns_without_a_score_are_left_out():
    """A chat without a search has no empty columns."""
    assert table(as_text(of(turn(1))))[0].split() == ["in", "part", "id", "tokens", "why"]
    assert "signals" not in as_html(of(turn(1)))


def test_an_empty_context_is_a_bar(memory):
    """Nothing said yet: a bar that is free, and no table."""
    empty = memory.session("nobody", user_id="ada").context()
    assert empty.report == ()
    assert len(as_text(empty).splitlines()) == 3
    assert "·" * 99 in as_text(empty)
    assert "table" not in Page(as_html(empty)).tags
    nothing = Context((), 0, 0, ())
    assert as_text(nothing).splitlines()[:2] == ["·" * 100, "0 of 0 tokens"]
    assert "0 of 0 tokens" in Page(as_html(nothing)).text


def test_a_fold_is_told_in_two_lines(opened):
    """What left the window, what the summary covers, and what became of the facts."""
    chat = opened(embedder="none", pruning={"summarization_threshold": 100}).session("chat")
    assert str(chat.compact()) == "nothing was folded: the window's 0 tokens are within its limits"
    chat.add([f"Turn {n} about sailing" for n in range(12)])
    report = chat.compact(max_tokens=10)
    turns = len(report.folded)
    first, second = str(report).splitlines()
    assert first == (
        f"{turns} turns folded, {report.before} → {report.after} tokens; "
        f"the summary covers {turns} turns (by extractive)"
    )
    assert (
        second == f"facts: {report.kept} kept, {report.pinned} pinned, {report.reachable} reachable, {report.lost} lost"
    )


def test_an_estimate_says_about(opened):
    """A counter that approximates says so wherever the total stands; an exact one does not."""
    exact, estimated = of(turn(1)), of(turn(1), estimated=True)
    assert as_text(estimated).splitlines()[1] == "about 73 of 8,000 tokens"
    assert "about 73 of 8,000 tokens" in Page(as_html(estimated)).text
    assert "about" not in as_text(exact) + as_html(exact)
    chat = opened(token_counter=ApproximateCounter()).session("chat")
    chat.add("The beans go by the south wall.")
    assert chat.context().estimated
    assert "about " in str(chat.context())


def test_prefix_and_margin_are_told_when_there_are_any():
    """What a prompt cache can reuse, and the factor that `report_usage` taught."""
    both = of(turn(1), margin=1.04, cacheable=2900)
    assert "73 of 8,000 tokens (cacheable prefix: 2,900; safety margin 1.04)" in as_text(both)
    assert "(cacheable prefix: 2,900; safety margin 1.04)" in Page(as_html(both)).text
    assert details(replace(both, margin=1.0)) == "cacheable prefix: 2,900"
    assert details(replace(both, cacheable=0)) == "safety margin 1.04"
    assert "(" not in as_text(of(turn(1))).splitlines()[1]


def test_the_legend_names_what_is_there():
    """Each share with its sign, tokens and per cent; a share of nothing is not named."""
    context = Context((), 2000, 8000, (turn(1), Candidate("summary", "s", 1900, included=True, reason="x")))
    assert as_text(context).splitlines()[2] == (
        "▓ summary 1,900 (24%)  █ turns 70 (<1%)  ▁ overhead 30 (<1%)  · free 6,000 (75%)"
    )


def test_lines_that_cost_less_together_add_up():
    """Hits are counted one by one; where the block that holds them costs less, their share gives way, not the total."""
    context = Context((), 100, 200, (turn(1), *(hit(n) for n in range(2))))
    assert {s.part: s.tokens for s in shares(context) if s.tokens} == {"turn": 70, "hit": 30, "free": 100}
