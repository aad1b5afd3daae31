"""What search reads of an owner's entries, as arrays: vectors, full text, neighbours, and the constants of the signals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..protocols import Feature
from ..rules.lexical import term_ids
from ..rules.postings import Postings
from ..rules.question import aliases, is_user
from ..types import TYPE_NUMBER, MemoryType

_FOREVER = np.iinfo(np.int64).max
_TURN = TYPE_NUMBER[MemoryType.SHORT_TERM]
_REACH = 2  # turns on each side that `near` takes in
_NEARER = 0.7  # what the next turn counts, and the one after it of that
_AT_ONCE = 4096  # rows whose vectors are copied at a time
_TAIL = 24  # terms of the turn before that a turn's document opens with: about its last 40 words


class ScopeIndex:
    """What search reads of an owner's entries, as arrays with a row an entry.

    Attributes (each of shape (rows,) unless said):
        number, session, seq, created, expires: int64. `created` and `expires` in microseconds.
        kind: int8, the entry's type by number. speaker, agent: object arrays. words: int32. importance: float32.
        traits: uint8 (`rules.traits`). called: object array, the names that it gives (`protocols.Record`). user: bool, a user
        said it who has no name. before, after: rows of the neighbouring turns, or -1.
        labels: how many entries each speaker has.
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
        ("traits", np.uint8),
        ("called", object),
        ("before", np.int64),
        ("after", np.int64),
        ("alive", np.bool_),
        ("embedded", np.bool_),
        ("user", np.bool_),
        ("norm", np.float32),
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
    traits: npt.NDArray[np.uint8]
    called: npt.NDArray[Any]
    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    alive: npt.NDArray[np.bool_]
    embedded: npt.NDArray[np.bool_]
    user: npt.NDArray[np.bool_]
    norm: npt.NDArray[np.float32]

    def __init__(self, features: Sequence[Feature], *, dimensions: int, vectors_in_ram: bool = True) -> None:
        self.rows = len(features)
        self._in_ram = vectors_in_ram
        self.row_of: dict[int, int] = {f[0]: row for row, f in enumerate(features)}
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
            self._user[: self.rows] = [is_user(label) for label in columns[4]]
        self.labels: Counter[str | None] = Counter(f[4] for f in features)
        self._moved: set[int] = set(range(self.rows))
        """Rows whose `norm` is to be computed anew."""
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
        """Link a new row with the turn before it in its session; that row, or -1."""
        session = int(self._session[row])
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
        if row < self.rows:
            self._said_by(row, -1)
        values = (*feature[:7], _FOREVER if feature[7] is None else feature[7], *feature[8:-1])
        for (name, _), value in zip(self._ARRAYS, values, strict=False):
            getattr(self, f"_{name}")[row] = value
        self._alive[row], self._embedded[row] = True, False
        self._user[row] = is_user(self._speaker[row])
        self._said_by(row, 1)
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
        self._touch(row)

    def drop(self, number: int) -> None:
        """Take an entry out; nothing of it is left in its neighbours."""
        row = self.row_of.pop(number, None)
        if row is None:
            return
        self._said_by(row, -1)
        self._touch(row)
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
            self._touch(row)

    def _said_by(self, row: int, change: int) -> None:
        label = self._speaker[row]
        self.labels[label] += change
        if not self.labels[label]:
            del self.labels[label]

    def names(self) -> dict[str, str]:
        """Speakers by what they are called: by their labels, and by other names that are used for them."""
        labels = {label: label for label in self.labels if label}
        return {**aliases(self._given(), labels, count=self.count), **labels}

    def _given(self) -> Iterator[tuple[str | None, str]]:
        for row in np.flatnonzero(self.called != None):  # noqa: E711 - element by element
            yield self._speaker[row], self._called[row]

    def count(self, word: str) -> int:
        """How many entries hold *word*, or another form of it."""
        return int(np.count_nonzero(self.postings.bm25(term_ids(word))))

    def knows(self, word: str) -> bool:
        """Whether any entry holds *word*, or another form of it."""
        return self.count(word) > 0

    def neighbours(self, reach: int) -> list[npt.NDArray[np.int64]]:
        """Rows of the turns before and after each row, the nearest first, up to *reach* on each side; -1 for none."""
        steps = (self.before, self.after)
        found: list[npt.NDArray[np.int64]] = list(steps)
        while len(found) < 2 * reach:
            there, step = found[-2], steps[len(found) % 2]
            found.append(np.where(there >= 0, step[there], -1))
        return found

    def near(self, cosines: npt.NDArray[np.float32], *, counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Cosines with each turn and its neighbours as one, a weighted sum of their vectors; without what is not *counted*.

        *cosines* are those of the entries themselves, 0 for what is not counted, so that no vector is read again but where one
        has moved.
        """
        around = self.neighbours(_REACH)
        if self._moved:
            moved = np.fromiter(self._moved, np.int64, len(self._moved))
            self._norm[moved] = self._norms(moved, around, self.alive)
            self._moved.clear()
        norms = self.norm
        left_out = np.flatnonzero(self.alive & ~counted)
        if len(left_out):
            beside = np.unique(np.concatenate([there[left_out] for there in around]))
            beside = beside[beside >= 0]
            norms = norms.copy()
            norms[beside] = self._norms(beside, around, counted)
        together = cosines.copy()
        for n, there in enumerate(around):
            has = there >= 0
            together[has] += _share(n) * cosines[there[has]]
        return np.divide(together, np.maximum(norms, 1e-6), out=together)

    def _norms(
        self, rows: npt.NDArray[np.int64], around: Sequence[npt.NDArray[np.int64]], counted: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Lengths of the weighted sums of the vectors of *rows* and their neighbours, of those that are *counted*."""
        norms = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            together = self.vectors[some] * counted[some, None]
            for n, there in enumerate(around):
                has = (there[some] >= 0) & counted[there[some]]
                together[has] += _share(n) * self.vectors[there[some[has]]]
            norms[start : start + len(some)] = np.linalg.norm(together, axis=1)
        return norms

    def _touch(self, row: int) -> None:
        """Note that a row's vector, or its place, has changed: its neighbours' norms do too."""
        self._moved.add(row)
        for step in (self._before, self._after):
            there = row
            for _ in range(_REACH):
                there = int(step[there])
                if there < 0:
                    break
                self._moved.add(there)

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


def _share(place: int) -> np.float32:
    """What a neighbour counts in `near`, by its place among `neighbours`."""
    return np.float32(_NEARER ** (1 + place // 2))


__all__ = ["ScopeIndex"]
