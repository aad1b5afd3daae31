"""What processes keep together on a Redis server: a real one, that may refuse, hang, die, forget and lie."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
from conftest import found, in_threads, wait_until
from pydantic import SecretStr
from redis_server import RedisServer, free_port
from test_cache import QUESTION, talk

import neuralflow_memory
import neuralflow_memory.storage.redis as redis_module
from neuralflow_memory import ConfigError, MissingDependency, open_memory
from neuralflow_memory.cli.doctor import state
from neuralflow_memory.config import Redis
from neuralflow_memory.protocols import Cache
from neuralflow_memory.storage.redis import RedisCache
from neuralflow_memory.testing import HashingEmbedder, ManualClock

MB = 1024 * 1024
ONLY_REDIS = {"context": {"cache_size": 0}}
"""No results in RAM, so that what is cached is on the server."""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One server for the tests that do it no harm."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(running):
    running.client().flushall()
    return running


@pytest.fixture
def own_server(tmp_path):
    """Makes servers of this test's own."""
    servers = []

    def start(**options):
        folder = tmp_path / f"redis-{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder, **options))
        return servers[-1]

    yield start
    for one in servers:
        one.kill()


@pytest.fixture
def cache():
    """Makes caches on a server, all of one ledger."""
    made = []

    def make(server, *, prefix="ours:", url=None, **options):
        made.append(RedisCache(Redis(url=url or server.url, **options), prefix=prefix))
        return made[-1]

    yield make
    for one in made:
        one.close()


def shared(memory):
    return memory.stats()["cache"]["shared"]


def keys(server):
    return sorted(server.client().keys())


def fastest(*calls):
    """Seconds that the fastest of *calls* took: this machine may be busy, and each does the same."""
    took = []
    for call in calls:
        began = time.monotonic()
        call()
        took.append(time.monotonic() - began)
    return min(took)


# -- the cache by itself


def test_what_was_set_is_there_and_nothing_else(server, cache):
    """Under its partition, name and head."""
    one = cache(server)
    assert isinstance(one, Cache)
    one.set("ada", {"a": b"1", "b": b"\0\xff"}, head="7.1", ttl=60)
    assert one.get("ada", ["b", "c", "a"], head="7.1") == [b"\0\xff", None, b"1"]
    assert one.get("ada", ["a"], head="8.1") == [None]
    assert one.get("bob", ["a"], head="7.1") == [None]
    assert one.stats()["hits"] == 2
    assert one.stats()["misses"] == 3
    assert (one.stats()["errors"], one.stats()["open"]) == (0, False)


def test_values_of_another_head_make_room(server, cache):
    """A partition holds what was made from one state of it; also where another process was the first to move on."""
    one, other = cache(server), cache(server)
    one.set("ada", {"a": b"1"}, head="7.1", ttl=60)
    other.get("ada", ["a"], head="8.1")
    other.set("ada", {"b": b"2"}, head="8.1", ttl=60)
    assert one.get("ada", ["a"], head="7.1") == [None]
    assert one.get("ada", ["a", "b"], head="8.1") == [None, b"2"]
    assert server.client().hlen(keys(server)[0]) == 2  # the value, and the head


def test_a_partition_does_not_grow_without_end(server, cache, monkeypatch):
    """Whoever asks ever new questions and writes nothing begins anew."""
    monkeypatch.setattr(redis_module, "_MOST_VALUES", 5)
    one = cache(server)
    for n in range(23):
        one.set("ada", {str(n): b"x"}, head="7.1", ttl=60)
        assert one.get("ada", [str(n)], head="7.1") == [b"x"]
    assert server.client().hlen(keys(server)[0]) <= 6


def test_every_key_has_an_expiry(server, cache):
    """Of as many seconds as asked for; it is set again with each value, and the key goes with it."""
    one = cache(server)
    one.set("ada", {"a": b"1"}, head="7.1", ttl=1000)
    one.set("bob", {"a": b"1"}, head="7.1", ttl=0.2)
    assert [server.client().ttl(key) for key in keys(server)] == [pytest.approx(1000, abs=2), pytest.approx(1, abs=1)]
    wait_until(lambda: len(keys(server)) == 1, seconds=5)


