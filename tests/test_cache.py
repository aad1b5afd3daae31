"""What is kept in RAM of what was read and found: bounded, never stale, and nobody's to change."""

import sqlite3
import threading
from datetime import UTC, datetime, timedelta

import pytest
from conftest import SMALL, CountingEmbedder, FailingEmbedder, found, in_threads, texts, wait_until
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory import MemoryType, Message, open_memory
from neuralflow_memory.errors import InputError, QueryError
from neuralflow_memory.pipeline import cached
from neuralflow_memory.storage.cache import _OVERHEAD, LRU
from neuralflow_memory.storage.ledger import schema
from neuralflow_memory.testing import ManualClock

QUESTION = "Who goes sailing?"
DAY = 86_400_000_000


# -- the LRU by itself


def held(lru, owner, keys, now=0):
    return lru.get(owner, keys, now=now)


def test_what_was_used_the_longest_ago_makes_room():
    """By number, and by bytes with what keeping takes."""
    lru = LRU(max_entries=3, max_bytes=10**6)
    for n in range(3):
        lru.put(1, {n: (f"value {n}", 10)}, now=0)
    assert held(lru, 1, [0]) == {0: "value 0"}
    lru.put(2, {0: ("other", 10)}, now=0)
    assert held(lru, 1, range(3)) == {0: "value 0", 2: "value 2"}
    assert held(lru, 2, [0, 1]) == {0: "other"}
    assert lru.stats()["evictions"] == 1
    lru = LRU(max_entries=100, max_bytes=10 * (100 + _OVERHEAD))
    for n in range(30):
        lru.put(n, {"a": (n, 100)}, now=0)
    assert lru.stats()["entries"] == 10
    assert lru.stats()["bytes"] == 10 * (100 + _OVERHEAD)
    lru.put(99, {"a": ("too large by itself", 20_000)}, now=0)
    assert held(lru, 99, ["a"]) == {}
    assert lru.stats()["entries"] == 10


def test_nothing_is_kept_where_nothing_may_be():
    """`max_entries=0`."""
    lru = LRU(max_entries=0, max_bytes=10**6)
    lru.put(1, {1: ("a", 1)}, now=0)
    assert held(lru, 1, [1]) == {}
    assert lru.stats() == {"entries": 0, "bytes": 0, "hits": 0, "misses": 1, "evictions": 0}


def test_what_is_not_used_leaves_unless_it_was_used_often():
    """Uses fade by halves."""
    lru = LRU(max_entries=10, max_bytes=10**6, max_age=DAY, min_uses=2.0)
    lru.put(1, {"once": (1, 1), "often": (2, 1)}, now=0)
    for _ in range(7):
        lru.get(1, ["often"], now=0)
    lru.expire(now=DAY)
    assert lru.stats()["entries"] == 2
    lru.expire(now=DAY + 1)
    assert lru.stats()["entries"] == 1
    assert lru.get(1, ["once"], now=DAY + 1) == {}
    lru.expire(now=2 * DAY)  # eight uses count two
    assert lru.stats()["entries"] == 1
    assert lru.get(1, ["often"], now=2 * DAY + 1) == {}  # also where nobody has looked
    assert lru.stats()["entries"] == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "drop", "drop all", "clear"]), st.integers(0, 3), st.integers(0, 5)),
        max_size=60,
    )
)
def test_it_holds_what_a_dict_would_within_its_bounds(steps):
    """Its bytes and its owners are always those of what it holds."""
    lru, model = LRU(max_entries=6, max_bytes=6 * _OVERHEAD + 100), {}
    for n, (step, owner, key) in enumerate(steps):
        match step:
            case "put":
                lru.put(owner, {key: (n, key * 10)}, now=0)
                model[owner, key] = n
            case "get":
                assert held(lru, owner, [key]).get(key) in (None, model.get((owner, key)))
            case "drop":
                lru.drop(owner, [key])
                model.pop((owner, key), None)
            case "drop all":
                lru.drop(owner)
                model = {place: value for place, value in model.items() if place[0] != owner}
            case _:
                lru.clear()
                model.clear()
        slots = {place: slot.value for place, slot in lru._slots.items()}
        assert slots.items() <= model.items()
        assert lru.stats()["bytes"] == sum(k * 10 + _OVERHEAD for _, k in slots) <= 6 * _OVERHEAD + 100
        assert {(o, k) for o, keys in lru._owners.items() for k in keys} == slots.keys()
        assert len(slots) <= 6


# -- what a memory does with it


