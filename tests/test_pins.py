"""Pinned turns stay in the window whatever is folded, whole and in their place, and in every prompt that has room."""

import threading

import pytest
from conftest import SMALL, index_keys, live_keys, texts
from test_folding import APART, Quoting, said, summaries

from neuralflow_memory import AccessDenied, InputError, Message, NotFound, ToolCall


def grown(chat, ids):
    """Add a turn and its answer for each id, and let each fold that is due happen before the next."""
    for own in ids:
        chat.add([Message("user", f"Turn {own}", id=own), Message("assistant", f"Answer {own}", id=f"{own}!")])
        chat.memory.flush()


def names(first, last):
    return [f"t{n}" for n in range(first, last)]


def asked(chat, own, *, city="Oslo"):
    """A question, two tool calls side by side, their results and the answer."""
    calls = [ToolCall(f"{own}-now", "weather", {"city": city}), ToolCall(f"{own}-later", "forecast", {"city": city})]
    chat.add(
        [
            Message("user", f"Weather in {city}?", id=own),
            Message("assistant", "", id=f"{own}-call", tool_calls=calls),
            Message("tool", "Rain, 4 degrees", id=f"{own}-rain", tool_call_id=f"{own}-now"),
            Message("tool", "Snow on Friday", id=f"{own}-snow", tool_call_id=f"{own}-later"),
            Message("assistant", "Take a coat.", id=f"{own}-answer"),
        ]
    )
    chat.memory.flush()
    return [own, f"{own}-call", f"{own}-rain", f"{own}-snow"]


def window(chat):
    return [m.id for m in chat.messages(view="window")]


def pinned(chat):
    return [e.id for e in chat.entries.list(within="session", types=["short_term"]) if e.pinned]


def all_is_there(chat):
    """The window is what no segment covers and what is pinned, in order, nothing twice."""
    covered = {i for s in summaries(chat, kind="segment") for i in s.sources}
    stays = {*pinned(chat)}
    assert window(chat) == [m.id for m in chat.messages() if m.id not in covered or m.id in stays]


@pytest.fixture
def memory(opened):
    return opened(pruning=SMALL, summarizer=Quoting(), context=APART)


# -- the window --


def test_a_pinned_turn_stays_through_many_folds(memory, chat):
    """Alone, where it was; what was said around it is folded as ever, its answer too."""
    grown(chat, names(0, 3))
    chat.pin("t1")
    grown(chat, names(3, 20))
    assert pinned(chat) == ["t1"]
    first, *rest = window(chat)
    assert first == "t1"
    assert 4 <= len(rest) < 8
    assert rest == [m.id for m in chat.messages(last=len(rest))]
    assert memory.stats()["folds"] >= 8
    assert "Turn t1\n" not in f"{said(chat)}\n"
    assert "Answer t1" in said(chat)
    all_is_there(chat)


@pytest.mark.parametrize("which", ["", "-call", "-rain", "-snow"])
def test_a_tool_call_is_pinned_whole(memory, chat, which):
    """With all of its results and its user turn; the answer is a turn of its own."""
    unit = asked(chat, "q")
    chat.pin(f"q{which}")
    whole = unit if which else ["q"]
    assert pinned(chat) == whole
    grown(chat, names(0, 8))
    assert window(chat)[: len(whole)] == whole
    assert "q-answer" not in window(chat)
    sent = [m.id for m in chat.context(max_tokens=4000).messages]
    assert [i for i in sent if i in unit] == whole
    chat.unpin(f"q{which}")
    assert pinned(chat) == []
    grown(chat, names(8, 12))
    assert not {*unit} & {*window(chat)}
    all_is_there(chat)


def test_an_answer_is_pinned_with_its_question(memory, chat):
    """No provider takes an answer without a user turn before it."""
    grown(chat, names(0, 2))
    chat.pin("t0!")
    grown(chat, names(2, 8))
    assert pinned(chat) == window(chat)[:2] == ["t0", "t0!"]


def test_a_result_that_comes_after_the_pin_stays_with_its_call(memory, chat):
    """A call may be pinned while its tool is at work."""
    chat.add(
        [Message("user", "Weather?", id="q"), Message("assistant", "", id="c", tool_calls=[ToolCall("k", "w", {})])]
    )
    chat.pin("c")
    chat.add(Message("tool", "Rain", id="r", tool_call_id="k"))
    grown(chat, names(0, 8))
    assert window(chat)[:3] == ["q", "c", "r"]
    assert {"q", "c", "r"} <= {m.id for m in chat.context(max_tokens=4000).messages}