def test_a_deleted_partition_is_gone_from_the_server(server, cache):
    """And no other one's."""
    one = cache(server)
    for owner in ("ada", "bob"):
        one.set(owner, {"a": b"1"}, head="7.1", ttl=60)
    one.delete("ada")
    assert keys(server) == [b"ours:bob"]


# -- the server's memory


def test_memory_and_policy_are_set_where_that_is_allowed(own_server, cache):
    """As the options say; with None they stay as they are."""
    server = own_server(maxmemory="100mb")
    cache(server, max_memory_mb=None, max_memory_policy=None).get("ada", ["a"], head="7.1")
    told = server.client().config_get("maxmemory*")
    assert told["maxmemory"] == str(100 * MB)
    assert told["maxmemory-policy"] == "noeviction"
    one = cache(server)
    one.get("ada", ["a"], head="7.1")
    told = server.client().config_get("maxmemory*")
    assert (told["maxmemory"], told["maxmemory-policy"]) == (str(512 * MB), "allkeys-lru")
    assert one.stats()["advice"] is None


def test_a_server_that_was_started_anew_is_set_again(own_server, cache, monkeypatch):
    """It has forgotten what it was told."""
    monkeypatch.setattr(redis_module, "_PAUSE", 0.01)
    server = own_server()
    one = cache(server)
    one.get("ada", ["a"], head="7.1")
    server.kill()
    one.get("ada", ["a"], head="7.1")
    server.start()
    wait_until(lambda: (one.get("ada", ["a"], head="7.1"), not one.stats()["open"])[1])
    assert server.client().config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lru"


def test_a_full_server_gives_up_what_was_used_the_longest_ago(own_server, cache):
    """Nothing fails, and the statistics say how many went."""
    server = own_server()
    one = cache(server, max_memory_mb=4)
    for n in range(600):
        one.set(f"user-{n}", {"a": b"x" * 20_000}, head="7.1", ttl=60)
    assert one.stats()["errors"] == 0
    assert one.stats()["evictions"] > 100
    assert one.get("user-599", ["a"], head="7.1") == [b"x" * 20_000]
    assert len(keys(server)) < 400


def limited(server, *, password="word", rules=("-config", "-client", "-object", "-command", "-acl")):
    """The address of a user as a managed server has it: all but what configures."""
    server.client().acl_setuser(
        "app", enabled=True, passwords=[f"+{password}"], keys=["*"], categories=["+@all"], commands=list(rules)
    )
    return f"redis://app:{password}@127.0.0.1:{server.port}/0"


def test_without_config_it_is_checked_and_said(own_server, cache):
    """One warning, `stats()` and `doctor`; the cache works all the same."""
    server = own_server()
    one = cache(server, url=limited(server))
    with pytest.warns(RuntimeWarning, match="maxmemory is 0, not 536870912 and maxmemory-policy is noeviction"):
        one.set("ada", {"a": b"1"}, head="7.1", ttl=60)
    assert one.get("ada", ["a"], head="7.1") == [b"1"]
    assert "redis.max_memory_mb" in one.stats()["advice"]
    assert "word" not in repr(one.stats())


def test_without_config_nothing_is_said_where_all_is_well(own_server, cache):
    """The server has what is asked for, or nothing is."""
    server = own_server(**{"maxmemory": "64mb", "maxmemory-policy": "volatile-lru"})
    url = limited(server)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (
            {"max_memory_mb": 64, "max_memory_policy": "volatile-lru"},
            {"max_memory_mb": None, "max_memory_policy": None},
        ):
            one = cache(server, url=url, **options)
            one.set("ada", {"a": b"1"}, head="7.1", ttl=60)
            assert one.get("ada", ["a"], head="7.1") == [b"1"]
            assert one.stats()["advice"] is None


def test_a_user_who_may_not_even_ask_for_info_is_told(own_server, cache):
    """It can't be checked; the cache works."""
    server = own_server()
    one = cache(server, url=limited(server, rules=("-config", "-info")))
    with pytest.warns(RuntimeWarning, match="maxmemory is None"):
        one.set("ada", {"a": b"1"}, head="7.1", ttl=60)
    assert one.get("ada", ["a"], head="7.1") == [b"1"]


