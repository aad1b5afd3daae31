"""The filter language means one thing, never fails on data, and says what is wrong with a bad expression."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory.errors import FilterError
from neuralflow_memory.rules.filters import FIELDS, MAX_DEPTH, parse
from neuralflow_memory.types import Entry, MemoryType, Scope

DAY = datetime(2024, 5, 3, tzinfo=UTC)


def entry(**fields: Any) -> Entry:
    defaults: dict[str, Any] = {
        "id": "m1",
        "key": "k1",
        "type": MemoryType.SHORT_TERM,
        "content": "We fly to Lisbon",
        "scope": Scope(user_id="ada", session_id="chat", agent_id="planner"),
        "seq": 7,
        "created_at": DAY,
        "written_at": DAY + timedelta(hours=1),
        "updated_at": DAY + timedelta(hours=2),
        "role": "user",
        "tags": ("trip", "visa"),
        "category": "travel/visa",
        "importance": 0.5,
    }
    return Entry(**(defaults | fields))


def matches(expression: Any, **fields: Any) -> bool:
    parsed = parse(expression)
    return parsed is None or parsed.matches(entry(**fields))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("2024-05-03")
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
names = st.sampled_from(
    ["role", "seq", "tags", "category", "importance", "metadata.x", "x", "x.y", "user_id", "absent"]
)
orders = st.sampled_from(["$gt", "$gte", "$lt", "$lte"])
tests = (
    json_values.map(lambda v: {"$eq": v})
    | json_values.map(lambda v: {"$ne": v})
    | st.tuples(orders, st.integers() | st.floats() | st.text(max_size=5)).map(lambda t: {t[0]: t[1]})
    | st.lists(scalars, max_size=4).map(lambda v: {"$in": v})
    | st.lists(scalars, max_size=4).map(lambda v: {"$nin": v})
    | scalars.map(lambda v: {"$contains": v})
    | st.text(max_size=3).map(lambda v: {"$startswith": v})
)
filters = st.recursive(
    st.dictionaries(names, tests, max_size=3),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"$and": parts})
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"$or": parts})
        | inner.map(lambda part: {"$not": part})
    ),
    max_leaves=6,
)
entries = st.builds(
    entry,
    metadata=st.dictionaries(st.sampled_from(["x", "y", "x.y", "role"]) | st.text(max_size=4), json_values, max_size=4),
    tags=st.lists(st.text(max_size=4), max_size=3).map(tuple),
    category=st.none() | st.text(alphabet="ab/", max_size=5),
    importance=st.floats(0, 1),
)


@given(filters, filters, entries)
def test_not_of_and_is_or_of_nots(left, right, it):
    """De Morgan's law holds, so a filter may be rewritten without changing what it finds."""
    apart = parse({"$or": [{"$not": left}, {"$not": right}]})
    assert parse({"$not": {"$and": [left, right]}}).matches(it) == apart.matches(it)


@given(filters, entries)
def test_double_negation_is_no_negation(one, it):
    """`$not` only ever flips."""
    assert parse({"$not": {"$not": one}}).matches(it) == parse({"$and": [one]}).matches(it)


@given(names, st.lists(scalars, max_size=4), entries)
def test_nin_is_the_opposite_of_in(name, values, it):
    """Every entry passes exactly one of `$in` and `$nin`."""
    assert parse({name: {"$nin": values}}).matches(it) != parse({name: {"$in": values}}).matches(it)


@given(names, st.lists(json_values, max_size=4), entries)
def test_in_is_equality_with_any_of_the_values(name, values, it):
    """`$in` has no equality of its own."""
    each = [parse({name: {"$eq": value}}).matches(it) for value in values]
    assert parse({name: {"$in": values}}).matches(it) == any(each)


@given(names, json_values, entries)
def test_ne_is_the_opposite_of_eq(name, value, it):
    """Every entry passes exactly one of `$eq` and `$ne`."""
    assert parse({name: {"$ne": value}}).matches(it) != parse({name: {"$eq": value}}).matches(it)


@given(filters, entries)
def test_a_filter_answers_for_any_metadata(one, it):
    """Whatever JSON lies in an entry, matching gives a bool and never an exception."""
    parsed = parse(one)
    assert parsed is None or parsed.matches(it) in (True, False)


