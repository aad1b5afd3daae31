"""Parts for tests of code that uses a memory: an embedder and a clock without model, network or surprises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from .types import utc

_WORD = re.compile(r"\w+")


class HashingEmbedder:
    """An `Embedder` that hashes words: texts are as near as the words they share, the same on every machine.

    Texts of one set of words have one vector, whatever their order; a text without words has the zero vector.
    """

    def __init__(self, *, dimensions: int = 64) -> None:
        """Make one whose vectors have *dimensions* numbers; the fewer, the more words fall together by accident."""
        if dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, not {dimensions}")
        self.dimensions = dimensions
        self.model_id = f"hashing-{dimensions}"

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One unit vector per text: shape (number of texts, dimensions)."""
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in enumerate(texts):
            for word in _WORD.findall(text.lower()):
                digest = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
                vectors[row, (digest >> 1) % self.dimensions] += 1.0 if digest & 1 else -1.0
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = vectors / np.maximum(lengths, np.float32(1e-9))
        return unit

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        """The unit vector of *text*: shape (dimensions,)."""
        vector: npt.NDArray[np.float32] = HashingEmbedder.embed_documents(self, [text])[0]
        return vector


class ManualClock:
    """A `Clock` that stands still until it is moved: `open_memory(..., clock=ManualClock())`."""

    def __init__(self, now: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        """Start at *now*; a naive time is taken as UTC."""
        self.now = utc(now)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **duration: Any) -> datetime:
        """Move on by a duration given as for `timedelta`, e.g. `advance(days=2, minutes=30)`; the new time."""
        self.now += timedelta(**duration)
        return self.now


__all__ = ["HashingEmbedder", "ManualClock"]