class Asked(CountingEmbedder):
    """Keeps every question, too."""

    def __init__(self):
        super().__init__()
        self.questions = []

    def embed_query(self, text):
        self.questions.append(text)
        return super().embed_query(text)


def talk(memory, user="ada"):
    chat = memory.session("chat", user_id=user)
    chat.add([f"{user} goes sailing on Sunday", f"{user} grows tomatoes", f"{user} hates sailing in winter"])
    memory.flush()
    return chat


def results(memory):
    return memory.stats()["cache"]["results"]


def statements(memory, call):
    """What *call* asks of SQLite in this thread."""
    memory.flush()
    database, own, said = memory._core.parts.ledger._db, threading.get_ident(), []
    connections = [database._writer, *database._readers]
    with database.lock, database._readers_lock:
        for db in connections:
            db.set_trace_callback(lambda text: said.append(text) if threading.get_ident() == own else None)
    call()
    with database.lock, database._readers_lock:
        for db in connections:
            db.set_trace_callback(None)
    return said


def test_the_same_search_and_context_are_not_done_again(memory):
    """Not a statement, and the same answer."""
    chat = talk(memory)
    first, prompt = chat.search(QUESTION), chat.context()
    assert statements(memory, lambda: (chat.search(QUESTION), chat.context())) == []
    assert (chat.search(QUESTION), chat.context()) == (first, prompt)
    assert results(memory)["hits"] == 4


def test_entries_that_were_read_lately_are_not_read_again(memory):
    """Another question, of which the hits are in RAM."""
    chat = talk(memory)
    chat.search(QUESTION)
    read = [s for s in statements(memory, lambda: chat.search("sailing?")) if "FROM entries" in s]
    assert read == []
    assert memory.stats()["cache"]["entries"]["entries"] == 3


def test_who_asks_from_another_session_of_the_user_has_the_same_answer(memory):
    """Only what depends on the session is kept by session."""
    chat = talk(memory)
    chat.search(QUESTION)
    other = memory.session("other", user_id="ada")
    other.search(QUESTION)
    assert results(memory)["hits"] == 1
    assert other.search(QUESTION, within="session") == []
    assert len(chat.search(QUESTION, within="session")) == 3
    assert results(memory)["hits"] == 1


def test_every_argument_is_part_of_what_is_asked(memory):
    """What differs in one of them has its own answer; also in types and spelling that are alike."""
    chat = talk(memory)
    chat.remember("Ada's boat goes sailing", tags=["boat"], metadata={"n": 1})
    memory.flush()
    asked = [
        {},
        {"k": 1},
        {"types": ["long_term"]},
        {"types": (t for t in [MemoryType.SHORT_TERM])},
        {"filter": {"role": "user"}},
        {"filter": {"n": 1}},
        {"filter": {"n": {"$gt": 1}}},
        {"since": datetime(2000, 1, 1, tzinfo=UTC)},
        {"until": "2001-01-01"},
        {"within": "session"},
        {"as_of": "ever"},
        {"as_of": datetime(2001, 1, 1, tzinfo=UTC)},
    ]
    first = [found(chat.search(QUESTION, **dict(options))) for options in asked]
    asked[3] = {"types": [MemoryType.SHORT_TERM]}
    assert [found(chat.search(QUESTION, **options)) for options in asked] == first
    assert results(memory)["hits"] == len(asked)
    assert len({tuple(hits) for hits in first}) == 4
    budgets = [{}, {"max_tokens": 60}, {"reserve_tokens": 7940}, {"query": QUESTION}, {"search": False}]
    prompts = [chat.context(**options) for options in budgets]
    assert [chat.context(**options) for options in budgets] == prompts
    assert prompts[1].budget != prompts[0].budget
    with pytest.raises(QueryError):
        chat.search(QUESTION, k=True)
    with pytest.raises(InputError):
        chat.context(reserve_tokens=False)


def test_nothing_that_a_caller_changes_is_the_caches(memory):
    """Neither what was found the first time nor what was found again."""
    chat = memory.session("chat", user_id="ada")
    chat.add(
        [
            Message("user", "Who goes sailing today?", metadata={"a": [1]}, payload={"p": {"x": 1}}),
            Message("assistant", [{"type": "text", "text": "Everybody goes sailing"}]),
            Message("user", "And who goes sailing tomorrow?"),
        ]
    )
    memory.flush()
    first = chat.search("sailing", k=9)
    kept = [(h.entry, dict(h.signals)) for h in chat.search("sailing", k=9)]
    for _ in range(2):
        for hit in chat.search("sailing", k=9):
            hit.signals.clear()
            hit.entry.metadata.clear()
            hit.entry.metadata["b"] = 1
            if hit.entry.payload:
                hit.entry.payload["p"]["x"] = 2
            if hit.entry.blocks:
                hit.entry.blocks[0]["text"] = "Nobody"
    assert [(h.entry, dict(h.signals)) for h in chat.search("sailing", k=9)] == kept
    assert found(first) == found(chat.search("sailing", k=9))
    prompt = chat.context("sailing")
    for _ in range(2):
        changed = chat.context("sailing")
        assert changed == prompt == chat.context("sailing")
        for message in changed.messages:
            message.metadata["x"] = 1
        for candidate in changed.report:
            candidate.signals["x"] = 1
    chat.context("sailing").messages[0].metadata["x"] = 1
    assert chat.context("sailing") == prompt