# -- servers that fail


def test_a_dead_server_costs_little_once(cache):
    """Then it is left alone, and asked again later."""
    caches = [cache(None, url=f"redis://127.0.0.1:{free_port()}/0") for _ in range(3)]
    assert fastest(*[partial(one.get, "ada", ["a"], head="7.1") for one in caches]) < 0.1
    one = caches[0]

    def hundred():
        for _ in range(100):
            assert one.get("ada", ["a"], head="7.1") == [None]
            one.set("ada", {"a": b"1"}, head="7.1", ttl=60)

    assert fastest(hundred, hundred) < 0.02
    assert one.stats()["errors"] == 1
    assert one.stats()["open"]
    assert "Connection" in one.stats()["error"]


def test_a_server_that_hangs_costs_little_once(own_server, cache, monkeypatch):
    """It takes the connection and never answers; once it goes on, it is asked again."""
    monkeypatch.setattr(redis_module, "_PAUSE", 3.0)
    server = own_server()
    known, fresh = [cache(server) for _ in range(3)], [cache(server) for _ in range(3)]
    for one in known:
        one.set("ada", {"a": b"1"}, head="7.1", ttl=60)
    server.freeze()
    for caches in (known, fresh):
        assert fastest(*[partial(one.get, "ada", ["a"], head="7.1") for one in caches]) < 0.1
        assert all(one._breaker.healthy is False for one in caches)
        assert fastest(*[partial(one.get, "ada", ["a"], head="7.1") for one in caches]) < 0.01
    server.thaw()
    one = known[0]
    wait_until(lambda: one.get("ada", ["a"], head="7.1") == [b"1"])
    assert not one.stats()["open"]


