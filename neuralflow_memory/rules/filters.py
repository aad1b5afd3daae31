"""The filter language: one meaning for every store, decided here by asking an entry itself.

A filter is a mapping. Each key names a field, each value says what it must be; several keys must all hold.

    {"role": "user", "importance": {"$gte": 0.5, "$lt": 0.9}, "category": "travel"}
    {"$or": [{"tags": {"$contains": "visa"}}, {"created_at": {"$gte": "2024-05-01"}}]}

Fields are those of an entry listed in `FIELDS`; any other name is a metadata key. `metadata.x` is always the metadata
key `x`, also where a field has that name. Dots lead into nested metadata (`trip.city`), unless a key is spelt that way.

What holds when:

- A bare value means `$eq`. A missing field is None: it equals None, and passes `$ne`, `$nin` and `$not`.
- Numbers compare by value (1 equals 1.0), text by its characters (case counts), times as instants. A bool is not a
  number. Values of different kinds are unequal, and `$gt $gte $lt $lte` between them are false.
- Times are datetimes or ISO 8601 text; without a zone they are UTC. Against a datetime, text in metadata counts as a time.
- `category` is a path: "travel" equals "travel" and "travel/visa", not "travelling"; so do `$ne`, `$in` and `$nin`.
- A list (`tags`) equals a list with equal members in the same order, never a single value: ask with `$contains`.
- `$in` means equal to one of the listed values; of none, if the list is empty. `$nin` is its opposite, `$ne` that of `$eq`.
- `$contains` is membership in a list, or part of a text; `$startswith` is the beginning of a text.
- `$and` and `$or` take non-empty lists of filters; `$not` takes a filter, or below a field a mapping of operators.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any, TypeAlias

from ..errors import FilterError
from ..types import Entry, utc

MAX_DEPTH = 32
"""How deep filters, and the values in them, may nest."""

_TIMES = frozenset({"created_at", "written_at", "updated_at", "expires_at", "valid_from", "valid_to"})
_SCOPED = frozenset({"session_id", "user_id", "agent_id"})
_PLAIN = """id type role name content seq importance tags category source provenance trust version pinned key tokens
    supersedes superseded_by tier archive_label"""
FIELDS = frozenset(_PLAIN.split()) | _TIMES | _SCOPED
"""Names that mean a field of the entry rather than a metadata key."""

_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_OPERATORS = ("$eq", "$ne", *_ORDER, "$in", "$nin", "$contains", "$startswith", "$not")


@dataclass(frozen=True, slots=True)
class Condition:
    """One field against one value. `operator` is `$eq`, an order, `$contains`, `$startswith`, or `$in` over texts."""

    field: str
    operator: str
    operand: Any

    def matches(self, entry: Entry) -> bool:
        """Whether *entry* meets the condition; never raises."""
        value, operand = _value(entry, self.field), self.operand
        match self.operator:
            case "$eq":
                return _under(value, operand) if self.field == "category" else _same(value, operand)
            case "$in":
                return isinstance(value, str) and value in operand
            case "$contains" if isinstance(value, str):
                return isinstance(operand, str) and operand in value
            case "$contains":
                return isinstance(value, list | tuple) and any(_same(member, operand) for member in value)
            case "$startswith":
                return isinstance(value, str) and value.startswith(operand)
            case order:
                return _ordered(value, operand, _ORDER[order])


@dataclass(frozen=True, slots=True)
class Every:
    """All of the parts hold; true without parts."""

    parts: tuple[Filter, ...]

    def matches(self, entry: Entry) -> bool:
        """Whether *entry* meets every part; never raises."""
        return all(part.matches(entry) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Some:
    """At least one of the parts holds; false without parts."""

    parts: tuple[Filter, ...]

    def matches(self, entry: Entry) -> bool:
        """Whether *entry* meets one of the parts; never raises."""
        return any(part.matches(entry) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Negation:
    """The part does not hold."""

    part: Filter

    def matches(self, entry: Entry) -> bool:
        """Whether *entry* fails the part; never raises."""
        return not self.part.matches(entry)


Filter: TypeAlias = Condition | Every | Some | Negation


def parse(expression: Mapping[str, Any] | None) -> Filter | None:
    """Return *expression* checked and ready to match entries; None where nothing is asked for (None or empty).

    Raises:
        FilterError: An unknown operator, an operand of the wrong kind, a text that is no time, or too deep a nesting.
    """
    if expression is None:
        return None
    parsed = _filter(expression, depth=0)
    return None if parsed == Every(()) else parsed


def _filter(expression: Any, *, depth: int) -> Filter:
    _check_depth(depth)
    if not isinstance(expression, Mapping):
        raise FilterError(f'a filter is a mapping such as {{"role": "user"}}, not {_shown(expression)}')
    return _every([_clause(key, value, depth=depth + 1) for key, value in expression.items()])


def _clause(key: Any, value: Any, *, depth: int) -> Filter:
    if not isinstance(key, str):
        raise FilterError(f"a filter's keys are field names or operators, not {_shown(key)}")
    if key in {"$and", "$or"}:
        if not isinstance(value, list | tuple) or not value:
            raise FilterError(f"{key} takes a list of at least one filter, not {_shown(value)}")
        parts = tuple(_filter(part, depth=depth) for part in value)
        return Every(parts) if key == "$and" else Some(parts)
    if key == "$not":
        return Negation(_filter(value, depth=depth))
    if key.startswith("$"):
        raise FilterError(
            f"{_shown(key)} does not stand alone: use $and, $or, $not, or a field name with an operator below"
        )
    if isinstance(value, Mapping):
        return _tests(key, value, depth=depth)
    return _condition(key, "$eq", value, depth=depth)


def _tests(field: str, tests: Mapping[Any, Any], *, depth: int) -> Filter:
    """Parse what stands below a field name: a mapping of operators."""
    _check_depth(depth)
    unknown = [name for name in tests if name not in _OPERATORS]
    if unknown or not tests:
        what = f"{_shown(unknown[0])} is no operator" if unknown else "no operator given"
        raise FilterError(
            f"{_shown(field)}: {what}; use {', '.join(_OPERATORS)}. Nested metadata is named with dots, "
            'and compared as a whole with {"$eq": {...}}'
        )
    return _every([_condition(field, name, value, depth=depth + 1) for name, value in tests.items()])


def _condition(field: str, name: str, raw: Any, *, depth: int) -> Filter:
    match name:
        case "$not":
            if not isinstance(raw, Mapping):
                raise FilterError(
                    f"{_shown(field)}: $not takes a mapping of operators, not {_shown(raw)}; for a value use $ne"
                )
            return Negation(_tests(field, raw, depth=depth))
        case "$ne":
            return Negation(_condition(field, "$eq", raw, depth=depth))
        case "$nin":
            return Negation(_condition(field, "$in", raw, depth=depth))
        case "$in":
            if not isinstance(raw, list | tuple | set | frozenset):
                raise FilterError(f"{_shown(field)}: $in and $nin take a list of values, not {_shown(raw)}")
            values = [_operand(field, value, depth=depth) for value in raw]
            if field != "category" and all(isinstance(value, str) for value in values):
                return Condition(field, "$in", frozenset(values))
            return Some(tuple(Condition(field, "$eq", value) for value in values))
    if name in {"$contains", "$startswith"} and field in _TIMES:
        raise FilterError(f"{field} is a time: ask for a span with $gte and $lt, not with {name}")
    operand = _operand(field, raw, depth=depth)
    if name in _ORDER and (isinstance(operand, bool) or not isinstance(operand, int | float | str | datetime)):
        raise FilterError(f"{_shown(field)}: {name} takes a number, a text or a time, not {_shown(raw)}")
    if name == "$startswith" and not isinstance(operand, str):
        raise FilterError(f"{_shown(field)}: $startswith takes a text, not {_shown(raw)}")
    return Condition(field, name, operand)


def _operand(field: str, raw: Any, *, depth: int) -> Any:
    """Return *raw* with its times as aware datetimes."""
    _check_depth(depth)
    if isinstance(raw, datetime) or (field in _TIMES and isinstance(raw, str)):
        when = _time(raw)
        if when is None:
            raise FilterError(
                f"{_shown(field)}: {_shown(raw)} is no time; give a datetime or ISO 8601 text: 2024-05-03T14:00Z"
            )
        return when
    if isinstance(raw, date):
        return datetime.combine(raw, time(), UTC)
    if field in _TIMES and raw is not None:
        raise FilterError(f"{field} is a time: compare it with a datetime, ISO 8601 text or None, not {_shown(raw)}")
    if raw is None or isinstance(raw, str | bool | int | float):
        return raw
    if isinstance(raw, list | tuple):
        return tuple(_operand(field, member, depth=depth + 1) for member in raw)
    if isinstance(raw, Mapping):
        return {name: _operand(field, member, depth=depth + 1) for name, member in raw.items()}
    raise FilterError(f"{_shown(field)}: can't compare with a {type(raw).__name__}; give a JSON value or a datetime")


def _every(parts: list[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else Every(tuple(parts))


def _shown(value: Any) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # a number of more digits than Python prints
        return f"this {type(value).__name__}"


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FilterError(
            f"the filter nests deeper than {MAX_DEPTH} levels; write it flatter, e.g. one $and with all parts"
        )


def _value(entry: Entry, field: str) -> Any:
    """Return what *field* names in *entry*; None where it is missing."""
    if field in FIELDS:
        return getattr(entry.scope if field in _SCOPED else entry, field)
    path = field.removeprefix("metadata.")
    if path in entry.metadata:
        return entry.metadata[path]
    value: Any = entry.metadata
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _same(value: Any, operand: Any) -> bool:
    """Equality as the filters mean it; goes no deeper than *operand* does."""
    if isinstance(operand, datetime):
        return _time(value) == operand
    if operand is None or isinstance(operand, bool) or isinstance(value, bool):
        return value is operand
    if isinstance(operand, str):
        return isinstance(value, str) and value == operand
    if isinstance(operand, int | float):
        return isinstance(value, int | float) and value == operand
    if isinstance(operand, tuple):
        return isinstance(value, list | tuple) and len(value) == len(operand) and all(map(_same, value, operand))
    return (
        isinstance(value, Mapping)
        and value.keys() == operand.keys()
        and all(_same(value[name], member) for name, member in operand.items())
    )


def _under(value: Any, operand: Any) -> bool:
    """Whether the category *value* is *operand* or lies below it, by whole segments."""
    if not isinstance(value, str) or not isinstance(operand, str):
        return _same(value, operand)
    path = operand.rstrip("/")
    return value in (operand, path) or value.startswith(path + "/")


def _ordered(value: Any, operand: Any, holds: Callable[[Any, Any], bool]) -> bool:
    if isinstance(operand, datetime):
        when = _time(value)
        return when is not None and holds(when, operand)
    if isinstance(operand, str):
        return isinstance(value, str) and holds(value, operand)
    return isinstance(value, int | float) and not isinstance(value, bool) and holds(value, operand)


def _time(value: Any) -> datetime | None:
    try:
        return utc(datetime.fromisoformat(value) if isinstance(value, str) else value)
    except (ValueError, OverflowError, AttributeError, TypeError):  # no time, or one outside the calendar in UTC
        return None


__all__ = ["FIELDS", "MAX_DEPTH", "Condition", "Every", "Filter", "Negation", "Some", "parse"]
