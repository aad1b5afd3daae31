"""`neuralflow-memory fit`: weights from labelled chats, and what they are worth on others."""

import json
import random

import numpy as np
import pytest
from typer.testing import CliRunner

from neuralflow_memory.cli import app
from neuralflow_memory.config import Ranking
from neuralflow_memory.rules.fitting import Sample, loss, pruned, recall


def samples(count, *, seed=0, entries=80):
    """Questions whose evidence has a high second signal; the first is noise."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        signals = rng.random((entries, 3))
        evidence = rng.choice(entries, 2, replace=False)
        signals[evidence, 1] += 0.6
        found.append(Sample(signals, evidence))
    return found


def test_the_gradient_is_that_of_the_loss():
    """By finite differences."""
    given, start = samples(6), np.array([1.0, 0.2, 0.5])
    weights = np.array([0.7, 0.4, 0.6])
    options = {"start": start, "softness": 0.5, "pull": 0.01}
    _, gradient = loss(weights, given, **options)
    step = 1e-6
    for place in range(3):
        moved = [weights + sign * step * np.eye(3)[place] for sign in (1, -1)]
        slope = (loss(moved[0], given, **options)[0] - loss(moved[1], given, **options)[0]) / (2 * step)
        assert gradient[place] == pytest.approx(slope, abs=1e-4)


def test_going_down_the_loss_finds_more():
    """Weights that point at the evidence lose less, and have more of it among the first."""
    given = samples(30)
    start = np.array([1.0, 0.1, 1.0])
    better = np.array([0.1, 2.0, 0.1])
    options = {"start": start, "softness": 0.3, "pull": 0.0}
    assert loss(better, given, **options)[0] < loss(start, given, **options)[0]
    assert recall(given, better, depth=10) > recall(given, start, depth=10) + 0.2
    assert recall([], better, depth=10) == 0


def test_only_what_may_come_into_question_is_looked_at():
    """All of the evidence, however bad, and the best of the rest."""
    signals = np.linspace(0, 1, 1000)[:, None]
    few = pruned(Sample(signals, np.array([0, 5])), np.array([1.0]))
    assert few.signals[few.evidence, 0].tolist() == signals[[0, 5], 0].tolist()
    assert len(few.signals) == 152
    assert few.signals[2:, 0].min() > 0.8


@pytest.fixture
def file(tmp_path):
    """Chats in which the assistant repeats every question at length, and the user's few words hold the answer."""
    rng = random.Random(3)
    things = ["boat", "garden", "kitchen", "bicycle", "piano", "violin", "cellar", "window", "teapot", "ladder"]
    lines = []
    for user in ("ada", "bob", "eve"):
        for n, thing in enumerate(things):
            colour = rng.choice(["red", "blue", "green"])
            where = {"user_id": user, "session_id": f"{user}-{n}"}
            answer = f"The {thing}, the {thing}! What colour the {thing} has, the {thing} of a {thing}, who knows?"
            lines += [
                {**where, "role": "assistant", "id": f"{user}-{n}-a", "content": answer},
                {**where, "role": "user", "id": f"{user}-{n}-u", "content": f"My {thing} is {colour}, by the way."},
            ]
            lines.append({"user_id": user, "question": f"What colour is my {thing}?", "evidence": [f"{user}-{n}-u"]})
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("NEURALFLOW_EMBEDDER__MODEL", "none")

    def call(*args, code=0):
        result = CliRunner().invoke(app, ["fit", *map(str, args)])
        assert result.exit_code == code, result.output
        return result

    return call


def test_weights_are_fitted_and_judged_on_other_users(run, file):
    """Each user's questions are answered with weights that were fitted without them."""
    found = json.loads(run(file, "--json", "--keep", "length").stdout)
    assert (found["questions"], found["users"]) == (30, 3)
    assert set(found["weights"]) == set(Ranking.model_fields)
    assert found["before"] == Ranking().model_dump()
    assert found["weights"]["length"] == Ranking().length
    assert all(weight >= 0 for weight in found["weights"].values())
    assert found["R@10 fitted"] >= found["R@10 before"]
    assert found["R@10 on others"] > 0.9
    shown = run(file).stdout
    assert "30 questions of 3 users" in shown
    assert "fitted on others" in shown


def test_an_unknown_signal_is_named(run, file):
    """With those that there are."""
    assert "signals are dense, near" in run(file, "--keep", "luck", code=2).output.replace("\n", " ")
