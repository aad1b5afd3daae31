"""Keyed values: JSON objects under namespaces and keys, found by meaning through entries that carry their texts.

A value and its entries are written in one transaction. So all that holds for entries holds for what a value is found by:
embedding, indexing, filters, deletion. The texts of a user's values are knowledge of that user.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np

from .._ids import new_id
from .._json import dumped
from ..errors import FilterError, InputError, QueryError, StorageError, brief
from ..protocols import Namespace, Record, StoredValue, ValueRecord, ValuesWritten
from ..rules.analysis import recorded
from ..types import TYPE_NUMBER, Entry, MemoryType, Scope, Value, microseconds, moment
from .cached import forget
from .ingest import encodable, take
from .parts import Parts
from .search import LONGEST_QUERY, Conditions, index_of, ranked

DEEPEST = 200  # levels of a value and of a filter
_PAGE = 2000  # values that are read at once while a search looks for some that fulfil its filter
_ANY = "*"  # in the pattern of a namespace, for one label
_MINUTE = 60_000_000  # microseconds


@dataclass(frozen=True, slots=True)
class Get:
    """Read a value. *refresh*: it begins to live anew, if it has a time to live."""

    namespace: Namespace
    key: str
    refresh: bool = True


@dataclass(frozen=True, slots=True)
class Put:
    """Keep a JSON object under a key, found by *texts*, for *ttl* minutes after its last use; None deletes it."""

    namespace: Namespace
    key: str
    value: Mapping[str, Any] | None
    texts: Iterable[str] = ()
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """Find values below *prefix*: the best for *query*, or those changed last; *refresh* as for `Get`."""

    prefix: Namespace = ()
    query: str | None = None
    filter: Mapping[str, Any] | None = None
    limit: int = 10
    offset: int = 0
    refresh: bool = True


@dataclass(frozen=True, slots=True)
class Namespaces:
    """List namespaces that begin with each of *prefixes* and end with each of *suffixes*; `*` stands for any label."""

    prefixes: Sequence[Namespace] = ()
    suffixes: Sequence[Namespace] = ()
    max_depth: int | None = None
    limit: int = 100
    offset: int = 0


_Name = tuple[Namespace, str]
_Chosen = tuple[_Name, float | None]
"""A value that a search is to show, and its score."""
Op = Get | Put | Search | Namespaces
Result = Value | list[Value] | list[Namespace] | None


def run(parts: Parts, scope: Scope, ops: Iterable[Op], *, principal: str | None) -> list[Result]:
    """Do *ops*; a result for each, None for a put.

    Reads see what was there before. The puts are one transaction; of two for one key the last counts. Wrong input among
    the operations raises before anything is done.
    """
    given = list(ops)
    for action in dict.fromkeys(_action(op) for op in given):
        parts.authorize(principal, action, scope)
    now = parts.clock()
    checked = [_checked(op) for op in given]
    puts = {(op.namespace, op.key): op for op in checked if isinstance(op, Put)}
    records = [_record(parts, scope, op, now=now) for op in puts.values()]
    us = microseconds(now)
    results = [_read(parts, scope, op, principal=principal, now=us) for op in checked]
    read: dict[_Name, None] = {}
    for op, result in zip(checked, results, strict=True):
        if isinstance(op, Get | Search) and op.refresh:
            values = result if isinstance(result, list) else [result]
            read.update({(v.namespace, v.key): None for v in values if isinstance(v, Value) and v.expires_at})
    if records:
        _write(parts, scope, records, read=list(read), now=us)
    elif read:
        try:
            _write(parts, scope, [], read=list(read), now=us)
        except StorageError as error:  # a read need not be able to write
            parts.trouble = f"refreshing values: {type(error).__name__}: {error}"
    return results


def sweep(parts: Parts, scope: Scope, *, principal: str | None) -> int:
    """Delete the values that have expired; how many."""
    parts.authorize(principal, "delete", scope)
    return delete_expired(parts, scope)


def delete_expired(parts: Parts, scope: Scope) -> int:
    """The same for a sweep, which is nobody's."""
    count = 0
    while expired := _write(parts, scope, [], now=microseconds(parts.clock())).expired:
        count += expired
    return count