@given(json_values.filter(lambda v: json.loads(json.dumps(v)) == v), st.text(max_size=5))
def test_a_metadata_value_equals_itself(value, name):
    """What was stored under a key is found by asking for it, whatever the key is called."""
    assert parse({f"metadata.{name}": {"$eq": value}}).matches(entry(metadata={name: value}))


operator_names = st.sampled_from(
    ["$and", "$or", "$not", "$eq", "$in", "$gt", "$contains", "$startswith", "$x", "created_at"]
)
odd_json = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(operator_names | st.text(max_size=4), inner, max_size=3)
    ),
)


@given(odd_json)
def test_parsing_gives_a_filter_or_a_filter_error(expression):
    """Any JSON at all is either understood or refused by name."""
    try:
        parsed = parse(expression)
    except FilterError:
        return
    assert parsed is None or parsed.matches(entry()) in (True, False)


@pytest.mark.parametrize(
    ("expression", "hint"),
    [
        ("role", "mapping"),
        ({3: 1}, "field names"),
        ({"$xor": [{"role": "user"}]}, "$and, $or, $not"),
        ({"$eq": 3}, "field name"),
        ({"$and": []}, "at least one"),
        ({"$or": {"role": "user"}}, "at least one"),
        ({"$and": ["x"]}, "mapping"),
        ({"$not": 5}, "mapping"),
        ({"role": {}}, "no operator given"),
        ({"role": {"$like": "u%"}}, "$startswith"),
        ({"trip": {"city": "Lisbon"}}, "dots"),
        ({"trip": {"$eq": 1, "city": 2}}, "dots"),
        ({"seq": {"$not": 5}}, "$ne"),
        ({"seq": {"$gt": True}}, "number"),
        ({"seq": {"$gt": None}}, "number"),
        ({"seq": {"$lt": [1]}}, "number"),
        ({"seq": {"$in": "abc"}}, "list"),
        ({"seq": {"$nin": 5}}, "list"),
        ({"name": {"$startswith": 5}}, "text"),
        ({"name": object()}, "JSON value"),
        ({"created_at": "yesterday"}, "ISO 8601"),
        ({"created_at": {"$gt": "2024-13-01"}}, "ISO 8601"),
        ({"created_at": {"$gte": 1714694400}}, "datetime"),
        ({"created_at": {"$in": ["2024-05-03", "soon"]}}, "ISO 8601"),
        ({"created_at": {"$startswith": "2024"}}, "$gte"),
        ({"name": {"$startswith": 10**5000}}, "this int"),
    ],
)
def test_a_wrong_expression_says_what_to_do(expression, hint):
    """The error names the way out."""
    with pytest.raises(FilterError) as caught:
        parse(expression)
    assert hint in str(caught.value)


@pytest.mark.parametrize("shape", ["filters", "values", "field"])
def test_too_deep_a_nesting_is_refused(shape):
    """Depth costs an error, not the stack."""
    nested: Any = {"role": "user"} if shape == "filters" else 1 if shape == "values" else {"$eq": 1}
    for _ in range(5000):
        nested = {"$not": nested} if shape != "values" else [nested]
    with pytest.raises(FilterError, match=str(MAX_DEPTH)):
        parse({"x": nested} if shape != "filters" else nested)


def test_nothing_asked_means_no_filter():
    """None and an empty mapping restrict nothing."""
    assert parse(None) is None
    assert parse({}) is None
    assert not matches({"$not": {}})


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_reads_the_entry(name):
    """Each field name asks the entry (or its scope), even where metadata has the same key."""
    it = entry(metadata={name: "decoy"})
    value = getattr(it.scope if name in {"session_id", "user_id", "agent_id"} else it, name)
    assert parse({name: {"$eq": value}}).matches(it)
    assert parse({f"metadata.{name}": "decoy"}).matches(it)


def test_categories_match_by_whole_segments():
    """A category holds what lies below it, and nothing that merely begins alike."""
    assert matches({"category": "travel"})
    assert matches({"category": "travel/"})
    assert matches({"category": "travel/visa"})
    assert not matches({"category": "trav"})
    assert not matches({"category": "travel/visa/eu"})
    assert matches({"category": {"$in": ["food", "travel"]}})
    assert not matches({"category": {"$ne": "travel"}})
    assert matches({"category": "travel"}, category="travel")
    assert not matches({"category": "travel"}, category="travelling")
    assert matches({"category": None}, category=None)
    assert not matches({"metadata.category": "travel"}, metadata={"category": "travel/visa"})