@pytest.mark.parametrize("own", ["t0", "t2!", "q-snow"])
def test_a_folded_turn_comes_back_to_its_place(memory, chat, own):
    """With what it can't stand without, in the order of the chat, nothing twice, and nothing else."""
    grown(chat, names(0, 3))
    unit = asked(chat, "q")
    grown(chat, names(3, 9))
    before, summary = window(chat), chat.summary()
    assert own not in before
    back = {"t0": ["t0"], "t2!": ["t2", "t2!"], "q-snow": unit}[own]
    chat.pin(own)
    assert window(chat) == [*back, *before]
    assert (pinned(chat), chat.summary()) == (back, summary)
    chat.pin("t1")
    assert window(chat) == [m.id for m in chat.messages() if m.id in {*back, *before, "t1"}]
    assert len(chat.messages()) == 23
    grown(chat, names(9, 14))
    assert {*back, "t1"} <= {*window(chat)}
    all_is_there(chat)
    chat.unpin(own)
    chat.unpin("t1")
    grown(chat, names(14, 18))
    assert not {*back, "t1"} & {*window(chat)}
    all_is_there(chat)
    assert index_keys(memory) == live_keys(memory)


def test_pinning_twice_is_pinning(memory, chat):
    """And taking away what is not there changes nothing."""
    grown(chat, names(0, 6))
    chat.unpin("t0")
    before = window(chat)
    for _ in range(2):
        chat.pin("t0")
        assert window(chat) == ["t0", *before]
    chat.unpin("t0")
    chat.unpin("t0")
    assert window(chat) == ["t0", *before]  # until the next fold
    assert pinned(chat) == []


async def test_pins_from_an_event_loop(memory, chat):
    """The async twins do the same."""
    grown(chat, names(0, 6))
    await chat.apin("t0")
    assert pinned(chat) == ["t0"]
    await chat.aunpin("t0")
    assert pinned(chat) == []


# -- folding --


@pytest.mark.parametrize("limit", ["items", "tokens"])
def test_pinned_turns_bring_no_fold_again_and_again(opened, limit):
    """However much is pinned, the chat folds as often as one where nothing is."""
    pruning = SMALL if limit == "items" else {"max_context_tokens": 400}
    memory = opened(embedder="none", pruning=pruning, summarizer=Quoting())
    folds = {}
    for name in ("plain", "pinned"):
        chat = memory.session(name, user_id="ada")
        started = memory.stats()["folds"]
        for n in range(6):
            chat.add([Message("user", f"Long {n} " + "word " * 150, id=f"long{n}")])
            if name == "pinned":
                chat.pin(f"long{n}")
        chat.compact(max_tokens=0)
        before = memory.stats()["folds"]
        grown(chat, names(0, 40))
        folds[name] = memory.stats()["folds"] - before
        assert not chat.compact().needed
        assert memory.stats()["folds"] - started >= folds[name]
    assert [i for i in window(chat) if i.startswith("long")] == [f"long{n}" for n in range(6)]
    assert 1 <= folds["pinned"] <= folds["plain"] + 1


def test_compact_counts_pinned_turns_and_leaves_them(memory, chat):
    """A limit below what is pinned folds the rest but the newest item."""
    grown(chat, names(0, 3))
    chat.pin("t0")
    report = chat.compact(max_tokens=1)
    assert (report.needed, window(chat)) == (True, ["t0", "t2", "t2!"])
    assert report.folded == ("t0!", "t1", "t1!")
    assert report.after == memory.count_tokens(chat.messages(view="window")) - memory.count_tokens([])


def test_a_turn_that_is_pinned_while_it_is_folded_stays(opened):
    """The fold starts again without it."""
    began, go = threading.Event(), threading.Event()

    class Slow(Quoting):
        def summarize(self, messages, *, previous, max_tokens):
            began.set()
            assert go.wait(30)
            return super().summarize(messages, previous=previous, max_tokens=max_tokens)

    memory = opened(pruning=SMALL, summarizer=Slow())
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", f"Turn {n}", id=f"t{n}") for n in range(5)])
    assert began.wait(30)
    chat.pin("t1")
    go.set()
    memory.flush()
    assert window(chat) == ["t1", "t3", "t4"]
    assert said(chat).splitlines() == ["Turn 0", "Turn 2"]


# -- what a pin outlives --


def test_a_pin_outlives_reopening(opened):
    """In the window and out of it."""
    options = {"pruning": SMALL, "summarizer": Quoting()}
    memory = opened(**options)
    chat = memory.session("chat", user_id="ada")
    grown(chat, names(0, 6))
    chat.pin("t0")
    chat.pin("t5")
    before = window(chat)
    memory.close()
    memory = opened(**options)
    chat = memory.session("chat", user_id="ada")
    assert (pinned(chat), window(chat)) == (["t0", "t5"], before)
    grown(chat, names(6, 12))
    assert window(chat)[:2] == ["t0", "t5"]
    all_is_there(chat)