def known(chat):
    return chat.entries.list(types=[MemoryType.LONG_TERM])[0]


def done(what):
    assert what


def taken_in(chat, text):
    """What somebody else's memory holds of the same user."""
    path = chat.memory.path.parent
    with open_memory(path / "elsewhere", embedder="none") as other:
        other.session("other", user_id="ada").add(text)
        other.export(path / "elsewhere.jsonl")
    done(chat.memory.import_(path / "elsewhere.jsonl").entries)


@pytest.mark.parametrize(
    "write",
    [
        lambda chat: chat.add("Everybody goes sailing"),
        lambda chat: chat.remember("Everybody goes sailing"),
        lambda chat: chat.add(Message("user", "No more of it", id="a"), on_conflict="replace"),
        lambda chat: chat.entries.update("a", content="No more of it"),
        lambda chat: chat.entries.update("a", importance=0.1),
        lambda chat: chat.entries.update("a", expires_at=datetime(2020, 1, 1, tzinfo=UTC)),
        lambda chat: chat.entries.delete("a"),
        lambda chat: chat.clear(),
        lambda chat: chat.replace([Message("user", "Only this", id="b")]),
        lambda chat: chat.pin("a"),
        lambda chat: chat.task("Go sailing").__enter__(),
        lambda chat: chat.compact(max_tokens=0),
        lambda chat: chat.memory.values(user_id="ada").put(("x",), "k", {"text": "Everybody goes sailing"}),
        lambda chat: chat.entries.restore(known(chat).id, 1),
        lambda chat: chat.entries.delete(known(chat).id),
        lambda chat: chat.remember("Nobody goes sailing", supersedes=known(chat).id),
        lambda chat: done(chat.entries.consolidate()),
        lambda chat: done(chat.episodes(by="hour")),
        lambda chat: chat.restore({**chat.snapshot(), "window": chat.snapshot()["window"][:1]}),
        lambda chat: chat.add("Everybody goes sailing", state={"a": 1}),
        lambda chat: taken_in(chat, "Everybody goes sailing"),
        lambda chat: done(chat.entries.archive(known(chat).id)),
        lambda chat: done(chat.memory.sweep().count("merge")),
    ],
)
@pytest.mark.parametrize("who", ["the same", "another process", "another session"])
def test_no_write_leaves_an_old_answer(opened, beside, write, who):
    """Of the process that asks, or of another one; the answer is that of a memory that keeps nothing."""
    memory = opened(pruning=SMALL)
    chat = memory.session("chat", user_id="ada")
    chat.add([Message("user", "Ada goes sailing", id="a"), Message("assistant", "In the harbour")])
    chat.add(["Bob goes sailing", "Who goes where?"])
    chat.remember("Ada has a boat")
    chat.entries.update(known(chat).id, content="Ada has a boat for sailing")
    chat.remember_many(["Cleo goes sailing on the lake each Sunday", "Cleo goes sailing on the lake each Sunday!"])
    memory.flush()
    chat.search(QUESTION), chat.context(QUESTION), chat.context()
    writer = {"the same": chat, "another session": memory.session("chat", user_id="ada")}.get(who)
    write(writer or beside(memory).session("chat", user_id="ada"))
    fresh = beside(memory)
    fresh._core.parts.hot.keeps_results = False
    theirs = fresh.session("chat", user_id="ada")
    memory._core.flush()
    assert chat.search(QUESTION, k=50) == theirs.search(QUESTION, k=50)
    assert chat.search(QUESTION) == theirs.search(QUESTION)
    assert texts(chat.context(QUESTION).messages) == texts(theirs.context(QUESTION).messages)
    assert texts(chat.context().messages) == texts(theirs.context().messages)


