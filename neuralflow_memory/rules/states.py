"""The states of sessions: which lives follow which, what a user's own fields may hold, where their transitions lead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from .._json import dumped
from ..errors import ConfigError, ConflictError, InvalidTransition, MessageError, StateError, brief
from ..types import Life, StateDiff, StateVersion

LIFE: dict[Life, tuple[Life, ...]] = {
    "active": ("idle", "expired", "closed"),
    "idle": ("active", "expired", "closed"),
    "expired": ("active", "closed"),
    "closed": ("active",),
}
"""Where a session's life may go."""
LONGEST_STATE = 200_000  # characters of the fields' JSON
Fields = dict[str, Any]
Hook = Callable[[StateVersion, StateVersion], object]
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True, eq=False)
class StateRules:
    """What a session's state may be: `open_memory(..., state_rules=StateRules(Form, transitions={...}))`.

    Attributes:
        schema: A pydantic model, or a JSON schema, of the fields; None for any JSON values. A state that was not written yet
            holds the defaults, as far as the model can be made of them.
        transitions: Where each status may go: `{"asking": ["booked"], "booked": []}`. A state begins with the model's default,
            else with the first. None for a state without a status.
        status: The field that the status stands in.
        on_transition: Called with the version before and the one after, once it is stored, when the status or the session's life
            has changed: a function, or several. What they raise is told in `stats()["last_error"]`; to refuse a state, have the
            model's validator raise.

    Raises:
        ConfigError: The schema is none, or the table names a status that has no row in it.
    """

    schema: type[BaseModel] | Mapping[str, Any] | None = None
    _: KW_ONLY
    transitions: Mapping[str, Iterable[str]] | None = None
    status: str = "status"
    on_transition: Hook | Sequence[Hook] = ()
    table: dict[str, tuple[str, ...]] = field(init=False, repr=False)
    hooks: tuple[Hook, ...] = field(init=False, repr=False)
    _check: Callable[[Fields], Fields] = field(init=False, repr=False)
    _own: Callable[[Mapping[str, Any]], Fields] = field(init=False, repr=False)
    _beginning: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = [self.on_transition] if callable(self.on_transition) else self.on_transition
        hooks = tuple(given) if isinstance(given, Iterable) else (None,)
        if not all(callable(hook) for hook in hooks):
            raise ConfigError(f"on_transition takes functions of two versions, not {brief(self.on_transition)}")
        object.__setattr__(self, "hooks", hooks)
        object.__setattr__(self, "table", _table(self.transitions))
        own, check, defaults = _by_schema(self.schema)
        object.__setattr__(self, "_own", own)
        object.__setattr__(self, "_check", check)
        beginning = defaults()
        if self.table:
            beginning.setdefault(self.status, next(iter(self.table)))
            if beginning[self.status] not in self.table:
                raise ConfigError(
                    f"a state would begin with {self.status}={brief(beginning[self.status])}, which has no row in transitions; "
                    "add one, or give the field another default"
                )
        object.__setattr__(self, "_beginning", _json(beginning))

    @property
    def beginning(self) -> Fields:
        """The fields of a state that was not written yet."""
        return _loaded(self._beginning)

    def status_of(self, fields: Mapping[str, Any]) -> str | None:
        """Where *fields* are in the table."""
        found = fields.get(self.status) if self.table else None
        return found if isinstance(found, str) else None

    def merged(self, before: Mapping[str, Any], given: Any, *, to: str | None = None) -> Fields:
        """*before* with the fields *given*, and the status *to*: valid, and reached as the table allows; else `StateError`."""
        status = {} if to is None else {self.status: to}
        return self.replaced(before, {**before, **self._own({**as_fields(given), **status})})

    def replaced(self, before: Mapping[str, Any], given: Any) -> Fields:
        """The fields *given* in place of *before*, as for `merged`."""
        after = self._check(self._own(as_fields(given)))
        if self.table:
            after.setdefault(self.status, before.get(self.status, self.beginning[self.status]))
            self._known(after)
            if after[self.status] != before.get(self.status):
                self.allow(self.status_of(before), after[self.status])
        _json(after)
        return after

    def valid(self, fields: Fields) -> Fields:
        """*fields* as they are, which were valid once, if they still are."""
        self._check(fields)
        self._known(fields)
        return fields

    def allow(self, before: str | None, after: Any) -> None:
        """Raise `InvalidTransition` unless the table leads from *before* to *after*."""
        if not self.table:
            raise StateError(
                "this session's state has no transition table: give open_memory or session a "
                "state_rules=StateRules(transitions={...}), or move its life with transition(life=...)"
            )
        # What is not in the table, because it was another one then, may only begin anew.
        allowed = self.table.get(before or "", (self.beginning[self.status],))
        if after not in allowed:
            _refuse(before, after, allowed, what=self.status)

    def _known(self, fields: Mapping[str, Any]) -> None:
        if self.table and (self.status_of(fields) or "") not in self.table:
            raise _invalid([f"{self.status}: {brief(fields.get(self.status))} is none of {', '.join(self.table)}"])


