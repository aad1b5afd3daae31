"""Caches of every kind against none: two processes on one folder, whatever they do, whatever becomes of Redis."""

import os
import tempfile
import warnings
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis_server import RedisServer

import neuralflow_memory.settings as settings_module
from neuralflow_memory import ConflictError, Extraction, Finding, Memory, MemoryType, Message, NotFound, Settings
from neuralflow_memory.testing import HashingEmbedder, ManualClock

IDS = st.sampled_from([f"t{n}" for n in range(6)])
TEXTS = st.sampled_from(["Sailing on Sunday", "Tomatoes are ripe", "Who sails on Sunday?", "No sleep", "Ripe or not?"])
QUESTIONS = ("Who goes sailing?", "What was ripe yesterday?")
USERS = st.sampled_from(["ada", "bob"])
PROCESS = st.sampled_from([0, 1])
HOURS = st.sampled_from([None, -30, 1])
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


class Reader:
    """Finds a fact in each turn that is no question."""

    name = "reader"

    def extract(self, messages):
        facts = [Finding(f"Fact: {m.text}", (m.id,)) for m in messages if m.id in "t0 t1 t2" and "?" not in m.text]
        return Extraction(tuple(facts))


class Stack(RuleBasedStateMachine):
    """Two cores with caches, as two processes have them, and a third without any; all on one folder."""

    server = None

    @initialize(results=st.sampled_from([0, 3, 1000]), entries=st.sampled_from([0, 2, 1000]), redis=st.booleans())
    def start(self, results, entries, redis):
        self.folder = tempfile.TemporaryDirectory()
        self.clock = ManualClock()
        self.cached = {"context": {"cache_size": results}, "tiers": {"lru_entries": entries}}
        if redis:
            if Stack.server is None:
                Stack.server = RedisServer(Path(tempfile.gettempdir()))
            Stack.server.client().flushall()
            self.cached["redis"] = {"url": Stack.server.url}
        self.plain = {"context": {"cache_size": 0}, "tiers": {"lru_entries": 0}}
        for options in (self.cached, self.plain):
            options["tiers"] |= {"warm_tier_max_age_days": 0.5}
            options["retention"] = {"delete": True, "retention_days": 1.5, "max_delete_share": 1}
        self.memories = [self.open(options) for options in (self.cached, self.cached, self.plain)]
        self.backups, self.snapshots, self.exports, self.sweeps = [], [], [], []

    def open(self, options):
        """A core of its own, as another process has it."""
        small = {"max_context_items": 2, "summarization_threshold": 4}
        chosen = Settings(path=Path(self.folder.name).resolve() / "memory", pruning=small, **options)
        given = dict.fromkeys(("reranker", "summarizer", "token_counter", "policy"))
        given |= {"embedder": HashingEmbedder(), "clock": self.clock, "extractor": Reader()}
        core = settings_module._open(chosen, given, release=lambda: None)
        return Memory(core, on_close=lambda core: core.close())

    def teardown(self):
        for memory in self.memories:
            memory.close()
        self.folder.cleanup()

    def chat(self, process, user="ada"):
        return self.memories[process].session("chat", user_id=user)

    @rule(process=PROCESS, user=USERS, own=IDS, text=TEXTS, conflict=st.sampled_from(["raise", "replace", "ignore"]))
    def add(self, process, user, own, text, conflict):
        try:
            self.chat(process, user).add(
                [Message("user", text, id=own), Message("assistant", "So it is")], on_conflict=conflict
            )
        except ConflictError:
            assert conflict == "raise"

    @rule(process=PROCESS, user=USERS, text=TEXTS, hours=st.tuples(HOURS, HOURS), again=st.booleans())
    def remember(self, process, user, text, hours, again):
        since, end = (None if h is None else self.clock() + timedelta(hours=h) for h in hours)
        said = f"Known: {text}{'!' * again}"
        self.chat(process, user).remember(said, valid_from=since, expires_at=end)

    @rule(process=PROCESS, user=USERS, text=TEXTS, since=HOURS, data=st.data())
    def supersede(self, process, user, text, since, data):
        chat = self.chat(process, user)
        ids = [e.id for e in known(chat) if e.superseded_by is None and e.content != f"Now: {text}"]
        if ids:
            begun = None if since is None else self.clock() + timedelta(hours=since)
            chat.remember(f"Now: {text}", supersedes=data.draw(st.sampled_from(ids)), valid_from=begun)

    @rule(process=PROCESS, user=USERS)
    def consolidate(self, process, user):
        self.chat(process, user).entries.consolidate()

    @rule(process=PROCESS, user=USERS, data=st.data())
    def restore_a_version(self, process, user, data):
        chat = self.chat(process, user)
        changed = [e for e in chat.entries.list() if e.seq > 0 and e.version > 1]
        if changed:
            entry = data.draw(st.sampled_from(changed))
            chat.entries.restore(entry.key, data.draw(st.integers(1, entry.version - 1)))

    @rule(process=PROCESS, user=USERS, role=st.sampled_from(["user", "assistant", None]))
    def archive(self, process, user, role):
        self.chat(process, user).entries.archive(filter={"role": role})

    @rule(process=PROCESS)
    def sweep(self, process):
        report = self.memories[process].sweep()
        if report.count("delete"):
            self.sweeps.append(report.run)

    @precondition(lambda self: self.sweeps)
    @rule(process=PROCESS)
    def undo(self, process):
        with suppress(NotFound):  # of before a restore
            self.memories[process].undo(self.sweeps.pop())

    @rule(process=PROCESS, user=USERS, by=st.sampled_from(["hour", "day", "session"]))
    def episodes(self, process, user, by):
        self.chat(process, user).episodes(by=by)

    @rule(process=PROCESS, user=USERS)
    def extract(self, process, user):
        self.chat(process, user).extract()

    @rule(process=PROCESS, user=USERS, text=TEXTS, back=st.booleans())
    def change_the_state(self, process, user, text, back):
        state = self.chat(process, user).state
        if back and (versions := state.history()):
            state.rollback(versions[0].version)
        else:
            state.update(about=text)

    @rule(process=PROCESS, user=USERS, own=IDS, text=TEXTS)
    def add_with_state(self, process, user, own, text):
        self.chat(process, user).add(Message("user", text, id=own), on_conflict="replace", state={"about": text})

    @rule(process=PROCESS, user=USERS)
    def take_a_snapshot(self, process, user):
        self.snapshots.append((user, self.chat(process, user).snapshot()))

    @precondition(lambda self: self.snapshots)
    @rule(process=PROCESS, data=st.data())
    def go_back(self, process, data):
        user, snapshot = data.draw(st.sampled_from(self.snapshots))
        self.chat(process, user).restore(snapshot)

    @rule(process=PROCESS, vectors=st.booleans())
    def export(self, process, vectors):
        path = Path(self.folder.name) / f"export-{len(self.exports)}"
        self.memories[process].export(path, user_id="ada", vectors=vectors)
        self.exports.append(path)

    @precondition(lambda self: self.exports)
    @rule(process=PROCESS, user=USERS, deleted=st.booleans(), data=st.data())
    def take_in(self, process, user, deleted, data):
        path = data.draw(st.sampled_from(self.exports))
        self.memories[process].import_(path, user_id=user, restore_deleted=deleted)

    @rule(process=PROCESS)
    def back_up(self, process):
        self.backups.append(Path(self.folder.name) / f"backup-{len(self.backups)}")
        self.memories[process].backup(self.backups[-1])

    @precondition(lambda self: self.backups)
    @rule(process=PROCESS, deleted=st.booleans(), data=st.data())
    def restore(self, process, deleted, data):
        """Of which only that process knows: the others are opened after it."""
        for n in {0, 1, 2} - {process}:
            self.memories[n].close()
        self.memories[process].restore(data.draw(st.sampled_from(self.backups)), restore_deleted=deleted)
        for n in {0, 1, 2} - {process}:
            self.memories[n] = self.open(self.cached if n < 2 else self.plain)

    @rule(process=PROCESS, user=USERS, data=st.data(), text=TEXTS)
    def update(self, process, user, data, text):
        chat = self.chat(process, user)
        keys = [e.key for e in chat.entries.list() if e.seq > 0]
        if keys:
            chat.entries.update(data.draw(st.sampled_from(keys)), content=text)

    @rule(process=PROCESS, user=USERS, data=st.data())
    def delete(self, process, user, data):
        chat = self.chat(process, user)
        keys = [e.key for e in chat.entries.list() if e.seq > 0]
        if keys:
            chat.entries.delete(data.draw(st.sampled_from(keys)))

    @rule(process=PROCESS, user=USERS)
    def clear(self, process, user):
        self.chat(process, user).clear()

    @rule(process=PROCESS, user=USERS, data=st.data())
    def pin(self, process, user, data):
        chat = self.chat(process, user)
        ids = [m.id for m in chat.messages()]
        if ids:
            chat.pin(data.draw(st.sampled_from(ids)))

    @rule(process=PROCESS, user=USERS)
    def compact(self, process, user):
        self.chat(process, user).compact(max_tokens=0)

    @rule(process=PROCESS, user=USERS, text=TEXTS)
    def note(self, process, user, text):
        with self.chat(process, user).task("Sail") as task:
            task.note(text, temporary=True, lifetime=90)

    @rule(process=PROCESS, user=USERS, text=TEXTS)
    def put(self, process, user, text):
        self.memories[process].values(user_id=user).put(("things",), "one", {"a": text}, texts=[text], ttl=2)

    @rule(process=PROCESS, user=USERS, ratio=st.sampled_from([1.0, 1.5]))
    def report_usage(self, process, user, ratio):
        chat = self.chat(process, user)
        if chat.messages():
            chat.report_usage("gpt", max(1, int(chat.context().tokens * ratio)))

    @rule(minutes=st.sampled_from([1, 30, 24 * 60]))
    def wait(self, minutes):
        self.clock.advance(minutes=minutes)

    @rule(process=PROCESS)
    def reopen(self, process):
        self.memories[process].close()
        self.memories[process] = self.open(self.cached)

    @precondition(lambda self: "redis" in self.cached)
    @rule(what=st.sampled_from(["flush", "restart", "freeze"]))
    def trouble(self, what):
        if what == "flush":
            Stack.server.client().flushall()
        elif what == "restart":
            Stack.server.kill()
            Stack.server.start()
        else:
            Stack.server.freeze()
            for process in (0, 1):
                self.chat(process).search(QUESTIONS[0])
            Stack.server.thaw()

    @precondition(lambda self: "redis" in self.cached)
    @rule()
    def believe_the_server_again(self):
        for memory in self.memories[:2]:
            memory._core.parts.hot.shared._breaker.succeeded()

    @invariant()
    def all_give_the_same_answers(self):
        for memory in self.memories:
            memory._core.flush()
        for user in ("ada", "bob"):
            entries, prompts, numbers = self.answers(2, user)
            for process in (0, 1, 0, 1):
                found = self.answers(process, user)
                assert found[:2] == (entries, prompts)
                assert found[2] == pytest.approx(
                    numbers, abs=2e-4
                )  # rows that lie otherwise in RAM are added up otherwise

    def answers(self, process, user):
        """Entries that were found, prompts, and scores with their shares."""
        chat = self.chat(process, user)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            hits = [chat.search(question, k=50) for question in QUESTIONS]
            earlier = self.clock() - timedelta(hours=20)
            hits += [chat.search(QUESTIONS[0], k=50, as_of=when) for when in (earlier, "ever")]
            contexts = [chat.context(), chat.context(QUESTIONS[1], max_tokens=200)]
        entries = [{hit.entry.key: hit.entry for hit in some} for some in hits]
        prompts = [
            (
                c.messages,
                c.tokens,
                c.budget,
                c.margin,
                c.cacheable,
                [replace(r, score=None, signals={}) for r in c.report],
            )
            for c in contexts
        ]
        numbers = {
            (n, hit.entry.key, name): share
            for n, some in enumerate(hits)
            for hit in some
            for name, share in {"score": hit.score, **hit.signals}.items()
        }
        return entries, prompts, numbers


def known(chat):
    return chat.entries.list(types=[MemoryType.LONG_TERM], filter={"content": {"$startswith": "Known"}})


Stack.TestCase.settings = settings(
    max_examples=500 if NIGHTLY else 12,
    stateful_step_count=30 if NIGHTLY else 12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_a_stack_of_caches_answers_as_none_does = Stack.TestCase


def teardown_module():
    if Stack.server is not None:
        Stack.server.kill()