def test_what_is_written_while_it_is_being_found_is_not_missed(memory, monkeypatch):
    """A value that was begun before a write and finished after it is not kept as if it were of after."""
    chat = talk(memory)
    ranked, interfere = cached.hits, [True]

    def hits(parts, scope, place, find, **options):
        def slow():
            made = find()
            if interfere.pop() if interfere else False:
                in_threads(lambda: chat.add("Everybody goes sailing"))
                parts.residents.look()
            return made

        return ranked(parts, scope, place, slow, **options)

    monkeypatch.setattr(cached, "hits", hits)
    assert "Everybody goes sailing" not in found(chat.search(QUESTION))
    assert "Everybody goes sailing" in found(chat.search(QUESTION))


def test_what_expires_is_not_found_again(opened):
    """Neither by a search nor in a prompt that are kept; nobody writes anything."""
    clock = ManualClock()
    memory = opened(clock=clock)
    chat = talk(memory)
    chat.remember("Everybody goes sailing", expires_at=clock() + timedelta(hours=1))
    memory.flush()
    for _ in range(2):
        assert "Everybody goes sailing" in found(chat.search(QUESTION))
        assert any("Everybody" in t for t in texts(chat.context(QUESTION).messages))
    clock.advance(minutes=59)
    hits = results(memory)["hits"]
    chat.search(QUESTION)
    assert results(memory)["hits"] == hits + 1
    clock.advance(minutes=1)
    assert "Everybody goes sailing" not in found(chat.search(QUESTION))
    assert not any("Everybody" in t for t in texts(chat.context(QUESTION).messages))
    clock.advance(minutes=-1)
    assert "Everybody goes sailing" in found(chat.search(QUESTION))  # a clock that was put back


def test_what_was_superseded_or_does_not_hold_yet_is_not_found_again(opened):
    """As knowledge begins to hold and ends; what held at a date is the same at any time."""
    clock = ManualClock()
    memory = opened(clock=clock)
    chat = memory.session("chat", user_id="ada")
    begun, hour = clock(), timedelta(hours=1)
    lake = chat.remember("Ada goes sailing on the lake")
    chat.remember("Ada goes sailing at sea", supersedes=lake, valid_from=begun + hour)
    memory.flush()

    def places():
        return {place for text in found(chat.search(QUESTION)) for place in ("lake", "sea") if text.endswith(place)}

    for _ in range(2):
        assert places() == {"lake"}
        assert any("on the lake" in t for t in texts(chat.context(QUESTION).messages))
    clock.advance(minutes=59)
    hits = results(memory)["hits"]
    assert places() == {"lake"}
    assert results(memory)["hits"] == hits + 1
    clock.advance(minutes=1)
    for _ in range(2):
        assert places() == {"sea"}
        assert not any("on the lake" in t for t in texts(chat.context(QUESTION).messages))
        assert found(chat.search(QUESTION, as_of=begun)) == ["Ada goes sailing on the lake"]
        assert len(chat.search(QUESTION, as_of="ever")) == 2
    hits = results(memory)["hits"]
    clock.advance(days=1000)
    assert found(chat.search(QUESTION, as_of=begun)) == ["Ada goes sailing on the lake"]
    assert found(chat.search(QUESTION, as_of=begun + hour)) == ["Ada goes sailing at sea"]
    assert results(memory)["hits"] == hits + 1


def test_yesterday_is_another_day_tomorrow(opened):
    """Whatever names a day by today's holds until midnight (UTC)."""
    clock = ManualClock(datetime(2026, 5, 1, 22, tzinfo=UTC))
    memory = opened(clock=clock)
    chat = memory.session("chat", user_id="ada")
    for day in range(5):
        chat.add(Message("user", f"I went sailing, number {day}", created_at=clock() - timedelta(days=4 - day)))
    memory.flush()
    asked = "Who went sailing yesterday?"
    assert found(chat.search(asked, k=1)) == ["I went sailing, number 3"]
    clock.advance(hours=1)
    chat.search(asked, k=1)
    assert results(memory)["hits"] == 1
    clock.advance(hours=1)
    assert found(chat.search(asked, k=1)) == ["I went sailing, number 4"]


def test_what_changes_with_each_moment_is_not_kept(opened):
    """`ranking.recency`."""
    clock = ManualClock()
    memory = opened(clock=clock, ranking={"recency": 1.0})
    chat = talk(memory)
    before = chat.search(QUESTION)[0].signals["recency"]
    clock.advance(days=30)
    assert chat.search(QUESTION)[0].signals["recency"] == pytest.approx(before / 2, abs=0.01)
    assert results(memory)["entries"] == 0


