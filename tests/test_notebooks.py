"""The notebooks run from top to bottom. As a script (`make notebooks`), this file runs them and stores their outputs."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def executed(path):
    """The notebook at *path*, run in a fresh kernel of this interpreter.

    Where a value shows itself as HTML, nobody sees its repr, which would hold the times of the run.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # how a cell's prints are cut into messages differs from run to run
        resources={"metadata": {"path": path.parent}},
    )
    run = client.execute(env={name: value for name, value in os.environ.items() if name != "GOOGLE_API_KEY"})
    for output in outputs(run):
        if "text/html" in output.get("data", {}):
            output["data"].pop("text/plain", None)
    return run


def outputs(notebook):
    """Each output of the notebook's cells, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(output):
    """What an output says as text."""
    return "".join([output.get("text", ""), *(str(v) for _, v in sorted(output.get("data", {}).items()))])


def stable(said):
    """What was said, without ids that are new in each run, and numbers: scores differ in their last digit by machine."""
    named = re.sub(r"\b(?:(?:task|summary)-[0-9a-f]+|[0-9a-f]{10,32})…?", "id", said)
    return re.sub(r"\d+(\.\d+)?", "#", named)


def test_there_is_a_notebook():
    """An empty folder would let the tests below pass without running anything."""
    assert "quickstart.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_offline_and_says_what_is_stored(path):
    """Every cell runs with the model's packaged weights, and prints what the stored outputs show."""
    stored = nbformat.read(path, as_version=4)
    run = executed(path)
    assert not [o for o in outputs(run) if o.output_type == "error" or o.get("name") == "stderr"]
    words = [[stable(text(o)) for o in outputs(notebook)] for notebook in (stored, run)]
    assert words[0] == words[1], "run `make notebooks` and look at what changed"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_outputs_tell_nothing_of_the_machine(path):
    """No folder of whoever ran it, and no times of the run, which would change with each run."""
    notebook = nbformat.read(path, as_version=4)
    assert outputs(notebook)
    said = "\n".join(text(output) for output in outputs(notebook))
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/|site-packages)", said)
    assert not [cell for cell in notebook.cells if "execution" in cell.metadata]


if __name__ == "__main__":
    for notebook_path in NOTEBOOKS:
        notebook = executed(notebook_path)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, notebook_path)
