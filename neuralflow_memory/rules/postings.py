"""The inverted index of a scope, in RAM, with BM25 of our own: no other scope's text moves a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .lexical import Ids

Rows = npt.NDArray[np.int64]

_MOST_AROUND = 16  # terms
_FEW = 2048  # documents, of which it is faster to look at each one's neighbours than for those of the ones that hold a term
_MOST_TIMES = 255
_MOST_LOOSE = 1 << 18  # terms of the tail: more take longer to look through than to merge now and then


@dataclass(frozen=True, slots=True)
class Matches:
    """Which documents hold the terms of a query, term by term, the terms that none holds left out.

    Attributes:
        docs: The documents of one term after those of another.
        times: float32, how often each of them holds it.
        bounds: Where the documents of a term begin; and, at last, where those of the last one end.
        alive: As given to `Postings.matches`.
    """

    docs: npt.NDArray[np.int32]
    times: npt.NDArray[np.float32]
    bounds: npt.NDArray[np.int64]
    alive: npt.NDArray[np.bool_] | None


class Postings:
    """An inverted index in RAM over documents 0..n-1, each a sequence of term ids, with BM25 over the live ones.

    Terms of documents that were there at `build` lie in arrays sorted by (term, document). Those of later ones, the tail,
    are looked through as they are, and merged into the arrays when they outgrow a sixteenth of them. Not safe for concurrent
    use: the owner holds a lock.
    """

    merge_at = 4096
    """Terms of the tail below which nothing is merged, however small the arrays are."""

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
        self._counts = np.zeros(0, np.uint8)
        """Frequencies; the highest stands for all that are higher still, since BM25 hardly tells them apart."""
        self._tail = 0
        """Where among the terms the tail begins."""
        self._owners = np.zeros(0, np.int32)
        """The document of each term of the tail, -1 for those of a removed one; and room to grow."""
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
        index._ids, index._used, index._tail = np.array(ids, dtype=np.uint32), len(ids), len(ids)
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
        """RAM held, in bytes."""
        documents = self._ids.nbytes + self._starts.nbytes + self._lengths.nbytes + self._live.nbytes
        arrays = self._terms.nbytes + self._bounds.nbytes + self._docs.nbytes + self._counts.nbytes
        return documents + self._packed.nbytes + arrays + self._owners.nbytes

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
        if self._packed[doc]:
            self._stale += length
        else:
            self._owners[start - self._tail : start - self._tail + length] = -1
        self._ids[start : start + length] = 0
        self._live[doc] = self._packed[doc] = False
        self._lengths[doc] = 0
        self._live_count -= 1
        self._live_length -= length
        self._tidy()

    def matches(self, query_ids: Ids | Sequence[int], *, alive: npt.NDArray[np.bool_] | None = None) -> Matches:
        """Look up the distinct terms of a query, for `bm25` and `around`, who take them in place of its ids.

        Raises:
            InputError: *alive* is not of shape (n,).
        """
        if alive is not None and alive.shape != (self._n,):
            raise InputError(f"alive has shape {alive.shape}; give one flag for each of the {self._n} documents")
        terms = np.array(sorted(set(np.asarray(query_ids, dtype=np.uint32).tolist())), np.uint32)
        places = np.searchsorted(self._terms, terms).tolist()
        tail = self._ids[self._tail : self._used]
        owners = self._owners[: len(tail)]
        docs: list[npt.NDArray[Any]] = [np.zeros(0, np.int32)]
        times: list[npt.NDArray[Any]] = [np.zeros(0, np.uint8)]
        term_of, packed = [0], [True]
        for number, (place, term) in enumerate(zip(places, terms.tolist(), strict=True)):
            if place < len(self._terms) and self._terms[place] == term:
                here = slice(*self._bounds[place : place + 2].tolist())
                docs.append(self._docs[here])
                times.append(self._counts[here])
                term_of.append(number)
                packed.append(True)
            if len(tail) and len(late := owners[tail == term]):
                first = _firsts(late)  # a document's terms lie together
                docs.append(late[first])
                times.append(np.diff(first, append=len(late)))
                term_of.append(number)
                packed.append(False)
        sizes = [len(some) for some in docs]
        found, often = np.concatenate(docs), np.concatenate(times).astype(np.float32)
        which = np.repeat(term_of, sizes)
        kept = found >= 0  # what was removed from the tail left zeros, and zero may be a term
        if self._stale:
            kept &= self._packed[found] | ~np.repeat(packed, sizes)
        if alive is not None:
            kept &= alive[found]
        found, often, which = found[kept], often[kept], which[kept]
        first = _firsts(which)
        return Matches(found, often, np.append(first, len(which)), alive)

    def bm25(
        self,
        query: Matches | Ids | Sequence[int],
        *,
        alive: npt.NDArray[np.bool_] | None = None,
        k1: float = 1.2,
        b: float = 0.75,
    ) -> npt.NDArray[np.float32]:
        """Score every document against the distinct terms of a query (Robertson and Zaragoza 2009, with Lucene's idf).

        Sum over terms of ln(1 + (N - df + 0.5) / (df + 0.5)) * tf (k1 + 1) / (tf + k1 (1 - b + b len / avglen)).

        Args:
            query: Ids of the query's terms; repeats count once. Or what they match.
            alive: Shape (n,); documents outside it score 0 and count neither in N nor in df nor in avglen.
            k1: How slowly repeats of a term saturate.
            b: How far long documents are marked down, 0..1.

        Returns:
            Scores of shape (n,), 0 for documents that match nothing or were removed.
        """
        found = query if isinstance(query, Matches) else self.matches(query, alive=alive)
        if found.alive is None:
            number, total = self._live_count, self._live_length
        else:
            number = int(np.count_nonzero(found.alive & self._live[: self._n]))
            total = int(self._lengths[: self._n][found.alive].sum())
        if not len(found.docs):
            return np.zeros(self._n, np.float32)
        having = np.diff(found.bounds)
        idf = np.log1p((number - having + 0.5) / (having + 0.5))
        norm = k1 * (1 - b) + (k1 * b * number / max(total, 1)) * self._lengths[found.docs]
        each = np.repeat(idf * (k1 + 1), having) * found.times / (found.times + norm)
        scores = np.bincount(found.docs, each, minlength=self._n)
        return scores.astype(np.float32)

    def around(
        self,
        query: Matches | Ids | Sequence[int],
        neighbours: Callable[[npt.NDArray[Any]], Sequence[Rows]],
        rows: Rows,
        *,
        alive: npt.NDArray[np.bool_] | None = None,
        k1: float = 1.2,
        b: float = 0.75,
    ) -> npt.NDArray[np.float32]:
        """Score *rows* as if each document and its neighbours were one, e.g. a turn and those before and after it.

        Args:
            query: As for `bm25`; of many terms, the rarest count.
            neighbours: Given documents, arrays of the same shape, each naming a neighbour of every one, or -1. Being one is
                mutual, and nobody is one's neighbour twice.
            rows: The documents to score; the average length is theirs.
            alive: As for `bm25`.
            k1: As for `bm25`.
            b: As for `bm25`.

        Returns:
            Scores of shape (len(rows),).
        """
        matches = query if isinstance(query, Matches) else self.matches(query, alive=alive)
        alive, scores = matches.alive, np.zeros(len(rows), np.float32)
        if not len(matches.docs) or not len(rows):
            return scores
        there_is = self._live[: self._n] if alive is None else alive & self._live[: self._n]
        scored = there_is[rows]
        own = self._lengths[: self._n] * there_is
        lengths = own[rows].astype(np.float32)
        beside = np.array(neighbours(rows), np.int64).reshape(-1, len(rows))
        beside[beside < 0] = self._n  # behind the last document, where nothing is
        lengths += np.append(own, 0)[beside].sum(axis=0)
        average = float(lengths[scored].mean()) if scored.any() else 0.0
        norm = k1 * (1 - b) + np.float32(k1 * b / max(average, 1e-6)) * lengths
        number = int(np.count_nonzero(there_is))
        together = np.zeros(self._n + 1, np.float32)
        found = [slice(*ends) for ends in pairwise(matches.bounds.tolist())]
        for here in sorted(found, key=lambda some: some.stop - some.start)[:_MOST_AROUND]:
            docs, times = matches.docs[here], matches.times[here]
            together[docs] = times
            if len(docs) > len(rows) or len(rows) == self._n <= _FEW:
                at = together[rows] + together[beside].sum(axis=0)
                together[docs] = 0.0
                if len(docs) > len(rows):  # about so many have it, or a neighbour that does
                    having = number * (1.0 - (1.0 - len(docs) / number) ** (1 + len(beside)))
                else:
                    having = float(np.count_nonzero(at[scored]))
            else:
                touched: list[npt.NDArray[Any]] = [docs]
                for there in neighbours(docs):
                    has = (there >= 0) & there_is[there]
                    together[there[has]] += times[has]  # no document comes twice, since being one is mutual
                    touched.append(there[has])
                at = together[rows]
                having = float(np.count_nonzero(together.view(np.int32)))
                for there in touched:
                    together[there] = 0.0
            idf = np.log1p((number - having + 0.5) / (having + 0.5))
            scores += np.float32(idf * (k1 + 1)) * at / (at + norm)
        scores[~scored] = 0.0
        return scores

    def _put(self, doc: int, array: Ids) -> None:
        end = self._used + len(array)
        self._ids, self._owners = _grown(self._ids, end), _grown(self._owners, end - self._tail)
        self._ids[self._used : end] = array
        self._owners[self._used - self._tail : end - self._tail] = doc
        self._starts[doc], self._lengths[doc], self._live[doc] = self._used, len(array), True
        self._used = end
        self._live_count += 1
        self._live_length += len(array)
        self._tidy()

    def _tidy(self) -> None:
        """Merge the tail into the arrays once it is large beside them, so that an append costs little on average."""
        loose = self._used - self._tail
        if loose + self._stale <= max(self.merge_at, min(len(self._docs) // 16, _MOST_LOOSE)):
            return
        kept = self._packed[self._docs]
        old = _keys(np.repeat(self._terms, np.diff(self._bounds)), self._docs)[kept]
        owners = self._owners[:loose]
        new = np.sort(_keys(self._ids[self._tail : self._used], owners)[owners >= 0])
        first = _firsts(new)
        places = np.searchsorted(old, new[first])
        self._pack(
            np.insert(old, places, new[first]),
            np.insert(self._counts[kept], places, np.minimum(np.diff(first, append=len(new)), _MOST_TIMES)),
        )
        self._packed = self._live.copy()
        self._stale = 0
        if self._used > 2 * self._live_length:
            self._compact()
        self._tail, self._owners = self._used, np.zeros(0, np.int32)

    def _pack(self, keys: npt.NDArray[np.uint64], counts: npt.NDArray[Any]) -> None:
        terms = (keys >> np.uint64(32)).astype(np.uint32)
        first = _firsts(terms)
        self._terms, self._bounds = terms[first], np.append(first, len(terms))
        self._docs, self._counts = (
            keys.astype(np.uint32).astype(np.int32),
            np.minimum(counts, _MOST_TIMES).astype(np.uint8),
        )

    def _compact(self) -> None:
        """Drop the room that removed and replaced documents left among the ids."""
        starts = np.cumsum(self._lengths) - self._lengths
        moved = np.repeat(self._starts - starts, self._lengths) + np.arange(self._live_length)
        self._ids, self._starts, self._used = self._ids[moved], starts, self._live_length

    def _check(self, doc: int) -> int:
        if not 0 <= doc < self._n:
            raise IndexError(f"document {doc} of {self._n}")
        return doc


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


__all__ = ["Ids", "Matches", "Postings"]