def test_a_prompt_holds_until_a_task_or_note_ends(opened):
    """Temporary notes, open tasks that nobody touches, and those that are over."""
    clock = ManualClock()
    memory = opened(clock=clock, tasks={"open_max_age": 7200, "completed_max_age": 1000})
    chat = talk(memory)
    with chat.task("book flight") as task:
        task.note("the window is open", temporary=True, lifetime=60)
        prompts = [texts(chat.context(QUESTION).messages) for _ in range(2)]
        assert prompts[0] == prompts[1]
        assert any("the window is open" in t for t in prompts[0])
        clock.advance(seconds=60)
        assert not any("the window is open" in t for t in texts(chat.context(QUESTION).messages))
    assert any("book flight" in t for t in texts(chat.context(QUESTION).messages[:1]))
    clock.advance(seconds=1001)
    assert not any("book flight" in t for t in texts(chat.context(QUESTION).messages[:1]))
    chat.task("wait").__enter__()
    assert any("wait" in t for t in texts(chat.context(QUESTION).messages[:1]))
    clock.advance(seconds=7200)
    assert not any("wait" in t for t in texts(chat.context(QUESTION).messages[:1]))


def test_an_answer_without_vectors_is_not_kept(opened):
    """Once the embedder is back, the same question is answered in full."""
    broken = [False]

    class Weak(FailingEmbedder):
        def embed_query(self, text):
            if broken[0]:
                raise RuntimeError("no question today")
            return super().embed_query(text)

    memory = opened(embedder=Weak(lambda _: False))
    chat = talk(memory)
    broken[0] = True
    with pytest.warns(RuntimeWarning, match="by words alone"):
        assert "dense" not in chat.search(QUESTION)[0].signals
    broken[0] = False
    assert "dense" in chat.search(QUESTION)[0].signals


def test_what_models_are_charged_changes_a_prompts_budget_at_once(opened, beside):
    """Reported here, or by another process."""
    memory = opened()
    chat = talk(memory)
    first = chat.context(QUESTION)
    chat.report_usage("gpt", first.tokens)
    chat.context(QUESTION)
    for n in range(4):
        chat.report_usage("gpt", first.tokens * 2)
        assert chat.context(QUESTION).margin > first.margin, n
    before = chat.context(QUESTION)
    theirs = beside(memory).session("chat", user_id="ada")
    theirs.context(QUESTION)
    theirs.report_usage("gpt", first.tokens * 3)
    assert chat.context(QUESTION).margin != before.margin


def test_a_prompt_from_the_cache_can_be_reported_like_any(opened):
    """What `report_usage` learns from is the prompt that was given last, with what was reserved for it."""
    memory = opened()
    chat = talk(memory)
    small, large = (chat.context(QUESTION, reserve_tokens=n) for n in (10, 1000))
    assert chat.context(QUESTION, reserve_tokens=10) == small
    window = memory._core.parts.window(chat.scope)
    assert window.sent.tokens == small.tokens + 10
    assert chat.context(QUESTION, reserve_tokens=1000) == large
    assert window.sent.tokens == large.tokens + 1000


def test_the_policy_is_asked_each_time(opened):
    """Also for what is in the cache."""
    refused = []

    class Policy:
        def allows(self, principal, action, scope):
            return principal not in refused

    memory = opened(policy=Policy())
    talk(memory)
    chat = memory.session("chat", user_id="ada", principal="eve")
    chat.search(QUESTION), chat.context(QUESTION)
    refused.append("eve")
    for ask in (chat.search, chat.context):
        with pytest.raises(PermissionError):
            ask(QUESTION)


def test_nothing_of_another_user_comes_from_a_cache(memory):
    """The same question, session and words; as many entries."""
    chats = [talk(memory, user) for user in ("ada", "bob")]
    chats += [memory.session("chat"), memory.session("chat", user_id="ada", tenant="other")]
    for _ in range(2):
        for chat, name in zip(chats, ("ada", "bob", None, None), strict=True):
            hits = chat.search(QUESTION)
            assert all(h.entry.content.startswith(str(name)) for h in hits)
            assert bool(hits) == (name is not None)
            assert all("bob" not in t or name == "bob" for t in texts(chat.context(QUESTION).messages))


# -- bounds and what goes


def test_cache_size_bounds_what_was_found(opened):
    """Search results and contexts; with 0 nothing is kept, and all works."""
    memory = opened(context={"cache_size": 5}, embedder=Asked())
    chat = talk(memory)
    for n in range(12):
        chat.search(f"sailing {n}")
    assert results(memory)["entries"] == 5
    assert results(memory)["evictions"] == 7
    memory.close()
    memory = opened(context={"cache_size": 0})
    chat = memory.session("chat", user_id="ada")
    assert chat.search(QUESTION) == chat.search(QUESTION)
    assert results(memory) == {"entries": 0, "bytes": 0, "hits": 0, "misses": 0, "evictions": 0}


