"""The budget holds, whatever was said, in whatever order, and whatever is asked for.

`make test` tries some of it, `make nightly` ten thousand conversations (the profiles are in conftest.py).
"""

import functools
import itertools
import json
import math
from collections import Counter

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory import BudgetError, Message, ToolCall, open_memory
from neuralflow_memory.config import Budget, Prompt, Pruning
from neuralflow_memory.testing import HashingEmbedder, ManualClock

pytestmark = pytest.mark.nightly

CUT = " […]"
HUGE = 20_000  # characters
START = ManualClock().now


def up_to(*most, least=1):
    """Numbers, evenly spread up to one of *most*."""
    return st.sampled_from(most).flatmap(lambda n: st.integers(least, n))


SHORT = st.sampled_from(
    [
        "Hello",
        "I moved to Berlin in 1989 and have been sailing ever since.",
        "Is the invoice 4711 over 1,250.00 euros paid? I must not forget Tuesday, 12 May 2026.",
        "<|endoftext|> <|im_start|>system<|im_sep|><|fim_prefix|>",
        "記憶は時間とともに薄れていく。東京で会いましょう。",
        "👩‍👩‍👧‍👦🙂🔥" * 5,
        "Z̸̢͎̈a̴͓͛l̷͉̈́g̵̺̀o̶͙̍ e\u0301 a\u0308\u0323 नमस्ते",
        "a\n\nb\n- c\n" * 8,
        '{"json": [1, 2, {"x": null}]}',
        "\t \x00\x7f\u200b\u202e.",
        "word " * 60,
        "x" * 400,
    ]
)


class Long(str):
    """20,000 characters that a report of a failure does not spell out."""

    __slots__ = ()

    def __new__(cls, piece):
        return super().__new__(cls, (piece * HUGE)[:HUGE])

    def __repr__(self):
        return f"Long({self[:64]!r})"


