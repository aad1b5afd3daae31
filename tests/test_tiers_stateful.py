"""A memory whose entries move between tiers against a plain dict: nothing is lost, nothing twice, nothing comes back."""

import itertools
import os
import shutil
import tempfile
import threading
from copy import deepcopy

import pytest
from chroma_server import ChromaServer
from conftest import index_keys, live_keys
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis_server import RedisServer

import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import MemoryType, Message, ModelMismatch, NotFound, open_memory
from neuralflow_memory.testing import HashingEmbedder, ManualClock

IDS = st.sampled_from([f"t{n}" for n in range(14)])
TOPICS = ["Sailing", "Tomatoes", "Invoices", "記憶 🙂", "Berlin"]
USERS = ["ada", "eve"]


COLLECTIONS = itertools.count()
WRITING = [n for n in failpoints.FAILPOINTS if not n.startswith(("open.", "archive."))]
SWEEPING = [n for n in failpoints.FAILPOINTS if n.startswith("archive.")]


class Cut(BaseException):
    """Ends a step where a killed process would end."""


# What a memory may consist of: caches in RAM or none, Redis or none; Chroma embedded, served or none; an archive or none.
NO_CACHE = {"tiers": {"lru_entries": 0}, "context": {"cache_size": 0}}
STACKS = {
    "RAM, Chroma, archive": {"embedder": HashingEmbedder},
    "words only, archive": {"embedder": lambda: "none", **NO_CACHE},
    "Redis, Chroma served, archive": {
        "embedder": HashingEmbedder,
        "served": True,
        "redis": True,
        "context": {"cache_size": 0},  # so that Redis is asked
    },
    "RAM, Redis, Chroma, no archive": {
        "embedder": HashingEmbedder,
        "redis": True,
        "tiers": {"warm_tier_max_age_days": None},
        "archive": {"after_days": None},
        "retention": {"retention_days": None, "max_entries": None},
    },
    "Chroma, small archive, retention deletes": {
        "embedder": HashingEmbedder,
        "tiers": {"warm_tier_max_age_days": 5.0, "enable_compression": False, "lru_entries": 20},
        "retention": {"delete": True, "retention_days": 20.0, "max_delete_share": 1.0, "undo_days": 30.0},
        "archive": {"max_age_days": None},
    },
}


@pytest.fixture(scope="module", autouse=True)
def servers(tmp_path_factory):
    Life.server = ChromaServer(tmp_path_factory.mktemp("chroma")).start()
    Life.redis = RedisServer(tmp_path_factory.mktemp("redis"))
    yield
    Life.server.kill()
    Life.redis.kill()


