"""Scopes do not leak: another's text can't come back, nor influence a ranking, whatever is asked."""

import random

import pytest
from conftest import found, index_keys, live_keys, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralflow_memory import AccessDenied, MemoryType, Message, NotFound, ScopeError, open_memory
from neuralflow_memory.testing import HashingEmbedder, ManualClock

WORDS = ["sailing", "tomato", "invoice", "Berlin", "grandmother", "train", "blue", "Tuesday", "recipe", "hotel"]


def sentences(seed, count):
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=rng.randint(3, 12)))} {n}" for n in range(count)]


OTHERS = [
    {"user_id": "bob"},
    {"user_id": None},
    {"user_id": "ada", "tenant": "other"},
    {"user_id": "chat"},
    {"user_id": None, "tenant": "ada"},
    {"user_id": "ADA"},
    {"user_id": "ada "},
    {"user_id": '","ada'},
]


@pytest.mark.parametrize("embedder", [HashingEmbedder(), "none"], ids=["vectors", "words"])
def test_scores_are_equal_with_and_without_other_users(tmp_path, embedder):
    """Hits, scores and every signal are the same to the last digit, whoever else is in the folder."""
    questions = ["sailing in Berlin", "tomato recipe", "grandmother Tuesday", "hotel 3", "unheard word blue"]

    def answers(folder, *, crowded):
        # Folds come when the machine has time for them, so there are none here, and the clock stands still.
        unfolded = {"summarization_threshold": 1000}
        with open_memory(folder, embedder=embedder, clock=ManualClock(), pruning=unfolded) as memory:
            chat = memory.session("chat", user_id="ada")
            for n, text in enumerate(sentences(1, 40)):
                if crowded:
                    for other in OTHERS:
                        memory.session("chat", **other).add(sentences(f"{n}{other}", 3))
                        memory.session("chat", **other).remember(f"blue {text}")
                chat.add(Message("user", text, id=str(n)))
            memory.flush()
            found = [
                [(h.entry.id, h.score, dict(h.signals)) for h in chat.search(q, k=50, within=w)]
                for q in questions
                for w in ("user", "session")
            ]
            context = chat.context("sailing blue", max_tokens=700)
            return found, [m.content for m in context.messages], context.tokens

    assert answers(tmp_path / "alone", crowded=False) == answers(tmp_path / "crowded", crowded=True)


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_nothing_of_another_owner_comes_back(memory, other):
    """Not by search, filter, id, key, page, update, delete or clear."""
    ada, stranger = memory.session("chat", user_id="ada"), memory.session("chat", **other)
    ada.add(Message("user", "The secret is sailing", id="a", metadata={"n": 1}))
    knowledge = ada.remember("Secret knowledge of sailing")
    keys = [e.key for e in ada.entries.list()]
    memory.flush()
    assert stranger.messages() == stranger.messages(view="window") == stranger.entries.list() == []
    assert stranger.search("secret sailing", k=100) == []
    assert stranger.search("secret", filter={"user_id": "ada"}, types=list(MemoryType)) == []
    assert stranger.context("secret sailing").messages == ()
    assert stranger.entries.count(within="user") == stranger.entries.delete(filter={"metadata.n": 1}) == 0
    for own in ("a", knowledge, *keys):
        for call in (
            lambda own=own: stranger.entries.get(own),
            lambda own=own: stranger.entries.update(own, content="x"),
            lambda own=own: stranger.entries.delete(own),
            lambda own=own: stranger.entries.list(after=own),
        ):
            with pytest.raises(NotFound):
                call()
    stranger.add(Message("user", "My own words", id="a"))
    stranger.replace([])
    stranger.clear()
    assert texts(ada.messages()) == ["The secret is sailing"]
    assert len(ada.search("secret sailing")) == 2


def test_the_same_id_in_two_sessions_is_two_turns(memory):
    """Ids are unique in their session; a key addresses one entry from any session of the user."""
    one, two = memory.session("one", user_id="ada"), memory.session("two", user_id="ada")
    one.add(Message("user", "First", id="a"))
    two.add(Message("user", "Second", id="a"))
    assert (one.entries.get("a").content, two.entries.get("a").content) == ("First", "Second")
    assert two.entries.get(one.entries.get("a").key).content == "First"
    assert one.entries.get("a").key != two.entries.get("a").key
    two.entries.delete(one.entries.get("a").key)
    assert one.messages() == one.messages(view="window") == []
    assert texts(two.messages()) == ["Second"]


def test_an_id_that_looks_like_a_key_is_an_id_first(memory):
    """A turn whose id is another entry's key hides nothing and reaches nothing else."""
    ada = memory.session("one", user_id="ada")
    ada.add(Message("user", "First", id="a"))
    key = ada.entries.get("a").key
    ada.add(Message("user", "Second", id=key))
    assert ada.entries.get(key).content == "Second"