def as_rules(given: Any) -> StateRules:
    """Rules as callers give them: `StateRules`, or a schema alone."""
    return given if isinstance(given, StateRules) else StateRules(given)


def living(before: Life, after: Any) -> Life:
    """*after*, if a life may go there from *before*; `InvalidTransition` otherwise."""
    if after not in get_args(Life):
        raise StateError(f"life is one of {', '.join(LIFE)}, not {brief(after)}")
    if after not in LIFE[before]:
        _refuse(before, after, LIFE[before], what="life")
    found: Life = after
    return found


def overtaken(name: str, *, expected: int, found: int) -> ConflictError:
    """The error of a change that was made from another version of a session's state than it is at."""
    return ConflictError(
        f"the state of {name!r} is at version {found}, and was expected at {expected}: read it again, or change it with "
        "state.change(), which does so by itself",
        id=name,
        expected=expected,
        found=found,
    )


def open_for_writing(life: Life) -> None:
    """Raise `InvalidTransition` if a session of this life is closed."""
    if life == "closed":
        raise InvalidTransition(
            "the session is closed, and its state can't be changed: open it again with transition(life='active')",
            before="closed",
            after="active",
            allowed=LIFE["closed"],
        )


def by_silence(silence: float, *, expiry: float) -> Life:
    """How a session stands after so many seconds without a write."""
    if silence < expiry:
        return "active"
    return "idle" if silence < 2 * expiry else "expired"


