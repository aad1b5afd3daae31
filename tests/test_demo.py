"""The demo: its chat is sound, and playing it proves what it claims."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from neuralflow_memory.cli import app
from neuralflow_memory.cli.demo_chat import Question, bundled_chat
from neuralflow_memory.cli.demo_questions import Answer, lost, scripted_answer
from neuralflow_memory.types import Context


def test_the_chat_is_long_and_alternates():
    """At least 120 turns over some months; user and assistant take turns; dates only go forward."""
    chat = bundled_chat()
    turns = [turn for session in chat.sessions for turn in session.turns]
    assert len(turns) >= 120
    assert len(chat.sessions) >= 6
    assert (turns[-1].at - turns[0].at).days > 90
    assert [t.at for t in turns] == sorted(t.at for t in turns)
    assert chat.asked > turns[-1].at
    for session in chat.sessions:
        assert [t.role for t in session.turns] == ["user", "assistant"] * (len(session.turns) // 2)


def test_turns_can_be_told_apart():
    """Ids and texts are unique, so that a hit is evidence or is not."""
    turns = [turn for session in bundled_chat().sessions for turn in session.turns]
    assert len({t.id for t in turns}) == len({t.text for t in turns}) == len(turns)


def test_every_question_has_evidence_sessions_back():
    """At least eight questions; their evidence exists, and they are asked long after."""
    chat = bundled_chat()
    turns = {turn.id: turn for session in chat.sessions for turn in session.turns}
    assert len(chat.questions) >= 8
    assert len({q.text for q in chat.questions}) == len(chat.questions)
    for question in chat.questions:
        assert question.evidence
        assert set(question.evidence) <= set(turns)
        assert all((chat.asked - turns[e].at).days > 14 for e in question.evidence)
    sessions = Counter(e.rsplit("-", 1)[0] for q in chat.questions for e in q.evidence)
    assert set(sessions) == {s.id for s in chat.sessions}


def answer(found, *, evidence=("a",)):
    return Answer(Question("where?", evidence), (), tuple(found), Context((), 0, 0, ()))


def test_an_answer_is_complete_only_with_all_of_its_evidence():
    """One turn of two found is not enough."""
    assert answer(["x", "b", "a"], evidence=("a", "b")).complete
    assert not answer(["x", "b"], evidence=("a", "b")).complete


def test_a_question_that_finds_other_turns_is_reported():
    """The comparison after reopening can fail."""
    assert lost([answer("abc")], [answer("cab")]) == []
    assert lost([answer("abc")], [answer("abd")]) == ["where?"]


def test_the_scripted_model_admits_finding_nothing():
    """Without a hit there is nothing to quote."""
    assert "Nothing" in scripted_answer([])


def test_the_demo_refuses_a_folder_that_is_not_empty(tmp_path):
    """A kept memory is never played over."""
    (tmp_path / "note.txt").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--path", str(tmp_path)])
    assert result.exit_code == 1
    assert "not empty" in result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(("library", "extra"), [("langchain_classic", "langchain"), ("llama_index", "llama-index")])
def test_the_demo_says_which_host_is_missing(library, extra, tmp_path):
    """Without one of the hosts it tells how to install it, before anything is played."""
    code = f"import sys; sys.modules[{library!r}] = None; from neuralflow_memory.cli import main; main()"
    command = [sys.executable, "-c", code, "demo", "--path", str(tmp_path / "memory")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert f"pip install 'neuralflow-memory[{extra}]'" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "memory").exists()


@pytest.mark.slow
def test_the_demo_finds_all_evidence_and_keeps_the_memory(tmp_path):
    """As a user runs it: both hosts play, the budget folds, and every question's evidence is found, twice."""
    memory = tmp_path / "memory"
    command = [sys.executable, "-m", "neuralflow_memory.cli", "demo", "--fast", "--path", str(memory)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    count = len(bundled_chat().questions)
    assert f"{count} of {count} questions found all of their evidence" in run.stdout
    assert "LangChain then LlamaIndex" in run.stdout
    assert "scripted model" in run.stdout
    folds = [int(n) for n in re.findall(r"(\d+) folds", run.stdout)]
    assert len(folds) == len(bundled_chat().sessions)
    assert sum(folds) > 0
    assert "140 of 140 turns stand in the transcript" in run.stdout
    assert "Warning" not in run.stderr
    found = CliRunner().invoke(app, ["search", "whose sofa", "--user", "nadia", "--path", str(memory)])
    assert "Ines" in found.stdout
