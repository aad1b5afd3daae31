"""The event loop is never blocked, and async does what sync does."""

import asyncio
import gc
import inspect
import threading
import time

import pytest
from conftest import found, in_threads, texts

from neuralflow_memory import ClosedError, Memory, Message, Session, aopen_memory
from neuralflow_memory._offload import Workers
from neuralflow_memory.session import Entries
from neuralflow_memory.testing import HashingEmbedder

NO_TWIN = {"session", "task", "thread", "values"}  # cheap, no I/O


def operations():
    for owner in (Memory, Session, Entries):
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and not name.startswith("_") and not inspect.iscoroutinefunction(method):
                yield pytest.param(owner, name, id=f"{owner.__name__}.{name}")


@pytest.mark.parametrize(("owner", "name"), list(operations()))
def test_every_operation_has_an_async_twin(owner, name):
    """The same name with an `a`, the same parameters."""
    if name in NO_TWIN:
        return
    twin = getattr(owner, f"a{name}")
    assert inspect.iscoroutinefunction(twin)
    assert inspect.signature(twin).parameters == inspect.signature(getattr(owner, name)).parameters
    assert twin.__name__ == f"a{name}"
    assert name in twin.__doc__


def test_no_twin_stands_alone():
    """There is nothing that only async can do."""
    for owner in (Memory, Session, Entries):
        for name, method in vars(owner).items():
            if inspect.iscoroutinefunction(method) and not name.startswith("_"):
                assert callable(vars(owner)[name.removeprefix("a")])


async def test_async_and_sync_see_the_same(folder):
    """A chat led through the twins is the chat that the sync methods show."""
    async with await aopen_memory(folder, embedder=HashingEmbedder()) as memory:
        chat = memory.session("chat", user_id="ada")
        ids = await chat.aadd(["Sailing on Sunday", Message("assistant", "Nice")])
        own = await chat.aremember("Ada sails")
        assert [m.id for m in await chat.amessages()] == ids
        assert found(await chat.asearch("sailing")) == found(chat.search("sailing"))
        assert await chat.acontext() == chat.context()
        assert (await chat.entries.aget(own)).content == "Ada sails"
        assert (await chat.entries.aupdate(own, content="Ada sails a lot")).version == 2
        assert await chat.entries.acount() == 2
        assert len(await chat.entries.alist()) == 3
        assert not (await chat.acompact()).needed
        assert await chat.asummary() == ""
        await chat.areplace(["Only this"])
        await memory.aflush()
        await memory.areindex()
        await memory.aready()
        assert (await memory.astats())["dirty"] == 0
        assert len(await memory.asessions(user_id="ada")) == 1
        assert await memory.acount_tokens("Hello") == memory.count_tokens("Hello")
        assert await chat.entries.adelete(own) == 1
        await chat.aclear()
        assert chat.messages() == []
    with pytest.raises(ClosedError):
        await chat.aadd("x")
    with pytest.raises(ClosedError):
        await memory.astats()


async def test_the_loop_keeps_ticking(opened):
    """While a slow embedder, a slow summarizer and 200 searches are at work, other tasks get their turns."""

    class Slow(HashingEmbedder):
        def embed_query(self, text):
            threading.Event().wait(0.005)
            return super().embed_query(text)

    memory = opened(embedder=Slow())
    chat = memory.session("chat", user_id="ada")
    await chat.aadd([f"Turn {n} about sailing" for n in range(200)])
    await memory.aflush()
    gaps, running = [], True

    async def tick():
        last = time.perf_counter()
        while running:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    results = await asyncio.gather(*(chat.asearch(f"turn {n}") for n in range(200)))
    running = False
    await ticking
    assert all(results)
    # Not a measure of speed: a loop that was blocked for the length of it all would have had one turn.
    assert len(gaps) >= 20


async def test_200_concurrent_operations_all_come_back(memory):
    """Searches, adds and contexts at once, none lost, none mixed up."""
    chats = [memory.session(f"s{n}", user_id=f"u{n % 7}") for n in range(100)]
    await asyncio.gather(*(c.aadd(f"Number {n} likes sailing") for n, c in enumerate(chats)))
    hits = await asyncio.gather(*(c.asearch("sailing", within="session") for c in chats for _ in range(2)))
    assert [found(h) for h in hits] == [[f"Number {n // 2} likes sailing"] for n in range(200)]
    contexts = await asyncio.gather(*(c.acontext(search=False) for c in chats))
    assert [texts(c.messages) for c in contexts] == [[f"Number {n} likes sailing"] for n in range(100)]


