"""A memory against a plain list: whatever is done, in whatever order, both show the same."""

import tempfile

from conftest import index_keys, live_keys, texts
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neuralflow_memory import ConflictError, MemoryType, Message, open_memory
from neuralflow_memory.testing import HashingEmbedder

IDS = st.sampled_from([f"t{n}" for n in range(12)])
TEXTS = st.sampled_from(["Sailing on Sunday", "Tomatoes", "The invoice 4711", "No sleep", "Blue Berlin", "🙂 記憶"])
ROLES = st.sampled_from(["user", "user", "assistant"])
BATCHES = st.lists(st.builds(lambda i, r, t: Message(r, t, id=i), IDS, ROLES, TEXTS), min_size=1, max_size=4)


class Chat(RuleBasedStateMachine):
    """`turns` is what was said, in order: id to (role, text). `window` is what it may show verbatim."""

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.turns, self.out, self.knowledge = {}, set(), set()
        self.open()

    def open(self):
        self.memory = open_memory(
            f"{self.folder.name}/memory",
            embedder=HashingEmbedder(),
            pruning={"max_context_items": 2, "summarization_threshold": 4},
        )
        self.chat = self.memory.session("chat", user_id="ada")
        self.other = self.memory.session("other", user_id="ada")

    def teardown(self):
        self.memory.close()
        self.folder.cleanup()

    @rule(batch=BATCHES, conflict=st.sampled_from(["raise", "replace", "ignore"]))
    def add(self, batch, conflict):
        new = dict(self.turns)
        refused = False
        for m in batch:
            said = (m.role, m.content)
            if m.id not in new or conflict == "replace":
                new[m.id] = said
            elif new[m.id] != said and conflict == "raise":
                refused = True
        try:
            assert self.chat.add(batch, on_conflict=conflict) == [m.id for m in batch]
            assert not refused
            self.out -= new.keys() - self.turns.keys()
            self.turns = new
        except ConflictError:
            assert refused

    @rule(batch=BATCHES)
    def add_without_ids(self, batch):
        given = [Message(m.role, m.content) for m in batch]
        self.turns |= {i: (m.role, m.content) for i, m in zip(self.chat.add(given), given, strict=True)}

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), text=TEXTS)
    def update(self, data, text):
        own = data.draw(st.sampled_from(sorted(self.turns)))
        self.chat.entries.update(own, content=text)
        self.turns[own] = (self.turns[own][0], text)

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def delete(self, data):
        doomed = data.draw(st.lists(st.sampled_from(sorted(self.turns)), min_size=1, max_size=3, unique=True))
        assert self.chat.entries.delete(doomed) == len(doomed)
        for own in doomed:
            del self.turns[own]

    @rule()
    def clear(self):
        self.chat.clear()
        self.turns = {}

    @rule(batch=BATCHES)
    def replace(self, batch):
        batch = list({m.id: m for m in batch}.values())
        self.chat.replace(batch)
        given = [m.id for m in batch]
        window = [m.id for m in self.chat.messages(view="window")]
        assert window == [i for i in given if i in window]  # what a fold that began at once has left of it
        summarized = {s for e in self.chat.entries.list(types=[MemoryType.EPISODIC]) for s in e.sources}
        assert set(given) <= set(window) | summarized
        self.out |= self.turns.keys()
        self.turns |= {m.id: (m.role, m.content) for m in batch}

    @rule(text=TEXTS)
    def remember(self, text):
        self.knowledge.add(self.other.remember(f"Known: {text}"))

    @rule(tokens=st.sampled_from([None, 0, 15]))
    def compact(self, tokens):
        self.chat.compact(max_tokens=tokens)

    @rule()
    def reopen(self):
        self.memory.close()
        self.open()

    @rule()
    def flush(self):
        self.memory.flush()
        assert index_keys(self.memory) == live_keys(self.memory)
        assert self.memory.stats()["parked"] == []

    @invariant()
    def the_transcript_is_what_was_said(self):
        stored = self.chat.messages()
        assert {m.id: (m.role, m.content) for m in stored} == self.turns
        assert [m.id for m in stored] == list(self.turns)

    @invariant()
    def the_window_is_a_part_of_it(self):
        for m in self.chat.messages(view="window"):
            assert self.turns[m.id] == (m.role, m.content)

    @invariant()
    def every_turn_is_in_the_window_or_covered_or_was_replaced(self):
        self.memory._core.flush()
        window = {m.id for m in self.chat.messages(view="window")}
        entries = self.chat.entries.list(types=[MemoryType.EPISODIC])
        covered = {s for e in entries for s in e.sources}
        assert self.turns.keys() - window - covered <= self.out
        assert bool(self.chat.summary()) == bool(entries)

    @invariant()
    def search_finds_what_is_there_and_nothing_else(self):
        hits = self.chat.search("Sailing Sunday Tomatoes invoice", k=100, types=["short_term", "long_term"])
        assert {h.entry.id for h in hits} <= self.turns.keys() | self.knowledge
        expected = {i for i, (_, t) in self.turns.items() if t in ("Sailing on Sunday", "Tomatoes", "The invoice 4711")}
        assert expected <= {h.entry.id for h in hits}
        assert all(0 <= h.score <= 1 for h in hits)

    @invariant()
    def the_budget_holds(self):
        context = self.chat.context(max_tokens=120)
        assert self.memory.count_tokens(context.messages) == context.tokens <= 120
        users = [t for r, t in self.turns.values() if r == "user"]
        assert not texts(context.messages) or all(isinstance(t, str) for t in texts(context.messages))
        said = [m for m in context.messages if "neuralflow" not in m.metadata]
        assert len(users) >= sum(m.role == "user" for m in said)


Chat.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_a_memory_is_a_list_that_remembers = Chat.TestCase
