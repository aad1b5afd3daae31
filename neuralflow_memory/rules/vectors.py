"""Vectors from an embedder, checked and brought to unit length, so that a dot product is a cosine."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EmbeddingError


def unit_rows(vectors: Any, *, rows: int) -> npt.NDArray[np.float32]:
    """*vectors* as float32 of shape (rows, dimensions), each of length 1 (a zero vector stays zero)."""
    try:
        array = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise EmbeddingError(f"the embedder returned vectors of different lengths or no numbers ({error})") from error
    if array.ndim != 2 or array.shape[0] != rows or not array.shape[1] or not np.isfinite(array).all():
        raise EmbeddingError(
            f"the embedder returned an array of shape {array.shape} for {rows} texts, or one that is not finite; "
            "it must return one vector of finite numbers per text"
        )
    lengths = np.sqrt(np.square(array).sum(axis=1, keepdims=True))
    lengths[lengths == 0] = 1.0
    unit: npt.NDArray[np.float32] = array / lengths
    return unit


__all__ = ["unit_rows"]
