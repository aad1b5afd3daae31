"""An embedder that costs nothing, and exact search over its vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

DIMENSIONS = 384
_POOL = 1 << 18
_DECAY = 0.35
"""Of the spread with the dimension: cosines of two texts then vary by 0.1, as those of a real model do, not by 0.05."""


class PreparedEmbedder:
    """Makes a text's vector from its hash, spread as a real model's are. What was prepared is only looked up."""

    model_id = f"prepared-{DIMENSIONS}"

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        pool = rng.standard_normal(_POOL + DIMENSIONS).astype(np.float32)
        self._windows = np.lib.stride_tricks.sliding_window_view(pool, DIMENSIONS)
        spread = np.arange(1, DIMENSIONS + 1) ** -_DECAY
        # In no particular direction: each number of a model's vectors varies about as much as any other.
        turned, _ = np.linalg.qr(rng.standard_normal((DIMENSIONS, DIMENSIONS)))
        self._spread = (spread[:, None] * turned).astype(np.float32)
        self._prepared: dict[str, Vectors] = {}

    def prepare(self, queries: Iterable[str]) -> None:
        """Make the vectors of *queries*, so that `embed_query` returns them at no cost."""
        for query in queries:
            self._prepared[query] = self.embed_documents([query])[0]

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """One unit vector per text: shape (number of texts, 384)."""
        digests = b"".join(blake2b(text.encode(), digest_size=8).digest() for text in texts)
        numbers = np.frombuffer(digests, np.uint32).reshape(-1, 2)
        made = (self._windows[numbers[:, 0] % _POOL] + self._windows[numbers[:, 1] % _POOL]) @ self._spread
        unit: Vectors = made / np.linalg.norm(made, axis=1, keepdims=True)
        return unit

    def embed_query(self, text: str) -> Vectors:
        """The unit vector of *text*: shape (384,)."""
        found = self._prepared.get(text)
        return self.embed_documents([text])[0] if found is None else found


def nearest(vectors: Vectors, query: Vectors, *, k: int) -> npt.NDArray[np.int64]:
    """The rows of the *k* largest products with *query*, best first: all that exact search needs."""
    products = vectors @ query
    top = np.argpartition(products, -min(k, len(products)))[-k:]
    found: npt.NDArray[np.int64] = top[np.argsort(-products[top])]
    return found


def recall(found: Vectors, vectors: Vectors, query: Vectors, *, k: int) -> float:
    """The share of the *k* nearest of *vectors* that is among *found*; an equally near one is as good.

    What points away from the query has nothing in common with it, and search leaves it out.
    """
    products = np.sort(vectors @ query)[::-1][:k]
    best = products[products > 0]
    if not len(best):
        return 1.0
    return min(1.0, float((found @ query >= best[-1] - 1e-5).sum()) / len(best))


__all__ = ["DIMENSIONS", "PreparedEmbedder", "Vectors", "nearest", "recall"]