def test_what_was_found_is_dropped_when_its_user_writes(memory):
    """All of it, and nothing of others."""
    ada, bob = talk(memory, "ada"), talk(memory, "bob")
    for n in range(4):
        ada.search(f"sailing {n}")
    bob.search(QUESTION)
    ada.add("Something else")
    bob.search(QUESTION)
    assert results(memory)["entries"] == 1
    assert results(memory)["hits"] == 1


def test_the_hot_tier_is_bounded_in_entries_and_megabytes(opened):
    """`tiers.lru_entries` and `tiers.lru_mb`; with 0 entries there is none."""
    for options, most in (({"lru_entries": 7}, 7), ({"lru_entries": 0}, 0), ({"lru_mb": 1}, 30)):
        memory = opened(tiers=options, embedder="none")
        chat = memory.session("chat", user_id="ada")
        if not chat.messages():
            chat.add([f"sailing {n} " + "x" * 40_000 for n in range(60)])
        memory.flush()  # a fold moves windows, and entries with them
        assert len(chat.search("sailing", k=60)) == 60
        kept = memory.stats()["cache"]["entries"]
        assert kept["entries"] <= most
        assert kept["entries"] >= most // 2
        assert kept["bytes"] <= options.get("lru_mb", 64) * 1024 * 1024
        memory.close()


def test_an_entry_leaves_the_hot_tier_when_nobody_uses_it(opened):
    """`tiers.hot_tier_max_age_days` and `tiers.min_access_count_hot`; None keeps what there is room for."""
    clock = ManualClock()
    options = {"hot_tier_max_age_days": 1, "min_access_count_hot": 3}
    memory = opened(tiers=options, clock=clock, context={"cache_size": 0})
    chat = talk(memory)
    chat.search("tomatoes", k=1)
    for _ in range(11):
        chat.search("winter", k=1)
    assert memory.stats()["cache"]["entries"]["entries"] == 2
    clock.advance(days=1, seconds=1)
    assert memory.stats()["cache"]["entries"]["entries"] == 1
    clock.advance(days=2)
    assert memory.stats()["cache"]["entries"]["entries"] == 0
    memory.close()
    memory = opened(tiers={"hot_tier_max_age_days": None}, clock=clock)
    memory.session("chat", user_id="ada").search(QUESTION)
    clock.advance(days=10_000)
    assert memory.stats()["cache"]["entries"]["entries"] == 3


def in_ram(memory, text):
    """Whether anything that is cached holds *text*."""
    hot = memory._core.parts.hot
    return any(text in repr(slot.value) for lru in (hot.entries, hot.results) for slot in lru._slots.values())


def test_what_is_deleted_is_in_no_cache_any_more(memory, beside):
    """At once where it was deleted; in other processes as soon as they look, which they do by themselves."""
    chat = talk(memory)
    other = beside(memory)
    for session in (chat, other.session("chat", user_id="ada")):
        session.search("tomatoes"), session.context("tomatoes")
    assert in_ram(memory, "ada grows tomatoes")
    assert in_ram(other, "ada grows tomatoes")
    chat.entries.delete(chat.messages()[1].id)
    assert not in_ram(memory, "ada grows tomatoes")
    wait_until(lambda: not in_ram(other, "ada grows tomatoes"), seconds=10)


def test_a_deleted_value_is_in_no_cache_any_more(memory):
    """Nor what it was found by."""
    values = memory.values(user_id="ada")
    values.put(("likes",), "food", {"a": "tomatoes"}, texts=["ada likes tomatoes"])
    memory.flush()
    chat = memory.session("chat", user_id="ada")
    assert found(chat.search("tomatoes")) == ["ada likes tomatoes"]
    assert in_ram(memory, "ada likes tomatoes")
    values.delete(("likes",), "food")
    assert not in_ram(memory, "ada likes tomatoes")


def test_what_was_so_before_going_back_is_in_no_cache_any_more(memory):
    """A turn that was changed since, and is as it was again."""
    chat = memory.session("chat", user_id="ada")
    chat.add(Message("user", "Ada grows tomatoes", id="a"))
    before = chat.snapshot()
    chat.add(Message("user", "Ada grows carrots", id="a"), on_conflict="replace")
    memory.flush()
    chat.search("carrots"), chat.context("carrots")
    assert in_ram(memory, "Ada grows carrots")
    chat.restore(before)
    assert not in_ram(memory, "Ada grows carrots")
    assert found(chat.search("What does Ada grow?")) == ["Ada grows tomatoes"]


