"""What two years of chat take on disk once a sweep has gone over them, and that all of it is still there."""

import json
import os
import random
import time
from collections import defaultdict
from itertools import pairwise
from pydoc_data import topics

import pytest
from conftest import SMALL

from neuralflow_memory import Message
from neuralflow_memory.testing import HashingEmbedder, ManualClock

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
MESSAGES, USERS, SWEEPS = (100_000, 20, 24) if NIGHTLY else (960, 2, 4)


def prose(rng):
    """Sentences that read as English does, without end: each pair of words follows the other in Python's own documentation."""
    words = " ".join(topics.topics.values()).split()
    after = defaultdict(list)
    for one, other in pairwise(words):
        after[one].append(other)
    word = words[0]
    while True:
        said = [word]
        for _ in range(rng.randint(9, 59)):
            said.append(rng.choice(after[said[-1]]))
        word = rng.choice(after[said[-1]])
        yield " ".join(said)


def line(entry, user):
    """The entry in a file of JSON lines, as a chat would write it itself."""
    own = {"id": entry.id, "session_id": "chat", "user_id": user, "role": entry.role, "content": entry.content}
    return json.dumps(own | {"created_at": entry.created_at.isoformat()}, ensure_ascii=False) + "\n"


def live(folder):
    """Bytes of what is read and written every day: all but the archive."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "archive" not in p.parts)


@pytest.mark.timeout(7200 if NIGHTLY else 120)
def test_two_years_of_messages(opened, folder, monkeypatch):
    """The archive takes at most a quarter of the same entries' JSONL, what is live at most 40 % of what it took."""
    if not NIGHTLY:  # an index this small would not be made anew
        monkeypatch.setattr("neuralflow_memory.storage.chroma._WORTH_IT", 10)
    rng = random.Random(11)
    sentences = prose(rng)
    said = {f"user-{n}": {} for n in range(USERS)}
    clock = ManualClock()
    memory = opened(embedder=HashingEmbedder(dimensions=384), clock=clock, pruning=SMALL, tokenizer="approx")
    chats = {user: memory.session("chat", user_id=user) for user in said}
    start = time.perf_counter()
    for n in range(MESSAGES // 20):
        user = f"user-{n % USERS}"
        new = [
            Message(("user", "assistant")[k % 2], f"{next(sentences)} unique{20 * n + k}", id=f"m{20 * n + k}")
            for k in range(20)
        ]
        chats[user].add(new)
        said[user] |= {m.id: m.content for m in new}
        clock.advance(days=730 * 20 / MESSAGES)
    memory.flush()
    memory.vacuum()
    before = live(folder)
    written = time.perf_counter()
    report = memory.sweep()
    for _ in range(SWEEPS):
        clock.advance(days=2)
        memory.sweep()
    memory.flush()
    memory.vacuum()
    swept = time.perf_counter()

    state, jsonl, cold = memory.stats(), 0, []
    for user, chat in chats.items():
        there = chat.entries.list(filter={"tier": "cold"})
        cold += [(user, e.id) for e in there]
        jsonl += sum(len(line(e, user).encode()) for e in there)
        # Warm is what is younger than a month, and what a summary or the window still needs.
        window = {m.id for m in chat.messages(view="window")}
        warm = chat.entries.list(types=["short_term"], filter={"tier": "warm"})
        assert all(e.id in window or (clock.now - e.written_at).days < 30 for e in warm)
        assert {m.id: m.content for m in chat.messages()} == said[user]
    asked = rng.sample(cold, 100)
    found = sum(i in {h.entry.id for h in chats[u].search(f"unique{i[1:]}", k=3)} for u, i in asked)
    print(
        f"{MESSAGES:,} messages of {USERS} users: written in {written - start:.0f} s, {len(report.moves):,} moves and "
        f"{SWEEPS} more sweeps in {swept - written:.0f} s; {len(cold):,} of {state['entries']:,} entries cold in "
        f"{state['blocks']:,} blocks; archive {state['archive_bytes']:,} bytes, {state['archive_bytes'] / jsonl:.1%} of "
        f"their JSONL; live {before:,} before, {live(folder):,} after, {live(folder) / before:.1%}; {found} of 100 found"
    )
    assert len(cold) > 0.9 * MESSAGES
    assert state["archive_bytes"] <= 0.25 * jsonl
    assert live(folder) <= 0.4 * before
    assert found == 100