@pytest.mark.parametrize("change", ["delete", "update", "tags", "conflict", "replace", "segment", "summary"])
def test_a_pin_outlives_changes(memory, chat, change):
    """Of the turn itself and of what was folded around it; the window stays in order."""
    grown(chat, names(0, 6))
    chat.pin("t1")
    if change == "delete":
        chat.entries.delete("t2")  # its segment falls, and gives back the others
    elif change == "update":
        chat.entries.update("t1", content="Changed")
    elif change == "tags":
        chat.entries.update("t1", tags=["first"])
    elif change == "conflict":
        chat.add(Message("user", "Changed", id="t1"), on_conflict="replace")
    elif change == "replace":
        chat.replace([*chat.messages(view="window"), Message("user", "Another", id="u")])
    else:
        chat.entries.delete([s.key for s in summaries(chat, kind=change)])
    memory.flush()
    assert pinned(chat) == ["t1"]
    all_is_there(chat)
    grown(chat, names(6, 12))
    assert window(chat)[0] == "t1"
    assert chat.messages(view="window")[0].content == ("Changed" if change in ("update", "conflict") else "Turn t1")
    if change == "delete":
        assert "t2" not in {m.id for m in chat.messages()}
        assert "Turn t2" not in str([(e.content, e.metadata) for e in chat.entries.list()])
    all_is_there(chat)


def test_a_pin_goes_with_its_turn(memory, chat):
    """Deleted, cleared or added anew under its id, a turn is not pinned."""
    grown(chat, names(0, 6))
    for own in ("t0", "t5"):
        chat.pin(own)
    chat.entries.delete(["t0", "t5"])
    memory.flush()
    chat.add([Message("user", "Turn t0", id="t0"), Message("user", "Turn t5", id="t5")])
    assert pinned(chat) == []
    chat.pin("t0")
    chat.clear()
    assert window(chat) == []
    grown(chat, names(0, 6))
    assert pinned(chat) == []
    assert "t0" not in window(chat)
    all_is_there(chat)


def test_a_window_that_is_set_without_a_pinned_turn_has_it_no_more(memory, chat):
    """`replace` says what the window is; pinning brings the turn back, once."""
    grown(chat, names(0, 3))
    chat.pin("t0")
    chat.replace([m for m in chat.messages(view="window") if m.id != "t0"])
    assert "t0" not in window(chat)
    chat.pin("t0")
    assert window(chat) == [m.id for m in chat.messages()]


# -- the prompt --


def test_the_prompt_holds_pinned_turns_within_its_budget(opened):
    """Before the other turns, whole units only, in order; what finds no room is said to have found none."""
    memory = opened(embedder="none", pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    unit = asked(chat, "q")
    grown(chat, names(0, 4))
    for own in ("q-rain", "t0", "t1"):
        chat.pin(own)
    grown(chat, names(4, 12))
    held = {}
    for max_tokens in [*range(30, 260, 5), 1000]:
        context = chat.context("Turn", max_tokens=max_tokens)
        assert memory.count_tokens(context.messages) == context.tokens <= max_tokens
        sent = [m.id for m in context.messages if m.id]
        assert sent == [m.id for m in chat.messages() if m.id in sent]
        assert sent[-2:] == ["t11", "t11!"]
        assert len({*unit[1:]} & {*sent}) in (0, 3)
        assert next(m.role for m in context.messages if m.role != "system") == "user"
        turns = {c.id: c for c in context.report if c.part == "turn"}
        for own in (*unit, "t0", "t1"):
            assert turns[own].included == (own in sent)
            assert turns[own].reason == ("pinned" if own in sent else "pinned, and no room for it")
        held[max_tokens] = all(turns[own].included for own in (*unit, "t0", "t1"))
        # Beside the newest turn and the other pins, what was left out has no room, whatever else is sent.
        needed = [
            c.tokens for own, c in turns.items() if own in sent and (c.reason == "pinned" or own.startswith("t11"))
        ]
        room = max_tokens - memory.count_tokens([]) - sum(needed)
        for group in (["t0"], ["t1"], unit):
            out = [turns[own].tokens for own in group if own not in sent]
            assert not out or sum(out) > room
    assert (held[30], held[1000]) == (False, True)


def test_a_pinned_call_is_not_sent_without_its_question(opened):
    """Where there is room for one of them only, neither is sent: no provider takes a call after nothing."""
    memory = opened(embedder="none", pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    unit = asked(
        chat, "q", city="the capital of the country in which the meeting in the first week of June is to be held"
    )
    chat.pin("q-call")
    grown(chat, names(0, 8))
    for max_tokens in range(30, 300, 3):
        context = chat.context("Turn", max_tokens=max_tokens, search=False)
        sent = [m for m in context.messages if m.role != "system"]
        assert sent[0].role == "user"
        assert {m.id for m in sent} & {*unit} in ({*unit}, {"q"}, set())


@pytest.mark.parametrize("placement", ["end", "start"])
def test_a_pinned_turn_before_any_user_turn_is_quoted(opened, placement):
    """It can't be sent as a turn, so it stands beside the summary, once."""
    memory = opened(pruning=SMALL, context={"hits_placement": placement})
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("system", "Be kind.", id="s"), Message("assistant", "Welcome, the code is 4711.", id="greeting")])
    chat.pin("greeting")
    grown(chat, names(0, 8))
    assert window(chat)[:2] == ["s", "greeting"]
    context = chat.context("What is the code?")
    assert memory.count_tokens(context.messages) == context.tokens
    assert context.messages[1].role == "system"
    assert "assistant: Welcome, the code is 4711." in context.messages[1].content
    assert str(texts(context.messages)).count("Welcome, the code is 4711.") == 1
    assert "greeting" not in [m.id for m in context.messages]
    assert next(m.role for m in context.messages if m.role != "system") == "user"
    (reason,) = {c.reason for c in context.report if c.id == "greeting" and c.part == "turn"}
    assert reason.startswith("pinned; quoted beside the summary")


