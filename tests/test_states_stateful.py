"""The state of a session against a plain list of versions, over random transition tables."""

import tempfile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neuralflow_memory import ConflictError, InvalidTransition, NotFound, StateError, StateRules, open_memory
from neuralflow_memory.pipeline.states import cleanup
from neuralflow_memory.testing import ManualClock

STATUSES = "abcde"
TABLES = st.dictionaries(st.sampled_from(STATUSES), st.sets(st.sampled_from(STATUSES)), min_size=1).map(
    lambda rows: {s: sorted(rows.get(s, ())) for s in {*rows, *(t for to in rows.values() for t in to)}}
)
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(-1, 10),  # 0..9 are valid
        "s": st.sampled_from(["", "x", "long"]),  # at most 3 characters
        "status": st.sampled_from([*STATUSES, None, 1]),
    },
)
SCHEMA = {
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "s": {"type": "string", "maxLength": 3}},
    "required": ["status"],
}


def fits(fields):
    """Whether fields, their status aside, are valid: said without a schema."""
    return 0 <= fields.get("n", 0) <= 9 and len(fields.get("s", "")) <= 3


class States(RuleBasedStateMachine):
    """`versions` is what was written, all of it: (fields, act)."""

    @initialize(table=TABLES, keep=st.integers(1, 6), persistent=st.booleans())
    def start(self, table, keep, persistent):
        self.folder = tempfile.TemporaryDirectory()
        self.clock = ManualClock()
        self.table, self.keep, self.persistent = table, keep, persistent
        self.heard, self.moves = [], []
        self.versions, self.closed, self.taken = [], False, None
        self.kept_from = 1
        self.turns = 0
        self.first = next(iter(table))
        self.open()

    def open(self):
        rules = StateRules(
            SCHEMA, transitions=self.table, on_transition=lambda a, b: self.heard.append((a.status, b.status))
        )
        self.memory = open_memory(
            f"{self.folder.name}/memory",
            embedder="none",
            clock=self.clock,
            state_rules=rules,
            state={"max_states": self.keep, "persistence": self.persistent},
        )
        self.chat = self.memory.session("chat", user_id="ada")
        self.state = self.chat.state

    def teardown(self):
        self.memory.close()
        self.folder.cleanup()

    @property
    def fields(self):
        return self.versions[-1][0] if self.versions else {"status": self.first}

    def wanted(self, given):
        """The error that a merge of *given* must raise, None if it must go."""
        after = {**self.fields, **given}
        if self.closed:
            return InvalidTransition
        if not fits(after) or after["status"] not in self.table:
            return StateError
        moved = after["status"] != self.fields["status"]
        return InvalidTransition if moved and after["status"] not in self.table[self.fields["status"]] else None

    def written(self, fields, act, *, life="active"):
        if fields["status"] != self.fields["status"]:
            self.moves.append((self.fields["status"], fields["status"]))
        self.versions.append((fields, act))
        self.closed = life == "closed"

    def tried(self, call, error, fields, act):
        if error is None:
            call()
            self.written(fields, act)
        else:
            with pytest.raises(error):
                call()

    @rule(given=GIVEN)
    def update(self, given):
        self.tried(lambda: self.state.update(given), self.wanted(given), {**self.fields, **given}, "update")

    @rule(given=GIVEN)
    def change(self, given):
        call = lambda: self.state.change(lambda fields: {**fields, **given})
        self.tried(call, self.wanted(given), {**self.fields, **given}, "update")

    @rule(given=GIVEN)
    def add(self, given):
        error = self.wanted(given)
        self.tried(lambda: self.chat.add("Hello", state=given), error, {**self.fields, **given}, "update")
        self.turns += error is None

    @rule(to=st.sampled_from(STATUSES), given=GIVEN)
    def transition(self, to, given):
        after = {**given, "status": to}
        error = self.wanted(after)
        if not self.closed and to not in self.table[self.fields["status"]]:
            error = InvalidTransition
        self.tried(lambda: self.state.transition(to, given), error, {**self.fields, **after}, "transition")

    @rule(behind=st.integers(0, 8))
    def rollback(self, behind):
        version = len(self.versions) - behind
        if version < self.kept_from:
            with pytest.raises(NotFound):
                self.state.rollback(version)
        else:
            error = InvalidTransition if self.closed else None
            self.tried(lambda: self.state.rollback(version), error, self.versions[version - 1][0], "rollback")
            if error is None:
                assert self.state.get().fields == self.versions[version - 1][0]

    @rule(off=st.sampled_from([-1, 1]))
    def expect_another(self, off):
        with pytest.raises(ConflictError) as caught:
            self.state.update({"n": 1}, expect=len(self.versions) + off)
        assert (caught.value.expected, caught.value.found) == (len(self.versions) + off, len(self.versions))

    @rule()
    def close_or_open(self):
        life = "active" if self.closed else "closed"
        self.state.transition(life=life)
        self.heard.pop()
        self.written(self.fields, "transition", life=life)

    @rule()
    def take(self):
        self.taken = self.chat.snapshot(), self.fields, self.closed, bool(self.versions)

    @precondition(lambda self: self.taken)
    @rule()
    def restore(self):
        snapshot, fields, closed, some = self.taken
        before = len(self.heard)
        self.chat.restore(snapshot)
        if some or self.versions:
            del self.heard[before:]
            known = len(self.moves)
            self.written(fields, "restore", life="closed" if closed else "active")
            del self.moves[known:]

    @rule()
    def clear(self):
        self.chat.clear()
        self.turns = 0
        if self.versions:
            self.versions.append(({"status": self.first}, "clear"))
            self.closed = False
            self.kept_from = len(self.versions)

    @rule(minutes=st.sampled_from([1, 61, 130]))
    def wait(self, minutes):
        self.clock.advance(minutes=minutes)
        if self.persistent:  # else it forgets, which test_states.py looks at
            known = len(self.heard)
            cleanup(self.memory._core.parts)
            assert all(a == b for a, b in self.heard[known:])
            del self.heard[known:]

    @precondition(lambda self: self.persistent)
    @rule()
    def reopen(self):
        self.memory.close()
        self.open()

    @invariant()
    def the_history_is_the_newest_of_what_was_written(self):
        self.kept_from = max(self.kept_from, len(self.versions) - self.keep + 1)
        history = self.state.history()
        assert [v.version for v in history] == list(range(self.kept_from, len(self.versions) + 1))
        assert [(v.fields, v.act) for v in history] == self.versions[self.kept_from - 1 :]
        now = self.state.get()
        assert (now.version, now.fields, now.status) == (len(self.versions), self.fields, self.fields["status"])
        assert (now.life == "closed") == self.closed

    @invariant()
    def nothing_invalid_is_stored(self):
        assert all(fits(v.fields) and v.fields["status"] in self.table for v in self.state.history())

    @invariant()
    def hooks_hear_of_each_move_of_the_status(self):
        assert [move for move in self.heard if move[0] != move[1]] == self.moves

    @invariant()
    def turns_are_those_that_came_with_a_state(self):
        assert len(self.chat.messages()) >= self.turns


States.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_a_state_is_a_list_of_versions = States.TestCase
