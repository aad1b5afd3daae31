"""What a turn and a search cost, in counts that no machine changes: the same at turn 100 and at turn 10,000."""

import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
from conftest import CountingEmbedder, wait_until

from neuralflow_memory import Message, open_memory
from neuralflow_memory.testing import ManualClock

SHORT, LONG = 100, 10_000
BATCH = 1_000


class CountingTokens:
    """Counts words, and how often it was asked."""

    name, exact = "words", True

    def __init__(self):
        self.calls = {}

    def count(self, text):
        own = threading.get_ident()  # folds count in the background
        self.calls[own] = self.calls.get(own, 0) + 1
        return len(text.split())


class Brief:
    """A summarizer that takes no time."""

    name = "brief"

    def summarize(self, messages, *, previous, max_tokens):
        return "They talked about boats."


class CountingQueries(CountingEmbedder):
    """Keeps every question, too."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def embed_query(self, text):
        self.queries.append(text)
        return super().embed_query(text)


@contextmanager
def counted(memory):
    """What this thread asks of SQLite: its statements, and the steps of SQLite's machine, one or more for each row visited."""
    memory.flush()  # SQLite waits for ever for a callback to be set on a connection that is calling one
    database = memory._core.parts.ledger._db
    connections = [database._writer, *database._readers]
    assert len(connections) > 1
    own, found = threading.get_ident(), SimpleNamespace(statements=[], steps=0)

    def statement(text):
        if threading.get_ident() == own:
            found.statements.append(text)

    def step():
        found.steps += threading.get_ident() == own

    with database.lock, database._readers_lock:
        for db in connections:
            db.set_trace_callback(statement)
            db.set_progress_handler(step, 1)
    try:
        yield found
    finally:
        own = None
        memory.flush()
        with database.lock, database._readers_lock:
            for db in connections:
                db.set_trace_callback(None)
                db.set_progress_handler(None, 0)
    assert len(database._readers) <= len(connections) - 1, "a connection that was not counted"


def named(n):
    """A number in letters: digits would be facts, which folds check one by one."""
    return "".join("abcdefghij"[int(digit)] for digit in str(n))


def said(n):
    return [
        Message("user", f"what about the boat {named(n)} in the harbour?"),
        Message("assistant", f"the boat {named(n)} sails away."),
    ]


def talk(chat, *, turns):
    for start in range(0, turns, BATCH):
        chat.add([m for n in range(start, min(turns, start + BATCH)) for m in said(n)])
        chat.memory.flush()


@pytest.fixture(scope="module")
def counter():
    return CountingTokens()


@pytest.fixture(scope="module")
def memory(tmp_path_factory, counter):
    """Two users, one with a hundred turns behind them, one with ten thousand."""
    folder = tmp_path_factory.mktemp("cost") / "memory"
    cold = {"lru_entries": 0}  # each entry is read from the ledger, as if it was the first time
    parts = {"summarizer": Brief(), "token_counter": counter, "clock": ManualClock()}
    with open_memory(folder, embedder="none", tiers=cold, **parts) as memory:
        talk(memory.session("chat", user_id="short"), turns=SHORT)
        talk(memory.session("chat", user_id="long"), turns=LONG)
        with (
            ExitStack() as readers
        ):  # as many as there may ever be at once, so that none is made while others are counted
            for _ in range(8):
                readers.enter_context(memory._core.parts.ledger._db.read())
        yield memory


@pytest.fixture
def chats(memory):
    return memory.session("chat", user_id="short"), memory.session("chat", user_id="long")


def cost(chat, counter, call):
    """(statements, steps, tokenizer calls) of *call*, which folds nothing meanwhile."""
    own = threading.get_ident()
    before = counter.calls.get(own, 0)
    with counted(chat.memory) as found:
        call()
    return len(found.statements), found.steps, counter.calls.get(own, 0) - before


def turn(chat, n, *, search=False):
    chat.add(said(n))
    return chat.context(search=search)


def test_a_turn_costs_the_same_at_turn_100_and_at_turn_10000(chats, counter):
    """As many statements, as many steps of SQLite over rows, as many texts counted; folds come in between in both."""
    found = []
    for chat in chats:
        turn(chat, 20_000)
        folds = chat.memory.stats()["folds"]
        found.append([cost(chat, counter, lambda chat=chat, n=n: turn(chat, 20_001 + n)) for n in range(30)])
        assert chat.memory.stats()["folds"] > folds
    short, long = (Counter((statements, steps) for statements, steps, _ in turns) for turns in found)
    ((usual, times),) = long.most_common(1)
    assert [usual] == [cost for cost, _ in short.most_common(1)]
    assert times >= 25
    assert max(long)[0] <= usual[0] + 3  # now and then something is tidied up
    assert max(steps for _, steps in long) < 1.5 * usual[1]
    assert usual[0] <= 25
    short, long = found
    # Two messages, each time; what a fold has made anew is counted once.
    assert [tokens for *_, tokens in long].count(2) >= 26
    assert sum(tokens for *_, tokens in long) <= sum(tokens for *_, tokens in short)