def test_a_pinned_turn_is_no_hit_beside_itself(memory, chat):
    """What is sent as a turn is not quoted as well."""
    grown(chat, names(0, 6))
    chat.pin("t0")
    context = chat.context("Turn t0")
    assert sum(m.content == "Turn t0" for m in context.messages) == 1
    assert "user: Turn t0" not in str(texts(m for m in context.messages if m.id is None))


# -- what can't be pinned --


def test_only_turns_of_the_session_are_pinned(opened):
    """Neither knowledge, nor summaries, nor another chat's turns, nor what nobody knows."""
    memory = opened(pruning=SMALL)
    chat, other = memory.session("chat", user_id="ada"), memory.session("other", user_id="ada")
    grown(chat, names(0, 6))
    other.add(Message("user", "Elsewhere", id="o"))
    known = chat.remember("Ada likes tea")
    wrong = [known, summaries(chat, kind="segment")[0].key, summaries(chat, kind="summary")[0].id]
    wrong.append(other.entries.get("o").key)
    for act in (chat.pin, chat.unpin):
        for own in wrong:
            with pytest.raises(InputError, match="of this session"):
                act(own)
        for own in ("o", "nobody's"):
            with pytest.raises(NotFound):
                act(own)
        with pytest.raises(InputError):
            act(7)
    stranger = memory.session("chat", user_id="eve")
    for own in ("t0", chat.entries.get("t0").key):
        with pytest.raises(NotFound):
            stranger.pin(own)
    assert pinned(chat) == pinned(other) == []
    chat.pin(chat.entries.get("t0").key)
    assert pinned(chat) == ["t0"]


def test_pinning_is_writing(opened):
    """The access policy is asked."""

    class ReadOnly:
        def allows(self, principal, action, scope):
            return principal is None or action == "read"

    memory = opened(policy=ReadOnly())
    memory.session("chat", user_id="ada").add(Message("user", "Hello", id="t0"))
    guest = memory.session("chat", user_id="ada", principal="guest")
    for act in (guest.pin, guest.unpin):
        with pytest.raises(AccessDenied):
            act("t0")
    assert pinned(guest) == []


def test_unpinning_leaves_the_user_turn_that_another_pin_needs(memory, chat):
    """Two answers to one question are pinned: unpinning one leaves the question with the other."""
    chat.add([Message("user", "Which boats?", id="q"), *(Message("assistant", f"Boat {n}", id=f"a{n}") for n in "12")])
    chat.pin("a1")
    chat.pin("a2")
    chat.unpin("a1")
    assert pinned(chat) == ["q", "a2"]
    chat.unpin("a2")
    assert pinned(chat) == []


def test_a_pinned_greeting_outlives_the_summary_and_says_when_it_does_not_fit(memory, chat):
    """It can't be sent as a turn; where room is scarce the summary is cut first, and the report says what was left out."""
    chat.add([Message("assistant", "Welcome, the code is 4711.", id="greeting"), Message("user", "Hello", id="hello")])
    chat.pin("greeting")
    grown(chat, names(0, 30))
    quoted = {}
    for tokens in range(20, 400, 10):
        context = chat.context("Turn", max_tokens=tokens, search=False)
        system = "\n".join(texts(m for m in context.messages if m.role == "system"))
        (reason,) = {c.reason for c in context.report if c.id == "greeting"}
        quoted[tokens] = "4711" in system
        assert reason.startswith("pinned; quoted") if quoted[tokens] else reason == "pinned, and no room for it"
        assert quoted[tokens] or "Turn t" not in system
    assert list(quoted.values()) == sorted(quoted.values()), "once there is room there is room"
    assert not quoted[20]
    assert quoted[390]