@pytest.mark.parametrize("password", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_an_error_that_is_said(own_server, cache, password):
    """In the statistics and by `doctor`, without the password."""
    server = own_server(requirepass="right")
    one = cache(server, url=server.url.replace("//", f"//{password}"))
    assert one.get("ada", ["a"], head="7.1") == [None]
    assert one.stats()["open"]
    assert "wrong" not in one.stats()["address"]
    assert "Authentication" in one.stats()["error"]
    right = cache(server, url=server.url.replace("//", "//:right@"))
    right.set("ada", {"a": b"1"}, head="7.1", ttl=60)
    assert right.get("ada", ["a"], head="7.1") == [b"1"]


def test_what_could_not_be_deleted_is_deleted_later(own_server, cache, monkeypatch):
    """As soon as the server answers again, before it is asked anything else."""
    monkeypatch.setattr(redis_module, "_PAUSE", 0.05)
    server = own_server()
    one = cache(server)
    one.set("ada", {"a": b"1"}, head="7.1", ttl=60)
    one.set("bob", {"a": b"1"}, head="7.1", ttl=60)
    server.freeze()
    one.delete("ada")
    server.thaw()
    wait_until(lambda: one.get("bob", ["a"], head="7.1") == [b"1"], seconds=5)
    assert keys(server) == [b"ours:bob"]


def test_something_else_under_its_key_is_nothing(server, cache, monkeypatch):
    """A string where a hash is expected: an error in the statistics, a miss for whoever asks."""
    monkeypatch.setattr(redis_module, "_PAUSE", 0.0)
    server.client().set("ours:ada", "mine")
    one = cache(server)
    assert one.get("ada", ["a"], head="7.1") == [None]
    one.set("ada", {"a": b"1"}, head="7.1", ttl=60)
    assert one.stats()["errors"] >= 1


def test_an_address_is_checked_when_a_memory_is_opened(folder):
    """Before anything is written."""
    for url in ("http://127.0.0.1", "redis://", "redis://host:0", "unix://", "127.0.0.1:6379"):
        with pytest.raises(ConfigError, match="redis"):
            open_memory(folder, embedder="none", redis={"url": url})
    with pytest.raises(ConfigError, match="socket_timeout"):
        open_memory(folder, embedder="none", redis={"url": "redis://127.0.0.1?socket_timeout=soon"})
    assert Redis(url="unix:///run/redis.sock").url == SecretStr("unix:///run/redis.sock")


def test_without_the_library_it_says_what_to_install(folder, monkeypatch):
    """And without an address nothing is missed."""
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(MissingDependency, match=r"neuralflow-memory\[redis\]"):
        open_memory(folder, embedder="none", redis={"url": "redis://127.0.0.1"})
    open_memory(folder, embedder="none").close()


# -- a memory with it


@pytest.fixture
def memory(opened, server):
    return opened(redis={"url": server.url}, **ONLY_REDIS)


def test_a_search_is_answered_by_what_another_process_found(memory, beside, server):
    """The other has not even read what it compares; hits, scores and signals are the same."""
    chat = talk(memory)
    first = chat.search(QUESTION)
    assert chat.search(QUESTION) == first
    other = beside(memory)
    assert other.session("another", user_id="ada").search(QUESTION) == first
    resident = other._core.parts.residents.unused(chat.scope)
    assert resident.index is None
    assert shared(memory)["hits"] == shared(other)["hits"] == 1


def test_a_prompt_is_built_from_what_another_process_found(memory, beside, server):
    """Without reading what it compares; brief answers with the turns before them included."""
    chat = talk(memory)
    for n in range(30):
        chat.add([f"Where was the boat of day {n}?", f"In harbour {n}"])
    memory.flush()
    first = chat.context("Which harbour was the boat in on day 3?")
    assert any(c.part == "hit" and c.included for c in first.report)
    other = beside(memory)
    theirs = other.session("chat", user_id="ada")
    theirs.context(search=False)
    assert theirs.context("Which harbour was the boat in on day 3?") == first
    assert other._core.parts.residents.unused(chat.scope).index is None


def test_no_text_is_on_the_server(memory, server):
    """Neither of what was said nor of what was asked, nor whose it is."""
    chat = talk(memory, user="ada-lovelace")
    chat.search("Does anybody like tomatoes?")
    chat.context("Does anybody like tomatoes?")
    client = server.client()
    (key,) = keys(server)
    fields = client.hgetall(key)
    assert len(fields) == 3
    dump = b"".join([key, *fields, *fields.values()]).lower()
    for word in (b"tomato", b"sailing", b"lovelace", b"anybody", b"chat"):
        assert word not in dump
    assert client.ttl(key) == pytest.approx(86_400, abs=5)


def test_a_write_a_deletion_and_a_change_are_seen_at_once(memory, beside, server):
    """By every process; what is deleted or changed also leaves the server."""
    chat = talk(memory)
    theirs = beside(memory).session("chat", user_id="ada")
    for who in (chat, theirs):
        who.search(QUESTION)
    chat.add("Everybody goes sailing")
    assert "Everybody goes sailing" in found(theirs.search(QUESTION))
    own = theirs.messages()[-1].id
    assert len(keys(server)) == 1
    theirs.entries.update(own, content="Nobody does")
    assert keys(server) == []
    assert "Everybody goes sailing" not in found(chat.search(QUESTION))
    assert len(keys(server)) == 1
    chat.entries.delete(own)
    assert keys(server) == []
    chat.search(QUESTION)
    theirs.clear()
    assert keys(server) == []
    assert chat.search(QUESTION) == []


def test_scopes_do_not_leak(memory, server):
    """Users, tenants and chats of nobody: each sees its own, whatever somebody does to the server."""
    chats = [
        talk(memory, "ada"),
        talk(memory, "bob"),
        memory.session("chat", user_id="ada", tenant="other"),
        memory.session("chat"),
        memory.session("ada"),
    ]
    for n, chat in enumerate(chats[2:]):
        chat.add(f"Sailing with number {n}")
    memory.flush()
    expected = [chat.search(QUESTION) for chat in chats]
    assert len({tuple(found(hits)) for hits in expected}) == len(chats) == len(keys(server))
    assert [chat.search(QUESTION) for chat in chats] == expected
    client = server.client()
    everything = {key: client.hgetall(key) for key in keys(server)}
    for key in everything:  # everybody's values under everybody's keys, with the heads that are asked for
        head = everything[key][b"\0head"]
        for theirs in everything.values():
            client.hset(key, mapping=theirs)
        client.hset(key, b"\0head", head)
    assert [chat.search(QUESTION) for chat in chats] == expected
    for key, theirs in zip(everything, [*list(everything.values())[1:], everything[keys(server)[0]]], strict=True):
        values = [value for name, value in theirs.items() if name != b"\0head"]
        for name in everything[key]:
            if name != b"\0head":
                client.hset(key, name, values[0])
    before = shared(memory)["hits"]
    assert [chat.search(QUESTION) for chat in chats] == expected
    assert shared(memory)["hits"] == before + len(chats)  # they were there, and not believed


@pytest.mark.parametrize(
    "poison",
    [
        b"",
        b"x",
        b"[]",
        b"\x80\x04K\x01.",
        b"\xff" * 100,
        b"0" * 16 + b'[1, "7.1", 0, 9e99, [], [], []]',
        b"[" * 100_000,
    ],
)
def test_what_somebody_else_has_written_there_is_a_miss(memory, server, poison):
    """Never an error, never an answer."""
    chat = talk(memory)
    first = chat.search(QUESTION)
    client, (key,) = server.client(), keys(server)
    for name in client.hkeys(key):
        if name != b"\0head":
            client.hset(key, name, poison)
    assert chat.search(QUESTION) == first
    assert chat.search(QUESTION) == first


def test_a_value_that_was_cut_or_turned_is_a_miss(memory, server):
    """Any flipped byte shows."""
    chat = talk(memory)
    first = chat.search(QUESTION)
    client, (key,) = server.client(), keys(server)
    (name,) = (n for n in client.hkeys(key) if n != b"\0head")
    value = client.hget(key, name)
    for place in range(0, len(value), 7):
        client.hset(key, name, value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :])
        assert chat.search(QUESTION) == first
    client.hset(key, name, value[:-1])
    assert chat.search(QUESTION) == first


