"""A session's search as a LangChain retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from neuralflow_memory import Hit, MemoryType, Session


class NeuralFlowRetriever(BaseRetriever):
    """Finds what was said and remembered, best first.

    A document's `id` is the entry's key; its metadata holds `score` (0..1), `id`, `key`, `type`, `role`, `name`,
    `session_id` and `created_at` (ISO 8601, UTC), beside the entry's own metadata.

    Attributes:
        session: Whose memory is searched.
        k: How many documents, at most; `invoke(query, k=...)` overrides it.
        filter: A filter expression over entry fields and metadata.
        types: The kinds of memory; all by default.
        within: "session", "user" or "agent"; by default the user where one is known.
    """

    session: Session
    k: int = 8
    filter: Mapping[str, Any] | None = None
    types: Sequence[MemoryType] | None = None
    within: Literal["session", "user", "agent"] | None = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002  # the host passes it
        k: int | None = None,
    ) -> list[Document]:
        return [_document(hit) for hit in self.session.search(query, **self._options(k))]

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002
        k: int | None = None,
    ) -> list[Document]:
        return [_document(hit) for hit in await self.session.asearch(query, **self._options(k))]

    def _options(self, k: int | None) -> dict[str, Any]:
        count = self.k if k is None else k
        return {"k": count, "filter": self.filter, "types": self.types, "within": self.within}


def _document(hit: Hit) -> Document:
    entry = hit.entry
    facts = {
        "score": hit.score,
        "id": entry.id,
        "key": entry.key,
        "type": entry.type.value,
        "role": entry.role,
        "name": entry.name,
        "session_id": entry.scope.session_id,
        "created_at": entry.created_at.isoformat(),
    }
    return Document(page_content=entry.content, id=entry.key, metadata={**entry.metadata, **facts})


__all__ = ["NeuralFlowRetriever"]
