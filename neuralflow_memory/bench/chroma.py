"""Chroma by itself: the vectors, documents and metadata that an application would keep in it, and its own queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from .vectors import Vectors

BATCH = 1_000


class RawChroma:
    """One collection on this machine, made as `ChromaStore` makes its own; or the one that a memory has made."""

    def __init__(self, folder: Path, *, collection: str = "raw") -> None:
        import chromadb
        from chromadb.config import Settings

        self._client: Any = chromadb.PersistentClient(str(folder), settings=Settings(anonymized_telemetry=False))
        self._collection: Any = self._client.get_or_create_collection(
            collection, embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
        )
        self._next = 0

    def upsert(self, texts: Sequence[str], vectors: Vectors, *, user: str) -> None:
        """Entries of one user, with the six metadata that an application would filter by, in batches of 1,000."""
        for start in range(0, len(texts), BATCH):
            part = list(texts[start : start + BATCH])
            numbers = range(self._next, self._next + len(part))
            self._next += len(part)
            self._collection.upsert(
                ids=[f"{n:032x}" for n in numbers],
                embeddings=vectors[start : start + BATCH],
                documents=part,
                metadatas=[
                    {"user": user, "session": f"s{n // 20}", "role": "user", "seq": n, "created_at": n, "version": 1}
                    for n in numbers
                ],
            )

    def query(self, vector: Vectors, *, user: str | None = None, k: int = 10) -> Any:
        """The nearest *k*, of one user or of all, with what is needed to show them."""
        where = {} if user is None else {"where": {"user": user}}
        return self._collection.query(
            query_embeddings=[vector], n_results=k, include=["documents", "metadatas", "distances"], **where
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


__all__ = ["BATCH", "RawChroma"]