def test_two_folders_on_one_server_never_meet(opened, server, tmp_path):
    """The same users, sessions and questions."""
    one = opened(tmp_path / "one", redis={"url": server.url}, **ONLY_REDIS)
    two = opened(tmp_path / "two", redis={"url": server.url}, **ONLY_REDIS)
    mine, theirs = (memory.session("chat", user_id="ada") for memory in (one, two))
    mine.add("Mine goes sailing")
    theirs.add("Theirs goes sailing")
    for _ in range(2):
        assert found(mine.search(QUESTION)) == ["Mine goes sailing"]
        assert found(theirs.search(QUESTION)) == ["Theirs goes sailing"]
    prefixes = {key.rpartition(b":")[0] for key in keys(server)}
    assert len(prefixes) == 2
    mine.clear()
    assert len(keys(server)) == 1


def test_nothing_shared_before_a_restore_is_used_after_it(opened, beside, server, tmp_path):
    """By this process and by others: each time it is another owner's head, also where no change of it is noted since."""
    memory = opened(redis={"url": server.url}, embedder="none", **ONLY_REDIS)
    chat = talk(memory)
    as_then = {}
    for name in ("one", "two"):
        chat.add(f"Sailing number {name}")
        memory.backup(tmp_path / name)
        as_then[name] = chat.search(QUESTION)
    for n, name in enumerate(("one", "two", "one", "one", "two")):
        memory.restore(tmp_path / name)
        assert chat.search(QUESTION) == as_then[name]
        assert shared(memory)["hits"] == 0
        other = beside(memory)
        assert other.session("chat", user_id="ada").search(QUESTION) == as_then[name]
        assert shared(other)["hits"] == 1
        other.close()
        if n == 3:
            chat.add("Nobody goes sailing")
            assert "Nobody goes sailing" in found(chat.search(QUESTION))


