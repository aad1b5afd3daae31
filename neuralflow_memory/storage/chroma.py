"""`ChromaStore`: entries with their vectors, documents and filterable metadata in one Chroma collection.

It can always be rebuilt from the ledger; what it returns is ids and distances, never the word on what exists.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import Chroma
from ..errors import FolderError, MissingDependency, StorageError, StorageFull
from ..protocols import Ledger
from ..rules.breaker import Breaker

try:
    import chromadb
    from chromadb.api.client import Client
    from chromadb.api.shared_system_client import SharedSystemClient
    from chromadb.config import Settings as ChromaSettings
    from chromadb.errors import AuthorizationError, ChromaAuthError, ChromaError, NotFoundError, RateLimitError
except ImportError as error:  # pragma: no cover - a base dependency
    raise MissingDependency("chromadb", "all", "The vector index") from error

_BATCH = 300  # Chroma Cloud refuses more rows a call, others more than 5,461; and one holds its lock for the length of a call
_LONGEST_DOCUMENT = 16_384  # bytes, in Chroma Cloud
_LINKS = 140  # bytes of a row in the file of vectors, beside its numbers
_WORN, _WORTH_IT = 2, 1000  # so many times more rows than there are entries, and that many entries at least
_TIMEOUT = (2.0, 10.0, 10.0, 10.0)  # seconds: to connect, read, write, and get a connection of the pool
_CALLERS_TIMEOUT = {"connect": 2.0, "read": 2.0, "write": 2.0, "pool": 2.0}
_CALLERS = ("/query", "/count")  # what is asked while a caller waits: the rest is the indexer's


class ChromaStore:
    """An `EntryStore` on Chroma. Cosine is fixed when the collection is made, and checked on open.

    Embedded, it is opened at once. A server need not be there: `check`, which is the indexer's to call, opens it, and opens
    it anew where it lost its data. Callers wait two seconds for a server at most, and not at all while it is known to be down.
    """

    def __init__(self, path: Path, *, options: Chroma | None = None, ledger: Ledger | None = None) -> None:
        """Open the index in the folder *path*, unless *options* say that it is served; *ledger* says which one is its own."""
        options = options or Chroma()
        self.url = options.url
        self.down: str | None = None
        self._options = options
        self._ledger = ledger
        self._owner = "" if ledger is None else ledger.id
        self._where = options.url or str(path)
        self._client: Any = None
        self._collection: Any = None
        self._seen: Any = None
        """The collection that `check` found last."""
        self._reads = Breaker()
        # Held while `reset` swaps the collection, and by reads, which must not meet the moment between the two. Those of a
        # server rather fail than wait for it.
        self._replacing: AbstractContextManager[Any] = threading.Lock() if self.url is None else nullcontext()
        if self.url is not None:
            self.down = f"Chroma at {self.url} was not asked yet"
            return
        with self._translated():
            self._client = _embedded(path)
            self._collection = self._open()

    def check(self, *, create: bool = True) -> bool:
        if self.url is not None:
            try:
                if self._client is None:
                    self._client = _connected(self._options, self.url)
                self._collection = self._open(create=create)
            except FolderError as error:
                self.down = str(error)
                raise
            except Exception as error:
                if isinstance(error, NotFoundError) and not create:
                    self.down = f"{self._said(error)}, at {self.url}: the process that indexes makes it"
                    return False
                self.down = self._told(error)
                raise StorageError(self.down, path=self._where) from self._harmless(error)
        seen, self._seen = self._seen, self._collection.id
        if seen == self._seen and self.down is None:
            return False
        self._reads.succeeded()
        self.down = None
        return True

    def _open(self, *, create: bool = True, **metadata: str | int) -> Any:
        name = self._options.collection
        try:
            collection = self._client.get_collection(name, embedding_function=None)
        except NotFoundError:
            if not create:
                raise
            collection = self._client.get_or_create_collection(
                name,
                embedding_function=None,
                configuration={"hnsw": {"space": "cosine"}},
                metadata={"ledger": self._owner, **metadata},
            )
        # Either may return what somebody else has made.
        if self.url is not None and (collection.metadata or {}).get("ledger") != self._owner:
            raise FolderError(
                f"the collection {name!r} at {self._where} belongs to another memory, and was left as it is; give this one a "
                "collection of its own: chroma.collection",
                path=self._where,
            )
        space = (collection.configuration_json.get("hnsw") or {}).get("space")
        if space != "cosine":
            raise FolderError(
                f"the collection {name!r} in {self._where} measures by {space}, not by cosine; it was not made by this "
                "package: choose another folder, or rebuild it with reindex()",
                path=self._where,
            )
        return collection

    @property
    def model_id(self) -> str | None:
        """The embedding model that the collection was made for, None while it is new, or not the one of the marks."""
        with self._translated():
            found = (self._collection.metadata or {}).get("model_id")
            known = None if self._ledger is None else self._ledger.collection
            ours = known in (None, str(self._collection.id))
        return str(found) if ours and found is not None else None

    def upsert(
        self,
        keys: Sequence[str],
        vectors: Any,
        documents: Sequence[str],
        metadatas: Sequence[Mapping[str, str | int | float | bool]],
    ) -> None:
        if _is_cloud(self.url):
            documents = [d.encode()[:_LONGEST_DOCUMENT].decode(errors="ignore") for d in documents]
        with self._indexing():
            for start in range(0, len(keys), _BATCH):
                part = slice(start, start + _BATCH)
                ids = list(keys[part])
                new = [dict(m) for m in metadatas[part]]
                # Chroma merges metadata on upsert; a key that is gone must be set to None to go.
                known = self._collection.get(ids=ids, include=["metadatas"])
                old = dict(zip(known["ids"], known["metadatas"] or [], strict=True))
                for i, key in enumerate(ids):
                    for stale in (old.get(key) or {}).keys() - new[i].keys():
                        new[i][stale] = None  # type: ignore[assignment]
                self._collection.upsert(
                    ids=ids, embeddings=vectors[part], documents=list(documents[part]), metadatas=new
                )

    def delete(self, keys: Sequence[str]) -> None:
        with self._indexing():
            for start in range(0, len(keys), _BATCH):
                self._collection.delete(ids=list(keys[start : start + _BATCH]))

    def query(self, vector: Any, *, partition: str, k: int) -> list[tuple[str, float]]:
        with self._reading(), self._replacing:
            found = self._asked(
                lambda collection: collection.query(
                    query_embeddings=[vector], n_results=k, where={"partition": partition}, include=["distances"]
                )
            )
        return [(key, 1.0 - d) for key, d in zip(found["ids"][0], found["distances"][0], strict=True)]

    def count(self, *, partition: str | None = None) -> int:
        with self._reading(), self._replacing:
            if partition is None:
                return int(self._asked(lambda collection: collection.count()))
            return len(self._asked(lambda c: c.get(where={"partition": partition}, include=[]))["ids"])

    def keys(self) -> list[str]:
        with self._translated(), self._replacing:
            return list(self._asked(lambda collection: collection.get(include=[]))["ids"])

    def _asked(self, question: Callable[[Any], Any]) -> Any:
        """What the collection answers; if another process has made it anew, the new one does."""
        try:
            return question(self._collection)
        except NotFoundError:
            if self.url is None:
                raise
            self._collection = self._open(create=False)
            return question(self._collection)

    def reset(self, *, model_id: str, dimensions: int) -> None:
        with self._indexing(), self._replacing:
            if self.url is not None:
                self._open()  # raises if it has become another memory's
            self._client.delete_collection(self._options.collection)
            self._collection = self._open(model_id=model_id, dimensions=dimensions)
        if self._ledger is not None:
            self._ledger.collection = str(self._collection.id)

    def clear(self) -> bool:
        """Close, and remove the folder, if most of what its files have room for is gone; whether that was so."""
        path = Path(self._where)
        room = sum(file.stat().st_size for file in path.glob("*/data_level0.bin"))
        row = 4 * int((self._collection.metadata or {}).get("dimensions", 0)) + _LINKS
        if self.url is not None or room < _WORN * row * max(self._collection.count(), _WORTH_IT):
            return False
        self.close()
        shutil.rmtree(path)
        return True

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn Chroma's errors into this package's; raise at once while it is down."""
        if self.down is not None:
            raise StorageError(self.down, path=self._where)
        try:
            yield
        except (StorageError, MissingDependency):
            raise
        except Exception as error:
            where = self._where
            if "disk is full" in str(error) or getattr(error, "errno", None) == 28:
                raise StorageFull(
                    f"no space left for the vector index in {where}; entries wait in the ledger: free some space",
                    path=where,
                ) from error
            raise StorageError(
                f"Chroma failed in {where}: {self._said(error)}", path=where, away=_is_away(error)
            ) from self._harmless(error)

    @contextmanager
    def _indexing(self) -> Iterator[None]:
        """What the indexer does: notes that a server is down, and leaves it alone until `check` finds it back."""
        try:
            with self._translated():
                yield
        except StorageError as error:
            if self.url is not None and getattr(error, "away", False):
                self.down = str(error)
            raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What a caller waits for: a server that keeps failing, or is too slow, is left alone for a while."""
        if self.url is None or self.down is not None:
            with self._translated():
                yield
            return
        if not self._reads.enter(time.time()):
            raise StorageError(
                f"Chroma at {self.url} failed several times and is left alone for a while", path=self.url
            )
        try:
            with self._translated():
                yield
        except BaseException:
            self._reads.failed(time.time())
            raise
        self._reads.succeeded()

    def _told(self, error: BaseException) -> str:
        return (
            f"Chroma at {self.url} can't be used ({self._said(error)}); chat and search go on, and the entries wait in the "
            "ledger: see that the server runs, and that chroma.url, chroma.token, chroma.tenant "
            f"({self._options.tenant}) and chroma.database ({self._options.database}) are right"
        )

    def _said(self, error: BaseException) -> str:
        """The text of *error*, in a line, without the token, which a proxy may repeat."""
        text = " ".join(str(error).split())
        for secret in self._secrets():
            text = text.replace(secret, "***")
        return text[:300] or type(error).__name__

    def _harmless(self, error: Exception) -> Exception | None:
        """*error*, to be shown as the cause, unless it repeats the token."""
        return None if any(secret in str(error) for secret in self._secrets()) else error

    def _secrets(self) -> list[str]:
        return [] if self._options.token is None else [self._options.token.get_secret_value()]


class _Client(Client):
    """Chroma's client, whose requests would wait for ever: it sets no timeout, and asks while it is being made."""

    def get_user_identity(self) -> Any:
        _limit(self._server)
        return super().get_user_identity()

    def _validate_tenant_database(self, tenant: str, database: str) -> None:
        """Nothing: the first use tells, and what is made for this check is not given back when it fails."""

    def close(self) -> None:
        system = self._system
        super().close()
        for client in (self, self._admin_client):
            vars(client)["_server"]._session.close()
        known = SharedSystemClient._identifier_to_system
        for identifier in [
            i for i, other in list(known.items()) if other is system
        ]:  # a second entry, never given back
            known.pop(identifier, None)


