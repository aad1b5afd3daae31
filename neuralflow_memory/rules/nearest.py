"""Unit vectors by row: as they are while they are few; in eight bits a number, and found by their signs, when they are many."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MOST_EXACT = 50_000
_READ = 0.04  # share of the rows whose cosines are looked at, of those that are compressed
_LEAST_READ = 16  # times as many rows as are wanted, at least
_AT_ONCE = 4096  # rows that are compressed at a time
_CACHED_BYTES, _CACHED_BITS = 256, 32_768  # rows at a time that leave what is made of them in the processor's cache
_FAR = np.iinfo(np.uint16).max


def compressed_bytes(dimensions: int) -> int:
    """What a row takes that is compressed: a byte and a bit a number, and what they are to be multiplied by."""
    return dimensions + 8 * -(-dimensions // 64) + 4


class Vectors:
    """Unit vectors by row, zero where none was put.

    Up to *most_exact* rows they are held as float32, and cosines are exact. Beyond that a number takes eight bits, so that a
    cosine is off by about 0.0005, and a quarter of the room is enough. The rows that are nearest to a question are then
    found by one more bit for each dimension of the space, turned at random, so that none says more than another: on which side
    of the average a vector lies. Rows that differ from the question in few of these bits, those where the question is far from
    the average counting three times, are looked at closely.
    """

    def __init__(self, dimensions: int = 0, *, rows: int = 0, most_exact: int = MOST_EXACT) -> None:
        self.dimensions = dimensions
        self._most_exact = most_exact
        self._exact: Floats | None = np.zeros((rows, dimensions), np.float32)
        self._bytes = np.zeros((0, dimensions), np.int8)
        self._scales = np.zeros(0, np.float32)
        self._bits = np.zeros((0, 0), np.uint64)
        """Of shape (words, rows): the bits of a row are in a column."""
        self._center = np.zeros(dimensions, np.float32)
        self._turned = np.zeros((0, dimensions), np.float32)
        """A rotation."""
        if rows > most_exact:
            self._compress()

    def __len__(self) -> int:
        return len(self._bytes) if self._exact is None else len(self._exact)

    @property
    def exact(self) -> bool:
        """Whether cosines are exact."""
        return self._exact is not None

    @property
    def nbytes(self) -> int:
        if self._exact is not None:
            return self._exact.nbytes
        return self._bytes.nbytes + self._scales.nbytes + self._bits.nbytes + self._turned.nbytes

    def resize(self, rows: int) -> None:
        """Make room for so many *rows*, of which there may only come more."""
        if self._exact is not None:
            self._exact = _longer(self._exact, rows)
            if rows > self._most_exact:
                self._compress()
        else:
            self._bytes, self._scales = _longer(self._bytes, rows), _longer(self._scales, rows)
            self._bits = _longer(self._bits.T, rows).T.copy()

    def put(self, row: int, vector: Floats) -> None:
        """Give *row* a vector of unit length, or zeros."""
        if self._exact is not None:
            self._exact[row] = vector
        else:
            self._put(np.array([row]), vector[None, :])

    def of(self, rows: Rows) -> Floats:
        """The vectors of *rows*, shape (len(rows), dimensions), as well as they are known."""
        if self._exact is not None:
            return self._exact[rows]
        found = self._bytes[rows].astype(np.float32)
        found *= self._scales[rows, None]
        return found

    def cosines(self, question: Floats, rows: Rows | slice = slice(None)) -> Floats:
        """The cosines of *rows*, or of all, with a vector of unit length."""
        if self._exact is not None:
            return self._exact[rows] @ question
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        found = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _CACHED_BYTES):
            some = rows[start : start + _CACHED_BYTES]
            found[start : start + len(some)] = self._bytes[some].astype(np.float32) @ question
        return found * self._scales[rows]

    def nearest(self, question: Floats, *, k: int, among: npt.NDArray[np.bool_]) -> Rows:
        """Rows of the *k* highest cosines with *question*, in no order; *among* says which rows count, the first ones if short."""
        rows = np.flatnonzero(among)
        if not self.exact:
            rows = self._close(question, number=max(_LEAST_READ * k, int(_READ * len(rows))), among=among)
        if len(rows) <= k:
            return rows
        cosines = self.cosines(question, rows)
        return rows[np.argpartition(cosines, len(rows) - k)[len(rows) - k :]]

    def _close(self, question: Floats, *, number: int, among: npt.NDArray[np.bool_]) -> Rows:
        """At least *number* rows, or all, that differ least in their bits."""
        offset = self._turned @ (question - self._center)
        signs = _packed((offset > 0)[None, :])[:, 0]
        heavy = _packed((np.abs(offset) > offset.std())[None, :])[:, 0]
        distance = np.zeros(len(among), np.uint16)
        for start in range(0, len(among), _CACHED_BITS):
            here = distance[start : start + _CACHED_BITS]
            for column, sign, counting in zip(self._bits, signs, heavy, strict=True):
                differs = column[start : start + len(here)] ^ sign
                here += np.bitwise_count(differs)
                differs &= counting
                more = np.bitwise_count(differs)
                here += more
                here += more
        if len(distance) <= number:
            return np.flatnonzero(among)
        distance[~among] = _FAR
        farthest = np.partition(distance, number)[number]
        return np.flatnonzero((distance <= farthest) & among)

    def _compress(self) -> None:
        assert self._exact is not None
        exact, self._exact = self._exact, None
        rows = len(exact)
        there = exact[exact.any(axis=1)]
        self._center = there.mean(axis=0) if len(there) else self._center
        random = np.random.default_rng(0).standard_normal((self.dimensions, self.dimensions))
        self._turned = np.linalg.qr(random).Q.astype(np.float32)
        self._bytes, self._scales = np.zeros((rows, self.dimensions), np.int8), np.zeros(rows, np.float32)
        self._bits = np.zeros((-(-self.dimensions // 64), rows), np.uint64)
        for start in range(0, rows, _AT_ONCE):
            some = np.arange(start, min(rows, start + _AT_ONCE))
            self._put(some, exact[some])

    def _put(self, rows: Rows, vectors: Floats) -> None:
        scales = np.abs(vectors).max(axis=1) / 127
        self._scales[rows] = scales
        self._bytes[rows] = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
        self._bits[:, rows] = _packed((vectors - self._center) @ self._turned.T > 0)


def _packed(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Rows of bits as columns of words of 64."""
    words = -(-bits.shape[1] // 64)
    padded = np.zeros((len(bits), words * 8), np.uint8)
    packed = np.packbits(bits, axis=1)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64).T


def _longer(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    longer = np.zeros((rows, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array[:rows]
    return longer


__all__ = ["MOST_EXACT", "Vectors", "compressed_bytes"]