def test_a_copy_of_a_folder_that_went_on_by_itself_is_another_one(opened, server, folder, tmp_path):
    """The same ledger, secrets and numbers, as many changes, and other texts."""
    import shutil

    memory = opened(redis={"url": server.url}, **ONLY_REDIS)
    chat = talk(memory)
    memory.close()
    shutil.copytree(folder, tmp_path / "copy")
    both = [opened(path, redis={"url": server.url}, **ONLY_REDIS) for path in (folder, tmp_path / "copy")]
    for n, memory in enumerate(both):
        chat = memory.session("chat", user_id="ada")
        chat.add(f"Sailing number {n}")
        memory.flush()
    heads = []
    for n, memory in enumerate(both):
        chat = memory.session("chat", user_id="ada")
        said = found(chat.search(QUESTION))
        assert f"Sailing number {n}" in said
        assert f"Sailing number {1 - n}" not in said
        heads.append(memory._core.parts.hot.head(memory._core.parts.ledger.owner(chat.scope)))
    assert heads[0][0] == heads[1][0]  # only who wrote it tells them apart
    assert heads[0][1] != heads[1][1]


def test_other_options_or_models_find_for_themselves(memory, opened, folder, server):
    """What decides the ranking is part of the key."""
    chat = talk(memory)
    first = chat.search("When is sailing?")
    memory.close()
    again = opened(redis={"url": server.url}, **ONLY_REDIS)
    assert again.session("chat", user_id="ada").search("When is sailing?") == first
    assert shared(again)["hits"] == 1
    again.close()
    other = opened(redis={"url": server.url}, ranking={"length": 0.0}, **ONLY_REDIS)
    found_ = other.session("chat", user_id="ada").search("When is sailing?")
    assert found_[0].signals["length"] == 0 < first[0].signals["length"]
    assert shared(other)["hits"] == 0


def test_what_is_shared_is_not_older_than_its_time(opened, server):
    """`redis.default_ttl`, by the memory's clock, whatever the key's own expiry."""
    clock = ManualClock()
    memory = opened(redis={"url": server.url, "default_ttl": 100}, clock=clock, **ONLY_REDIS)
    chat = talk(memory)
    chat.search(QUESTION)
    assert server.client().ttl(keys(server)[0]) == pytest.approx(100, abs=5)
    clock.advance(seconds=99)
    chat.search(QUESTION)
    assert shared(memory)["hits"] == 1
    clock.advance(seconds=2)
    chat.search("What about tomatoes?")  # renews the key
    before = server.client().hgetall(keys(server)[0])
    chat.search(QUESTION)
    assert server.client().hgetall(keys(server)[0]) != before  # found and set anew


