"""What users may supply in place of our parts. Any object with these methods fits; nothing is inherited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

from .types import Message, Scope

Clock = Callable[[], datetime]
"""Returns the current time, aware, in UTC."""


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors. LangChain's method names, so any LangChain `Embeddings` fits as it is.

    A `model_id` attribute names the model, so that vectors of two models never mix; without one, the attributes
    `model_name` or `model` are tried, then the class's name is taken.
    """

    def embed_documents(self, texts: list[str]) -> Sequence[Sequence[float]]:
        """One vector per text, all of one length. Called from worker threads, one call at a time."""
        ...

    def embed_query(self, text: str) -> Sequence[float]:
        """The vector of a question, comparable by cosine. May run beside `embed_documents`."""
        ...


@runtime_checkable
class TokenCounter(Protocol):
    """Counts tokens of plain text; the overhead of messages is added by `rules.budget`."""

    name: str
    """Identifies the tokenizer; stored counts are only reused under the same name."""
    exact: bool
    """False when `count` is an estimate."""

    def count(self, text: str) -> int:
        """Tokens in *text*; special-token text counts as ordinary text. Thread-safe."""
        ...


@runtime_checkable
class Summarizer(Protocol):
    """Writes the running summary of a conversation."""

    name: str

    def summarize(self, messages: Sequence[Message], *, previous: str, max_tokens: int) -> str:
        """Return a summary of *previous* (the summary so far, may be empty) and of *messages*, which followed it.

        At most *max_tokens* long, in the language of the chat. Raises `SummarizerError` rather than return
        something empty or cut off. Called in the background, off the storage workers.
        """
        ...


@runtime_checkable
class AccessPolicy(Protocol):
    """Says who may do what."""

    def allows(self, principal: str | None, action: str, scope: Scope) -> bool:
        """Whether *principal* (None: the embedding application itself) may do *action* in *scope*.

        Actions: `read`, `write`, `delete`.
        """
        ...


class EntryStore(Protocol):
    """A vector index of entries: ids and distances only. What exists, and its text, is the ledger's to say.

    Every call names the `partition` (a stable, opaque text per tenant and user, or per userless session); no store is
    ever asked without one.
    """

    def upsert(
        self,
        keys: Sequence[str],
        vectors: Any,
        documents: Sequence[str],
        metadatas: Sequence[Mapping[str, str | int | float | bool]],
    ) -> None:
        """Write entries whole: a repeated key replaces vector, document and all of its metadata.

        *vectors* is a float32 array of shape (n, dimensions); each metadata holds `partition`.
        """
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove entries; unknown keys are no error."""
        ...

    def query(self, vector: Any, *, partition: str, k: int) -> list[tuple[str, float]]:
        """The *k* nearest keys of *partition* with their cosine similarity, best first."""
        ...

    def count(self, *, partition: str | None = None) -> int:
        """How many entries it holds."""
        ...

    def keys(self) -> list[str]:
        """Every key it holds."""
        ...

    def reset(self, *, model_id: str, dimensions: int) -> None:
        """Drop everything and start anew for vectors of this model."""
        ...

    def close(self) -> None: ...


__all__ = ["AccessPolicy", "Clock", "Embedder", "EntryStore", "Summarizer", "TokenCounter"]
