"""What search reads of an owner's entries, as arrays: vectors, full text, neighbours, and the constants of the signals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..protocols import Feature
from ..rules.postings import Postings
from ..types import TYPE_NUMBER, MemoryType

_FOREVER = np.iinfo(np.int64).max
_TURN = TYPE_NUMBER[MemoryType.SHORT_TERM]
_TAIL = 24  # terms of the turn before that a turn's document opens with: about its last 40 words


class ScopeIndex:
    """What search reads of an owner's entries, as arrays with a row an entry.

    Attributes (each of shape (rows,) unless said):
        number, session, seq, created, expires: int64. `created` and `expires` in microseconds.
        kind: int8, the entry's type by number. speaker, agent: object arrays. words: int32. importance: float32.
        question: bool. place: the session as a number from 0. before, after: rows of the neighbouring turns, or -1.
        alive: bool. vectors: float32 of shape (rows, dimensions), zero where `embedded` is False.
        postings: the full text; a turn's document opens with the last terms of the turn before it, so that a short
            answer is found by the words of its question.
    """

    _ARRAYS: tuple[tuple[str, Any], ...] = (
        ("number", np.int64),
        ("session", np.int64),
        ("seq", np.int64),
        ("kind", np.int8),
        ("speaker", object),
        ("agent", object),
        ("created", np.int64),
        ("expires", np.int64),
        ("importance", np.float32),
        ("words", np.int32),
        ("question", np.bool_),
        ("place", np.int64),
        ("before", np.int64),
        ("after", np.int64),
        ("alive", np.bool_),
        ("embedded", np.bool_),
    )
    number: npt.NDArray[np.int64]
    session: npt.NDArray[np.int64]
    seq: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int8]
    speaker: npt.NDArray[Any]
    agent: npt.NDArray[Any]
    created: npt.NDArray[np.int64]
    expires: npt.NDArray[np.int64]
    importance: npt.NDArray[np.float32]
    words: npt.NDArray[np.int32]
    question: npt.NDArray[np.bool_]
    place: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    alive: npt.NDArray[np.bool_]
    embedded: npt.NDArray[np.bool_]

    def __init__(self, features: Sequence[Feature], *, dimensions: int, vectors_in_ram: bool = True) -> None:
        self.rows = len(features)
        self._in_ram = vectors_in_ram
        self.row_of: dict[int, int] = {f[0]: row for row, f in enumerate(features)}
        self._places: dict[int, int] = {}
        self._last: dict[int, int] = {}
        """The last turn's row of each session."""
        for name, dtype in self._ARRAYS:
            setattr(self, f"_{name}", np.zeros(max(64, self.rows), dtype))
        self._vectors = np.zeros((max(64, self.rows) if dimensions else 0, dimensions), np.float32)
        if features:
            columns = list(zip(*features, strict=True))
            for (name, _), column in zip(self._ARRAYS, columns[:-1], strict=False):
                values = [_FOREVER if v is None else v for v in column] if name == "expires" else column
                getattr(self, f"_{name}")[: self.rows] = values
            self._alive[: self.rows] = True
        own = [np.frombuffer(f[-1], "<u4") for f in features]
        self._own = [len(ids) for ids in own]
        """How many terms of each document are the entry's own."""
        documents = []
        for row, ids in enumerate(own):
            before = self._link(row)
            documents.append(ids if before < 0 else np.concatenate([own[before][-_TAIL:], ids]))
        self.postings = Postings.build(
            np.concatenate(documents) if documents else np.zeros(0, np.uint32),
            np.array([len(d) for d in documents], np.int64),
        )

    def _link(self, row: int) -> int:
        """Give a new row its place among its session's turns; the row before it, or -1."""
        session = int(self._session[row])
        self._place[row] = self._places.setdefault(session, len(self._places))
        self._before[row] = self._after[row] = -1
        if self._kind[row] != _TURN:
            return -1
        before = self._before[row] = self._last.get(session, -1)
        if before >= 0:
            self._after[before] = row
        self._last[session] = row
        return int(before)

    def _terms(self, row: int) -> npt.NDArray[np.uint32]:
        """The entry's own terms."""
        ids = self.postings.ids_of(row)
        return ids[len(ids) - self._own[row] :]

    def _document(self, row: int, ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        before = int(self._before[row])
        return ids if before < 0 else np.concatenate([self._terms(before)[-_TAIL:], ids])

    def __getattr__(self, name: str) -> Any:
        # The arrays have room to grow; what is shown of them ends at the last row.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self, f"_{name}")[: self.rows]

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        return self._vectors[: self.rows]

    @property
    def pending(self) -> npt.NDArray[np.bool_]:
        """Entries with words whose vectors are not known yet; none where vectors are not held here."""
        return self.alive & ~self.embedded & (self.words > 0) & self._in_ram

    @property
    def nbytes(self) -> int:
        own = sum(getattr(self, f"_{name}").nbytes for name, _ in self._ARRAYS)
        return int(own + self._vectors.nbytes + self.postings.nbytes + 100 * len(self.row_of))

    def put(self, feature: Feature) -> None:
        """Add an entry, or a new version of one (its vector is no longer known then)."""
        number, ids = feature[0], np.frombuffer(feature[-1], "<u4")
        row = self.row_of.get(number, self.rows)
        if row == len(self._number):
            self._grow()
        values = (*feature[:7], _FOREVER if feature[7] is None else feature[7], *feature[8:-1])
        for (name, _), value in zip(self._ARRAYS, values, strict=False):
            getattr(self, f"_{name}")[row] = value
        self._alive[row], self._embedded[row] = True, False
        if row == self.rows:
            self.rows += 1
            self.row_of[number] = row
            self._own.append(len(ids))
            self._link(row)
            self.postings.append(self._document(row, ids))
            return
        self._own[row] = len(ids)
        self.postings.replace(row, self._document(row, ids))
        self._refresh(int(self._after[row]))
        if len(self._vectors):
            self._vectors[row] = 0

    def drop(self, number: int) -> None:
        """Take an entry out; nothing of it is left in its neighbours."""
        row = self.row_of.pop(number, None)
        if row is None:
            return
        self._alive[row] = self._embedded[row] = False
        if len(self._vectors):
            self._vectors[row] = 0
        before, after = int(self._before[row]), int(self._after[row])
        if before >= 0:
            self._after[before] = after
        if after >= 0:
            self._before[after] = before
        elif self._last.get(int(self._session[row])) == row:
            self._last[int(self._session[row])] = before
        self._before[row] = self._after[row] = -1
        self._own[row] = 0
        self.postings.remove(row)
        self._refresh(after)

    def _refresh(self, row: int) -> None:
        """Make a turn's document anew after the turn before it has changed."""
        if row >= 0:
            self.postings.replace(row, self._document(row, self._terms(row)))

    def embed(self, vectors: Iterable[tuple[int, npt.NDArray[np.float32]]]) -> None:
        """Take vectors (number, unit vector) of entries that are still here."""
        if not self._in_ram:
            return
        for number, vector in vectors:
            row = self.row_of.get(number)
            if row is None or not self._alive[row]:
                continue
            if not len(self._vectors):
                self._vectors = np.zeros((len(self._number), len(vector)), np.float32)
            self._vectors[row] = vector
            self._embedded[row] = True

    def _grow(self) -> None:
        size = 2 * len(self._number)
        for name, dtype in self._ARRAYS:
            old = getattr(self, f"_{name}")
            new = np.zeros(size, dtype)
            new[: self.rows] = old[: self.rows]
            setattr(self, f"_{name}", new)
        if len(self._vectors):
            vectors = np.zeros((size, self._vectors.shape[1]), np.float32)
            vectors[: self.rows] = self._vectors[: self.rows]
            self._vectors = vectors


__all__ = ["ScopeIndex"]
