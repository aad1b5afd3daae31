"""`ChromaStore`: entries with their vectors, documents and filterable metadata in one Chroma collection.

It can always be rebuilt from the ledger; what it returns is ids and distances, never the word on what exists.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FolderError, MissingDependency, StorageError, StorageFull

try:
    import chromadb
    from chromadb.api.shared_system_client import SharedSystemClient
    from chromadb.config import Settings as ChromaSettings
except ImportError as error:  # pragma: no cover - a base dependency
    raise MissingDependency("chromadb", "all", "The vector index") from error

COLLECTION = "entries"
_BATCH = 1000  # Chroma refuses more than 5,461 rows a call, and holds its lock for the length of one


class ChromaStore:
    """An `EntryStore` on embedded Chroma. Cosine is fixed when the collection is made, and checked on open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._replacing = threading.Lock()
        """Held while `reset` swaps the collection, and by reads, which must not meet the moment between the two."""
        with self._translated():
            try:
                # A new Settings object for each client: Chroma changes the one it is given.
                self._client = chromadb.PersistentClient(str(path), settings=ChromaSettings(anonymized_telemetry=False))
            except BaseException:
                _forget_failed(path)
                raise
            self._collection = self._open()

    def _open(self, **metadata: str | int) -> Any:
        collection = self._client.get_or_create_collection(
            COLLECTION,
            embedding_function=None,
            configuration={"hnsw": {"space": "cosine"}},
            metadata=metadata or None,
        )
        space = (collection.configuration_json.get("hnsw") or {}).get("space")
        if space != "cosine":
            # get_or_create returns an existing collection whatever was asked for.
            raise FolderError(
                f"the collection {COLLECTION!r} in {self._path} measures by {space}, not by cosine; it was not made by this "
                "package: choose another folder, or rebuild it with reindex()",
                path=str(self._path),
            )
        return collection

    @property
    def model_id(self) -> str | None:
        """The embedding model that the collection was made for, None while it is new."""
        found = (self._collection.metadata or {}).get("model_id")
        return None if found is None else str(found)

    def upsert(
        self,
        keys: Sequence[str],
        vectors: Any,
        documents: Sequence[str],
        metadatas: Sequence[Mapping[str, str | int | float | bool]],
    ) -> None:
        with self._translated():
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
        with self._translated():
            for start in range(0, len(keys), _BATCH):
                self._collection.delete(ids=list(keys[start : start + _BATCH]))

    def query(self, vector: Any, *, partition: str, k: int) -> list[tuple[str, float]]:
        with self._translated(), self._replacing:
            found = self._collection.query(
                query_embeddings=[vector], n_results=k, where={"partition": partition}, include=["distances"]
            )
        return [(key, 1.0 - d) for key, d in zip(found["ids"][0], found["distances"][0], strict=True)]

    def count(self, *, partition: str | None = None) -> int:
        with self._translated(), self._replacing:
            if partition is None:
                return int(self._collection.count())
            return len(self._collection.get(where={"partition": partition}, include=[])["ids"])

    def keys(self) -> list[str]:
        with self._translated(), self._replacing:
            return list(self._collection.get(include=[])["ids"])

    def reset(self, *, model_id: str, dimensions: int) -> None:
        with self._translated(), self._replacing:
            self._client.delete_collection(COLLECTION)
            self._collection = self._open(model_id=model_id, dimensions=dimensions)

    def close(self) -> None:
        close: Callable[[], None] | None = getattr(self._client, "close", None)
        if close is not None:
            close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn Chroma's errors into this package's."""
        try:
            yield
        except (StorageError, MissingDependency):
            raise
        except Exception as error:
            where = str(self._path)
            if "disk is full" in str(error) or getattr(error, "errno", None) == 28:
                raise StorageFull(
                    f"no space left for the vector index in {where}; entries wait in the ledger: free some space",
                    path=where,
                ) from error
            raise StorageError(f"Chroma failed in {where}: {error}", path=where) from error


def _forget_failed(path: Path) -> None:
    """Let the folder be opened again once it is mended: Chroma keeps what it failed to start, and returns it next time."""
    if not SharedSystemClient._identifier_to_refcount.get(str(path)):
        SharedSystemClient._identifier_to_system.pop(str(path), None)


__all__ = ["COLLECTION", "ChromaStore"]
