"""The demo: its chat is sound, and playing it proves what it claims."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from neuralflow_memory import open_memory
from neuralflow_memory.cli import app
from neuralflow_memory.cli.demo_chat import Question, bundled_chat
from neuralflow_memory.cli.demo_questions import Answer, lost, scripted_answer
from neuralflow_memory.types import Context, Message


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
    assert "Nothing" in scripted_answer(answer([]))


def test_the_scripted_model_quotes_the_evidence_and_its_rank(chat):
    """Whatever stands first: the turns that hold the answer are quoted, each with the rank that it was found at."""
    chat.add(["The oven door sticks.", "The oven door is green.", "The oven door is mended."])
    hits = tuple(chat.search("oven door"))
    assert len(hits) == 3

    def said(*found, evidence):
        return scripted_answer(Answer(Question("?", evidence), hits, found, Context((), 0, 0, ())))

    both = said("x", "a", "b", evidence=("a", "b"))
    assert re.search(r"^hit 2, you said on .*; hit 3, you said on ", both)
    assert hits[0].entry.content not in both
    assert said("x", "y", "z", evidence=("a",)).startswith("No hit holds the answer; the best is hit 1, ")


def refused(folder):
    result = CliRunner().invoke(app, ["demo", "--path", str(folder)])
    assert result.exit_code == 1
    assert "not empty" in result.stderr
    return result.stderr


def test_the_demo_refuses_a_folder_that_is_not_empty(tmp_path):
    """A kept memory is never played over."""
    (tmp_path / "note.txt").write_text("mine")
    refused(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["note.txt"]


def test_the_demo_says_when_a_folder_holds_a_demo(folder):
    """One that was broken off is told apart from one that is whole, and from a memory of someone's own."""
    chat = bundled_chat()

    def play(sessions, *, user_id=chat.user_id):
        with open_memory(folder, embedder="none") as memory:
            for session in sessions:
                messages = [Message(turn.role, turn.text, id=turn.id) for turn in session.turns]
                memory.session(session.id, user_id=user_id).add(messages)

    play(chat.sessions[:2])
    turns = sum(len(session.turns) for session in chat.sessions)
    assert f"broken off after 40 of {turns} turns; delete that folder" in refused(folder)
    play(chat.sessions[2:])
    assert "played to its end" in refused(folder)
    play(chat.sessions[:1], user_id="ada")
    assert "demo that was" not in refused(folder)


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
    shown = " ".join(run.stdout.split())
    assert f"For {count} of {count} questions, every turn that holds the answer was found." in shown
    assert shown.count("statement 0.") == 3, "the parts of a score are shown for the first question only"
    assert shown.count("dense = meaning") == 1
    assert "Why can't uncle Farid go upstairs? scripted model: hit 1, you said on 14 March:" in shown
    assert "hit 1, you said on 25 July: “The rent is 820 euros" in shown
    assert "turns found, 3 shown" in shown
    assert "LangChain then LlamaIndex" in run.stdout
    assert "scripted model" in run.stdout
    folds = [int(n) for n in re.findall(r"(\d+) folds", run.stdout)]
    assert len(folds) == len(bundled_chat().sessions)
    assert sum(folds) > 0
    assert "140 of 140 turns stand in the transcript" in run.stdout
    assert "Warning" not in run.stderr
    found = CliRunner().invoke(app, ["search", "whose sofa", "--user", "nadia", "--path", str(memory)])
    assert "Ines" in found.stdout
