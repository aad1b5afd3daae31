"""What a session promises: read your writes, ids, windows, knowledge, deleting."""

from datetime import UTC, datetime, timedelta

import pytest
from conftest import SMALL, CountingEmbedder, found, index_keys, live_keys, texts

from neuralflow_memory import ConflictError, MemoryType, Message, NotFound, ToolCall
from neuralflow_memory.testing import ManualClock

# -- adding and reading


def test_what_was_added_is_read_at_once_in_order(chat):
    """add, messages, window and search agree without any waiting."""
    ids = chat.add(["One", Message("assistant", "Two"), "Three about zucchini"])
    assert [m.id for m in chat.messages()] == [m.id for m in chat.messages(view="window")] == ids
    assert [m.role for m in chat.messages()] == ["user", "assistant", "user"]
    assert found(chat.search("zucchini"))[0] == "Three about zucchini"
    assert [e.seq for e in chat.entries.list()] == [1, 2, 3]


def test_a_message_comes_back_with_everything_it_had(chat):
    """Blocks, tool calls, names, times, metadata and the host's JSON make the round trip."""
    when = datetime(2020, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
    given = [
        Message("system", "Be kind", name="rules"),
        Message("user", [{"type": "text", "text": "Look"}, {"type": "image", "url": "x"}], created_at=when, id="u1"),
        Message("assistant", "", tool_calls=[ToolCall("c1", "f", {"a": [1, 2.5, None, {"b": "ü"}]})], payload={"z": 1}),
        Message("tool", "", tool_call_id="c1", metadata={"n": 1}),
        Message("developer", "\N{GRINNING FACE} NUL \0 inside"),
    ]
    ids = chat.add(given)
    for back in (chat.messages(), chat.messages(view="window")):
        assert [m.id for m in back] == ids
        for one, other in zip(given, back, strict=True):
            names = ("role", "content", "name", "tool_calls", "tool_call_id", "metadata", "payload")
            assert [getattr(one, n) for n in names] == [getattr(other, n) for n in names]
    assert chat.messages()[1].created_at == when


def test_views_and_last_count_from_the_newest(opened):
    """`last` is the newest so many, in order; `window` leaves folded turns out, `all` never does."""
    chat = opened(pruning=SMALL).session("chat")
    chat.add([f"Turn {n}" for n in range(3)])
    chat.add([f"Turn {n}" for n in range(3, 6)])
    chat.compact()
    assert texts(chat.messages()) == [f"Turn {n}" for n in range(6)]
    assert texts(chat.messages(last=2)) == texts(chat.messages(view="window", last=2)) == ["Turn 4", "Turn 5"]
    assert texts(chat.messages(view="window")) == ["Turn 4", "Turn 5"]
    assert chat.messages(last=0) == []
    assert len(chat.messages(last=99)) == 6


def test_values_are_the_callers_own(chat, memory):
    """Neither the objects passed in nor those returned are tied to what is stored."""
    metadata, args, blocks = {"n": [1]}, {"a": [1]}, [{"type": "text", "text": "Look"}]
    chat.add(Message("user", blocks, metadata=metadata, payload={"p": [1]}))
    chat.add(Message("assistant", "", tool_calls=[ToolCall("c", "f", args)]))
    chat.add(Message("tool", "done", tool_call_id="c"))
    metadata["n"].append(2)
    args["a"].append(2)
    blocks[0]["text"] = "changed"
    expected = chat.messages()
    assert expected[0].metadata == {"n": [1]}
    assert expected[0].content[0]["text"] == "Look"
    for read in (
        chat.messages,
        lambda: chat.messages(view="window"),
        lambda: chat.context(max_tokens=1000, search=False).messages,
        lambda: [e.message for e in chat.entries.list()],
    ):
        for message in read():
            message.metadata["x"] = 1
            if message.payload is not None:
                message.payload["p"].append(3)
            for call in message.tool_calls:
                call.args["a"].append(3)
            if not isinstance(message.content, str):
                message.content[0]["text"] = "changed"
        assert chat.messages() == expected
        assert [m.metadata for m in chat.messages(view="window")] == [m.metadata for m in expected]
        assert chat.messages(view="window") == expected
    hit = chat.search("Look")[0]
    hit.entry.metadata["x"] = 1
    assert chat.search("Look")[0].entry.metadata == {"n": [1]}


# -- ids


def test_an_equal_message_again_is_no_error_and_no_second_turn(chat):
    """Retrying an add whose answer was lost does no harm, whatever JSON-equal form the values have."""
    call = Message("assistant", "", id="b", tool_calls=[ToolCall("c", "f", {"x": (1, 2)})])
    assert chat.add([Message("user", "One", id="a"), call]) == ["a", "b"]
    assert chat.add([Message("user", "One", id="a"), call]) == ["a", "b"]
    assert len(chat.messages()) == 2


def test_a_conflict_raises_and_writes_nothing(chat):
    """An id that stands for other content: the whole batch is refused."""
    chat.add(Message("user", "One", id="a"))
    with pytest.raises(ConflictError, match="on_conflict") as error:
        chat.add([Message("user", "New", id="b"), Message("user", "Other", id="a")])
    assert error.value.id == "a"
    assert texts(chat.messages()) == texts(chat.messages(view="window")) == ["One"]
    assert chat.search("New") == []


def test_a_conflict_can_keep_the_old(chat):
    """on_conflict='ignore' leaves what is there and adds the rest."""
    chat.add(Message("user", "One", id="a"))
    ids = chat.add([Message("user", "Other", id="a"), Message("user", "Two", id="b")], on_conflict="ignore")
    assert ids == ["a", "b"]
    assert texts(chat.messages()) == ["One", "Two"]


def test_a_conflict_can_replace_in_place(chat, memory):
    """on_conflict='replace' changes the turn where it stands, one version on; the old words find nothing."""
    chat.add([Message("user", "Apricots", id="a"), "Two"])
    memory.flush()
    chat.add(Message("user", "Blueberries", id="a"), on_conflict="replace")
    for view in ("all", "window"):
        assert texts(chat.messages(view=view)) == ["Blueberries", "Two"]
    entry = chat.entries.get("a")
    assert (entry.version, entry.seq) == (2, 1)
    assert "Blueberries" in found(chat.search("Blueberries"))
    assert all(h.signals.get("lexical", 0) == 0 for h in chat.search("Apricots"))
    memory.flush()
    assert index_keys(memory) == live_keys(memory)


@pytest.mark.parametrize("edit", ["replace", "window"])
def test_an_old_vector_never_speaks_for_new_words(opened, edit):
    """A replaced turn whose new text was not embedded yet has no vector, also after a crash and a restart."""
    with opened() as memory:
        memory.session("chat").add(Message("user", "Apricots", id="a"))
        memory.flush()
    with opened(embedder="none") as memory:
        chat = memory.session("chat")
        changed = Message("user", "Blueberries", id="a")
        chat.add(changed, on_conflict="replace") if edit == "replace" else chat.replace([changed])
        assert memory.stats()["vectors"] == 0


def test_one_batch_may_not_use_an_id_for_two_messages(chat):
    """Twice the same content is one turn; other content is a conflict, or replaces."""
    assert chat.add([Message("user", "One", id="a"), Message("user", "One", id="a")]) == ["a", "a"]
    with pytest.raises(ConflictError):
        chat.add([Message("user", "x", id="b"), Message("user", "y", id="b")])
    assert chat.add([Message("user", "x", id="b"), Message("user", "y", id="b")], on_conflict="replace") == ["b", "b"]
    assert texts(chat.messages()) == texts(chat.messages(view="window")) == ["One", "y"]
    assert [e.seq for e in chat.entries.list()] == [1, 2]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_deleted_id_can_be_used_again(opened, indexed):
    """The new turn is everywhere the old one was, whether or not the index had seen the deletion by then."""
    with opened() as memory:
        memory.session("chat").add(Message("user", "Apricots", id="a"))
        memory.flush()
        if indexed:
            memory.session("chat").entries.delete("a")
            memory.flush()
    with opened(embedder="none") as memory:
        chat = memory.session("chat")
        if not indexed:
            chat.entries.delete("a")
        chat.add(Message("user", "Blueberries", id="a"))
        for view in ("all", "window"):
            assert texts(chat.messages(view=view)) == ["Blueberries"]
        assert found(chat.search("Blueberries")) == ["Blueberries"]
        assert chat.entries.get("a").version > 1
    memory = opened()
    memory.flush()
    assert index_keys(memory) == live_keys(memory) == {memory.session("chat").entries.get("a").key}


# -- windows


def test_replace_keeps_what_matches_and_everything_in_the_transcript(chat):
    """Matched by id, or by being equal and in order; what leaves the window stays in `all` and in search."""
    ids = chat.add([Message("user", f"Turn {n}", id=None if n < 2 else f"t{n}") for n in range(5)])
    chat.replace(["Turn 0", Message("user", "Turn 4", id="t4"), "Something new", Message("user", "Changed 3", id="t3")])
    assert [m.id for m in chat.messages(view="window")][:2] == [ids[0], "t4"]
    assert texts(chat.messages(view="window")) == ["Turn 0", "Turn 4", "Something new", "Changed 3"]
    assert texts(chat.messages()) == ["Turn 0", "Turn 1", "Turn 2", "Changed 3", "Turn 4", "Something new"]
    assert "Turn 1" in found(chat.search("Turn 1"))
    chat.add("Next")
    assert texts(chat.messages(view="window"))[-2:] == ["Changed 3", "Next"]
    chat.replace([])
    assert chat.messages(view="window") == []
    assert len(chat.messages()) == 7


def test_replace_knows_turns_again_that_come_in_order(chat):
    """A host that hands back a part of the prompt writes nothing twice; what comes after something new is new."""
    ids = chat.add(["One", "Two", "Three", "Four"])
    chat.replace(["Two", "Four"])
    assert [m.id for m in chat.messages(view="window")] == [ids[1], ids[3]]
    chat.replace(["Four", "Two"])
    assert chat.messages(view="window")[0].id == ids[3]
    assert texts(chat.messages()) == ["One", "Two", "Three", "Four", "Two"]


def test_replace_survives_reopening(opened):
    """The window's order is stored, not the transcript's."""
    with opened() as memory:
        memory.session("chat").add([Message("user", x, id=x) for x in "abc"])
        memory.session("chat").replace([Message("user", x, id=x) for x in "cda"])
    with opened() as memory:
        assert texts(memory.session("chat").messages(view="window")) == ["c", "d", "a"]


def test_clear_deletes_the_session_and_keeps_knowledge(opened):
    """Turns and summaries go from every view, search and Chroma; what was remembered stays, other sessions too."""
    memory = opened(pruning=SMALL)
    chat, other = memory.session("chat", user_id="ada"), memory.session("other", user_id="ada")
    chat.add([f"Tomatoes {n}" for n in range(6)])
    other.add("Tomatoes elsewhere")
    chat.remember("Ada grows tomatoes")
    memory.flush()
    chat.clear()
    assert chat.messages() == chat.messages(view="window") == []
    assert chat.summary() == ""
    assert sorted(found(chat.search("Tomatoes"))) == ["Ada grows tomatoes", "Tomatoes elsewhere"]
    assert [e.content for e in chat.entries.list()] == ["Tomatoes elsewhere", "Ada grows tomatoes"]
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    assert len(index_keys(memory)) == 2
    chat.add("Again")
    assert texts(chat.messages()) == texts(chat.messages(view="window")) == ["Again"]


# -- knowledge, updates, deletes


def test_knowledge_belongs_to_the_user(memory, chat):
    """Another session of the user finds it, gets it by id, and can delete it."""
    own = chat.remember("Ada is allergic to peanuts", tags=["health"], category="health/food", metadata={"sure": True})
    other = memory.session("another", user_id="ada")
    assert found(other.search("peanuts", filter={"category": "health", "sure": True, "tags": {"$contains": "health"}}))
    assert other.entries.get(own).type is MemoryType.LONG_TERM
    assert other.messages() == []
    assert other.entries.delete(own) == 1
    with pytest.raises(NotFound):
        chat.entries.get(own)


def test_expired_knowledge_is_found_no_more(opened):
    """By the memory's own clock."""
    clock = ManualClock()
    chat = opened(clock=clock).session("chat")
    chat.remember("The code is 4711", expires_at=clock() + timedelta(hours=1))
    assert found(chat.search("code"))
    clock.advance(hours=2)
    assert chat.search("code") == []


def test_an_update_is_found_by_its_new_words_only(chat, memory):
    """Content, window, transcript, version and index change together; what hosts kept of the old text goes."""
    chat.add(Message("user", "Apricots", id="a", payload={"old": "Apricots"}))
    memory.flush()
    new = chat.entries.update("a", content="Blueberries", tags=["fruit"], importance=0.9, metadata={"n": 1})
    assert (new.version, new.tags, new.importance, new.metadata) == (2, ("fruit",), 0.9, {"n": 1})
    assert new == chat.entries.get("a")
    for view in ("all", "window"):
        assert [(m.content, m.payload) for m in chat.messages(view=view)] == [("Blueberries", None)]
    memory.flush()
    assert all(h.score < 0.5 for h in chat.search("Apricots"))
    assert index_keys(memory) == live_keys(memory)
    stored = memory._core.parts.store._collection.get(include=["documents"])["documents"]
    assert stored == ["Blueberries"]


def test_an_update_that_leaves_the_text_embeds_nothing(opened):
    """Changing a tag is no reason to call the model."""
    embedder = CountingEmbedder()
    memory = opened(embedder=embedder)
    chat = memory.session("chat")
    chat.add(Message("user", "Apricots", id="a"))
    memory.flush()
    chat.entries.update("a", tags=["fruit"])
    memory.flush()
    assert embedder.texts == ["Apricots"]
    assert memory.stats()["vectors"] == 1


def test_deleted_is_gone_from_everywhere(chat, memory):
    """Search, views, RAM, Chroma, the file's tables, and the scores of its neighbours."""
    chat.add([Message("user", "Apricots ripen in July", id="keep"), "Pears are green"])
    memory.flush()
    alone = {h.entry.id: (h.score, h.signals) for h in chat.search("Apricots in July")}
    chat.add([Message("assistant", f"Apricots {n} July July", id=f"x{n}") for n in range(5)])
    memory.flush()
    chat.search("Apricots in July")
    assert chat.entries.delete([f"x{n}" for n in range(5)]) == 5
    assert {h.entry.id: (h.score, h.signals) for h in chat.search("Apricots in July")} == alone
    with pytest.raises(NotFound):
        chat.entries.get("x1")
    memory.flush()
    assert index_keys(memory) == live_keys(memory)
    with memory._core.parts.ledger._db.read() as db:
        names = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        dump = str([db.execute(f"SELECT * FROM {n}").fetchall() for n in names])
    assert "July July" not in dump


def test_delete_of_an_unknown_id_deletes_nothing(chat):
    """All ids are there, or none goes."""
    chat.add(Message("user", "One", id="a"))
    with pytest.raises(NotFound, match="nope"):
        chat.entries.delete(["a", "nope"])
    assert texts(chat.messages()) == ["One"]


def test_entries_are_listed_in_pages(chat):
    """limit and after walk through all of them once."""
    chat.add([Message("user", f"Turn {n}", id=f"t{n}") for n in range(7)])
    chat.remember("Knowledge")
    seen, after = [], None
    while page := chat.entries.list(limit=3, after=after):
        seen += page
        after = page[-1].key
    assert [e.id for e in seen] == [e.id for e in chat.entries.list()]
    assert len(seen) == 8
    assert (chat.entries.count(), chat.entries.count(within="user")) == (7, 8)
    assert chat.entries.count(filter={"content": {"$startswith": "Turn"}}, within="user") == 7
    assert chat.entries.delete(filter={"seq": {"$lte": 5}}) == 5
    assert texts(chat.messages()) == ["Turn 5", "Turn 6"]


@pytest.mark.parametrize("within", ["user", "session"])
@pytest.mark.parametrize("options", [{}, {"types": ["short_term"]}, {"filter": {"content": {"$contains": "1"}}}])
def test_pages_hold_every_entry_once(opened, within, options):
    """Whatever the size of the page, also where summaries stand among the entries."""
    memory = opened(pruning=SMALL)
    for name in ("before", "chat", "after"):
        chat = memory.session(name, user_id="ada")
        for n in range(9):
            chat.add(f"I bought item number {n} in Berlin for {n * 10} euros")
            memory.flush()
        chat.remember(f"Ada buys items in {name} 1")
    chat = memory.session("chat", user_id="ada")
    assert len(chat.entries.list(within="session", types=["episodic"])) >= 2
    whole = [e.key for e in chat.entries.list(within=within, **options)]
    assert len(whole) > (4 if within == "user" else 1)
    for size in (1, 3, len(whole)):
        paged, last = [], None
        while page := chat.entries.list(within=within, limit=size, after=last, **options):
            paged += [e.key for e in page]
            assert len(paged) <= len(whole), "an entry came twice"
            last = page[-1].key
        assert paged == whole