def later(one: Life, other: Life) -> Life:
    """The one that more silence leads to."""
    lives = list(LIFE)
    return max(one, other, key=lives.index)


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> StateDiff:
    """What differs between the fields of two versions."""
    return StateDiff(
        {k: v for k, v in after.items() if k not in before},
        {k: v for k, v in before.items() if k not in after},
        {k: (before[k], v) for k, v in after.items() if k in before and not _same(before[k], v)},
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are one: to Python, 1, 1.0 and True are equal."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


# -- what rules are made of


def _table(transitions: Any) -> dict[str, tuple[str, ...]]:
    if transitions is None:
        return {}
    rows = dict(transitions) if isinstance(transitions, Mapping) else {}
    table = {
        s: tuple(to) if isinstance(to, Iterable) and not isinstance(to, str) else (None,) for s, to in rows.items()
    }
    named = [*table, *(s for to in table.values() for s in to)]
    if not table or not all(isinstance(s, str) and s for s in named):
        raise ConfigError(
            f"transitions is a mapping from each status to a list of those that follow, not {brief(transitions)}"
        )
    lost = sorted({s for s in named if s not in table})
    if lost:
        raise ConfigError(f"transitions lead to {', '.join(lost)}, which have no row: add {lost[0]!r}: [...] to it")
    return table


_Schema = tuple[Callable[[Mapping[str, Any]], Fields], Callable[[Fields], Fields], Callable[[], Fields]]
"""What makes JSON of given fields; what checks fields; and the defaults."""


def _by_schema(schema: Any) -> _Schema:
    if schema is None:
        return _plain, dict, dict
    if isinstance(schema, type) and issubclass(schema, BaseModel) and not schema.__pydantic_root_model__:
        return _by_model(schema)
    if isinstance(schema, Mapping):
        return _by_json_schema(_loaded(_json(schema)))
    raise ConfigError(f"a state's schema is a pydantic model with fields, or a JSON schema, not {brief(schema)}")


def _by_model(model: type[BaseModel]) -> _Schema:
    aliases = {
        alias: name
        for name, about in model.model_fields.items()
        for alias in (about.alias, about.validation_alias)
        if isinstance(alias, str)
    }

    def own(given: Mapping[str, Any]) -> Fields:
        named = {aliases.get(k, k): v for k, v in given.items()}
        if model.model_config.get("extra") != "allow":
            unknown = [f"{k}: {_unlike(k, model.model_fields)}" for k in named if k not in model.model_fields]
            if unknown:
                raise _invalid(unknown)
        try:
            return _plain(to_jsonable_python(named))
        except (PydanticSerializationError, ValueError) as error:
            if isinstance(error, StateError):
                raise
            raise _invalid([str(error)]) from None

    def check(fields: Fields) -> Fields:
        try:
            made = model.model_validate_json(_json(fields), by_alias=True, by_name=True)
        except ValidationError as error:
            raise _invalid([f"{_path(e['loc'])}: {e['msg']}" for e in error.errors()]) from None
        return _plain(made.model_dump(mode="json", round_trip=True))

    def defaults() -> Fields:
        try:
            return check({})
        except StateError:  # some fields have none
            return {}

    return own, check, defaults


def _unlike(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"there is no such field{f'; did you mean {near[0]!r}?' if near else ', but ' + ', '.join(known)}"


def _by_json_schema(schema: Fields) -> _Schema:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"a state's schema is no JSON schema: {error.message}") from None
    # A registry of its own, or references to elsewhere would be fetched from there.
    validator = kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)

    def check(fields: Fields) -> Fields:
        try:
            problems = [f"{_path(e.absolute_path)}: {e.message:.200}" for e in validator.iter_errors(fields)]
        except Unresolvable as error:
            raise StateError(
                f"the state's schema refers to what is not in it ({error}); copy that into its $defs"
            ) from None
        if problems:
            raise _invalid(sorted(problems))
        return dict(fields)

    def defaults() -> Fields:
        about = schema.get("properties", {})
        return {k: v["default"] for k, v in about.items() if isinstance(v, dict) and "default" in v}

    return _plain, check, defaults


def _path(parts: Iterable[Any]) -> str:
    return ".".join(map(str, parts)) or "state"


def as_fields(given: Any) -> Mapping[str, Any]:
    """The fields that callers give: a mapping, or a model, of which those count that were set."""
    if isinstance(given, BaseModel):
        return given.model_dump(exclude_unset=True, round_trip=True)
    if not isinstance(given, Mapping) or not all(isinstance(k, str) for k in given):
        raise StateError(f"the fields of a state are a mapping from names to JSON values, not {brief(given)}")
    return given


def _plain(given: Mapping[str, Any]) -> Fields:
    """JSON values of one's own."""
    return _loaded(_json(given))


def _loaded(text: str) -> Fields:
    found: Fields = json.loads(text)
    return found


def _json(fields: Mapping[str, Any]) -> str:
    try:
        text = dumped(fields, what="a state")
        text.encode()
    except (MessageError, UnicodeEncodeError) as error:
        raise _invalid([str(error)]) from None
    if len(text) > LONGEST_STATE:
        raise _invalid(
            [f"{len(text):,} characters as JSON, and at most {LONGEST_STATE:,} are kept; keep what is large elsewhere"]
        )
    return text


def _invalid(problems: Sequence[str]) -> StateError:
    told = "; ".join(problems[:_MOST_PROBLEMS])
    return StateError(f"the state would not be valid, and stands as it was: {told}", problems=tuple(problems))


def _refuse(before: str | None, after: Any, allowed: Sequence[str], *, what: str) -> None:
    ways = f"from there it may go to {', '.join(allowed)}" if allowed else "from there it goes nowhere"
    raise InvalidTransition(
        f"{what} can't go from {brief(before)} to {brief(after)}: {ways}",
        before=before,
        after=after,
        allowed=tuple(allowed),
    )


__all__ = [
    "LIFE",
    "LONGEST_STATE",
    "Fields",
    "Hook",
    "StateRules",
    "as_fields",
    "as_rules",
    "by_silence",
    "diff",
    "later",
    "living",
    "open_for_writing",
    "overtaken",
]
