"""What other packages keep, for `import`: chat histories of LangChain and LlamaIndex, memories of mem0.

Files are opened for reading only. Ids are made of what was said, where there are none, so that importing again adds nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from neuralflow_memory.errors import FormatError, InputError, MissingDependency
from neuralflow_memory.types import Message, Scope, utc

from .formats import Turn

_SQLITE = b"SQLite format 3\0"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
REDIS = ("redis://", "rediss://", "unix://")
PREFIX = "message_store:"
"""What LangChain puts before a session's id in Redis, by default."""


@dataclass(frozen=True, slots=True)
class Known:
    """A piece of knowledge, and whose it is: a user's, or a session's where no user is known."""

    id: str
    text: str
    user_id: str | None
    session_id: str | None = None
    agent_id: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    expires_at: datetime | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


Found = Turn | Known


def is_sqlite(file: Path) -> bool:
    """Whether it is a database of SQLite's."""
    with file.open("rb") as lines:
        return lines.read(len(_SQLITE)) == _SQLITE


def _wrong(file: Path | str, what: str, line: int = 0) -> FormatError:
    name = file.name if isinstance(file, Path) else file
    return FormatError(f"{name}: {what}", path=str(file), line=line)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _wrong(file, f"not JSON: {error}") from None


def _tables(db: sqlite3.Connection) -> dict[str, list[str]]:
    names = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
    return {
        name: [
            column for _, column, *_ in db.execute(f"SELECT * FROM pragma_table_info({_quoted(name, mark=chr(39))})")
        ]
        for (name,) in names
    }


def _quoted(name: str, *, mark: str = '"') -> str:
    return mark + name.replace(mark, 2 * mark) + mark


def _opened(file: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True))