def test_what_retention_deletes_is_in_no_cache_any_more(opened):
    """Nor found; and brought back, it is found again."""
    clock = ManualClock()
    memory = opened(clock=clock, retention={"delete": True, "max_delete_share": 1})
    chat = memory.session("chat", user_id="ada")
    chat.remember("Ada grows tomatoes")
    memory.flush()
    for _ in range(2):
        assert found(chat.search("tomatoes")) == ["Ada grows tomatoes"]
    clock.advance(days=100)
    assert in_ram(memory, "Ada grows tomatoes")
    report = memory.sweep()
    assert report.count("delete") == 1
    assert not in_ram(memory, "Ada grows tomatoes")
    assert [found(chat.search("tomatoes")) for _ in range(2)] == [[], []]
    memory.undo(report.run)
    assert [found(chat.search("tomatoes")) for _ in range(2)] == [["Ada grows tomatoes"]] * 2


def test_what_a_damaged_block_hides_is_found_once_it_is_whole(opened):
    """What was found without it is not kept, in a search and in a prompt."""
    memory = opened(embedder="none", tiers={"lru_entries": 0})
    chat = memory.session("chat", user_id="ada")
    chat.remember("Ada grows tomatoes")
    chat.entries.archive(known(chat).id)
    (block,) = (memory.path / "archive").iterdir()
    whole = block.read_bytes()
    block.unlink()
    memory._core.parts.archive._unpacked.clear()
    assert found(chat.search("tomatoes")) == []
    assert not any("tomatoes" in t for t in texts(chat.context("tomatoes").messages))
    block.write_bytes(whole)
    assert found(chat.search("tomatoes")) == ["Ada grows tomatoes"]
    assert any("tomatoes" in t for t in texts(chat.context("tomatoes").messages))


def test_a_prompt_from_the_cache_is_a_use_of_what_it_quotes(memory):
    """So that what is asked for again and again does not become cold."""
    chat = memory.session("chat", user_id="ada")
    chat.remember("Ada grows tomatoes")
    memory.flush()
    number = known(chat).number
    for uses in range(1, 5):
        chat.context("Who grows tomatoes?")
        assert memory._core.parts._uses[number][0] == uses
    assert results(memory)["hits"] == 3


def test_nothing_cached_before_a_restore_is_used_after_it(opened, beside, tmp_path):
    """Of users who were in the backup, and of one who came later; also by another process."""
    memory = opened(embedder="none")
    chats = [talk(memory, user) for user in ("ada", "bob")]
    as_then = [chat.search(QUESTION) for chat in chats]
    memory.backup(tmp_path / "backup")
    chats.append(talk(memory, "cleo"))
    for chat in chats:
        chat.add("Everybody goes sailing")
        chat.search(QUESTION), chat.context(QUESTION)
    heads = [head(memory, chat) for chat in chats]
    assert in_ram(memory, "Everybody")
    memory.restore(tmp_path / "backup")
    assert not in_ram(memory, "Everybody")
    assert [chat.search(QUESTION) for chat in chats] == [*as_then, []]
    assert not any("Everybody" in t for chat in chats for t in texts(chat.context(QUESTION).messages))
    other = beside(memory)
    new = [head(memory, chat) for chat in chats[:2]]
    assert new == [head(other, chat) for chat in chats[:2]]
    assert all(after > before for before, after in zip(heads, new, strict=False))
    chats[2].add("Cleo is back, sailing")
    assert found(chats[2].search(QUESTION)) == ["Cleo is back, sailing"]
    assert [chat.search(QUESTION) for chat in chats[:2]] == as_then
    for user in ("ada", "bob"):
        theirs = other.session("chat", user_id=user)
        assert "Everybody goes sailing" not in found(theirs.search(QUESTION))


# -- heads


def head(memory, chat):
    parts = memory._core.parts
    parts.residents.look()
    return parts.hot.head(parts.ledger.owner(chat.scope))


def test_a_head_moves_with_its_owner_only(memory, beside):
    """It is the same in every process."""
    ada, bob = talk(memory, "ada"), talk(memory, "bob")
    other = beside(memory)
    first = head(memory, ada), head(memory, bob)
    assert (head(other, ada), head(other, bob)) == first
    bob.add("Hello")
    memory.flush()
    assert head(memory, ada) == head(other, ada) == first[0]
    assert head(memory, bob) == head(other, bob) > first[1]


