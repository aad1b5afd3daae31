"""Search in a chat between a user and an assistant, with the default model: facts said in passing, instructions, updates, advice."""

from datetime import timedelta

import assistant_chat
import pytest

from neuralflow_memory import Message, open_memory

MOST_MISSED = 1  # of 34: other processors round otherwise


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """The whole chat, a session a day; asked half a year after it began."""
    folder = tmp_path_factory.mktemp("assistant") / "memory"
    with open_memory(folder, clock=lambda: assistant_chat.when(180)) as memory:
        for day, said, answer in assistant_chat.TURNS:
            at = assistant_chat.when(day)
            memory.session(f"day-{day}", user_id="são").add(
                [
                    Message("user", said, created_at=at),
                    Message("assistant", answer, created_at=at + timedelta(seconds=20)),
                ]
            )
        memory.flush()
        yield memory


def test_what_was_said_is_among_the_first_hits(chats):
    """By whoever it was said, however long ago, and in whatever words it is asked for."""
    ask = chats.session("now", user_id="são").search
    missed = {
        (question, wanted)
        for question, k, texts in assistant_chat.QUESTIONS
        for wanted in texts
        if not any(wanted in hit.entry.content for hit in ask(question, k=k))
    }
    assert len(missed) <= MOST_MISSED, missed


def test_a_prompt_of_1500_tokens_holds_what_answers(chats):
    """Also of long answers, of which the sentences that say most are quoted."""
    missed = set()
    for question, _, texts in assistant_chat.QUESTIONS:
        made = chats.session("now", user_id="são").context(question, max_tokens=1500)
        prompt = " ".join(" ".join(m.text.split()) for m in made.messages)
        assert made.tokens <= 1500
        missed |= {(question, wanted) for wanted in texts if wanted not in prompt}
    assert len(missed) <= MOST_MISSED, missed


def test_instructions_and_preferences_are_wishes(chats):
    """What the user wants from now on stands above other turns of the same meaning, and says so among its signals."""
    hits = chats.session("now", user_id="são").search("How should you answer me?", k=3)
    instructed = [hit for hit in hits if "always answer in short bullet points" in hit.entry.content]
    assert instructed
    assert instructed[0].signals["wish"] > 0
