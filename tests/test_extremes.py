"""Whatever is passed, what comes out is this package's own errors, and nothing is half-written."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from conftest import rows

from neuralflow_memory import Message, NeuralFlowError

EAST, WEST = timezone(timedelta(hours=5)), timezone(-timedelta(hours=5))
NASTY = {
    "2**63": 2**63,
    "10**400": 10**400,
    "10**5000": 10**5000,  # longer than Python writes an integer
    "-1": -1,
    "True": True,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "text": "5",
    "None": None,
    "list": [],
    "mapping": {},
    "bytes": b"x",
    "half a pair": "\ud800",
    "before year 1": datetime(1, 1, 1, tzinfo=EAST),
    "after year 9999": datetime(9999, 12, 31, 23, 59, tzinfo=WEST),
    "naive min": datetime.min,
    "ISO before year 1": "0001-01-01T00:00:00+05:00",
    "object": object(),
}
VERBS = {
    "query": lambda s, v: s.search(v),
    "k": lambda s, v: s.search("hello", k=v),
    "types": lambda s, v: s.search("hello", types=v),
    "a type": lambda s, v: s.search("hello", types=[v]),
    "filter": lambda s, v: s.search("hello", filter=v),
    "a filter's value": lambda s, v: s.search("hello", filter={"importance": v}),
    "a filter's bound": lambda s, v: s.search("hello", filter={"metadata.n": {"$gt": v}}),
    "a filter's time": lambda s, v: s.search("hello", filter={"created_at": {"$gt": v}}),
    "a filter's list": lambda s, v: s.search("hello", filter={"role": {"$in": v}}),
    "since": lambda s, v: s.search("hello", since=v),
    "until": lambda s, v: s.search("hello", until=v),
    "within": lambda s, v: s.search("hello", within=v),
    "last": lambda s, v: s.messages(last=v),
    "view": lambda s, v: s.messages(view=v),
    "limit": lambda s, v: s.entries.list(limit=v),
    "after": lambda s, v: s.entries.list(after=v),
    "since of a list": lambda s, v: s.entries.list(since=v),
    "types of a list": lambda s, v: s.entries.list(types=v),
    "get": lambda s, v: s.entries.get(v),
    "count": lambda s, v: s.entries.count(filter={"seq": v}),
    "max_tokens": lambda s, v: s.context(max_tokens=v),
    "reserve_tokens": lambda s, v: s.context(reserve_tokens=v),
    "a context's query": lambda s, v: s.context(v),
    "overflow": lambda s, v: s.context(overflow=v),
    "compact": lambda s, v: s.compact(max_tokens=v),
    "report_usage": lambda s, v: s.report_usage("m", v),
    "a model's name": lambda s, v: s.report_usage(v, 5),
    "count_tokens": lambda s, v: s.memory.count_tokens(v),
    "sessions": lambda s, v: s.memory.sessions(user_id=v),
    "session": lambda s, v: s.memory.session(v, user_id="ada").messages(),
    "tasks": lambda s, v: s.tasks(status=v),
}
WRITES = {
    "add": lambda s, v: s.add(v),
    "an id": lambda s, v: s.add(Message("user", "x", id=v)),
    "created_at": lambda s, v: s.add(Message("user", "x", created_at=v)),
    "metadata": lambda s, v: s.add(Message("user", "x", metadata={"k": v})),
    "payload": lambda s, v: s.add(Message("user", "x", payload={"k": v})),
    "tool_calls": lambda s, v: s.add(Message("assistant", "x", tool_calls=v)),
    "args": lambda s, v: s.add(Message("assistant", "x", tool_calls=[{"id": "c", "name": "n", "args": {"a": v}}])),
    "content": lambda s, v: s.add(Message("user", v)),
    "a block": lambda s, v: s.add(Message("user", [{"type": "image", "n": v}])),
    "on_conflict": lambda s, v: s.add("x", on_conflict=v),
    "delete": lambda s, v: s.entries.delete(v),
    "update importance": lambda s, v: s.entries.update("m1", importance=v),
    "update metadata": lambda s, v: s.entries.update("m1", metadata=v),
    "update tags": lambda s, v: s.entries.update("m1", tags=v),
    "update expires_at": lambda s, v: s.entries.update("m1", expires_at=v),
    "remember": lambda s, v: s.remember(v),
    "remember until": lambda s, v: s.remember("t", expires_at=v),
    "remember type": lambda s, v: s.remember("t", type=v),
    "pin": lambda s, v: s.pin(v),
    "replace": lambda s, v: s.replace(v),
    "task": lambda s, v: s.task(v).start(),
}


@pytest.fixture
def chat(opened):
    chat = opened(embedder="none").session("chat", user_id="ada")
    chat.add(Message("user", "hello there", id="m1"))
    return chat


@pytest.mark.parametrize("verb", [*VERBS, *WRITES])
def test_only_errors_of_this_package_come_out(chat, verb):
    """A value is taken or refused by name, however odd; what is refused leaves all rows as they were."""
    call = {**VERBS, **WRITES}[verb]
    for name, value in NASTY.items():
        before = rows(chat.memory)
        try:
            call(chat, value)
        except NeuralFlowError:
            assert rows(chat.memory) == before, f"{name} was refused and half-written"
        if verb in VERBS:
            assert rows(chat.memory) == before, name
    assert chat.memory.stats(verify=True)["integrity"] == "ok"


def test_times_beyond_utc_are_its_first_and_last(chat):
    """A zone may move a time out of what a datetime holds; it is kept as the nearest one."""
    early, late = datetime(1, 1, 1, tzinfo=EAST), datetime(9999, 12, 31, 23, tzinfo=WEST)
    chat.add([Message("user", "long ago", created_at=early), Message("user", "far off", created_at=late)])
    found = [m.created_at for m in chat.messages(last=2)]
    assert found == [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)]
    assert len(chat.search("long ago far off hello", since=early, until=late)) == 3


def test_entries_can_be_asked_for_by_every_field(chat):
    """What is pinned, by key, by size."""
    chat.add(Message("user", "pinned", id="p"))
    chat.pin("p")
    key = chat.entries.get("p").key
    for condition in ({"pinned": True}, {"key": key}, {"tokens": {"$gt": 0}, "id": "p"}):
        assert [e.id for e in chat.entries.list(filter=condition)] == ["p"]
        assert [h.entry.id for h in chat.search("pinned", filter=condition)] == ["p"]
        assert chat.entries.count(filter=condition) == 1
