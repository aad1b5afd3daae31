"""Options do what their descriptions say: those that no other test shows at work."""

import pytest
from conftest import SMALL, texts

from neuralflow_memory import ConfigError, Message


class Recorder:
    """A summarizer that keeps what it was asked: a summary of turns, or one of segments."""

    name = "recorder"

    def __init__(self):
        self.segments, self.limits = [], {"turns": set(), "segments": set()}

    def summarize(self, messages, *, previous, max_tokens):
        turns = messages[0].metadata.get("kind") != "segment"
        self.segments += [texts(messages)] if turns else []
        self.limits["turns" if turns else "segments"].add(max_tokens)
        return "They spoke."


def told(opened, **options):
    """What a summarizer is asked when eleven turns are folded at once."""
    recorder = Recorder()
    memory = opened(embedder="none", summarizer=recorder, pruning={"summarization_threshold": 100}, **options)
    chat = memory.session("chat")
    chat.add([f"Turn {n}: " + "we spoke of sailing and of tomatoes " * 8 for n in range(12)])
    chat.compact(max_tokens=10)
    return recorder


def test_the_summarizer_is_given_its_limit(opened):
    """The smaller of `pruning.summary_max_tokens` and three quarters of `budget.summary`; half of it for a segment."""
    limits = {}
    for given, options in {
        "by pruning": {"pruning": {**SMALL, "summary_max_tokens": 123}},
        "by budget": {"pruning": SMALL, "budget": {"summary": 200}},
    }.items():
        recorder = Recorder()
        with opened(embedder="none", summarizer=recorder, **options) as memory:
            chat = memory.session(given)
            for n in range(12):  # five segments, and a summary of them
                chat.add(f"Turn {n}")
                memory.flush()
        limits[given] = recorder.limits
    assert limits == {
        "by pruning": {"segments": {123}, "turns": {61}},
        "by budget": {"segments": {150}, "turns": {75}},
    }


def test_long_folds_are_summarized_in_segments(opened):
    """`context.max_context_length` bounds what a call reads; `context_overlap` repeats whole messages."""
    whole = told(opened, context={"max_context_length": 4096, "context_overlap": 0})
    assert [len(s) for s in whole.segments] == [11]


@pytest.mark.parametrize(("overlap", "shared"), [(0, 0), (128, 1)])
def test_segments_share_what_the_overlap_allows(opened, overlap, shared):
    """No turn is left out, and neighbours share as many whole messages as fit the overlap."""
    cut = told(opened, context={"max_context_length": 256, "context_overlap": overlap})
    assert len(cut.segments) > 2
    assert len({text for segment in cut.segments for text in segment}) == 11
    for before, after in zip(cut.segments, cut.segments[1:], strict=False):
        assert sum(text in before for text in after) == shared


def test_an_overlap_as_long_as_a_segment_is_refused(opened):
    """It would never end."""
    with pytest.raises(ConfigError, match="context_overlap"):
        opened(embedder="none", context={"max_context_length": 300, "context_overlap": 300})


def test_hits_keep_their_share_when_turns_would_fill_the_prompt(opened):
    """A greater `budget.hits_share` brings more hits, and the oldest verbatim turns yield."""
    quoted, turns = {}, {}
    for share in (0.0, 0.5):
        pruning = {"summarization_threshold": 100}
        budget = {"hits_share": share, "conversation": 8000}  # so that turns alone could fill it
        with opened(embedder="none", pruning=pruning, budget=budget) as memory:
            earlier = memory.session(f"earlier {share}", user_id=f"ada {share}")
            earlier.add([f"The sailing boat number {n} lies in Genoa, and its sails are red" for n in range(12)])
            chat = memory.session("now", user_id=f"ada {share}")
            for n in range(40):
                chat.add([Message("user", f"Turn {n} " + "of tomatoes and soup " * 3), Message("assistant", "Fine.")])
            context = chat.context("the sailing boat in Genoa", max_tokens=600)
        included = [c for c in context.report if c.included]
        quoted[share] = sum(c.part == "hit" for c in included)
        turns[share] = sum(c.part == "turn" for c in included)
    assert quoted[0.5] > quoted[0.0]
    assert turns[0.5] < turns[0.0]