def test_a_context_reads_nothing_from_a_window_in_ram(chats, counter):
    """No statement, and nothing is counted again."""
    for chat in chats:
        chat.memory.flush()
        chat.context(search=False)
        assert cost(chat, counter, lambda chat=chat: chat.context(search=False)) == (0, 0, 0)


@pytest.mark.parametrize("k", [10, 40])
def test_a_search_reads_its_hits_and_nothing_else(chats, counter, k):
    """Ranking happens in RAM: what is read is the hits, however many entries the user has."""
    found = []
    for chat in chats:
        chat.search("boat")
        found.append(
            [cost(chat, counter, lambda chat=chat, n=n: chat.search(f"boat {named(n)} sails", k=k)) for n in range(5)]
        )
        fewer = cost(chat, counter, lambda chat=chat: chat.search(f"boat {named(3)} sails", k=1))
        assert fewer[0] == found[-1][3][0]
        assert fewer[1] < found[-1][3][1] / 3
    short, long = found
    assert short == long
    assert {tokens for *_, tokens in long} == {0}
    assert long[0][0] <= 4


def test_a_turn_with_search_costs_the_same(chats, counter):
    """Words are searched, the hits are read and put into the prompt."""
    found = []
    for chat in chats:
        turn(chat, 40_000, search=True)
        turns = [cost(chat, counter, lambda chat=chat, n=n: turn(chat, 40_001 + n, search=True)) for n in range(8)]
        found.append({statements for statements, *_ in turns})
    short, long = found
    assert max(long) <= max(short) + 3
    assert max(long) <= 35


def test_a_cold_session_is_opened_without_reading_its_transcript(chats, memory, counter):
    """After a restart the first prompt reads the window and the summary: no more than of a short chat."""
    for chat in chats:
        turn(chat, 60_000)
    memory.flush()
    memory._core.parts.residents.forget()  # as a new process finds it
    (short, few), (long, many) = (
        (cost(chat, counter, lambda chat=chat: chat.context(search=False)), len(chat.messages(view="window")))
        for chat in chats
    )
    assert long[0] == short[0] <= 10
    assert abs(long[1] - short[1]) <= 100 * (abs(few - many) + 1)
    assert long[1] < 100 * (many + 10)


def test_whole_transcripts_are_read_where_they_are_asked_for(chats, counter):
    """What the steps are a measure of: the transcript of the long chat takes a hundred times as many."""
    short, long = (cost(chat, counter, chat.messages) for chat in chats)
    assert long[1] > 50 * short[1]


@pytest.mark.parametrize("entries", [200, 2_000])
def test_a_search_embeds_its_question_and_asks_no_index(opened, monkeypatch, entries):
    """One question to the embedder, nothing of what is stored, and Chroma is not asked; whatever others have."""
    embedder, asked = CountingQueries(), []
    memory = opened(embedder=embedder)
    store = memory._core.parts.store
    query = store.query
    monkeypatch.setattr(store, "query", lambda *args, **options: asked.append(options) or query(*args, **options))
    for user in range(entries // 100):
        memory.session("chat", user_id=f"user-{user}").add([f"Boat {n} of the harbour" for n in range(100)])
    chat = memory.session("other", user_id="user-0")
    memory.flush()
    stored = len(embedder.texts)
    chat.search("boat")
    for n in range(5):
        chat.search(f"boat {n}")
    assert embedder.queries == ["boat", *(f"boat {n}" for n in range(5))]
    assert len(embedder.texts) == stored
    assert asked == []


@pytest.mark.parametrize("turns", [10, 200])
def test_a_turn_embeds_each_message_once(opened, turns):
    """In the background, in few calls; and the question, when there is one."""
    embedder = CountingQueries()
    memory = opened(embedder=embedder)
    chat = memory.session("chat", user_id="ada")
    for n in range(0, turns, 10):
        chat.add([m for k in range(10) for m in said(n + k)])
    memory.flush()
    embedder.texts.clear()
    turn(chat, turns)
    wait_until(lambda: memory.stats()["dirty"] == 0)
    assert sorted(embedder.texts) == sorted(m.content for m in said(turns))
    assert embedder.queries == []
    chat.context("Which boat?")
    assert embedder.queries == ["Which boat?"]