def _when(value: Any) -> datetime | None:
    """A time as mem0 and LlamaIndex write it: ISO 8601, or seconds or nanoseconds since 1970."""
    if isinstance(value, int | float):
        return _EPOCH + (timedelta(microseconds=value // 1000) if value > 10**14 else timedelta(seconds=value))
    try:
        return utc(datetime.fromisoformat(value)) if value else None
    except (TypeError, ValueError):
        return None


class _Ids:
    """Ids for messages that have none, or one that another message of the session has, too."""

    def __init__(self) -> None:
        self._seen: Counter[bytes] = Counter()
        self._given: dict[bytes, bytes] = {}

    def of(self, session_id: str, said: Any, own: str | None) -> str:
        digest = _digest([session_id, said])
        if own:
            name = _digest([session_id, "id", own])
            if self._given.setdefault(name, digest) == digest:
                return own
        self._seen[digest] += 1
        return f"import-{digest.hex()}-{self._seen[digest]}"


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


# -- LangChain


def read_langchain(source: str, *, user_id: str | None = None, prefix: str = PREFIX) -> Iterator[Turn]:
    """Messages as LangChain's histories keep them.

    Of `SQLChatMessageHistory` a SQLite file, of `FileChatMessageHistory` a JSON file, whose name is the session's id, or a
    folder of them, of `RedisChatMessageHistory` the server's address.
    """
    ids = _Ids()
    for session_id, where, stored, at in _langchain(source, prefix=prefix):
        try:
            message = _from_langchain(json.loads(stored) if isinstance(stored, str | bytes) else stored)
            Scope(user_id=user_id, session_id=session_id)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise _wrong(where, f"not a message of LangChain's: {error}") from None
        said = {**message.payload["message"], "data": {**message.payload["message"]["data"], "id": None}}  # type: ignore[index]
        own = ids.of(session_id, said, message.id)
        yield Turn(user_id, session_id, replace(message, id=own, created_at=at))


def _from_langchain(stored: Any) -> Message:
    from langchain_core.messages import messages_from_dict

    from neuralflow_memory.langchain import from_langchain

    return from_langchain(messages_from_dict([stored])[0])


def _langchain(source: str, *, prefix: str) -> Iterator[tuple[str, str, Any, datetime | None]]:
    """Session, where it stands, the message's JSON and its time, if one is kept."""
    if source.startswith(REDIS):
        yield from _redis(source, prefix=prefix)
        return
    path = Path(source)
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        if is_sqlite(file):
            yield from _langchain_tables(file)
            continue
        stored = _json(file)
        if not isinstance(stored, list):
            raise _wrong(file, "a history of LangChain's is a JSON list of messages")
        for number, message in enumerate(stored, 1):
            yield file.stem, f"{file.name}, message {number}", message, None


def _langchain_tables(file: Path) -> Iterator[tuple[str, str, Any, datetime | None]]:
    with _opened(file) as db:
        named = [(name, columns) for name, columns in _tables(db).items() if {"session_id", "message"} <= {*columns}]
        if not named:
            raise _wrong(file, "there is no table with the columns session_id and message")
        for name, columns in named:
            at = "created_at" if "created_at" in columns else "NULL"
            query = f"SELECT rowid, session_id, message, {at} FROM {_quoted(name)} ORDER BY rowid"
            for number, session_id, message, when in db.execute(query):
                yield session_id, f"{file.name}, {name}, row {number}", message, _when(when)


def _redis(url: str, *, prefix: str) -> Iterator[tuple[str, str, Any, datetime | None]]:
    try:
        import redis
    except ImportError:
        raise MissingDependency("redis", "redis", "Reading histories from Redis") from None
    try:
        client = redis.Redis.from_url(url)
        for key in sorted(client.scan_iter(match=f"{prefix}*", _type="list")):
            session_id = key.decode().removeprefix(prefix)
            newest_first = client.lrange(key, 0, -1)
            for number, message in enumerate(reversed(newest_first), 1):
                yield session_id, f"{key.decode()}, message {number}", message, None
    except redis.RedisError as error:
        raise InputError(f"Redis can't be read: {error}; give its address, as redis://host:6379/0") from None


# -- LlamaIndex


def read_llama_index(source: str, *, user_id: str | None = None, prefix: str = "") -> Iterator[Turn]:  # noqa: ARG001
    """Messages as LlamaIndex's chat stores keep them; a key is a session's id.

    Of `SimpleChatStore` its JSON file; of `SQLAlchemyChatStore`, which `Memory` uses, and of `SQLiteChatStore` a SQLite
    file. Archived messages come in as such.
    """
    ids = _Ids()
    for key, where, stored, at, status in _llama_index(Path(source)):
        try:
            message = _from_llama_index(json.loads(stored) if isinstance(stored, str) else stored)
            Scope(user_id=user_id, session_id=key)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _wrong(where, f"not a message of LlamaIndex's: {error}") from None
        metadata = dict(message.metadata)
        if status not in (None, "active"):
            metadata["chat_store"] = status
        own = ids.of(key, [message.payload, None if at is None else at.isoformat()], None)
        yield Turn(user_id, key, replace(message, id=own, created_at=at, metadata=metadata))


def _from_llama_index(stored: Any) -> Message:
    try:
        from llama_index.core.llms import ChatMessage
    except ImportError:
        raise MissingDependency("llama-index-core", "llama-index", "Reading LlamaIndex's chat stores") from None
    from neuralflow_memory.llama_index import from_llama_index

    return from_llama_index(ChatMessage.model_validate(stored))


def _llama_index(file: Path) -> Iterator[tuple[str, str, Any, datetime | None, str | None]]:
    if not is_sqlite(file):
        stored = _json(file)
        stored = json.loads(stored) if isinstance(stored, str) else stored
        store = stored.get("store") if isinstance(stored, dict) else None
        if not isinstance(store, dict):
            raise _wrong(file, "a SimpleChatStore's file has its messages under 'store'")
        for key, messages in store.items():
            for number, message in enumerate(messages, 1):
                yield key, f"{file.name}, {key}, message {number}", message, None, None
        return
    with _opened(file) as db:
        found = False
        for name, columns in _tables(db).items():
            if {"key", "timestamp", "status", "data"} <= {*columns}:
                query = f"SELECT id, key, data, timestamp, status FROM {_quoted(name)} ORDER BY key, timestamp, id"
            elif {"id", "key", "value"} == {*columns}:
                query = f"SELECT id, key, value, NULL, NULL FROM {_quoted(name)} ORDER BY key, id"
            else:
                continue
            found = True
            for number, key, data, at, status in db.execute(query):
                yield key, f"{file.name}, {name}, row {number}", data, _when(at), status
        if not found:
            raise _wrong(file, "there is no table of a chat store in it")


# -- mem0

_OWN = ("id", "memory", "data", "hash", "user_id", "agent_id", "run_id", "created_at", "updated_at", "score")
_ALSO = ("text_lemmatized", "metadata", "categories", "expiration_date")


def read_mem0(source: str, *, user_id: str | None = None, prefix: str = "") -> Iterator[Found]:  # noqa: ARG001
    """Memories as mem0 keeps them, and its last messages.

    What `get_all()` returned, as JSON; its `history.db`; the `storage.sqlite` of its Qdrant collection; or a folder with
    these, such as `~/.mem0`. The history alone does not say whose they are: *user_id* does.
    """
    path = Path(source)
    if not path.is_dir():
        yield from _mem0(path, user_id=user_id)
        return
    stores = [
        p for p in sorted(path.rglob("storage.sqlite")) if not p.parent.name.endswith(("_entities", "migrations"))
    ]
    histories = sorted(path.rglob("history.db"))
    if not stores and not histories:
        raise _wrong(path, "there is neither a storage.sqlite nor a history.db in this folder")
    for store in stores:
        yield from _mem0(store, user_id=user_id)
    for history in histories:
        yield from (one for one in _mem0(history, user_id=user_id, known=not stores))


def _mem0(file: Path, *, user_id: str | None, known: bool = True) -> Iterator[Found]:
    if not is_sqlite(file):
        stored = _json(file)
        listed = stored.get("results", stored.get("memories")) if isinstance(stored, dict) else stored
        if not isinstance(listed, list):
            raise _wrong(file, "what get_all() returns has its memories under 'results'")
        for number, item in enumerate(listed, 1):
            yield _memory(item, f"{file.name}, memory {number}", user_id=user_id)
        return
    with _opened(file) as db:
        tables = _tables(db)
        if {"id", "point"} <= {*tables.get("points", ())}:
            for number, (point,) in enumerate(db.execute("SELECT point FROM points ORDER BY rowid"), 1):
                yield _memory(_point(point, file), f"{file.name}, point {number}", user_id=user_id)
            return
        if "memory_id" not in tables.get("history", ()) and "messages" not in tables:
            raise _wrong(file, "there is neither a history of mem0's in it, nor points of Qdrant's")
        if known and "history" in tables:
            yield from _history(db, file, user_id=user_id)
        if "session_scope" in tables.get("messages", ()):
            yield from _messages(db, file, user_id=user_id)


def _memory(item: Any, where: str, *, user_id: str | None) -> Known:
    """One memory of `get_all()`, or the payload of a point."""
    text = item.get("memory", item.get("data")) if isinstance(item, Mapping) else None
    if not isinstance(text, str) or not text.strip() or not isinstance(item.get("id"), str | int):
        raise _wrong(where, "a memory has an id and a text, under 'memory' or 'data'")
    nested = item["metadata"] if isinstance(item.get("metadata"), Mapping) else {}
    metadata = {k: v for k, v in item.items() if k not in (*_OWN, *_ALSO) and v is not None} | dict(nested)
    whose = item.get("user_id") or user_id
    run_id = item.get("run_id")
    if whose is not None and run_id is not None:
        metadata["run_id"] = run_id
    if whose is None and run_id is None:
        raise _wrong(where, "it does not say whose it is: pass --user")
    tags = item.get("categories") or ()
    return Known(
        id=str(item["id"]),
        text=text,
        user_id=whose,
        session_id=None if whose is not None else run_id,
        agent_id=item.get("agent_id"),
        created_at=_when(item.get("created_at")),
        updated_at=_when(item.get("updated_at")),
        expires_at=_when(item.get("expiration_date")),
        tags=tuple(map(str, tags if isinstance(tags, list | tuple) else ())),
        metadata=metadata,
    )


def _history(db: sqlite3.Connection, file: Path, *, user_id: str | None) -> Iterator[Known]:
    """The memories that are left after all that the history tells."""
    query = (
        "SELECT memory_id, new_memory, event, created_at, updated_at, is_deleted FROM history h WHERE rowid = "
        "(SELECT max(rowid) FROM history WHERE memory_id = h.memory_id) ORDER BY rowid"
    )
    for memory_id, text, event, created_at, updated_at, deleted in db.execute(query):
        if event == "DELETE" or deleted or not text:
            continue
        first = "SELECT created_at FROM history WHERE memory_id = ? ORDER BY rowid LIMIT 1"
        begun = db.execute(first, (memory_id,)).fetchone()[0]
        item = {"id": memory_id, "memory": text, "created_at": begun or created_at, "updated_at": updated_at}
        yield _memory(item, f"{file.name}, memory {memory_id}", user_id=user_id)


def _messages(db: sqlite3.Connection, file: Path, *, user_id: str | None) -> Iterator[Turn]:
    for own_id, scope, role, content, name, at in db.execute(
        "SELECT id, session_scope, role, content, name, created_at FROM messages ORDER BY created_at, rowid"
    ):
        named = {key: unquote(value) for key, _, value in (part.partition("=") for part in (scope or "").split("&"))}
        if not content or not content.strip():
            continue
        try:
            message = Message(role, content, id=own_id, name=name or None, created_at=_when(at))
        except InputError as error:
            raise _wrong(file, f"message {own_id}: {error}") from None
        yield Turn(named.get("user_id") or user_id, named.get("run_id") or named.get("agent_id") or "mem0", message)


class _Plain(pickle.Unpickler):
    """Reads the values of a pickle, and makes none of its objects: nothing in it can be called."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ARG002
        return type(name, (_Stub,), {})


class _Stub:
    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> _Stub:  # noqa: PYI034
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _point(blob: bytes, file: Path) -> dict[str, Any]:
    """The payload of a point that Qdrant's local mode has pickled, with its id."""
    try:
        found = _Plain(io.BytesIO(blob)).load().state
        fields = found["__dict__"] if isinstance(found, dict) and "__dict__" in found else found
        return {**fields["payload"], "id": fields["id"]}
    except Exception as error:  # a pickle that is cut or strange may raise anything
        raise _wrong(file, f"a point can't be read ({type(error).__name__}: {error})") from None


Reader = Callable[..., Iterator[Found]]
READERS: Mapping[str, Reader] = {"langchain": read_langchain, "llama-index": read_llama_index, "mem0": read_mem0}


def lines_of(known: Iterable[Known], *, now: datetime) -> Iterator[dict[str, Any]]:
    """Knowledge as records that `Memory.import_` takes."""
    for number, one in enumerate(known, 1):
        made = one.created_at or one.updated_at or now
        yield {
            "kind": "entry",
            "user_id": one.user_id,
            "session_id": one.session_id,
            "knowledge": True,
            "agent_id": one.agent_id,
            "id": one.id,
            "type": "long_term",
            "seq": number,
            "content": one.text,
            "metadata": dict(one.metadata) or None,
            "tags": list(one.tags),
            "source": "mem0",
            "provenance": "told",
            "created_at": made.isoformat(),
            "written_at": now.isoformat(),
            "updated_at": (one.updated_at or made).isoformat(),
            "expires_at": None if one.expires_at is None else one.expires_at.isoformat(),
            "version": 1,
        }


__all__ = ["PREFIX", "READERS", "REDIS", "Found", "Known", "is_sqlite", "lines_of"]
