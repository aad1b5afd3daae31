"""What search reads of an owner's entries, as arrays: vectors, full text, neighbours, and the constants of the signals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..protocols import Feature
from ..rules.lexical import term_ids
from ..rules.nearest import MOST_EXACT, Vectors, compressed_bytes
from ..rules.postings import Postings
from ..rules.question import aliases, is_user
from ..types import TYPE_NUMBER, MemoryType

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
T = TypeVar("T")

_INT64 = np.iinfo(np.int64)
_OPEN = {"expires": _INT64.max, "valid_from": _INT64.min, "valid_to": _INT64.max}  # where none is said
_TURN = TYPE_NUMBER[MemoryType.SHORT_TERM]
REACH = 2  # turns on each side that `near` takes in
_NEARER = 0.7  # what the next turn counts, and the one after it of that
_SHARES = np.array([_NEARER ** (1 + place // 2) for place in range(2 * REACH)], np.float32)  # by place among neighbours
_AT_ONCE = 4096  # rows whose vectors are copied at a time
_TAIL = 24  # terms of the turn before that a turn's document opens with: about its last 40 words


class ScopeIndex:
    """What search reads of an owner's entries, as arrays with a row an entry.

    Attributes (each of shape (rows,) unless said):
        number, session, seq, created, expires, valid_from, valid_to: int64, the times in microseconds.
        kind: int8, the entry's type by number. speaker, agent: object arrays. words: int32. importance: float32.
        traits: uint8 (`rules.traits`). called: object array, the names that it gives (`protocols.Record`). user: bool, a user
        said it who has no name. before, after: rows of the neighbouring turns, or -1.
        labels: how many entries each speaker has.
        cold: bool, its text is in the archive, and it has no vector. alive: bool. vectors: with a row for each, and some room; zero where `embedded` is False. holds_vectors: whether they
        are held at all; if not, the vector index is asked.
        model: number of the embedding model of the vectors, 0 while none is known.
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
        ("valid_from", np.int64),
        ("valid_to", np.int64),
        ("importance", np.float32),
        ("words", np.int32),
        ("traits", np.uint8),
        ("called", object),
        ("cold", np.bool_),
        ("before", np.int64),
        ("after", np.int64),
        ("alive", np.bool_),
        ("embedded", np.bool_),
        ("user", np.bool_),
        ("norm", np.float32),
        ("moved", np.bool_),
    )
    number: npt.NDArray[np.int64]
    session: npt.NDArray[np.int64]
    seq: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int8]
    speaker: npt.NDArray[Any]
    agent: npt.NDArray[Any]
    created: npt.NDArray[np.int64]
    expires: npt.NDArray[np.int64]
    valid_from: npt.NDArray[np.int64]
    valid_to: npt.NDArray[np.int64]
    importance: npt.NDArray[np.float32]
    words: npt.NDArray[np.int32]
    traits: npt.NDArray[np.uint8]
    called: npt.NDArray[Any]
    cold: npt.NDArray[np.bool_]
    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    alive: npt.NDArray[np.bool_]
    embedded: npt.NDArray[np.bool_]
    user: npt.NDArray[np.bool_]
    norm: npt.NDArray[np.float32]
    moved: npt.NDArray[np.bool_]
    """Whether `norm` is to be computed anew."""

    def __init__(self, features: Sequence[Feature], *, dimensions: int, max_bytes: int) -> None:
        """Take *features*, in the order of their numbers. What is held should not exceed *max_bytes*."""
        self.rows = len(features)
        self._max_bytes = max_bytes
        self._weighed, self._heavy = -1, False
        """How many rows it had when it was weighed last, and whether it was too heavy."""
        self._kept: dict[Callable[[ScopeIndex], Any], Any] = {}
        self._last: dict[int, int] = {}
        """The last turn's row of each session."""
        for name, dtype in self._ARRAYS:
            setattr(self, f"_{name}", np.zeros(max(64, self.rows), dtype))
        if features:
            columns = list(zip(*features, strict=True))
            for (name, _), column in zip(self._ARRAYS, columns[:-1], strict=False):
                values = [_OPEN[name] if v is None else v for v in column] if name in _OPEN else column
                getattr(self, f"_{name}")[: self.rows] = values
            self._alive[: self.rows] = self._moved[: self.rows] = True
            self._user[: self.rows] = [is_user(label) for label in columns[4]]
        self.labels: Counter[str | None] = Counter(f[4] for f in features)
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
        self.holds_vectors = True
        self.model = 0
        self.vectors = Vectors()
        if dimensions:
            self._make_room_for_vectors(dimensions)

    def _make_room_for_vectors(self, dimensions: int) -> None:
        # Where there is not room enough for them compressed, they are left to the vector index.
        room = len(self._number)
        warm = self.rows - int(np.count_nonzero(self.cold))
        self.holds_vectors = self.nbytes + warm * compressed_bytes(dimensions) <= self._max_bytes
        if self.holds_vectors:
            most_exact = min(MOST_EXACT, self._max_bytes // (8 * dimensions))
            self.vectors = Vectors(dimensions, rows=room, most_exact=most_exact)

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

    def kept(self, work: Callable[[ScopeIndex], T]) -> T:
        """What *work* makes of the scope: done once, until something in it changes. For reading only."""
        if work not in self._kept:
            self._kept[work] = work(self)
        found: T = self._kept[work]
        return found

    @property
    def pending(self) -> npt.NDArray[np.bool_]:
        """Entries with words whose vectors are not known yet; none where vectors are not held here."""
        return self.alive & ~self.embedded & ~self.cold & (self.words > 0) & self.holds_vectors

    @property
    def nbytes(self) -> int:
        kept = list(self._kept.values())  # at one moment: whoever weighs does not hold the lock
        return self._lasting_bytes + sum(getattr(found, "nbytes", 0) for found in kept)

    @property
    def _lasting_bytes(self) -> int:
        """Without what is worked out of it, which to read it anew would not spare."""
        own = sum(getattr(self, f"_{name}").nbytes for name, _ in self._ARRAYS)
        return int(own + self.vectors.nbytes + self.postings.nbytes + 8 * self.rows)

    @property
    def too_large(self) -> bool:
        """Whether it has outgrown its bytes by its vectors, which the vector index can answer for."""
        if not self.holds_vectors or not self.vectors.dimensions:
            return False
        if self._weighed != self.rows:
            self._weighed, self._heavy = self.rows, self._lasting_bytes > self._max_bytes
        return self._heavy

    @property
    def last(self) -> int:
        """The number of the newest entry, 0 if there was none."""
        return int(self._number[self.rows - 1]) if self.rows else 0

    def row(self, number: int) -> int:
        """The row of an entry that is alive, or -1."""
        row = int(np.searchsorted(self.number, number))
        return row if row < self.rows and self._number[row] == number and self._alive[row] else -1

    def put(self, feature: Feature) -> None:
        """Add an entry, or a new version of one (its vector is no longer known then)."""
        self._kept.clear()
        number, ids = feature[0], np.frombuffer(feature[-1], "<u4")
        row = self.row(number)
        if row < 0:
            row = self.rows
            if row and number <= self._number[row - 1]:
                raise ValueError(
                    f"entry {number} comes after {self._number[row - 1]}: what was dropped is to be read anew"
                )
        if row == len(self._number):
            self._grow()
        if row < self.rows:
            self._said_by(row, -1)
        for (name, _), value in zip(self._ARRAYS, feature[:-1], strict=False):
            getattr(self, f"_{name}")[row] = _OPEN[name] if value is None and name in _OPEN else value
        self._alive[row], self._embedded[row] = True, False
        self._user[row] = is_user(self._speaker[row])
        self._said_by(row, 1)
        if row == self.rows:
            self.rows += 1
            self._own.append(len(ids))
            self._link(row)
            self._touch(row)
            self.postings.append(self._document(row, ids))
            return
        self._own[row] = len(ids)
        self.postings.replace(row, self._document(row, ids))
        self._refresh(int(self._after[row]))
        self._forget_vector(row)
        self._touch(row)

    def drop(self, number: int) -> None:
        """Take an entry out; nothing of it is left in its neighbours."""
        row = self.row(number)
        if row < 0:
            return
        self._kept.clear()
        self._said_by(row, -1)
        self._touch(row)
        self._alive[row] = self._embedded[row] = False
        self._forget_vector(row)
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

    def cool(self, number: int) -> None:
        """Note that an entry has become cold: its vector goes, and is not asked for again."""
        row = self.row(number)
        if row >= 0:
            self._kept.clear()
            self._cold[row], self._embedded[row] = True, False
            self._forget_vector(row)
            self._touch(row)

    def warm(self, number: int) -> None:
        """Note that a cold entry is warm again: its vector is to come."""
        row = self.row(number)
        if row >= 0:
            self._kept.clear()
            self._cold[row] = False

    def expire(self, number: int, when: int | None) -> None:
        """Let an entry expire at another time: *when*, in microseconds, or never."""
        row = self.row(number)
        if row >= 0:
            self._kept.clear()
            self._expires[row] = _OPEN["expires"] if when is None else when

    def _refresh(self, row: int) -> None:
        """Make a turn's document anew after the turn before it has changed."""
        if row >= 0:
            self.postings.replace(row, self._document(row, self._terms(row)))

    def embed(self, vectors: Iterable[tuple[int, npt.NDArray[np.float32]]]) -> None:
        """Take vectors (number, unit vector) of entries that are still here."""
        self._kept.clear()
        for number, vector in vectors:
            row = self.row(number)
            if self.holds_vectors and not self.vectors.dimensions:
                self._make_room_for_vectors(len(vector))
            if not self.holds_vectors:
                return
            if row < 0:
                continue
            self.vectors.put(row, vector)
            self._embedded[row] = True
            self._touch(row)

    def _forget_vector(self, row: int) -> None:
        if self.vectors.dimensions:
            self.vectors.put(row, np.zeros(self.vectors.dimensions, np.float32))

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

    def neighbours(self, rows: Rows, *, reach: int) -> list[Rows]:
        """The turns before and after each of *rows*, the nearest first, up to *reach* on each side; -1 for none."""
        steps = (self.before, self.after)
        found: list[Rows] = [step[rows] for step in steps]
        while len(found) < 2 * reach:
            there, step = found[-2], steps[len(found) % 2]
            found.append(np.where(there >= 0, step[there], -1))
        return found

    def with_neighbours(self, rows: Rows, *, reach: int) -> Rows:
        """*rows* and their neighbours, each once, in order."""
        there = np.zeros(self.rows, np.bool_)
        there[rows] = True
        for beside in self.neighbours(rows, reach=reach):
            there[beside[beside >= 0]] = True
        return np.flatnonzero(there)

    def near(self, rows: Rows | None, cosines: Floats, *, counted: npt.NDArray[np.bool_]) -> Floats:
        """Cosines of *rows* with each turn and its neighbours as one, a weighted sum of vectors; without what is not *counted*.

        *cosines*, of shape (all rows,), are those of the entries themselves, 0 for what is not counted, so that no vector is
        read again but where one has moved; those of *rows* and their neighbours are needed. *rows* None: all.
        """
        beside = self.kept(_beside_every) if rows is None else self.beside(rows)
        rows = self.kept(every) if rows is None else rows
        moved = rows[self.moved[rows]]
        if len(moved):
            self._norm[moved] = self._norms(moved, self.alive)
            self._moved[moved] = False
        norms = self.norm[rows]
        left_out = np.flatnonzero(self.alive & ~counted)
        if len(left_out):
            concerned = np.isin(rows, self.with_neighbours(left_out, reach=REACH))
            norms[concerned] = self._norms(rows[concerned], counted)
        together = cosines[rows] + _SHARES @ np.append(cosines, np.float32(0.0))[beside]
        return np.divide(together, np.maximum(norms, 1e-6), out=together)

    def beside(self, rows: Rows) -> Rows:
        """The neighbours that `near` takes in, of shape (2 x REACH, len(rows)); the row behind the last one for none."""
        beside = np.array(self.neighbours(rows, reach=REACH))
        beside[beside < 0] = self.rows
        return beside

    def _norms(self, rows: Rows, counted: npt.NDArray[np.bool_]) -> Floats:
        """Lengths of the weighted sums of the vectors of *rows* and their neighbours, of those that are *counted*."""
        norms = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            together = self.vectors.of(some) * counted[some, None]
            for n, there in enumerate(self.neighbours(some, reach=REACH)):
                has = (there >= 0) & counted[there]
                together[has] += _SHARES[n] * self.vectors.of(there[has])
            norms[start : start + len(some)] = np.linalg.norm(together, axis=1)
        return norms

    def _touch(self, row: int) -> None:
        """Note that a row's vector, or its place, has changed: its neighbours' norms do too."""
        self._moved[row] = True
        for step in (self._before, self._after):
            there = row
            for _ in range(REACH):
                there = int(step[there])
                if there < 0:
                    break
                self._moved[there] = True

    def _grow(self) -> None:
        size = 2 * len(self._number)
        for name, dtype in self._ARRAYS:
            old = getattr(self, f"_{name}")
            new = np.zeros(size, dtype)
            new[: self.rows] = old[: self.rows]
            setattr(self, f"_{name}", new)
        if self.vectors.dimensions:
            self.vectors.resize(size)


def every(index: ScopeIndex) -> Rows:
    """All rows."""
    return np.arange(index.rows)


def _beside_every(index: ScopeIndex) -> Rows:
    return index.beside(every(index))


__all__ = ["REACH", "ScopeIndex", "every"]