def test_one_memory_serves_one_event_loop_after_another(memory):
    """Nothing is bound to the loop that came first."""
    for n in range(3):

        async def turn(n=n):
            chat = memory.session("chat")
            await asyncio.gather(*(chat.aadd(f"Turn {n} {i}") for i in range(10)))
            return len(await chat.amessages())

        assert asyncio.run(turn()) == 10 * (n + 1)


def test_event_loops_side_by_side(memory):
    """Several threads, each with a loop of its own."""

    async def turns(own):
        chat = memory.session(f"chat-{own}")
        await asyncio.gather(*(chat.aadd(f"Turn {i}") for i in range(20)))
        assert len(await chat.amessages()) == 20

    in_threads(*[lambda own=own: asyncio.run(turns(own)) for own in range(4)])


async def test_cancelled_calls_give_their_place_back(opened):
    """50 calls are cancelled at every stage; then 10 normal ones succeed."""
    go = threading.Event()

    class Waits(HashingEmbedder):
        def embed_query(self, text):
            assert go.wait(30)
            return super().embed_query(text)

    memory = opened(embedder=Waits())
    chat = memory.session("chat")
    await chat.aadd("Sailing")
    tasks = [asyncio.create_task(chat.asearch("sailing")) for _ in range(50)]
    for n, task in enumerate(tasks):
        if n % 5 == 0:
            await asyncio.sleep(0)
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(e, asyncio.CancelledError) for e in ended)
    go.set()
    results = await asyncio.wait_for(asyncio.gather(*(chat.asearch("sailing") for _ in range(10))), 30)
    assert [found(r) for r in results] == [["Sailing"]] * 10


async def test_a_cancelled_add_is_written_whole_or_not_at_all(memory, opened):
    """Cancelling stops the waiting, not the work."""
    chat = memory.session("chat")
    for n in range(20):
        task = asyncio.create_task(chat.aadd([f"A {n}", f"B {n}"]))
        await asyncio.sleep(0.0005 * (n % 4))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await chat.aadd("End")
    await asyncio.to_thread(memory.close)  # which waits for what was cancelled, and may come after the end
    stored = texts(opened().session("chat").messages())
    stored.remove("End")
    assert [t[0] for t in stored] == ["A", "B"] * (len(stored) // 2)


@pytest.mark.parametrize("how", ["cancelled", "abandoned"])
def test_places_survive_the_end_of_the_loop_they_were_waited_on(how):
    """A loop that ends while calls wait for a place takes none with it."""
    workers = Workers(2, name="test")
    for _ in range(5):
        go = threading.Event()
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(workers.run(lambda go=go: go.wait(30))) for _ in range(6)]
        loop.run_until_complete(asyncio.sleep(0.01))
        if how == "cancelled":
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            go.set()
        else:
            go.set()
            in_threads(lambda: time.sleep(0.02))  # places are given to a loop that no longer runs
            for task in tasks:
                task._log_destroy_pending = False
        loop.close()
        del tasks, task
        gc.collect()

    async def works():
        return await asyncio.wait_for(asyncio.gather(*(workers.run(lambda n=n: n) for n in range(10))), 30)

    assert asyncio.run(works()) == list(range(10))
    workers.close()


async def test_errors_come_through_as_they_are(chat):
    """The twin raises what the sync method raises."""
    with pytest.raises(ValueError, match="empty"):
        await chat.asearch(" ")
    with pytest.raises(LookupError):
        await chat.entries.aget("nope")


async def test_context_variables_reach_the_worker(memory, monkeypatch):
    """Tracing that follows context variables sees the call."""
    from contextvars import ContextVar

    trace = ContextVar("trace", default=None)
    seen = []
    chat = memory.session("chat")
    monkeypatch.setattr(
        memory._core.parts, "clock", lambda real=memory._core.parts.clock: (seen.append(trace.get()), real())[1]
    )
    trace.set("request-1")
    await chat.aadd("Hello")
    assert "request-1" in seen