class Life(RuleBasedStateMachine):
    """`turns` is what each user has said, in order; `facts` what was remembered; both by id."""

    @initialize(stack=st.sampled_from(sorted(STACKS)))
    def start(self, stack):
        self.folder = tempfile.TemporaryDirectory()
        self.stack = stack
        self.clock = ManualClock()
        self.turns = {user: {} for user in USERS}
        self.facts = {user: {} for user in USERS}
        self.gone = {user: {} for user in USERS}
        """Facts that retention has deleted, by run."""
        self.before = {user: {} for user in USERS}
        """What turns and facts said earlier, by id."""
        self.saved = None
        """What all that was when it was backed up."""
        self.words = 0
        self.dimensions = 256
        """Of the embedding model in use."""
        self.collection = f"life-{next(COLLECTIONS)}"
        self.open()

    def open(self):
        options = dict(STACKS[self.stack])
        if options.pop("served", False):
            options["chroma"] = {"url": self.server.url, "collection": self.collection}
        if options.pop("redis", False):
            options["redis"] = {"url": self.redis.url}
        self.memory = open_memory(
            f"{self.folder.name}/memory",
            embedder=self.embedder(options.pop("embedder")),
            clock=self.clock,
            pruning={"max_context_items": 1, "summarization_threshold": 2},
            **options,
        )

    def embedder(self, kind):
        return kind(dimensions=self.dimensions) if kind is HashingEmbedder else kind()

    def teardown(self):
        failpoints.hook = None
        if hasattr(self, "memory"):
            self.memory.close()
            self.folder.cleanup()

    def chat(self, user):
        return self.memory.session("chat", user_id=user)

    def text(self, topic):
        self.words += 1
        return f"{topic} unique{self.words}"

    def some(self, data, of):
        return data.draw(st.lists(st.sampled_from(sorted(of)), min_size=1, max_size=4, unique=True))

    @rule(
        user=st.sampled_from(USERS),
        ids=st.lists(IDS, min_size=1, max_size=5, unique=True),
        topic=st.sampled_from(TOPICS),
    )
    def add(self, user, ids, topic):
        new = {own: self.text(topic) for own in ids if own not in self.turns[user]}
        self.chat(user).add([Message("user", text, id=own, metadata={"of": own}) for own, text in new.items()])
        self.turns[user] |= new

    @rule(user=st.sampled_from(USERS), topic=st.sampled_from(TOPICS), importance=st.sampled_from([0.1, 0.5, 0.9]))
    def remember(self, user, topic, importance):
        text = self.text(topic)
        self.facts[user][self.chat(user).remember(text, importance=importance)] = text

    @precondition(lambda self: any(self.turns.values()))
    @rule(data=st.data(), topic=st.sampled_from(TOPICS))
    def update(self, data, topic):
        user = data.draw(st.sampled_from([u for u in USERS if self.turns[u]]))
        own = data.draw(st.sampled_from(sorted(self.turns[user])))
        self.before[user].setdefault(own, []).append(self.turns[user][own])
        self.turns[user][own] = self.text(topic)
        assert self.chat(user).entries.update(own, content=self.turns[user][own]).tier == "warm"

    @precondition(lambda self: any(self.turns.values()))
    @rule(data=st.data())
    def delete(self, data):
        user = data.draw(st.sampled_from([u for u in USERS if self.turns[u]]))
        for own in self.some(data, self.turns[user]):
            assert self.chat(user).entries.delete(own) == 1
            del self.turns[user][own]
            self.before[user].pop(own, None)

    @precondition(lambda self: any(self.turns.values()))
    @rule(data=st.data())
    def read(self, data):
        user = data.draw(st.sampled_from([u for u in USERS if self.turns[u]]))
        for own in self.some(data, self.turns[user]):
            assert self.chat(user).entries.get(own).content == self.turns[user][own]

    @precondition(lambda self: any(self.turns.values()))
    @rule(data=st.data())
    def archive(self, data):
        user = data.draw(st.sampled_from([u for u in USERS if self.turns[u]]))
        chat = self.chat(user)
        some = self.some(data, self.turns[user])
        self.memory.flush()  # a fold under way would change the window
        window = {m.id for m in chat.messages(view="window")}
        warm = {e.id for e in chat.entries.list(filter={"tier": "warm"})}
        label = data.draw(st.sampled_from([None, "old"]))
        assert chat.entries.archive(some, label=label) == len({*some} & warm - window)

    @rule(user=st.sampled_from(USERS))
    def clear(self, user):
        self.chat(user).clear()
        for own in self.turns[user]:
            self.before[user].pop(own, None)
        self.turns[user] = {}

    @precondition(lambda self: any(self.facts.values()))
    @rule(data=st.data(), topic=st.sampled_from([None, *TOPICS]))
    def change_or_say_again(self, data, topic):
        user = data.draw(st.sampled_from([u for u in USERS if self.facts[u]]))
        own = data.draw(st.sampled_from(sorted(self.facts[user])))
        if topic is None:
            assert self.chat(user).remember(self.facts[user][own]) == own
        else:
            self.before[user].setdefault(own, []).append(self.facts[user][own])
            self.facts[user][own] = self.text(topic)
            self.chat(user).entries.update(own, content=self.facts[user][own])

    @precondition(lambda self: any(self.turns.values()) or any(self.facts.values()))
    @rule(data=st.data())
    def look_back(self, data):
        user = data.draw(st.sampled_from([u for u in USERS if self.turns[u] or self.facts[u]]))
        known = self.turns[user] | self.facts[user]
        own = data.draw(st.sampled_from(sorted(known)))
        said = [e.content for e in self.chat(user).entries.history(own)]
        assert list(dict.fromkeys(said)) == [*self.before[user].get(own, []), known[own]]

    @rule()
    def back_up(self):
        shutil.rmtree(f"{self.folder.name}/backup", ignore_errors=True)
        assert self.memory.backup(f"{self.folder.name}/backup").damaged == {}
        self.saved = deepcopy((self.turns, self.facts, self.gone, self.before))
        self.saved_with = self.dimensions

    @precondition(lambda self: self.saved is not None and self.saved_with == self.dimensions)
    @rule()
    def go_back(self):
        assert self.memory.restore(f"{self.folder.name}/backup", restore_deleted=True).damaged == {}
        self.turns, self.facts, self.gone, self.before = deepcopy(self.saved)

    @rule()
    def export(self):
        assert self.memory.export(f"{self.folder.name}/all.jsonl").unread == 0
        with tempfile.TemporaryDirectory() as other, open_memory(other, embedder="none", clock=self.clock) as memory:
            memory.import_(f"{self.folder.name}/all.jsonl")
            for user in USERS:
                entries = memory.session("chat", user_id=user).entries
                kinds = [MemoryType.SHORT_TERM, MemoryType.LONG_TERM]
                assert {e.id: e.content for e in entries.list(types=kinds)} == self.turns[user] | self.facts[user]

    @precondition(lambda self: "words only" not in self.stack)
    @rule(dimensions=st.sampled_from([128, 256]))
    def take_up_another_model(self, dimensions):
        self.dimensions = dimensions
        assert self.memory.reindex(HashingEmbedder(dimensions=dimensions), samples=2).switched
        assert index_keys(self.memory) == live_keys(self.memory)

    @rule(days=st.sampled_from([1, 6, 25, 40]))
    def wait(self, days):
        self.clock.advance(days=days)

    @rule()
    def sweep(self):
        self.memory.flush()
        plan = self.memory.sweep(dry_run=True)
        report = self.memory.sweep()
        assert report.moves == plan.moves
        assert report.done == len(report.moves)
        self.discarded(report)
        again = self.memory.sweep(dry_run=True)
        assert again.moves == (), "what was moved is moved again"

    def discarded(self, report):
        for move in report.moves:
            if move.what == "delete":
                assert move.type is MemoryType.LONG_TERM
                assert "deletes" in self.stack
                self.gone[move.user_id].setdefault(report.run, {})[move.id] = self.facts[move.user_id].pop(move.id)

    @precondition(lambda self: any(self.gone.values()))
    @rule(data=st.data())
    def undo(self, data):
        run = data.draw(st.sampled_from(list(dict.fromkeys(run for own in self.gone.values() for run in own))))
        expected = sum(len(self.gone[user].get(run, {})) for user in USERS)
        try:
            assert self.memory.undo(run) == expected
        except NotFound:  # its days are over
            for user in USERS:
                self.gone[user].pop(run, None)
            return
        for user in USERS:
            self.facts[user] |= self.gone[user].pop(run, {})

    def cut(self, at, call):
        """Do *call* until a place is passed that many times: then nothing goes on, as in a process that is killed."""
        name, passing = at
        left = [passing]

        def hook(passed):
            left[0] -= passed == name
            if left[0] <= 0:
                raise Cut

        # A thread of the memory's own may pass a place as well, and ends there.
        told, threading.excepthook = threading.excepthook, lambda args: args.exc_type is Cut or told(args)
        failpoints.hook = hook
        try:
            call()
        except Cut:
            pass
        finally:
            failpoints.hook = None
            self.reopen()
            threading.excepthook = told

    @precondition(lambda self: "deletes" not in self.stack)
    @rule(at=st.tuples(st.sampled_from(SWEEPING), st.integers(1, 3)))
    def crash_while_sweeping(self, at):
        self.cut(at, self.memory.sweep)

    @precondition(lambda self: "words only" not in self.stack)
    @rule(
        dimensions=st.sampled_from([128, 256]),
        at=st.tuples(st.sampled_from(failpoints.REINDEXING), st.integers(1, 2)),
    )
    def crash_while_taking_up_another_model(self, dimensions, at):
        try:
            self.cut(at, lambda: self.memory.reindex(HashingEmbedder(dimensions=dimensions), samples=2))
        except ModelMismatch:  # it is in use
            self.dimensions = dimensions
            self.open()

    @rule(
        data=st.data(),
        user=st.sampled_from(USERS),
        own=IDS,
        topic=st.sampled_from(TOPICS),
        at=st.tuples(st.sampled_from(WRITING), st.integers(1, 3)),
    )
    def crash_while_writing(self, data, user, own, topic, at):
        """What the call does happened, or did not."""
        entries, text, turns = self.chat(user).entries, self.text(topic), self.turns[user]
        before, after = dict(turns), dict(turns)
        said = deepcopy(self.before[user])
        if own not in turns:
            after[own] = text
            self.cut(at, lambda: self.chat(user).add(Message("user", text, id=own, metadata={"of": own})))
        elif data.draw(st.booleans()):
            after[own] = text
            said.setdefault(own, []).append(turns[own])
            self.cut(at, lambda: entries.update(own, content=text))
        else:
            del after[own]
            said.pop(own, None)
            self.cut(at, lambda: entries.delete(own))
        found = {m.id: m.content for m in self.chat(user).messages()}
        assert found in (before, after)
        if found == after:
            self.turns[user], self.before[user] = after, said

    @precondition(lambda self: "Redis" in self.stack)
    @rule()
    def lose_redis(self):
        """It is killed; started again, it is empty."""
        self.redis.kill()
        self.search_finds_what_is_there_and_nothing_else()
        self.redis.start()

    @rule()
    def reopen(self):
        self.memory.close()
        self.open()

    @rule()
    def flush(self):
        self.memory.flush()
        if self.memory._core.parts.store is not None:
            assert index_keys(self.memory) == live_keys(self.memory)
        assert self.memory.stats()["parked"] == []

    @rule()
    def check_every_block(self):
        state = self.memory.stats(verify=True)
        assert state["archive_damaged"] == {}
        assert state["integrity"] == "ok"

    @invariant()
    def everything_is_there_once(self):
        for user in USERS:
            chat = self.chat(user)
            assert [(m.id, m.content, m.metadata) for m in chat.messages()] == [
                (own, text, {"of": own}) for own, text in self.turns[user].items()
            ]
            entries = chat.entries.list(types=[MemoryType.SHORT_TERM, MemoryType.LONG_TERM])
            assert {e.id: e.content for e in entries} == self.turns[user] | self.facts[user]
            assert len(entries) == len(self.turns[user]) + len(self.facts[user])
            assert (
                all(e.tier == "warm" for e in entries)
                or "no archive" not in self.stack
                or self.memory.stats()["blocks"]
            )

    @invariant()
    def search_finds_what_is_there_and_nothing_else(self):
        for user in USERS:
            known = self.turns[user] | self.facts[user]
            hits = self.chat(user).search("Sailing Tomatoes Invoices Berlin", k=100, types=["short_term", "long_term"])
            found = {h.entry.id: h.entry.content for h in hits}
            assert found.items() <= known.items()
            named = {
                own for own, text in known.items() if text.split()[0] in ("Sailing", "Tomatoes", "Invoices", "Berlin")
            }
            assert named <= found.keys()


NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
Life.TestCase.settings = settings(
    max_examples=500 if NIGHTLY else 20, stateful_step_count=50 if NIGHTLY else 20, deadline=None
)
test_tiers_against_a_dict = pytest.mark.timeout(3600 if NIGHTLY else 300)(Life.TestCase)