def _action(op: Op) -> str:
    if not isinstance(op, Op):
        raise InputError(f"an operation is a Get, Put, Search or Namespaces, not {brief(op)}")
    if isinstance(op, Put):
        return "delete" if op.value is None else "write"
    return "read"


# -- writing


def _write(
    parts: Parts,
    scope: Scope,
    records: Sequence[ValueRecord],
    *,
    read: Sequence[_Name] = (),
    now: int,
) -> ValuesWritten:
    """Write, and bring what is in RAM up to date."""
    resident = parts.resident(scope)
    with resident.lock:
        try:
            done = parts.ledger.write_values(scope, records, read=read, now=now)
            take(parts, scope, done.written, session=done.session)
            index = resident.index
            if index is not None:
                for number in done.gone:
                    index.drop(number)
                for number, expires in done.moved.items():
                    index.expire(number, expires)
        except BaseException:
            resident.forget()
            raise
    if done.gone:
        forget(parts, scope)
    if done.written or done.gone:
        parts.changed()
    return done


def _record(parts: Parts, scope: Scope, op: Put, *, now: datetime) -> ValueRecord:
    if op.value is None:
        return ValueRecord(op.namespace, op.key, None)
    about = {"kind": "value", "namespace": list(op.namespace), "key": op.key}
    texts = [_text(parts, scope, text, about=about, now=now) for text in op.texts]
    ttl = None if op.ttl is None else max(1, int(min(op.ttl, sys.maxsize // _MINUTE) * _MINUTE))
    return ValueRecord(op.namespace, op.key, encodable(dumped(op.value, what="a value")), ttl, texts)


def _text(parts: Parts, scope: Scope, text: str, *, about: Mapping[str, Any], now: datetime) -> Record:
    """An entry by which a value is found."""
    own_id = new_id()
    return recorded(
        Entry(
            id=own_id,
            key=parts.ledger.key(scope, id=own_id, knowledge=True),
            type=MemoryType.LONG_TERM,
            content=text,
            scope=scope,
            seq=0,
            created_at=now,
            written_at=now,
            updated_at=now,
            metadata=about,
            provenance="told",
            tokens=parts.counter.count(text),
        )
    )


# -- reading


def _read(parts: Parts, scope: Scope, op: Op, *, principal: str | None, now: int) -> Result:
    match op:
        case Get(namespace, key):
            stored = parts.ledger.values(scope, [(namespace, key)], now=now).get((namespace, key))
            return None if stored is None else _value(stored)
        case Search():
            return _search(parts, scope, op, principal=principal, now=now)
        case Namespaces():
            return _namespaces(parts, scope, op, now=now)
    return None


def _search(parts: Parts, scope: Scope, op: Search, *, principal: str | None, now: int) -> list[Value]:
    end = min(op.offset + op.limit, sys.maxsize)
    if not op.limit or op.offset >= end:
        return []
    if op.query is None:
        enough = None if op.filter else end
        below = parts.ledger.values_below(scope, op.prefix, now=now, limit=enough)
        chosen: Iterator[_Chosen] = (((v.namespace, v.key), None) for v in below)
    else:
        chosen = _best(parts, scope, op.prefix, op.query, principal=principal, now=now)
    found = _loaded(parts, scope, chosen, page=end, now=now)
    return list(islice((v for v in found if _matches(v.value, op.filter or {})), op.offset, end))


def _best(
    parts: Parts, scope: Scope, prefix: Namespace, query: str, *, principal: str | None, now: int
) -> Iterator[_Chosen]:
    """All values below *prefix*: the best first, each by its best text; then the other ones, those without a text last."""
    texts = parts.ledger.value_texts(scope, prefix)
    given: set[_Name] = set()
    if texts:
        conditions = Conditions([MemoryType.LONG_TERM], besides=_besides(parts, scope, texts))
        hits = ranked(parts, scope, query, principal=principal, conditions=conditions)
        while page := list(islice(hits, _PAGE if given else 64)):
            names = parts.ledger.values_of(scope, [hit.entry.number for hit in page])
            for hit in page:
                name = names.get(hit.entry.number)
                if name is not None and name[0][: len(prefix)] == prefix and name not in given:
                    given.add(name)
                    yield name, hit.score
    rest = parts.ledger.values_below(scope, prefix, now=now)
    rest = [v for v in rest if (v.namespace, v.key) not in given]
    yield from (((v.namespace, v.key), 0.0) for v in rest if v.texts)
    yield from (((v.namespace, v.key), None) for v in rest if not v.texts)


def _besides(parts: Parts, scope: Scope, wanted: Collection[int]) -> frozenset[int]:
    """Numbers of the owner's other knowledge, so that no namespace's texts move the ranking of another's."""
    resident = parts.resident(scope)
    with resident.lock:
        fresh = resident.index is None
        index = index_of(parts, resident)
        knowledge = index.alive & (index.kind == TYPE_NUMBER[MemoryType.LONG_TERM])
        others = index.number[knowledge & ~np.isin(index.number, list(wanted))].tolist()
    if fresh:
        parts.residents.weigh(resident)
    return frozenset(others)


def _loaded(parts: Parts, scope: Scope, chosen: Iterator[_Chosen], *, page: int, now: int) -> Iterator[Value]:
    """The values, read in pages; what was deleted meanwhile is left out."""
    while part := list(islice(chosen, min(page, _PAGE))):
        stored = parts.ledger.values(scope, [name for name, _ in part], now=now)
        yield from (_value(stored[name], score) for name, score in part if name in stored)
        page = max(64, 4 * min(page, _PAGE))


def _value(stored: StoredValue, score: float | None = None) -> Value:
    return Value(
        stored.namespace,
        stored.key,
        json.loads(stored.value),
        moment(stored.created_at),
        moment(stored.updated_at),
        None if stored.expires_at is None else moment(stored.expires_at),
        score,
    )


def _namespaces(parts: Parts, scope: Scope, op: Namespaces, *, now: int) -> list[Namespace]:
    begun = max((p[: p.index(_ANY)] if _ANY in p else p for p in op.prefixes), key=len, default=())
    found = {
        namespace[: op.max_depth]
        for namespace in parts.ledger.namespaces(scope, begun, now=now)
        if all(_alike(namespace, pattern) for pattern in op.prefixes)
        and all(_alike(namespace[::-1], pattern[::-1]) for pattern in op.suffixes)
    }
    return sorted(found)[op.offset : op.offset + op.limit]


def _alike(namespace: Namespace, pattern: Namespace) -> bool:
    """Whether *namespace* begins as *pattern* says."""
    if len(namespace) < len(pattern):
        return False
    return all(wanted in (_ANY, label) for label, wanted in zip(namespace, pattern, strict=False))


# -- filters


_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_OPERATORS = ("$eq", "$ne", *_ORDER)


def _matches(value: Any, wanted: Any) -> bool:
    """Whether *value* is as *wanted* says: operators, mappings by the keys that they name, lists item by item, or equal."""
    if isinstance(wanted, dict):
        if any(name in wanted for name in _OPERATORS):
            return all(_compares(value, name, than) for name, than in wanted.items())
        return isinstance(value, dict) and all(_matches(value.get(name), part) for name, part in wanted.items())
    if isinstance(wanted, list):
        same_size = isinstance(value, list) and len(value) == len(wanted)
        return same_size and all(_matches(v, w) for v, w in zip(value, wanted, strict=True))
    return bool(value == wanted)


def _compares(value: Any, name: str, than: Any) -> bool:
    if name in ("$eq", "$ne"):
        return bool((value == than) == (name == "$eq"))
    numbers = _number(value), _number(than)
    if None not in numbers:
        return _ORDER[name](*numbers)
    return isinstance(value, str) and isinstance(than, str) and _ORDER[name](value, than)


def _number(value: Any) -> float | None:
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


# -- what callers give


def _checked(op: Op) -> Op:
    """*op* with values of its own, if it can be done; `InputError` otherwise."""
    match op:
        case Get():
            return replace(op, namespace=_labels(op.namespace), key=_key(op.key))
        case Put():
            return _checked_put(op)
        case Search():
            return _checked_search(op)
    for name in ("limit", "offset", "max_depth"):
        _size(name, getattr(op, name), may_be_none=name == "max_depth")
    return replace(op, prefixes=tuple(_labels(p) for p in op.prefixes), suffixes=tuple(_labels(s) for s in op.suffixes))


def _checked_put(op: Put) -> Put:
    if isinstance(op.texts, str) or not isinstance(op.texts, Iterable):
        raise InputError(f"texts is a list of texts, not {brief(op.texts)}")
    texts = list(op.texts)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"texts is a list of texts, not one with {brief(text)}")
    ttl = op.ttl
    if ttl is not None and (not isinstance(ttl, int | float) or isinstance(ttl, bool) or not ttl > 0):
        raise InputError(f"ttl is a number of minutes, more than 0, or None, not {brief(ttl)}")
    return replace(
        op,
        namespace=_labels(op.namespace),
        key=_key(op.key),
        value=None if op.value is None else _plain(op.value, what="a value"),
        texts=tuple(dict.fromkeys(encodable(text) for text in texts if text.strip())),
    )


def _checked_search(op: Search) -> Search:
    for name in ("limit", "offset"):
        _size(name, getattr(op, name))
    if op.query is not None:
        if not isinstance(op.query, str) or not op.query.strip():
            raise QueryError("the query is empty: say what to look for, or pass None for what changed last")
        if len(op.query) > LONGEST_QUERY:
            raise QueryError(
                f"the query has {len(op.query)} characters; pass the part that asks, at most {LONGEST_QUERY} characters"
            )
    wanted = None
    if op.filter is not None:
        wanted = _plain(op.filter, what="a filter")
        for name, part in wanted.items():
            if name.startswith("$"):
                raise FilterError(f"{name!r:.80} stands where a filter names a field")
            _check_operators(part)
    return replace(op, prefix=_labels(op.prefix), filter=wanted)


def _check_operators(wanted: Any) -> None:
    """Raise `FilterError` unless each operator in *wanted* is one of ours."""
    if isinstance(wanted, list):
        for part in wanted:
            _check_operators(part)
    elif isinstance(wanted, dict):
        if not any(name.startswith("$") for name in wanted):
            for part in wanted.values():
                _check_operators(part)
            return
        for name in wanted:
            if name not in _OPERATORS:
                raise FilterError(f"{name!r:.80} is no operator; use {', '.join(_OPERATORS)}")


def _plain(value: Any, *, what: str) -> dict[str, Any]:
    """*value* as JSON values of its own; `InputError` unless it would read back equal."""
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is a mapping of JSON values, not {brief(value)}")
    text = encodable(dumped(value, what=what))  # so it has no circles
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, Mapping):
                odd = [name for name in part if not isinstance(name, str)]
                if odd:
                    raise InputError(f"the keys in {what} are texts, not {brief(odd[0])}")
                inner += part.values()
            elif isinstance(part, list | tuple):
                inner += part
        if not inner:
            found: dict[str, Any] = json.loads(text)
            return found
        level = inner
    raise InputError(f"{what} has at most {DEEPEST} levels, and this one has more")


def _labels(namespace: Any) -> Namespace:
    labels: list[Any] = [*namespace] if isinstance(namespace, tuple | list) else [None]
    if not all(isinstance(label, str) and label and "\0" not in label for label in labels):
        raise InputError(f"a namespace is a tuple of texts, none of them empty or with a NUL, not {brief(namespace)}")
    return tuple(encodable(label) for label in labels)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise InputError(f"a key is a text, not {brief(key)}")
    return encodable(key)


def _size(name: str, value: Any, *, may_be_none: bool = False) -> None:
    if value is None and may_be_none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise QueryError(f"{name} is a number, 0 or more, not {brief(value)}")


__all__ = ["DEEPEST", "Get", "Namespaces", "Op", "Put", "Result", "Search", "delete_expired", "run", "sweep"]
