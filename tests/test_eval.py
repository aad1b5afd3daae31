"""`neuralflow-memory eval`: what search finds of labelled questions, measured on one's own chats."""

import json
import math

import pytest
from typer.testing import CliRunner

from neuralflow_memory.cli import app
from neuralflow_memory.cli.evaluating import Answered, _fused
from neuralflow_memory.cli.formats import Asked, read_locomo_questions
from neuralflow_memory.rules.measures import averaged, measures

TURNS = [
    ("monday", "user", "m1", "The beans go by the south wall."),
    ("monday", "assistant", "m2", "And the tomatoes, by the shed?"),
    ("tuesday", "user", "t1", "The oven door is loose again."),
    ("tuesday", "assistant", "t2", "Call the landlord about the oven."),
]
QUESTIONS = [
    {"question": "Where do the beans go?", "evidence": ["m1"], "user_id": "ada", "category": "fact"},
    {"question": "What is wrong with the oven, and who helps?", "evidence": ["t1", "t2"], "user_id": "ada"},
]


@pytest.fixture
def file(tmp_path):
    lines = [
        {"user_id": "ada", "session_id": s, "role": role, "id": own, "content": text} for s, role, own, text in TURNS
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [*lines, *QUESTIONS]))
    return path


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args, code=0):
        result = CliRunner().invoke(app, ["eval", *map(str, args)])
        assert result.exit_code == code, result.output
        return result

    return call


def test_each_question_is_asked_of_each_ranking(run, file):
    """With the place of each piece of evidence; the chats leave no memory behind."""
    found = json.loads(run(file, "--json").stdout)
    assert list(found) == [
        "this memory",
        "plain dense",
        "plain BM25",
        "dense and BM25 by reciprocal rank",
        "dense and BM25, weighted",
    ]
    ours = found["this memory"]
    assert [q["question"] for q in ours["questions"]] == [q["question"] for q in QUESTIONS]
    assert ours["questions"][0]["ranks"] == [1]
    assert sorted(ours["questions"][1]["ranks"]) == [1, 2]
    assert ours["R@10"] == 1.0
    assert ours["R@1"] == 0.75
    assert ours["questions"][0]["category"] == "fact"
    assert ours["ms"] > 0
    assert found["plain dense"]["R@10"] == 1.0  # no signal: the words still say what is relevant at all


def test_two_rankings_are_fused_by_reciprocal_rank():
    """What both have found comes before what only one has; ties as they come; costs and times go along."""
    asked = Asked("Where?", ("c",), user_id=None, session_id="s", category=None)
    one = Answered(asked, {"a": 5, "b": 6, "c": 7}, 1.0)
    other = Answered(asked, {"c": 7, "d": 8}, 2.0)
    fused = _fused(one, other)
    assert fused.hits == {"c": 7, "a": 5, "b": 6, "d": 8}
    assert fused.ranks == (1,)
    assert fused.milliseconds == 3.0


def test_another_policy_is_compared_question_by_question(run, file):
    """What it would gain and lose, on the same chats."""
    shown = run(file, "--set", "ranking.lexical=0", "--set", "ranking.around=0", "--set", "ranking.user=9").stdout
    assert "ranking.lexical=0, ranking.around=0, ranking.user=9" in shown
    assert "R@10: 0 questions gain, 0 lose" in shown
    assert "2 questions" in shown
    assert "█" in shown


def test_questions_may_stay_in_their_session(run, file, tmp_path):
    """Where no user is named, the session is whose memory is meant."""
    own = tmp_path / "own.jsonl"
    lines = [{"session_id": "s", "role": "user", "id": f"x{n}", "content": f"Word {n} of many"} for n in range(3)]
    own.write_text("\n".join(map(json.dumps, [*lines, {"question": "word 1?", "evidence": ["x1"], "session_id": "s"}])))
    assert json.loads(run(own, "--json").stdout)["this memory"]["questions"][0]["ranks"] == [1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"question": "x"}, "evidence is missing"),
        ({"question": "x", "evidence": []}, "evidence must be a list of ids"),
        ({"question": "x", "evidence": ["a"], "k": 3}, "'k' is not a field"),
        ({"question": 5, "evidence": ["a"]}, "question must be text"),
    ],
)
def test_a_wrong_question_is_named_by_its_line(run, file, line, problem):
    """As a wrong message is."""
    file.write_text(file.read_text() + "\n" + json.dumps(line))
    assert f"line 7: {problem}" in run(file, code=1).stderr


def test_wrong_policies_are_named(run, file):
    """An option that is none, and what is no option at all."""
    assert "did you mean 'speaker'" in run(file, "--set", "ranking.speakers=2", code=1).stderr
    assert "OPTION=VALUE" in run(file, "--set", "speaker", code=2).output


def test_a_file_without_questions_says_so(run, file):
    """It is for import."""
    file.write_text("\n".join(file.read_text().splitlines()[:4]))
    assert "no questions with evidence" in run(file, code=1).stderr


def test_questions_do_not_disturb_import(file, tmp_path, monkeypatch):
    """The same file may be imported."""
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")
    done = CliRunner().invoke(app, ["import", str(file), "--path", str(tmp_path / "memory"), "--json"])
    assert json.loads(done.stdout)["messages"] == 4


def test_locomo_questions_name_turns_that_are_there(tmp_path):
    """Evidence in any spelling; without turns, or of those without an answer, there is nothing to measure."""
    turns = [{"speaker": "Ada", "dia_id": f"D1:{n}", "text": "x"} for n in range(1, 4)]
    qa = [
        {"question": "a", "category": 1, "evidence": ["D1:1", "D1:3; D1:1"]},
        {"question": "b", "category": 4, "evidence": ["D9:9"]},
        {"question": "c", "category": 5, "evidence": ["D1:1"]},
        {"question": "d", "category": 2},
    ]
    conversation = {"session_1": turns, "session_1_date_time": "1:00 pm on 8 May, 2023"}
    path = tmp_path / "locomo.json"
    path.write_text(json.dumps([{"sample_id": "conv", "conversation": conversation, "qa": qa}]))
    (asked,) = read_locomo_questions(path)
    assert (asked.question, asked.evidence, asked.user_id) == ("a", ("conv/D1:1", "conv/D1:3"), "conv")


def test_measures_by_hand():
    """Shares among the first k and within a budget, and the gain that fades with the rank."""
    ranked = [f"e{n}" for n in range(30)]
    found = measures(ranked, ["e0", "e6", "e25", "elsewhere"], tokens=[100] * 30)
    assert [found[f"R@{k}"] for k in (1, 5, 10, 20)] == [0.25, 0.25, 0.5, 0.5]
    assert (found["R@500t"], found["R@1000t"]) == (0.25, 0.5)
    ideal = sum(1 / math.log2(n + 2) for n in range(4))
    assert found["NDCG@10"] == pytest.approx((1 + 1 / math.log2(8)) / ideal)
    assert averaged([{"R@1": 1.0}, {"R@1": 0.0}]) == {"R@1": 0.5}
    assert measures([], ["a"], tokens=[])["R@10"] == 0