def test_nobody_notices_a_server_that_is_killed_and_comes_back(opened, beside, own_server, monkeypatch):
    """In mid-chat, under load, in two processes: the same answers as from a memory without; only the statistics tell."""
    monkeypatch.setattr(redis_module, "_PAUSE", 0.05)
    monkeypatch.setattr(redis_module, "_LONGEST_PAUSE", 0.1)
    server = own_server()
    memory = opened(redis={"url": server.url}, **ONLY_REDIS)
    both = [memory, beside(memory)]
    over, slowest = threading.Event(), []

    def use(n):
        chat = both[n % 2].session(f"chat-{n}", user_id=f"user-{n}")
        said = 0
        while not over.is_set() or said < 5:
            chat.add([f"sailing number {said}"])
            said += 1
            for _ in range(3):
                began = time.monotonic()
                hits = chat.search("sailing", k=1000)
                slowest.append(time.monotonic() - began)
                assert {h.entry.content for h in hits} == {f"sailing number {i}" for i in range(said)}
            assert len(chat.context().messages) >= 1
            time.sleep(0.005)

    def trouble():
        try:
            for _ in range(2):
                time.sleep(0.4)
                server.freeze()
                time.sleep(0.3)
                server.kill()
                time.sleep(0.3)
                server.start()
            wait_until(lambda: shared(memory)["hits"] > before["hits"] and not shared(memory)["open"])
        finally:
            over.set()

    before = shared(memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_threads(*[lambda n=n: use(n) for n in range(4)], trouble)
    assert sum(shared(m)["errors"] for m in both) >= 2
    assert memory.stats()["failed_writes"] == 0
    assert memory.stats()["last_error"] is None


def test_doctor_says_how_the_server_is(opened, own_server):
    """It answers; it does not; it is not set up as it should be."""
    server = own_server()
    memory = opened(redis={"url": limited(server)}, **ONLY_REDIS)
    with pytest.warns(RuntimeWarning, match="maxmemory"):
        facts = memory.stats(verify=True)
    said = [f for f in state(facts) if f.name == "cache"]
    assert [f.level for f in said] == ["ok", "note"]
    assert f"redis://127.0.0.1:{server.port}/0 answers" in said[0].detail
    server.kill()
    memory.session("chat", user_id="ada").add("Hello")
    memory.session("chat", user_id="ada").search("hello")
    said = [f for f in state(memory.stats(verify=True)) if f.name == "cache"]
    assert said[0].level == "wrong"
    assert "does not answer" in said[0].detail


class Shelf:
    """A cache of one's own: what the protocol asks for, in a dict."""

    def __init__(self):
        self.held, self.hits = {}, 0

    def get(self, partition, names, *, head):
        found = [self.held.get((partition, head, name)) for name in names]
        self.hits += sum(value is not None for value in found)
        return found

    def set(self, partition, values, *, head, ttl):
        self.held |= {(partition, head, name): value for name, value in values.items()}

    def delete(self, partition):
        self.held = {key: value for key, value in self.held.items() if key[0] != partition}

    def stats(self):
        return {"hits": self.hits, "misses": 0, "errors": 0, "evictions": 0, "open": False}

    def close(self):
        raise AssertionError("it is its owner's to close")


def test_a_cache_of_ones_own_takes_the_place_of_redis(opened, beside):
    """Whatever has the methods."""
    shelf = Shelf()
    memory = opened(cache=shelf, **ONLY_REDIS)
    chat = talk(memory)
    first = chat.search(QUESTION)
    assert beside(memory, cache=shelf).session("chat", user_id="ada").search(QUESTION) == first
    assert shelf.hits == 1
    assert shared(memory) == shelf.stats()
    chat.clear()
    assert shelf.held == {}
    with pytest.raises(ConfigError, match="cache= takes an object with"):
        open_memory("unused", embedder=HashingEmbedder(), cache=object())


DYING = """
import os, signal, sys
import neuralflow_memory._failpoints as failpoints
from neuralflow_memory import open_memory
from neuralflow_memory.testing import HashingEmbedder

folder, url, point, act = sys.argv[1:]
memory = open_memory(folder, embedder=HashingEmbedder(), redis={"url": url}, context={"cache_size": 0})
chat = memory.session("chat", user_id="ada")
chat.search("Who goes sailing?"), chat.context("Who goes sailing?")

def hook(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)

failpoints.hook = hook
exec(act)
chat.search("Who goes sailing?")
"""


@pytest.mark.parametrize(
    ("point", "act"),
    [
        ("append.applied", "chat.add('Everybody goes sailing')"),
        ("append.committed", "chat.add('Everybody goes sailing')"),
        ("change.committed", "chat.entries.update(chat.messages()[0].id, content='Nobody goes')"),
        ("index.saved", "chat.add('Everybody goes sailing'); chat.search('Who goes?')"),
    ],
)
def test_a_process_that_is_killed_leaves_no_old_answer(memory, beside, server, point, act):
    """Whatever was committed by then is seen, and nothing else, though it could tell nobody."""
    chat = talk(memory)
    chat.search(QUESTION), chat.context(QUESTION)
    root = Path(neuralflow_memory.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", DYING, memory.path, server.url, point, act],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    fresh = beside(memory)
    fresh._core.parts.hot.keeps_results = False
    theirs = fresh.session("chat", user_id="ada")
    for _ in range(2):
        assert chat.search(QUESTION) == theirs.search(QUESTION)
        assert chat.context(QUESTION).messages == theirs.context(QUESTION).messages
    committed = point != "append.applied"
    assert ("Everybody goes sailing" in found(chat.search(QUESTION))) == (committed and "Everybody" in act)
    assert len(chat.search(QUESTION)) == 3 + (committed and "Everybody" in act)