def test_a_head_outlives_the_changes_it_is_known_from(opened, beside):
    """The newest ten thousand are kept; an owner that was quiet since has the head it had, in every process."""
    memory = opened(embedder="none")
    ada = talk(memory, "ada")
    known = head(memory, ada)
    bob = memory.session("chat", user_id="bob")
    for _ in range(12):
        bob.add([f"Number {n}" for n in range(1000)])
    with memory._core.parts.ledger._db.read() as db:
        assert db.execute("SELECT count(*), min(id) FROM changes").fetchone()[1] > known[0]
    assert head(memory, ada) == known
    fresh = beside(memory)
    assert head(fresh, ada) == known
    assert head(fresh, bob) == head(memory, bob)
    before = known
    ada.add("Again")
    assert head(fresh, ada) == head(memory, ada) > before
    bob.add([f"Number {n}" for n in range(11_000)])
    assert head(fresh, ada) == head(memory, ada) > before


def test_heads_that_are_not_in_ram_are_read(memory, monkeypatch):
    """With many owners: those asked for last are kept."""
    monkeypatch.setattr(cached, "_OWNERS", 2)
    chats = [talk(memory, f"user-{n}") for n in range(5)]
    known = [head(memory, chat) for chat in chats]
    assert len(set(known)) == 5
    chats[0].add("More")
    memory.flush()
    assert [head(memory, chat) for chat in chats][1:] == known[1:]
    assert head(memory, chats[0]) > known[0]
    assert len(memory._core.parts.hot._heads) == 2


def test_an_owner_that_has_another_number_now_has_nothing_of_anothers(memory):
    """When anything may have changed, as when a ledger was put back in place, nothing that was known of numbers is believed."""
    ada, bob = talk(memory, "ada"), talk(memory, "bob")
    expected = [chat.search(QUESTION) for chat in (ada, bob)]
    ledger = memory._core.parts.ledger
    numbers = [ledger.owner(chat.scope) for chat in (ada, bob)]
    with ledger._db.lock, ledger._db.write() as db:
        keys = [db.execute("SELECT key FROM owners WHERE id = ?", (n,)).fetchone()[0] for n in numbers]
        db.execute("UPDATE owners SET key = '?' WHERE id = ?", (numbers[0],))
        db.execute("UPDATE owners SET key = ? WHERE id = ?", (keys[0], numbers[1]))
        db.execute("UPDATE owners SET key = ? WHERE id = ?", (keys[1], numbers[0]))
        newest = db.execute("SELECT max(id) FROM changes").fetchone()[0]
        db.execute("DELETE FROM changes")
        db.execute("INSERT INTO changes (id, no, session, origin) VALUES (?, 0, NULL, 0)", (newest + 2,))
        db.execute("UPDATE owners SET head = ?", (f"{newest + 2}.1",))
    for _ in range(2):
        assert found(ada.search(QUESTION)) == found(expected[1])
        assert found(bob.search(QUESTION)) == found(expected[0])
        memory._core.parts.residents._recent.clear()  # as when both were idle
    assert head(memory, ada) == (newest + 2, 1)


@pytest.mark.parametrize("there", [True, False])
def test_a_ledger_from_before_there_were_heads_gets_them(opened, folder, there):
    """Also where the column is there already."""
    memory = opened(embedder="none")
    chat = talk(memory)
    expected = found(chat.search(QUESTION))
    memory.close()
    db = sqlite3.connect(folder / "ledger.sqlite3")
    with db:
        if not there:
            db.execute("DROP TRIGGER changes_kept")
            db.execute("ALTER TABLE owners DROP COLUMN head")
        db.execute(f"PRAGMA user_version = {schema.MIGRATIONS.index(schema._m013_heads)}")
    db.close()
    memory = opened(embedder="none")
    chat = memory.session("chat", user_id="ada")
    assert [found(chat.search(QUESTION)) for _ in range(2)] == [expected, expected]
    known = head(memory, chat)
    assert known > (0, 0)
    bob = memory.session("chat", user_id="bob")
    for _ in range(12):
        bob.add([f"Number {n}" for n in range(1000)])
    with memory._core.parts.ledger._db.read() as db:
        assert db.execute("SELECT min(id) FROM changes").fetchone()[0] > known[0]
        assert db.execute("SELECT head FROM owners").fetchone()[0] == f"{known[0]}.{known[1]}"
    assert head(memory, chat) == known


def test_vectors_that_are_made_anew_are_a_change(memory):
    """Another model: nothing that the one before found is found by its head."""
    chat = talk(memory)
    known = head(memory, chat)
    ledger = memory._core.parts.ledger
    ledger._alone = True
    with memory._core._indexing:
        ledger.forget_models(keep="")
        assert head(memory, chat) > known