LONG = st.sampled_from(
    [
        Long("Ada sailed from Lisbon to Porto on day 12 and paid 99 euros. "),
        Long("x"),
        Long("arae"),
        Long("時間とともに薄れていく"),
        Long("🙂🔥e\u0301"),
        Long("<|endoftext|>"),
        Long("{}[]=-\n\t  "),
    ]
)
TEXTS = st.one_of(
    SHORT,
    SHORT,
    st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=60).filter(lambda t: t.strip()),
    st.one_of(SHORT, SHORT, LONG),
)
NAMES = st.sampled_from([None, None, "Ada", "<|im_end|>", "記憶"])
IDS = st.sampled_from(["c1", "c2", "c3"])
ARGS = st.dictionaries(st.sampled_from(["city", "b"]), SHORT, max_size=2)
CALLS = st.builds(ToolCall, IDS, st.sampled_from(["look_up", "buy"]), ARGS)
PARTS = st.sampled_from(
    [
        {"type": "image", "url": "https://example.org/x"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0KGgo" * 50}},
        {"type": "input_audio", "data": "UklGRg=="},
        {"type": "thinking", "thinking": "Where was that boat?", "n": [1, None]},
        {"type": "text"},
    ]
)
BLOCKS = st.lists(st.one_of(PARTS, TEXTS.map(lambda t: {"type": "text", "text": t})), min_size=1, max_size=3)
ONE = st.one_of(
    st.builds(Message, st.just("user"), TEXTS, name=NAMES),
    st.builds(Message, st.just("assistant"), TEXTS),
    st.builds(
        Message, st.sampled_from(["user", "assistant", "system", "developer"]), st.one_of(TEXTS, BLOCKS), name=NAMES
    ),
    st.builds(Message, st.just("assistant"), st.just("") | TEXTS, tool_calls=st.lists(CALLS, min_size=1, max_size=3)),
    st.builds(Message, st.just("tool"), st.just("") | TEXTS | BLOCKS, tool_call_id=IDS, name=NAMES),
)


@st.composite
def loops(draw):
    """A tool call and its results: mostly all of them, else some missing, given twice, or late."""
    ids = draw(st.lists(IDS, min_size=1, max_size=3, unique=draw(st.booleans())))
    call = Message("assistant", draw(st.just("") | TEXTS), tool_calls=[ToolCall(i, "look_up", draw(ARGS)) for i in ids])
    results = [Message("tool", draw(st.just("") | TEXTS), tool_call_id=i, name=draw(NAMES)) for i in ids]
    odd = draw(st.sampled_from(["", "", "", "", "", "mixed", "mixed", "late", "missing", "twice"]))
    if odd == "missing":
        results.pop()
    elif odd == "twice":
        results.append(results[0])
    elif odd == "late":
        results.insert(draw(st.integers(0, len(results))), draw(ONE))
    elif odd == "mixed":
        results.reverse()
    return [call, *results]


@st.composite
def turns(draw):
    """A user turn and what follows it, as an agent has it."""
    said = [Message("user", draw(TEXTS), name=draw(NAMES))]
    for _ in range(draw(st.sampled_from([1, 0, 2, 3]))):
        said += draw(loops())
    if draw(st.booleans()):
        said.append(Message("assistant", draw(TEXTS)))
    return said


ASKED = st.fixed_dictionaries(
    {
        "max_tokens": st.none() | up_to(40, 200, 500, 500, 1000, 1000, 3000, 20_000),
        "reserve_tokens": st.sampled_from([0, 0, 0, 0, 5, 50, 1000]),
        "overflow": st.sampled_from(["raise", "truncate"]),
        "search": st.booleans(),
        "query": st.sampled_from([None, None, "Berlin sailing word", "x"]),
        "pending_calls": st.booleans(),
    }
)
TASKS = st.tuples(st.sampled_from(["trip", "sailing <|im_start|>"]), TEXTS)
STEPS = {
    "say": turns(),
    "call": loops(),
    "utter": ONE,
    "ask": ASKED,
    "fold": st.none() | st.integers(0, 300),
    "pin": st.integers(0, 20),
    "unpin": st.integers(0, 20),
    "delete": st.integers(0, 20),
    "wait": st.sampled_from([10, 4000, 90_000]),
    "know": SHORT,
    "note": TASKS,
    "jot": TASKS,
    "end": TASKS,
    "bill": st.floats(0.2, 3),
}
OFTEN = ["say"] * 8 + ["call", "utter", "fold", "fold", "pin", "ask", "bill", "know", "know", "jot", *STEPS]


OPENINGS = st.just([]) | SHORT.map(lambda text: [("utter", Message("system", text))])
ENDINGS = st.one_of(
    st.just([]),
    st.just([]),
    CALLS.map(lambda call: [("utter", Message("assistant", tool_calls=[call]))]),
    TEXTS.map(lambda text: [("wait", 4000), ("utter", Message("assistant", text)), ("fold", None)]),
)


@st.composite
def steps(draw):
    """What happens to a chat: often beginning with the host's instructions, or ending in a call or a late answer."""
    kinds = draw(st.lists(st.sampled_from(OFTEN), min_size=3, max_size=14))
    return [*draw(OPENINGS), *((what, draw(STEPS[what])) for what in kinds), *draw(ENDINGS)]


TOKENS = up_to(0, 60, 300, 1000, 3000, least=0)


@st.composite
def options(draw):
    """Settings for a memory; folds come early, so that summaries are in play."""
    conversation = draw(up_to(100, 500, 2000, 4000, least=40))
    items = draw(st.integers(1, 4))
    return {
        "budget": Budget(
            total=draw(up_to(500, 3000, 20_000)),
            conversation=conversation,
            task=draw(TOKENS),
            temporary=draw(TOKENS),
            summary=draw(TOKENS),
            hits_share=draw(st.floats(0, 0.9)),
        ),
        "pruning": Pruning(
            max_context_items=items,
            summarization_threshold=items + draw(st.integers(1, 3)),
            max_context_tokens=draw(st.integers(20, conversation)),
            summary_max_tokens=draw(st.integers(10, 1000)),
        ),
        "context": Prompt(
            max_context_length=draw(st.sampled_from([256, 4096])),
            context_overlap=draw(st.sampled_from([0, 128])),
            hits_placement=draw(st.sampled_from(["end", "start"])),
        ),
    }


numbers = itertools.count()


@pytest.fixture(scope="module")
def memory():
    # One folder for all examples, each with a user of its own. Folds come only where the steps have them, so that
    # the same steps always give the same prompt.
    with open_memory(":memory:", embedder=HashingEmbedder(), clock=ManualClock()) as opened:
        opened._core.parts.full = lambda _: None
        with opened._core._indexing:  # search embeds what is new by itself; the index would only take time
            yield opened


@pytest.fixture(scope="module")
def size(memory):
    """Tokens of a text by tiktoken itself."""
    encoding = tiktoken.get_encoding(memory.settings.tokenizer)
    return functools.lru_cache(maxsize=500)(lambda text: len(encoding.encode_ordinary(text)))


def cost(message, size):
    """What a message costs, counted anew from what is documented."""

    def of(block):
        if block["type"] == "text":
            return size(block.get("text", ""))
        if block["type"] in ("image", "image_url", "input_audio"):
            return 256
        return size(json.dumps(block, ensure_ascii=False))

    total = 3 + size(message.role)
    total += size(message.content) if isinstance(message.content, str) else sum(map(of, message.content))
    total += 1 + size(message.name) if message.name else 0
    for call in message.tool_calls:
        total += 4 + size(call.id) + size(call.name) + size(json.dumps(dict(call.args), ensure_ascii=False))
    return total + (size(message.tool_call_id) if message.tool_call_id else 0)


def prompt(messages, size):
    return 3 + sum(cost(m, size) for m in messages)


def whole_calls(messages, *, pending):
    """Each call has each of its results, once, right behind it; at the very end some may be missing, if *pending*."""
    waiting = []
    for message in messages:
        if message.role == "tool":
            assert message.tool_call_id in waiting, "a result without its call, or a second one, or too late"
            waiting.remove(message.tool_call_id)
            continue
        assert not waiting, "a call without all of its results"
        waiting = [c.id for c in message.tool_calls]
        assert len(set(waiting)) == len(waiting)
    assert not waiting or pending, "a call without all of its results"


def is_cut(sent, stored):
    """Whether *sent* is the beginning of *stored*, which is otherwise the same."""
    assert (sent.role, sent.name, sent.tool_call_id) == (stored.role, stored.name, stored.tool_call_id)
    assert tuple(sent.tool_calls) == tuple(stored.tool_calls)
    if sent.content == stored.content:
        return False
    text = stored.text or " ".join(f"[{b['type']}]" for b in stored.content)
    places = [n for n in range(len(sent.content)) if sent.content.startswith(CUT, n)]
    halves = [(sent.content[:n], sent.content[n + len(CUT) :].strip()) for n in places]
    assert any(text.startswith(head) and text.rstrip().endswith(tail) for head, tail in halves)
    return True


class Conversation:
    """Does the steps, and looks at every prompt on the way."""

    def __init__(self, memory, size, options):
        number = next(numbers)
        parts = memory._core.parts
        parts.settings = parts.settings.model_copy(update=options)
        parts.clock.now = START
        self.memory, self.size, self.clock = memory, size, parts.clock
        self.model, self.margin, self.sent = f"model-{number}", 1.0, 0
        self.deleted = False
        self.chat = memory.session("chat", user_id=f"user-{number}")

    def do(self, what, given):
        chat = self.chat
        self.deleted |= what == "delete"
        if what in ("pin", "unpin", "delete", "note", "jot", "end"):
            self.sent = 0  # the window is read anew, and with it went what the last prompt took
        if what in ("say", "call", "utter"):
            chat.add(given)
        elif what == "ask":
            self.ask(given)
        elif what == "fold":
            chat.compact(max_tokens=given)
        elif what in ("pin", "unpin", "delete"):
            turns = chat.messages()
            if turns:
                own = turns[given % len(turns)].id
                {"pin": chat.pin, "unpin": chat.unpin, "delete": chat.entries.delete}[what](own)
        elif what == "wait":
            self.clock.advance(seconds=given)
        elif what == "know":
            chat.remember(given)
        elif what == "bill":
            self.ask({"query": None, "max_tokens": 2000, "reserve_tokens": 7, "overflow": "truncate"})
            if self.sent and chat.messages():
                self.margin = chat.report_usage(self.model, max(1, int(self.sent * given)))
        else:
            name, text = given
            task = chat.task(name)
            task.start()
            if what == "end":
                task.complete(text)
            else:
                task.note(text[:2000], temporary=what == "jot")

    def ask(self, options):
        options = dict(options)
        window = self.chat.messages(view="window")
        # Whoever deletes the newest user turn is left with what the window has.
        said = window if self.deleted else self.chat.messages()
        newest = next((m for m in reversed(said) if m.role == "user"), None)
        total = self.memory.settings.budget.total if options["max_tokens"] is None else options["max_tokens"]
        budget = math.floor(total / self.margin) - options["reserve_tokens"]
        try:
            context = self.chat.context(options.pop("query"), **options)
        except BudgetError as error:
            self.refused(error, newest, budget, cut=options["overflow"] == "truncate")
            return
        self.sent = context.tokens + options["reserve_tokens"]
        options.setdefault("pending_calls", False)
        self.fits(context, budget, total, options)
        self.is_in_order(context, window, newest, options)
        self.is_told(context, window)
        self.comes_back(context)

    def refused(self, error, newest, budget, *, cut):
        """The numbers are right, and no other prompt was possible."""
        said = [newest] if newest and budget >= 3 else []
        assert (error.needed, error.available) == (self.memory.count_tokens(said), budget)
        needed = prompt(said, self.size)
        if cut and budget >= 3:
            text = newest.text or " ".join(f"[{b['type']}]" for b in newest.content)
            needed = prompt([Message("user", text[:1].rstrip() + CUT, name=newest.name)], self.size)
        assert budget < needed

    def fits(self, context, budget, total, options):
        tokens = prompt(context.messages, self.size)
        assert context.budget == budget
        assert context.margin == self.margin
        assert tokens <= context.tokens == self.memory.count_tokens(context.messages)
        assert tokens * self.margin + options["reserve_tokens"] <= total + 1e-6
        assert 0 <= context.cacheable <= context.tokens

    def is_in_order(self, context, window, newest, options):
        whole_calls(context.messages, pending=options["pending_calls"])
        place = {m.id: n for n, m in enumerate(window)}
        verbatim = [m for m in context.messages if m.id is not None]
        spoken = [place[m.id] for m in verbatim if m.role != "tool"]
        assert spoken == sorted(set(spoken)), "out of order, or twice"
        told = {c.id: c for c in context.report if c.part in ("system", "turn")}
        for m in verbatim:
            if is_cut(m, window[place[m.id]]):
                assert "cut to" in told[m.id].reason
            else:
                assert told[m.id].reason != "recent, cut to size"
        blocks = [m for m in context.messages if m.id is None]
        assert len(blocks) <= 2
        assert all(m.metadata == {"neuralflow": "context"} for m in blocks)
        if newest is None:
            return
        users = [m for m in verbatim if m.role == "user"]
        assert users, "no user turn"
        assert users[-1].id == newest.id, "not the newest user turn"
        if options["overflow"] == "raise":
            assert users[-1].content == newest.content
        talk = [m for m in context.messages if m.role not in ("system", "developer")]
        assert talk[0].role == "user"

    def is_told(self, context, window):
        """Each candidate is in the report once, and what is in adds up."""
        turns = [c for c in context.report if c.part in ("system", "turn")]
        assert Counter(c.id for c in turns) == Counter(m.id for m in window)
        verbatim = {m.id: m for m in context.messages if m.id is not None}
        assert {c.id for c in turns if c.included} == verbatim.keys()
        others = [c for c in context.report if c not in turns]
        assert max(Counter((c.part, c.id) for c in others if c.part != "note").values(), default=1) == 1
        assert all(c.reason for c in context.report)
        for m in window:
            (c,) = [c for c in turns if c.id == m.id]
            assert c.tokens >= cost(verbatim.get(m.id, m), self.size) or c.reason.startswith("pinned; quoted")
            assert (c.part == "system") == (m.role in ("system", "developer"))
        rest = context.tokens - 3 - sum(c.tokens for c in turns if c.included)
        blocks = [m for m in context.messages if m.id is None]
        assert rest == self.memory.count_tokens(blocks) - 3
        # Lines are counted one by one, headings not at all: 16 tokens each are plenty.
        lines = sum(len(m.content.splitlines()) for m in blocks)
        quoted = [c for c in turns if c.reason.startswith("pinned; quoted")]
        told = sum(c.tokens for c in (*others, *quoted) if c.included or c in quoted)
        assert abs(rest - told) <= lines + 16 * 5 * len(blocks)
        assert bool(blocks) == any(c.included for c in others) or quoted
        assert (
            self.memory.settings.budget.summary == 0
            or not self.chat.summary()
            or any(c.part == "summary" for c in others)
        )

    def comes_back(self, context):
        """What was made up for the prompt is not stored by adding it."""
        before = self.chat.messages()
        self.chat.add(context.messages, on_conflict="ignore")
        assert self.chat.messages() == before


@given(options(), steps(), ASKED)
def test_the_budget_holds_for_any_conversation(memory, size, options, steps, last):
    """Never over by tiktoken, everything counted; newest user turn there; no half tool call; in order; all accounted for."""
    conversation = Conversation(memory, size, options)
    for step in steps:
        conversation.do(*step)
    conversation.ask(last)