def _limit(server: Any) -> None:
    """Give each request of a client's server API its time."""

    def hurry(request: Any) -> None:
        if request.url.path.endswith(_CALLERS):
            request.extensions["timeout"] = _CALLERS_TIMEOUT

    server._session.timeout = _TIMEOUT
    server._session.event_hooks = {"request": [hurry]}


def _connected(options: Chroma, url: str) -> Any:
    """A client of the server at *url*; raises what Chroma raises if it does not answer."""
    headers = {}
    if options.token is not None:
        token = options.token.get_secret_value()
        headers["X-Chroma-Token"] = token
        if not _is_cloud(url):  # there is only one header that Cloud knows; proxies mostly know the other
            headers["Authorization"] = f"Bearer {token}"
    settings = ChromaSettings(
        anonymized_telemetry=False,
        chroma_api_impl="chromadb.api.fastapi.FastAPI",
        chroma_server_host=url,
        chroma_server_http_port=urlsplit(url).port or 0,  # which Chroma wants to have; that of the address counts
        chroma_server_ssl_enabled=url.startswith("https:"),
        chroma_server_headers=headers,
        # A token of Cloud is for one tenant and mostly one database, which then need not be named.
        chroma_overwrite_singleton_tenant_database_access_from_auth=_is_cloud(url),
    )
    return _Client(tenant=options.tenant, database=options.database, settings=settings)


def _is_cloud(url: str | None) -> bool:
    return url is not None and (urlsplit(url).hostname or "").endswith(".trychroma.com")


def _is_away(error: Exception) -> bool:
    """Whether a server is to blame for *error*, or what stands before it, rather than what was sent."""
    if isinstance(error, ChromaError):
        return isinstance(error, ChromaAuthError | AuthorizationError | NotFoundError | RateLimitError)
    response = getattr(error.__context__, "response", None)  # of a proxy; the server's own errors are Chroma's
    if response is not None:
        return response.status_code >= 500 or response.status_code in (401, 403, 404, 408, 429)
    return not isinstance(error, ValueError | TypeError)


def _embedded(path: Path) -> Any:
    try:
        # A new Settings object for each client: Chroma changes the one it is given.
        return chromadb.PersistentClient(str(path), settings=ChromaSettings(anonymized_telemetry=False))
    except BaseException:
        _forget_failed(path)
        raise


def _forget_failed(path: Path) -> None:
    """Let the folder be opened again once it is mended: Chroma keeps what it failed to start, and returns it next time."""
    if not SharedSystemClient._identifier_to_refcount.get(str(path)):
        SharedSystemClient._identifier_to_system.pop(str(path), None)


__all__ = ["ChromaStore"]