def test_missing_equals_none_and_passes_negations():
    """A missing field is None: found by None, `$ne`, `$nin` and `$not`, and by no comparison."""
    for found in (
        {"x": None},
        {"x": {"$ne": 1}},
        {"x": {"$nin": [1]}},
        {"x": {"$not": {"$gt": 1}}},
        {"x": {"$in": [None]}},
    ):
        assert matches(found)
    for lost in ({"x": {"$gt": 1}}, {"x": {"$lte": "z"}}, {"x": {"$contains": "a"}}, {"x.y": 1}, {"x": {"$ne": None}}):
        assert not matches(lost)


def test_kinds_do_not_mix():
    """Numbers compare by value; bools, texts and numbers never equal nor order each other."""
    assert matches({"n": 1}, metadata={"n": 1.0})
    assert matches({"n": {"$gt": 1}}, metadata={"n": 1.5})
    assert not matches({"n": 1}, metadata={"n": True})
    assert not matches({"n": True}, metadata={"n": 1})
    assert not matches({"n": {"$gt": 0}}, metadata={"n": True})
    assert not matches({"n": {"$gt": 0}}, metadata={"n": "5"})
    assert not matches({"n": {"$lt": "z"}}, metadata={"n": 5})
    assert not matches({"n": {"$eq": [True]}}, metadata={"n": [1]})


def test_lists_are_asked_by_membership():
    """A list never equals one of its members."""
    assert not matches({"tags": "visa"})
    assert not matches({"tags": {"$in": ["visa"]}})
    assert matches({"tags": {"$contains": "visa"}})
    assert not matches({"tags": {"$contains": "vis"}})
    assert matches({"tags": ["trip", "visa"]})
    assert not matches({"tags": ["visa", "trip"]})
    assert matches({"content": {"$contains": "Lisbon"}})
    assert not matches({"content": {"$contains": 5}})


def test_times_are_instants():
    """Datetimes, dates and ISO text in any zone mean the same instant; naive ones are UTC."""
    for same in (DAY, DAY.replace(tzinfo=None), date(2024, 5, 3), "2024-05-03", "2024-05-03T02:00:00+02:00"):
        assert matches({"created_at": same})
        assert matches({"created_at": {"$gte": same, "$lte": same}})
        assert not matches({"created_at": {"$gt": same}})
    assert matches({"expires_at": None})
    assert not matches({"expires_at": {"$lt": DAY}})
    assert matches({"due": {"$gt": DAY}}, metadata={"due": "2024-05-04"})
    assert not matches({"due": {"$gt": DAY}}, metadata={"due": "soon"})
    assert not matches({"due": {"$gt": DAY}}, metadata={"due": 5})


def test_dots_lead_into_metadata():
    """Nested metadata is reached by dots, and a key spelt with a dot by its spelling."""
    nested = {"trip": {"city": {"name": "Lisbon"}}}
    assert matches({"trip.city.name": "Lisbon"}, metadata=nested)
    assert matches({"metadata.trip.city.name": {"$startswith": "Lis"}}, metadata=nested)
    assert matches({"trip": {"$eq": {"city": {"name": "Lisbon"}}}}, metadata=nested)
    assert not matches({"trip.city": "Lisbon"}, metadata=nested)
    assert matches({"a.b": 1}, metadata={"a.b": 1, "a": {"b": 2}})


def test_several_keys_and_operators_must_all_hold():
    """Everything in one mapping is joined by and."""
    assert matches({"role": "user", "importance": {"$gte": 0.5, "$lt": 0.6}})
    assert not matches({"role": "user", "importance": {"$gte": 0.5, "$lt": 0.5}})
    assert not matches({"role": "assistant", "seq": 7})


def test_types_are_asked_by_member_or_by_name():
    """`MemoryType.SHORT_TERM` and "short_term" are the same question, also in lists."""
    for kind in (MemoryType.SHORT_TERM, "short_term"):
        assert matches({"type": kind})
        assert matches({"type": {"$in": [kind, "other"]}})
    assert not matches({"type": {"$in": []}})
    assert matches({"type": {"$nin": []}})