def test_within_says_how_far_search_looks(memory):
    """The user by default; one session; what one agent wrote, of this user only."""
    one = memory.session("one", user_id="ada", agent_id="bot")
    two = memory.session("two", user_id="ada", agent_id="other")
    bobs = memory.session("one", user_id="bob", agent_id="bot")
    for n, chat in enumerate((one, two, bobs)):
        chat.add(f"Sailing {n}")
    assert sorted(found(one.search("sailing"))) == sorted(found(one.search("sailing", within="user")))
    assert sorted(found(one.search("sailing"))) == ["Sailing 0", "Sailing 1"]
    assert found(one.search("sailing", within="session")) == ["Sailing 0"]
    assert found(one.search("sailing", within="agent")) == ["Sailing 0"]
    assert found(memory.session("new", user_id="ada", agent_id="bot").search("sailing", within="agent")) == [
        "Sailing 0"
    ]
    assert memory.session("new", user_id="ada").search("sailing", within="session") == []


def test_without_a_user_a_session_is_alone(memory):
    """Two userless chats share nothing, not even knowledge; within='user' and 'agent' say what is missing."""
    one, two = memory.session("one"), memory.session("two")
    one.add("Sailing")
    one.remember("Knowledge of sailing")
    assert two.search("sailing") == two.entries.list() == []
    assert len(one.search("sailing")) == 2
    with pytest.raises(ScopeError, match="user_id"):
        one.search("sailing", within="user")
    with pytest.raises(ScopeError, match="agent_id"):
        one.search("sailing", within="agent")


def test_filters_stay_in_their_scope(memory):
    """$or, $not and an empty filter widen the condition, never the scope."""
    ada, bob = memory.session("chat", user_id="ada"), memory.session("chat", user_id="bob")
    ada.add("Sailing")
    bob.add("Sailing too")
    for condition in ({}, {"$or": [{"user_id": "bob"}, {"role": "user"}]}, {"$not": {"user_id": "ada"}}):
        assert "Sailing too" not in found(ada.search("sailing", filter=condition))
        assert all(e.scope.user_id == "ada" for e in ada.entries.list(filter=condition))
    assert bob.entries.delete(filter={"$not": {"content": ""}}, within="user") == 1
    assert texts(ada.messages()) == ["Sailing"]


def test_bulk_deletion_stays_in_the_session_unless_told(memory):
    """A filter deletes here; within='user' everywhere of this user."""
    one, two = memory.session("one", user_id="ada"), memory.session("two", user_id="ada")
    one.add(["Sailing", "Tomatoes"])
    two.add("Sailing elsewhere")
    assert one.entries.delete(filter={"content": {"$contains": "Sailing"}}) == 1
    assert texts(two.messages()) == ["Sailing elsewhere"]
    assert one.entries.delete(filter={"role": "user"}, within="user") == 2
    assert two.messages() == two.messages(view="window") == []
    memory.flush()
    assert index_keys(memory) == live_keys(memory) == set()


def test_a_principal_may_touch_its_own_only(memory):
    """Every verb asks; nothing is read or written before."""
    memory.session("chat", user_id="ada").add(Message("user", "Mine", id="a"))
    chat = memory.session("chat", user_id="ada", principal="bob")
    calls = [
        lambda: chat.add("x"),
        chat.messages,
        chat.clear,
        lambda: chat.replace([]),
        lambda: chat.remember("x"),
        lambda: chat.search("mine"),
        chat.context,
        chat.compact,
        chat.summary,
        chat.entries.list,
        lambda: chat.entries.get("a"),
        lambda: chat.entries.update("a", content="x"),
        lambda: chat.entries.delete("a"),
        lambda: chat.entries.delete(filter={}),
        chat.entries.count,
    ]
    for call in calls:
        with pytest.raises(AccessDenied, match="bob"):
            call()
    own = memory.session("chat", user_id="ada", principal="ada")
    assert texts(own.messages()) == ["Mine"]


def test_a_policy_of_ones_own_is_asked(opened):
    """Read but not delete, say."""

    class ReadOnly:
        def allows(self, principal, action, scope):
            return action == "read" or principal == "admin"

    memory = opened(policy=ReadOnly())
    memory.session("chat", user_id="ada", principal="admin").add(Message("user", "Mine", id="a"))
    chat = memory.session("chat", user_id="ada")
    assert texts(chat.messages()) == ["Mine"]
    for call in (lambda: chat.add("x"), chat.clear, lambda: chat.entries.delete("a")):
        with pytest.raises(AccessDenied):
            call()


ids = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, st.none() | ids, ids), min_size=2, max_size=6, unique=True))
def test_no_two_scopes_share_anything(scopes):
    """Whatever characters ids are made of, each (tenant, user, session) has its own turns."""
    memory = SHARED()
    chats = [memory.session(session, user_id=user, tenant=tenant) for tenant, user, session in scopes]
    for n, chat in enumerate(chats):
        chat.clear()
        chat.add(Message("user", f"Turn {n}", id="same"))
    for n, chat in enumerate(chats):
        assert texts(chat.messages()) == [f"Turn {n}"]
        owner = (chat.scope.tenant, chat.scope.user_id)
        allowed = (
            {n} if owner[1] is None else {i for i, c in enumerate(chats) if (c.scope.tenant, c.scope.user_id) == owner}
        )
        assert {h.entry.content for h in chat.search("Turn", k=50)} == {f"Turn {i}" for i in allowed}
    for chat in chats:
        chat.clear()


@pytest.fixture(autouse=True, scope="module")
def _shared(tmp_path_factory):
    with open_memory(tmp_path_factory.mktemp("scopes") / "memory", embedder="none") as memory:
        global SHARED  # noqa: PLW0603 - Hypothesis runs many examples against one memory
        SHARED = lambda: memory
        yield
