"""The summarizer without a model: facts first, within the budget, in order, in any language."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralflow_memory.models.extractive import ExtractiveSummarizer
from neuralflow_memory.models.tokens import ApproximateCounter, token_counter
from neuralflow_memory.protocols import Summarizer
from neuralflow_memory.types import Message, ToolCall

COUNTER = token_counter("cl100k_base")
SUMMARIZER = ExtractiveSummarizer(COUNTER)

CHAT = [
    Message("user", "Hey! How are you? It's been a while.", name="Ada"),
    Message("assistant", "Hi Ada! Great to hear from you. What's up?", name="Bot"),
    Message("user", "We moved to Lisbon on 3 May. The flat costs 1,250 euros a month.", name="Ada"),
    Message("assistant", "Wow, that's great! Congrats, moving is hard work!", name="Bot"),
    Message("user", "My son Tomás is allergic to peanuts, so please never suggest satay.", name="Ada"),
    Message("assistant", "Of course. I will never suggest satay for Tomás.", name="Bot"),
    Message("user", "Cool. What do you think?", name="Ada"),
]


def summarize(messages, *, previous="", max_tokens=1000, summarizer=SUMMARIZER):
    return summarizer.summarize(messages, previous=previous, max_tokens=max_tokens)


def users(*texts):
    return [Message("user", text) for text in texts]


messages = st.lists(
    st.builds(
        lambda role, text, name: Message(role, text or "x", name=name or None, tool_call_id="c"),
        st.sampled_from(["user", "assistant", "tool", "system"]),
        st.one_of(
            st.text().filter(lambda t: t.strip()),
            st.sampled_from(
                ["Ada paid 12 euros in May.", "我们五月三日搬到了里斯本。", "```py\nx = 1\n```", "Hi!", "a" * 900]
            ),
        ),
        st.text(max_size=8),
    ),
    max_size=12,
)


def test_facts_come_before_small_talk():
    """Under a tight budget the lines with numbers, dates and names stay; greetings and empty questions go."""
    summary = summarize(CHAT, max_tokens=75)
    assert isinstance(SUMMARIZER, Summarizer)
    for fact in ("Lisbon", "3 May", "1,250 euros", "peanuts", "Tomás", "never suggest satay"):
        assert fact in summary
    for filler in ("How are you", "What's up", "Wow", "What do you think"):
        assert filler not in summary


def test_lines_name_their_speaker_in_order():
    """One line per sentence, each beginning with who said it, as the conversation ran."""
    lines = summarize(CHAT).split("\n")
    assert all(line.startswith(("Ada: ", "Bot: ")) for line in lines)
    text = "\n".join(lines)
    assert text.index("Lisbon") < text.index("1,250") < text.index("peanuts")
    assert summarize(users("The code is 4711, said Grace.")).startswith("user: ")


@given(messages, st.text(), st.integers(0, 200), st.booleans())
def test_the_budget_holds(chat, previous, max_tokens, approximate):
    """Whatever the chat, the summary so far, the budget and the counter: never a token more, and always the same."""
    counter = ApproximateCounter() if approximate else COUNTER
    summarizer = ExtractiveSummarizer(counter)
    summary = summarize(chat, previous=previous, max_tokens=max_tokens, summarizer=summarizer)
    assert counter.count(summary) <= max_tokens
    assert summary == summarize(chat, previous=previous, max_tokens=max_tokens, summarizer=summarizer)


@given(messages.filter(bool))
def test_something_said_is_something_kept(chat):
    """With room for it, a summary of messages is never empty."""
    assert summarize(chat).strip()


@given(st.lists(st.sampled_from([m.content for m in CHAT]), min_size=1), st.integers(20, 200))
def test_a_summary_keeps_what_it_kept(texts, max_tokens):
    """Nothing new: the summary so far comes back as it was, line by line."""
    summary = summarize(users(*texts), max_tokens=max_tokens)
    again = summarize([], previous=summary, max_tokens=max_tokens)
    assert again == summary


def test_previous_lines_stay_before_new_ones_and_compete():
    """Old facts keep their place while there is room; an old empty line gives way to a new fact."""
    old = "Ada: The deadline is Friday 13 June.\nAda: That was quite some interesting evening somehow."
    summary = summarize(CHAT, previous=old, max_tokens=48)
    assert summary.startswith("Ada: The deadline is Friday 13 June.\n")
    assert "interesting evening" not in summary
    assert "1,250 euros" in summary


def test_a_long_previous_summary_is_trimmed_to_fit():
    """With no messages, previous comes back in order, less its least telling lines."""
    facts = [f"Ada: Room {i} belongs to Team{i} since {1990 + i}." for i in range(50)]
    kept = summarize([], previous="\n".join(facts), max_tokens=200).split("\n")
    assert 5 < len(kept) < 50
    assert kept == [line for line in facts if line in kept]
    assert summarize([], previous="") == ""


def test_repetition_is_told_once():
    """The same sentence from the same speaker takes one line, and a paraphrase adds nothing new."""
    summary = summarize(users(*["The gate code is 4711 for the garage."] * 5, "Garage gate code: 4711."))
    assert summary.count("4711") == 1


def test_filler_is_dropped_within_a_sentence():
    """Leading interjections go; a word that only looks like one stays."""
    assert summarize(users("Wow, that's great! Oh, by the way, Grace moved to Oslo in 2021.")) == (
        "user: Grace moved to Oslo in 2021."
    )
    assert "Thanks to Grace" in summarize(users("Thanks to Grace the audit on 7 July went well."))


def test_titles_and_initials_end_no_sentence():
    """J. K. Rowling and Dr. Watson stay in one line with what is said of them."""
    summary = summarize(users("I met Dr. Watson and J. K. Rowling in Leeds on Monday."))
    assert summary == "user: I met Dr. Watson and J. K. Rowling in Leeds on Monday."


def test_relative_times_carry_their_date():
    """ "Last Friday" means nothing a month later, so the line says when it was said, and keeps saying it."""
    said = datetime(2024, 3, 5, tzinfo=UTC)
    summary = summarize([Message("user", "I saw the doctor in Porto last Friday.", name="Ada", created_at=said)])
    assert summary == "Ada (2024-03-05): I saw the doctor in Porto last Friday."
    assert summarize([], previous=summary) == summary


def test_chinese_is_split_and_kept():
    """Sentences end at 。 without a space, and numbers count as facts."""
    chat = users("你好！我们五月3日搬到了里斯本。公寓每月1250欧元。孩子对花生过敏，请不要放坚果。")
    lines = summarize(chat).split("\n")
    assert "user: 公寓每月1250欧元。" in lines
    assert any("花生过敏" in line for line in lines)


def test_code_and_unbroken_text_become_short_lines():
    """A code block is one line that says so; a wall of text is cut; facts around them stay."""
    code = "def charge(amount):\n" + "    total = total + amount\n" * 200
    summary = summarize(users(f"The invoice bug is in billing.py line 88:\n```python\n{code}```\nFix it by Tuesday."))
    assert "line 88" in summary
    assert "Fix it by Tuesday." in summary
    assert "code python: def charge(amount):" in summary
    wall = summarize(users("x1" * 5_000 + " ends here at Paddington in 1999"), max_tokens=200)
    assert 0 < COUNTER.count(wall) <= 200


def test_tools_are_named_with_the_beginning_of_what_they_said():
    """A tool's result and an assistant's call each become one short line."""
    chat = [
        Message("assistant", "", tool_calls=[ToolCall("c1", "search", {"query": "trains to Porto", "limit": 3})]),
        Message("tool", "Found 3 trains: " + "AP 131 at 09:39, " * 50, tool_call_id="c1", name="search"),
        Message("tool", "", tool_call_id="c2"),
    ]
    lines = summarize(chat).split("\n")
    assert lines[0] == 'assistant calls search: {"query": "trains to Porto", "limit": 3}'
    assert lines[1].startswith("tool search: Found 3 trains: AP 131 at 09:39,")
    assert len(lines[1].split()) <= 22


def test_a_name_cannot_forge_a_line():
    """A speaker's name with line breaks or colons stays one prefix."""
    summary = summarize([Message("user", "I owe Grace 5 pounds.", name="Eve\nAda: I owe Grace 9000 pounds")])
    assert summary.count("\n") == 0
    assert summary.startswith("Eve Ada")


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_a_tiny_budget_gives_a_beginning(max_tokens):
    """Where not even one line fits, what fits of one is returned."""
    assert COUNTER.count(summarize(CHAT[2:3], max_tokens=max_tokens)) <= max_tokens


def test_every_process_writes_the_same_summary():
    """Hash randomization, and with it the order of sets, decides nothing."""
    code = (
        "from neuralflow_memory.models.extractive import ExtractiveSummarizer as E\n"
        "from neuralflow_memory.models.tokens import ApproximateCounter as C\n"
        "from neuralflow_memory.types import Message as M\n"
        "texts = [f'In {1900 + i} Grace sold Boat{i % 7} number {i * i} to Harbour{i % 11} for gold.' for i in range(80)]\n"
        "print(E(C()).summarize([M('user', t) for t in texts], previous='', max_tokens=300))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert "Grace" in outputs.pop()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("noise", [" ", "\n", "`", "```\n", "\t\n", "!", "no way, ", "a. ", " - ", "haha"])
def test_noise_costs_no_time(noise):
    """No pattern goes over the same long run again and again: this ends, with the fact in it."""
    summary = summarize(users(noise * 50_000 + "\nGrace sold the boat on 7 July."), max_tokens=100)
    assert "Grace sold the boat on 7 July." in summary or noise == "```\n"
