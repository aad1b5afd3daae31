"""The inverted index of a scope, in RAM, with BM25 of our own: no other scope's text moves a score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .lexical import Ids

_MOST_AROUND = 32  # terms, each of which takes a number a document


class Postings:
    """An inverted index in RAM over documents 0..n-1, each a sequence of term ids, with BM25 over the live ones.

    Terms of documents that were there at `build` lie in arrays sorted by (term, document); later ones in a dict
    that is merged into the arrays when it outgrows a sixteenth of them. Not safe for concurrent use: the
    owner holds a lock.
    """

    merge_at = 4096
    """Loose postings below which nothing is merged, however small the arrays are."""

    def __init__(self) -> None:
        self._ids: Ids = np.zeros(0, np.uint32)
        """Terms of all documents, one after the other, and room to grow; removed ones are zeroed."""
        self._used = 0
        self._starts = np.zeros(0, np.int64)
        self._lengths = np.zeros(0, np.int64)
        self._live = np.zeros(0, np.bool_)
        self._packed = np.zeros(0, np.bool_)
        """Per document: whether its terms are those in the arrays below."""
        self._n = 0
        self._live_count = 0
        self._live_length = 0
        self._terms: Ids = np.zeros(0, np.uint32)
        self._bounds = np.zeros(1, np.int64)
        self._docs = np.zeros(0, np.int32)
        self._counts = np.zeros(0, np.float32)
        self._tail: dict[int, dict[int, int]] = {}
        self._late = 0
        """Postings in the tail."""
        self._stale = 0
        """Postings in the arrays that no longer count."""

    @classmethod
    def build(cls, ids: Ids, lengths: npt.ArrayLike) -> Postings:
        """Index documents given as one array of *ids* and the *lengths* of the documents in it, in order.

        Raises:
            InputError: The lengths don't add up to the number of ids.
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        if sizes.sum() != len(ids) or (sizes < 0).any():
            raise InputError(f"{len(ids)} term ids can't be cut into documents of {sizes.sum()} in all: index anew")
        index = cls()
        index._ids, index._used = np.array(ids, dtype=np.uint32), len(ids)
        index._n = index._live_count = len(sizes)
        index._starts, index._lengths = np.cumsum(sizes) - sizes, sizes.copy()
        index._live, index._packed = np.ones(len(sizes), np.bool_), np.ones(len(sizes), np.bool_)
        index._live_length = len(ids)
        keys = _keys(index._ids, np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes))
        keys.sort()
        first = _firsts(keys)
        index._pack(keys[first], np.diff(first, append=len(keys)))
        return index

    def __len__(self) -> int:
        """Documents ever given a number, removed ones included: the length of `bm25`'s result."""
        return self._n

    @property
    def nbytes(self) -> int:
        """RAM held, in bytes; the tail is estimated at 120 bytes a posting."""
        documents = self._ids.nbytes + self._starts.nbytes + self._lengths.nbytes + self._live.nbytes
        arrays = self._terms.nbytes + self._bounds.nbytes + self._docs.nbytes + self._counts.nbytes
        return documents + self._packed.nbytes + arrays + 120 * self._late

    def ids_of(self, doc: int) -> Ids:
        """Return a copy of the term ids of *doc* in their order; empty if it was removed."""
        start = self._starts[self._check(doc)]
        return self._ids[start : start + self._lengths[doc]].copy()

    def append(self, ids: Ids | Sequence[int]) -> int:
        """Index one more document and return its number."""
        array = np.asarray(ids, dtype=np.uint32)
        doc = self._n
        self._n += 1
        if doc == len(self._live):
            for name in ("_starts", "_lengths", "_live", "_packed"):
                setattr(self, name, _grown(getattr(self, name), doc + 1))
        self._put(doc, array)
        return doc

    def replace(self, doc: int, ids: Ids | Sequence[int]) -> None:
        """Give *doc* other terms; a removed one lives again."""
        array = np.asarray(ids, dtype=np.uint32)  # before anything is taken out: it raises for what is no id
        self.remove(doc)
        self._put(doc, array)

    def remove(self, doc: int) -> None:
        """Take *doc* out of every score and count; its number is not given again. Removing twice is no error.

        Its terms in order are overwritten at once; its postings, no longer read, go with the next merge.
        """
        if not self._live[self._check(doc)]:
            return
        start, length = int(self._starts[doc]), int(self._lengths[doc])
        distinct = set(self._ids[start : start + length].tolist())
        if self._packed[doc]:
            self._stale += len(distinct)
        else:
            self._late -= len(distinct)
            for term in distinct:
                del self._tail[term][doc]
                if not self._tail[term]:
                    del self._tail[term]
        self._ids[start : start + length] = 0
        self._live[doc] = self._packed[doc] = False
        self._lengths[doc] = 0
        self._live_count -= 1
        self._live_length -= length
        self._tidy()

    def bm25(
        self,
        query_ids: Ids | Sequence[int],
        *,
        alive: npt.NDArray[np.bool_] | None = None,
        k1: float = 1.2,
        b: float = 0.75,
    ) -> npt.NDArray[np.float32]:
        """Score every document against the distinct terms of a query (Robertson and Zaragoza 2009, with Lucene's idf).

        Sum over terms of ln(1 + (N - df + 0.5) / (df + 0.5)) * tf (k1 + 1) / (tf + k1 (1 - b + b len / avglen)).

        Args:
            query_ids: Ids of the query's terms; repeats count once.
            alive: Shape (n,); documents outside it score 0 and count neither in N nor in df nor in avglen.
            k1: How slowly repeats of a term saturate.
            b: How far long documents are marked down, 0..1.

        Returns:
            Scores of shape (n,), 0 for documents that match nothing or were removed.
        """
        terms = np.unique(np.asarray(query_ids, dtype=np.uint32))
        if alive is not None and alive.shape != (self._n,):
            raise InputError(f"alive has shape {alive.shape}; give one flag for each of the {self._n} documents")
        docs, counts, which = self._postings(terms, alive)
        if alive is None:
            number, total = self._live_count, self._live_length
        else:
            number = int(np.count_nonzero(alive & self._live[: self._n]))
            total = int(self._lengths[: self._n][alive].sum())
        return _bm25(docs, counts, which, self._lengths[: self._n], number=number, total=total, k1=k1, b=b)

    def around(
        self,
        query_ids: Ids | Sequence[int],
        neighbours: Sequence[npt.NDArray[np.int64]],
        *,
        alive: npt.NDArray[np.bool_] | None = None,
        k1: float = 1.2,
        b: float = 0.75,
    ) -> npt.NDArray[np.float32]:
        """Score each document as if it and its neighbours were one, e.g. a turn and those before and after it.

        Args:
            query_ids: Ids of the query's terms; of many, the rarest count.
            neighbours: Arrays of shape (n,), each naming a neighbour of every document, or -1. Being one is mutual.
            alive: As for `bm25`.
            k1: As for `bm25`.
            b: As for `bm25`.

        Returns:
            Scores of shape (n,).
        """
        terms = np.unique(np.asarray(query_ids, dtype=np.uint32))
        docs, counts, which = self._postings(terms, alive)
        if not len(docs):
            return np.zeros(self._n, np.float32)
        if len(terms) > _MOST_AROUND:
            df = np.bincount(which, minlength=len(terms))
            rare = np.argsort(np.where(df > 0, df, self._n + 1), kind="stable")[:_MOST_AROUND]
            kept = np.isin(which, rare)
            docs, counts, which = docs[kept], counts[kept], np.searchsorted(np.sort(rare), which[kept])
        own = self._lengths[: self._n] * (self._live[: self._n] if alive is None else alive)
        table = np.zeros((min(len(terms), _MOST_AROUND), self._n), np.float32)
        table[which, docs] = counts
        lengths = own.astype(np.float32)
        for there in neighbours:
            has = there[docs] >= 0
            table[which[has], there[docs[has]]] += counts[has]  # no pair comes twice, since being one is mutual
            lengths[there >= 0] += own[there[there >= 0]]
        there_is = self._live[: self._n] if alive is None else alive & self._live[: self._n]
        pairs = np.flatnonzero(table)
        of, found = np.divmod(pairs, self._n)
        kept = there_is[found]
        of, found, pairs = of[kept], found[kept], pairs[kept]
        number, total = int(np.count_nonzero(there_is)), int(lengths[there_is].sum())
        return _bm25(found, table.ravel()[pairs], of, lengths, number=number, total=total, k1=k1, b=b)

    def _postings(
        self, terms: Ids, alive: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return documents, frequencies, and the term's place in *terms*, of all live postings of *terms*."""
        places = np.searchsorted(self._terms, terms)
        known = np.flatnonzero(np.take(self._terms, places, mode="clip") == terms) if len(self._terms) else places[:0]
        parts = [slice(*self._bounds[p : p + 2].tolist()) for p in places[known]]
        late = [(i, self._tail[t]) for i, t in enumerate(terms.tolist()) if t in self._tail]
        packed = sum(p.stop - p.start for p in parts)
        docs = np.empty(packed + sum(len(found) for _, found in late), np.int64)
        counts, which = np.empty(len(docs), np.float32), np.empty(len(docs), np.int64)
        end = 0
        for i, part in zip(known.tolist(), parts, strict=True):
            here = slice(end, end := end + part.stop - part.start)
            docs[here], counts[here], which[here] = self._docs[part], self._counts[part], i
        for i, found in late:
            here = slice(end, end := end + len(found))
            docs[here], counts[here], which[here] = list(found), list(found.values()), i
        if alive is None and not self._stale:
            return docs, counts, which
        kept = self._live[docs] if alive is None else self._live[docs] & alive[docs]
        if self._stale:
            kept[:packed] &= self._packed[docs[:packed]]
        return docs[kept], counts[kept], which[kept]

    def _put(self, doc: int, array: Ids) -> None:
        end = self._used + len(array)
        self._ids = _grown(self._ids, end)
        self._ids[self._used : end] = array
        self._starts[doc], self._lengths[doc], self._live[doc] = self._used, len(array), True
        self._used = end
        self._live_count += 1
        self._live_length += len(array)
        for term, count in Counter(array.tolist()).items():
            self._tail.setdefault(term, {})[doc] = count
            self._late += 1
        self._tidy()

    def _tidy(self) -> None:
        """Merge the tail into the arrays once it is large beside them, so that an append costs little on average."""
        if self._late + self._stale <= max(self.merge_at, len(self._docs) // 16):
            return
        kept = self._packed[self._docs]
        old = _keys(np.repeat(self._terms, np.diff(self._bounds)), self._docs)[kept]
        found = [(term, doc, count) for term, docs in self._tail.items() for doc, count in docs.items()]
        late = np.array(found, dtype=np.int64).reshape(-1, 3)
        new = _keys(late[:, 0], late[:, 1])
        order = np.argsort(new)
        keys = np.concatenate([old, new[order]])
        counts = np.concatenate([self._counts[kept], late[order, 2]])
        order = np.argsort(keys, kind="stable")  # of two sorted runs: a merge
        self._pack(keys[order], counts[order])
        self._packed = self._live.copy()
        self._tail, self._late, self._stale = {}, 0, 0
        if self._used > 2 * self._live_length:
            self._compact()

    def _pack(self, keys: npt.NDArray[np.uint64], counts: npt.NDArray[Any]) -> None:
        terms = (keys >> np.uint64(32)).astype(np.uint32)
        first = _firsts(terms)
        self._terms, self._bounds = terms[first], np.append(first, len(terms))
        self._docs, self._counts = keys.astype(np.uint32).astype(np.int32), counts.astype(np.float32)

    def _compact(self) -> None:
        """Drop the room that removed and replaced documents left among the ids."""
        starts = np.cumsum(self._lengths) - self._lengths
        moved = np.repeat(self._starts - starts, self._lengths) + np.arange(self._live_length)
        self._ids, self._starts, self._used = self._ids[moved], starts, self._live_length

    def _check(self, doc: int) -> int:
        if not 0 <= doc < self._n:
            raise IndexError(f"document {doc} of {self._n}")
        return doc


def _bm25(
    docs: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    which: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    *,
    number: int,
    total: int,
    k1: float,
    b: float,
) -> npt.NDArray[np.float32]:
    """Score postings (document, frequency, term) given all documents' *lengths*; *number* and *total* of the live ones."""
    if not len(docs):
        return np.zeros(len(lengths), np.float32)
    df = np.bincount(which)
    idf = np.log1p((number - df + 0.5) / (df + 0.5))
    norm = k1 * (1 - b) + (k1 * b * number / total) * lengths[docs]
    gains = idf[which] * (counts * (k1 + 1) / (counts + norm))
    return np.bincount(docs, weights=gains, minlength=len(lengths)).astype(np.float32)


def _keys(terms: npt.NDArray[Any], docs: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return term and document as one number that sorts by term, then by document."""
    return (terms.astype(np.uint64) << np.uint64(32)) | docs.astype(np.uint64)


def _firsts(ordered: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return where each distinct value of a sorted array begins."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])


def _grown(array: npt.NDArray[Any], needed: int) -> npt.NDArray[Any]:
    """Return *array* with room for *needed* values, doubling so that growing costs little on average."""
    if needed <= len(array):
        return array
    larger = np.zeros(max(needed, 2 * len(array), 16), array.dtype)
    larger[: len(array)] = array
    return larger


__all__ = ["Ids", "Postings"]
